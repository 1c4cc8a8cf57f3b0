"""Which daemon a command speaks to. A `Box` is all that a verb gets: calls, and the way in without a daemon.

`local_box` is a daemon on this machine, `remote_box` one over SSH (docs/laptop.md).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from agentqd.client.channel import UnixTransport
from agentqd.client.connection import Connection, take
from agentqd.client.queuefile import Queue, QueueFile
from agentqd.core.errors import AgentqError, InvalidRequest, Unreachable
from agentqd.core.folders import Folders, choose_folders

RECONNECT_S = 60.0
CONSUMER_DEFAULT = "default"


class Box(NamedTuple):
    """One box as a client sees it."""

    connection: Connection
    queue: Callable[
        [], Queue
    ]  # raises Unreachable when no state folder is known for this socket, and nobody answers at it
    folders: Callable[[], Folders]  # the same; InvalidRequest for a box over SSH, whose folders are not here
    reconnect_s: float = RECONNECT_S  # how long `wait` and `logs -f` outlast an absent daemon
    consumer: str = CONSUMER_DEFAULT
    kept_in: str = "queue_file"  # `where` of a task that was taken without a daemon
    name: str | None = None  # as the laptop's config calls it; None for this machine


class Where(NamedTuple):
    """What the command line said."""

    socket: str | None = None
    state_dir: str | None = None
    runtime_dir: str | None = None
    box: str | None = None  # over SSH; then none of the others


def find_box(where: Where, env: Mapping[str, str], uid: int, note: Callable[[str], None]) -> Box:
    """The box that the command line means. Raises AgentqError."""
    if where.box:
        return remote_box(where.box, env, uid, note)
    return local_box(where, env, uid)


def remote_box(name: str, env: Mapping[str, str], uid: int, note: Callable[[str], None]) -> Box:
    """A box of the laptop's config, over SSH. Nothing is connected before the first call."""
    from agentqd.client.boxname import ALL_BOXES, check_box_name
    from agentqd.client.clientid import client_id, contact_of
    from agentqd.client.errors import NoSuchBox
    from agentqd.client.kept import Kept, RemoteQueue

    if name == ALL_BOXES:
        raise NoSuchBox("--box all goes with status, list and pull only; name one box")
    try:
        check_box_name(name)
    except ValueError as error:
        raise NoSuchBox(str(error)) from None
    kept = Kept(name, env, uid, note)

    def folders() -> Folders:
        raise InvalidRequest(f"the folders of box {name} are not on this machine; run this on the box itself")

    consumer = client_id(env)
    return Box(
        Connection(kept, contact=contact_of(consumer)),
        lambda: RemoteQueue(kept),
        folders,
        reconnect_s=math.inf,
        consumer=consumer,
        name=name,
    )


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
    """The folders behind the socket that answered, else of a daemon that has run here, else the first. Of a named socket
    that is none of ours, those that its daemon says. Raises AgentqError."""
    if state_named:
        return candidates[0]
    for folders in candidates:
        if transport.paths == (folders.control_socket,):
            return folders
    if socket is not None:
        return _folders_told(transport, socket)
    for folders in candidates:
        if os.path.isdir(folders.queue):
            return folders
    return candidates[0]


def _folders_told(transport: UnixTransport, socket: str) -> Folders:
    """The folders of the daemon that answers at this socket. Raises AgentqError; Unreachable when nobody does."""
    try:
        state = take(take(Connection(transport).get("status"), "daemon", dict), "state_dir", str)
    except Unreachable as error:
        if not is_absent(error):
            raise
        raise Unreachable(
            f"agentqd is not running at {socket}, and whose queue file that is, is not known; give --state-dir too",
            socket=socket,
        ) from None
    folders = Folders(state, os.path.dirname(os.path.abspath(socket)))
    try:
        os.stat(folders.queue)
    except (
        FileNotFoundError,
        NotADirectoryError,
    ):  # the socket leads to another machine, or into a container
        text = (
            f"agentqd at {socket} has its state folder at {state}, and there is no queue folder on this machine;"
            " run this where that daemon runs, or use submit"
        )
        raise InvalidRequest(text, socket=socket) from None
    except OSError:
        pass  # whoever opens the queue file says who may
    return folders


def _absolute(path: str | None) -> str | None:
    return os.path.abspath(path) if path else None


def is_absent(error: AgentqError) -> bool:
    """Nobody is there: nothing was sent."""
    return type(error) is Unreachable
