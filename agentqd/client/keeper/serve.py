"""The keeper's socket: one request a connection (docs/laptop.md has the protocol).

Invariants:
1. While a keeper lives, its connection is believed to live: the first sign of the contrary ends the keeper, and with it
   every request; nothing is ever sent again by it.
2. After silence the first step of a request, which changes nothing, is a probe with a short timeout; its failure is
   `stale`: nothing was done, and another keeper may be started.
3. A keeper that leaves is no longer found (socket gone, lock free) before it finishes what it still has to do.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Final

import agentqd
from agentqd.client.boxes import BoxEntry, find_box
from agentqd.client.keeper.boxfiles import append_lines, put_prompt
from agentqd.client.keeper.control import RELAY
from agentqd.client.keeper.link import connect
from agentqd.client.keeper.pump import join
from agentqd.client.keeper.session import Session
from agentqd.client.keeper.trouble import BAD_REQUEST, NO_SFTP, STALE, UNREACHABLE, Trouble
from agentqd.client.keeperplace import Place, config_stamp
from agentqd.client.remotelines import APPEND_BYTES_MAX
from agentqd.core.errors import AgentqError
from agentqd.core.limits import KIB, MIB

HEAD_BYTES_MAX: Final = 64 * KIB
HEAD_TIMEOUT_S: Final = 10.0
PUT_BYTES_MAX: Final = 256 * MIB
SILENCE_S: Final = 12.0  # two keepalives that went unanswered, or a sleep
PROBE_TIMEOUT_S: Final = 5.0
STEP_TIMEOUT_S: Final = 30.0
LAST_WORDS_S: Final = 3.0
FAREWELL_S: Final = 2.0
PIECE_BYTES: Final = 256 * KIB
RELAY_NOTE: Final = "box {name}: its sshd forwards no Unix sockets (AllowStreamLocalForwarding): a command there relays them, more slowly"


class Keeper:
    """Serves one box until its connection ends, nobody has used it for `keep_s`, or it is told to leave."""

    def __init__(
        self, name: str, config: str, place: Place, listener: socket.socket, lock: int, tty: int | None
    ) -> None:
        self._name = name
        self._config = config
        self._stamp = config_stamp(config)  # before the config is read: an edit in between makes us stale
        self._place = place
        self._listener = listener
        self._lock = lock
        self._tty = tty
        self._session: asyncio.Future[Session] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_use = time.monotonic()
        self._last_answer = _awake_and_wall()
        self._leaving = asyncio.Event()
        self._asked = asyncio.Event()
        self._said_relay = False

    async def run(self) -> None:
        """Returns when it has left. Requests that came while it connected have got their answer."""
        async with asyncio.TaskGroup() as group:

            def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                task = group.create_task(self._serve(reader, writer))
                self._tasks.add(task)
                self._asked.set()
                task.add_done_callback(self._done)

            server = await asyncio.start_unix_server(accept, sock=self._listener, limit=HEAD_BYTES_MAX)
            try:
                entry = _find_entry(self._config, self._name)
                connection = await connect(entry, self._tty)
            except Trouble as trouble:
                self._session.set_exception(trouble)
                self._session.exception()  # counts as looked at, also where nobody has asked yet
                with suppress(TimeoutError):  # a quick failure must not shut out the verb that has started us
                    await asyncio.wait_for(self._asked.wait(), FAREWELL_S)
                self._leave(server)
                return
            self._detach()
            self._heard()
            self._session.set_result(Session(entry, connection))
            closed = group.create_task(connection.wait_closed())
            try:
                await self._until_unused(closed, entry.keep_s)
                self._leave(server)
                await self._until_served(closed)
            finally:
                connection.abort()

    async def _until_unused(self, closed: asyncio.Task[None], keep_s: float) -> None:
        """Until the connection has ended, somebody wants us to leave, or nobody has used us for so long."""
        leaving = asyncio.ensure_future(self._leaving.wait())
        try:
            while not closed.done() and not leaving.done():
                left_s = keep_s if self._tasks else self._last_use + keep_s - time.monotonic()
                if left_s <= 0:
                    return
                await asyncio.wait({closed, leaving}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()

    async def _until_served(self, closed: asyncio.Task[None]) -> None:
        """What was begun is finished while there is a connection; after its end, the requests have learnt of it."""
        while self._tasks and not closed.done():
            await asyncio.wait({closed, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=LAST_WORDS_S)
        for task in self._tasks:
            task.cancel()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._last_use = time.monotonic()

    def _leave(self, server: asyncio.Server) -> None:
        """Not found any more; what is being served goes on."""
        with suppress(FileNotFoundError):
            os.unlink(self._place.socket)  # ours: we hold the lock
        server.close()
        os.close(self._lock)

    def _detach(self) -> None:
        """Logged in: no key of the terminal and no hangup ends us any more. (Before it, Ctrl-C ends verb and keeper.)"""
        with suppress(OSError):
            os.setsid()
        os.chdir("/")  # the folder that the verb was started in may be unmounted
        if self._tty is not None:
            os.close(self._tty)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            try:
                await self._answer(reader, writer)
            except Trouble as trouble:
                await _say(writer, trouble.as_answer())
                if trouble.code in (STALE, UNREACHABLE):
                    self._leaving.set()
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError, ValueError):
            pass  # the client went away, or is none of ours
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(HEAD_TIMEOUT_S):
            request = _request(await reader.readline())
        if request.get("op") == "leave":
            self._leaving.set()
            await _say(writer, {"ok": True})
            return
        if request.get("version") != agentqd.__version__ or request.get("config") != self._stamp:
            raise Trouble(STALE, "this keeper is of another version or another config")
        session = await asyncio.shield(self._session)
        match request.get("op"):
            case "control":
                await self._control(session, reader, writer)
            case "append":
                await self._append(session, request, reader, writer)
            case "put":
                await self._put(session, request, reader, writer)
            case "about":
                await _say(writer, {"ok": True, **await self._probed(session.about())})
            case _:
                raise Trouble(BAD_REQUEST, f"no such operation: {str(request.get('op'))[:60]!r}")

    async def _control(
        self, session: Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        joined = await self._probed(session.control())
        answer: dict[str, Any] = {"ok": True, "way": joined.way}
        if joined.way == RELAY and not self._said_relay:
            self._said_relay = True
            answer["note"] = RELAY_NOTE.format(name=self._name)
        await _say(writer, answer)
        await join(reader, writer, joined.reader, joined.writer)
        self._heard()

    async def _append(
        self,
        session: Session,
        request: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        size = _size(request, APPEND_BYTES_MAX)
        folders = await self._probed(session.folders())
        sftp = await self._probed(session.sftp())
        await _say(writer, {"ok": True})  # a client that has not seen this may say all of it again
        body = await reader.readexactly(size)
        await append_lines(sftp, folders, body)
        self._heard()
        await _say(writer, {"ok": True, "queue_file": folders.queue_file})

    async def _put(
        self,
        session: Session,
        request: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        size, name = _size(request, PUT_BYTES_MAX), str(request.get("name"))
        folders = await self._probed(session.folders())
        sftp = await self._probed(session.sftp())
        await _say(writer, {"ok": True})
        pieces = _pieces(reader, size)
        try:
            await put_prompt(sftp, folders, name, pieces)
        except Trouble:
            async for _ in pieces:
                pass  # a client that is still sending would not hear why
            raise
        self._heard()
        await _say(writer, {"ok": True, "prompt_ref": name})

    async def _probed(self, step: Any) -> Any:
        """A step that changes nothing. After silence it must answer soon, else the connection is stale."""
        monotonic, wall = _awake_and_wall()
        silent_s = max(monotonic - self._last_answer[0], wall - self._last_answer[1])
        silent = silent_s > SILENCE_S
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S if silent else STEP_TIMEOUT_S):
                result = await step
        except TimeoutError:
            raise Trouble(
                STALE, "the connection to the box is dead: it was silent, and does not answer"
            ) from None
        except Trouble as trouble:
            if silent and trouble.code in (UNREACHABLE, NO_SFTP):
                raise Trouble(STALE, trouble.message) from trouble
            if trouble.code != UNREACHABLE:
                self._heard()
            raise
        self._heard()
        return result

    def _heard(self) -> None:
        self._last_answer = _awake_and_wall()


def _awake_and_wall() -> tuple[float, float]:
    """The monotonic clock stands still while the laptop sleeps; the wall clock may be set. The larger step counts."""
    return time.monotonic(), time.time()


def _find_entry(config: str, name: str) -> BoxEntry:
    try:
        return find_box(config, name)
    except AgentqError as error:
        raise Trouble(error.code, error.message, **error.fields) from error


def _request(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise Trouble(BAD_REQUEST, "a request is one line of JSON") from None
    if not isinstance(request, dict):
        raise Trouble(BAD_REQUEST, "a request is a JSON object")
    return request


def _size(request: dict[str, Any], bytes_max: int) -> int:
    size = request.get("bytes")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= bytes_max:
        raise Trouble(BAD_REQUEST, f"bytes is a number up to {bytes_max}")
    return size


async def _pieces(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    left = size
    while left:
        piece = await reader.read(min(left, PIECE_BYTES))
        if not piece:
            raise ConnectionResetError("the client went away in the middle of a payload")
        left -= len(piece)
        yield piece


async def _say(writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
    writer.write(json.dumps(answer).encode() + b"\n")
    await writer.drain()
