"""Which daemon a command speaks to. A `Box` is all that a verb gets: calls, and the way in without a daemon.

`--box NAME` (over SSH) will be another function that makes a `Box`: its own transport, its own `append`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from agentqd.client.channel import UnixTransport
from agentqd.client.connection import Connection
from agentqd.client.queuefile import QueueFile
from agentqd.core.errors import AgentqError, Unreachable
from agentqd.core.folders import Folders, choose_folders

RECONNECT_S = 60.0
CONSUMER_DEFAULT = "default"


class Box(NamedTuple):
    """One box as a client sees it."""

    connection: Connection
    queue: Callable[[], QueueFile]  # raises Unreachable when no state folder is known for this socket
    folders: Callable[[], Folders]  # the same
    reconnect_s: float = RECONNECT_S  # how long `wait` and `logs -f` outlast an absent daemon
    consumer: str = CONSUMER_DEFAULT
    kept_in: str = "queue_file"  # `where` of a task that was taken without a daemon


class Where(NamedTuple):
    """What the command line said."""

    box: str | None = None
    socket: str | None = None
    state_dir: str | None = None
    runtime_dir: str | None = None


def local_box(where: Where, env: Mapping[str, str], uid: int) -> Box:
    """A daemon on this machine: `--socket`, AGENTQD_SOCKET, the given folders, the user's, the system's."""
    candidates = candidate_folders(where, env, uid)
    socket = where.socket or env.get("AGENTQD_SOCKET")
    state_named = bool(where.state_dir or env.get("AGENTQD_STATE_DIR"))
    transport = UnixTransport([socket] if socket else [folders.control_socket for folders in candidates])

    def folders() -> Folders:
        return _folders_of(candidates, transport, socket, state_named=state_named)

    return Box(Connection(transport), lambda: QueueFile(folders()), folders)


def candidate_folders(where: Where, env: Mapping[str, str], uid: int) -> list[Folders]:
    """Where a daemon may live, best first. One, if an option or a variable names a folder."""
    own = choose_folders(env, uid, _absolute(where.state_dir), _absolute(where.runtime_dir))
    named = (
        where.state_dir or where.runtime_dir or env.get("AGENTQD_STATE_DIR") or env.get("AGENTQD_RUNTIME_DIR")
    )
    system = choose_folders({}, 0)
    if named or own == system or (os.path.isdir(own.queue) and not os.access(system.control_socket, os.W_OK)):
        return [own]  # a system daemon that is closed to us must not hide our own, which is only down
    return [own, system]


def _folders_of(
    candidates: list[Folders], transport: UnixTransport, socket: str | None, *, state_named: bool
) -> Folders:
    """The folders behind the socket that answered, else of a daemon that has run here, else the first."""
    if state_named:
        return candidates[0]
    for folders in candidates:
        if transport.paths == (folders.control_socket,):
            return folders
    if socket is not None:
        raise Unreachable(
            f"agentqd is not running at {socket}, and whose queue file that is, is not known; give --state-dir too",
            socket=socket,
        )
    for folders in candidates:
        if os.path.isdir(folders.queue):
            return folders
    return candidates[0]


def _absolute(path: str | None) -> str | None:
    return os.path.abspath(path) if path else None


def is_absent(error: AgentqError) -> bool:
    """Nobody is there: nothing was sent."""
    return type(error) is Unreachable
