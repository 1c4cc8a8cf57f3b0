"""`agentqctl box test`: the way to a box, one step after the other, with a connection of its own."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import asyncssh
from asyncssh import FXF_APPEND, FXF_WRITE

from agentqd.client.boxes import BoxEntry
from agentqd.client.keeper.control import FORWARD, Joined
from agentqd.client.keeper.link import Target, connect, read_options, target_of, why
from agentqd.client.keeper.session import Session
from agentqd.client.keeper.trouble import HOST_KEY_CHANGED, HOST_KEY_UNKNOWN, UNREACHABLE, Trouble
from agentqd.client.kept import error_from_keeper
from agentqd.core.errors import EXIT_OK, EXIT_UNREACHABLE
from agentqd.core.limits import MIB

TCP_TIMEOUT_S = 15.0
HTTP_TIMEOUT_S = 15.0
ANSWER_BYTES_MAX = 4 * MIB


class Step(NamedTuple):
    """One step; `exit_code` is what a verb would end with for this failure."""

    name: str
    ok: bool
    message: str
    code: str | None = None
    exit_code: int = EXIT_OK

    def as_json(self) -> dict[str, Any]:
        return {"step": self.name, "ok": self.ok, "message": self.message, "error": self.code}


Say = Callable[[Step], None]


async def walk(entry: BoxEntry, config: str, say: Say) -> None:
    """Says each step as it is done; ends where going on makes no sense."""
    say(Step("config", True, f"{entry.url} in {config}"))
    try:
        target = target_of(await read_options(entry))
        await _network(target, say)
        connection = await _login(entry, target, say)
        if connection is None:
            return
        async with connection:
            await _on_the_box(Session(entry, connection), say)
    except Trouble as trouble:
        say(_failed("connection", entry, trouble))


async def _network(target: Target, say: Say) -> None:
    """Name and TCP; not where a jump host does both for us."""
    if target.through:
        say(Step("name resolution", True, f"{target.host} is reached through {target.through}"))
        return
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Trouble(
            UNREACHABLE, f"{target.host}: {why(error)}; mend the URL, or HostName in ~/.ssh/config"
        ) from error
    say(
        Step(
            "name resolution",
            True,
            f"{target.host} is {', '.join(dict.fromkeys(str(item[4][0]) for item in found))}",
        )
    )
    try:
        async with asyncio.timeout(TCP_TIMEOUT_S):
            _, writer = await asyncio.open_connection(target.host, target.port)
    except (OSError, TimeoutError) as error:
        raise Trouble(
            UNREACHABLE,
            f"{target.host} port {target.port}: {why(error)}; is it up, is the port right, is there a firewall?",
        ) from error
    writer.close()
    say(Step("TCP", True, f"port {target.port} answers"))


async def _login(entry: BoxEntry, target: Target, say: Say) -> asyncssh.SSHClientConnection | None:
    try:
        connection = await connect(entry)
    except Trouble as trouble:
        if trouble.code in (HOST_KEY_UNKNOWN, HOST_KEY_CHANGED):
            say(_failed("host key", entry, trouble))
            return None
        if trouble.code != UNREACHABLE:
            say(Step("host key", True, "is the one in known_hosts"))
        say(_failed("login", entry, trouble))
        return None
    key = connection.get_server_host_key()
    say(Step("host key", True, key.get_fingerprint() if key is not None else "certified"))
    say(Step("login", True, f"as {target.user}"))
    return connection


async def _on_the_box(session: Session, say: Say) -> None:
    entry = session.entry
    try:
        await session.sftp()
        say(Step("SFTP", True, "works"))
        await _folders(session, say)
    except Trouble as trouble:
        say(_failed("SFTP", entry, trouble))
    try:
        joined = await session.control()
    except Trouble as trouble:
        say(_failed("control socket", entry, trouble))
    else:
        by = "forwarded by sshd" if joined.way == FORWARD else "relayed by a command: sshd forbids forwarding"
        say(Step("control socket", True, by))
        await _daemon(joined, say)
    try:
        await _queue_file(session, say)
    except Trouble as trouble:
        say(_failed("queue file", entry, trouble))


async def _folders(session: Session, say: Say) -> None:
    folders = await session.folders()
    sftp = await session.sftp()
    where = f"{folders.state}, {folders.runtime}"
    if await sftp.isdir(folders.queue):
        say(Step("folders", True, where))
    else:
        message = (
            f"{folders.queue} is not there: no agentqd has run there yet, or its folder is another "
            f"(agentqctl box add --force {session.entry.name} {session.entry.url} --state-dir DIR)"
        )
        say(Step("folders", False, message, "no_folder", EXIT_UNREACHABLE))


async def _daemon(joined: Joined, say: Say) -> None:
    joined.writer.write(b"GET /v1/status HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
    try:
        async with asyncio.timeout(HTTP_TIMEOUT_S):
            answer = b""
            while (piece := await joined.reader.read(65536)) and len(answer) < ANSWER_BYTES_MAX:
                answer += piece
        daemon = json.loads(answer.partition(b"\r\n\r\n")[2])["daemon"]
        say(Step("daemon", True, f"agentqd {daemon['version']}, pid {daemon['pid']}"))
    except (TimeoutError, ValueError, LookupError, TypeError, asyncssh.Error, OSError):
        message = "what serves the control socket does not answer as agentqd does; see its log on the box"
        say(Step("daemon", False, message, "bad_answer", EXIT_UNREACHABLE))
    finally:
        joined.writer.close()


async def _queue_file(session: Session, say: Say) -> None:
    """Opened for append and closed: nothing is written."""
    folders = await session.folders()
    sftp = await session.sftp()
    try:
        if await sftp.exists(folders.queue_file):
            await (await sftp.open(folders.queue_file, FXF_WRITE | FXF_APPEND, encoding=None)).close()
            say(Step("queue file", True, f"{folders.queue_file} can be appended to"))
        elif await sftp.isdir(folders.queue):
            say(
                Step(
                    "queue file", True, f"{folders.queue_file} is not there yet; it is made when it is needed"
                )
            )
    except asyncssh.SFTPError as error:
        message = (
            f"{folders.queue_file}: {error.reason}; log in as the daemon's user or join its control.group"
        )
        say(_failed("queue file", session.entry, Trouble("not_permitted", message)))


def _failed(name: str, entry: BoxEntry, trouble: Trouble) -> Step:
    error = error_from_keeper(entry.name, trouble.as_answer())
    return Step(name, False, trouble.message, trouble.code, error.exit_code)
