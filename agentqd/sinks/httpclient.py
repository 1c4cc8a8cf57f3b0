"""Posts to one receiver over kept HTTP/1.1 connections, and tells exactly how much of an answer there was.

Why it is not aiohttp's client: docs/decisions/0009-an-http-client-of-its-own.md.

Invariants:
1. One request at a time on a connection; it is kept only after a whole answer to a whole request with nothing behind it.
2. A request that was cancelled, timed out or answered in part takes its connection with it.
3. An answer that is no 2xx counts as soon as its head is there; a 2xx only when it is whole, or has said 64 KiB.
4. A kept connection that turns out to be closed before any byte of an answer is no failure of the receiver (RFC 9112,
   9.3.1: it may close an idle one at any time): the request is sent again at once, at last on a new connection. It may
   have been taken before; it bears the same id, so that this is what a retry five seconds later would do.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import ssl
import sys
import termios
import threading
from collections.abc import AsyncGenerator
from typing import Any, Final, Protocol

from agentqd.core.limits import MIB
from agentqd.core.weburl import WebUrl
from agentqd.sinks.answer import AnswerReader, NoAnswer

CONNECT_S: Final = 10.0
KEEP_S: Final = 15.0  # many receivers close an idle connection after 5 to 75 s
WHOLE_S: Final = 3000.0  # of one large request, however slowly its receiver takes it
_STALE_MAX: Final = 2
_ADDRESSES_MAX: Final = 6
_FLAWS: Final = (OSError, ssl.SSLError, ssl.CertificateError)


class Unanswered(Exception):
    """There is no answer that counts. `silent`: not one byte of it came."""

    def __init__(self, reason: str, *, connection: bool, busy: bool = False, silent: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.connection, self.busy, self.silent = reason, connection, busy, silent


class Pieces(Protocol):
    """A body that is too large for memory."""

    def pieces(self) -> AsyncGenerator[bytes, None]: ...


class HttpClient:
    def __init__(self, url: WebUrl, answer_s: float) -> None:
        self.url = url
        self._answer_s = answer_s
        self._idle: list[_Connection] = []
        self._sweeper: asyncio.TimerHandle | None = None
        self._tls: ssl.SSLContext | None = None
        self._lookup: asyncio.Future[list[str]] | None = None

    async def post(self, head: bytes, body: bytes | Pieces) -> AnswerReader:
        """The receiver's answer. Raises Unanswered, and whatever `body.pieces` raises."""
        for turn in range(_STALE_MAX + 1):
            kept = self._kept() if turn < _STALE_MAX else None
            connection = kept or await self._connect()
            try:
                answer = await connection.exchange(head, body, self._answer_s)
            except Unanswered as problem:
                connection.abort()
                if kept is None or not problem.silent or problem.busy:
                    raise
                continue
            except BaseException:  # cancelled, most likely: nothing stays half open
                connection.abort()
                raise
            if answer.keep:
                self._keep(connection)
            else:
                connection.abort()
            return answer
        raise AssertionError("the last turn's connection is a new one")

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        while self._idle:
            self._idle.pop().abort()
        await asyncio.sleep(0)  # the transports close their sockets at the loop's next turn

    # Kept connections: the one used last is used next, so that those not needed grow old.

    def _kept(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    def _keep(self, connection: _Connection) -> None:
        if not connection.is_open:
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = loop.call_later(KEEP_S, self._sweep)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweeper = None
        now = loop.time()
        for connection in self._idle:
            if connection.idle_since + KEEP_S <= now:
                connection.abort()
        self._idle = [connection for connection in self._idle if connection.is_open]
        if self._idle:
            self._sweeper = loop.call_later(self._idle[0].idle_since + KEEP_S - now, self._sweep)

    # New ones.

    async def _connect(self) -> _Connection:
        try:
            async with asyncio.timeout(CONNECT_S):
                if self.url.tls and self._tls is None:  # it reads some hundred certificates
                    self._tls = await asyncio.to_thread(ssl.create_default_context)
                return await self._connect_to(await self._addresses())
        except TimeoutError:
            raise self._unreachable(f"no connection within {CONNECT_S:g} s") from None

    async def _connect_to(self, addresses: list[str]) -> _Connection:
        """One after the other; a silent one must leave time for the next."""
        loop = asyncio.get_running_loop()
        problem: Exception = OSError("it has no address")
        for n, address in enumerate(addresses):
            last = n == len(addresses) - 1
            try:
                async with asyncio.timeout(None if last else CONNECT_S / len(addresses)):
                    _, connection = await loop.create_connection(
                        _Connection,
                        address,
                        self.url.port,
                        ssl=self._tls,
                        server_hostname=self.url.host if self._tls is not None else None,
                    )
                    return connection
            except (*_FLAWS, TimeoutError) as error:
                problem = error
        raise self._unreachable(_explained(problem)) from problem

    async def _addresses(self) -> list[str]:
        """Of the host, both families in turn."""
        host = self.url.host
        with contextlib.suppress(OSError):
            socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
            return [host]
        if self._lookup is None:
            self._lookup = _look_up(host)
            self._lookup.add_done_callback(self._looked_up)
        try:
            return await asyncio.shield(self._lookup)
        except OSError as error:
            raise self._unreachable(f"its name is not known: {error.strerror or error}") from error

    def _looked_up(self, done: asyncio.Future[list[str]]) -> None:
        self._lookup = None
        done.exception()  # asked for, even if nobody waits for it any more

    def _unreachable(self, why: str) -> Unanswered:
        return Unanswered(f"{self.url.where}: {why}", connection=True)


class _Connection(asyncio.Protocol):
    """One connection and, at most, one request on it."""

    __slots__ = (
        "_answer",
        "_complete",
        "_give_up_s",
        "_may_write",
        "_reader",
        "_timer",
        "_transport",
        "_unsent",
        "idle_since",
        "is_open",
    )

    def __init__(self) -> None:
        self.is_open = False
        self.idle_since = 0.0
        self._reader: AnswerReader | None = None
        self._answer: asyncio.Future[AnswerReader] | None = None
        self._may_write: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._complete = False
        self._unsent = 0
        self._give_up_s = 0.0
        self._transport: Any = None

    async def exchange(self, head: bytes, body: bytes | Pieces, answer_s: float) -> AnswerReader:
        """`answer_s` is for all of it; of a body in pieces it begins anew with each one that the receiver has taken."""
        loop = asyncio.get_running_loop()
        self._reader, self._complete, self._unsent = AnswerReader(), True, 0
        answer: asyncio.Future[AnswerReader] = loop.create_future()
        self._answer = answer
        self._timer = loop.call_later(answer_s, self._late, answer_s)
        try:
            if isinstance(body, bytes):
                self._transport.write(head + body)
            else:
                await self._send_pieces(head, body, answer_s)
            return await answer
        finally:
            self._timer.cancel()
            self._reader = self._answer = self._timer = None
            if answer.done() and not answer.cancelled():
                answer.exception()  # asked for, even if the body's own trouble came first

    def abort(self) -> None:
        self.is_open = False
        self._transport.abort()

    async def _send_pieces(self, head: bytes, body: Pieces, answer_s: float) -> None:
        loop = asyncio.get_running_loop()
        assert self._answer is not None
        self._complete, self._give_up_s = False, loop.time() + WHOLE_S
        self._transport.write(head)
        async with contextlib.aclosing(body.pieces()) as pieces:
            async for piece in pieces:
                if self._answer.done():  # it has said no, or is gone
                    return
                self._transport.write(piece)
                if self._may_write is not None:
                    await asyncio.wait((self._may_write, self._answer), return_when=asyncio.FIRST_COMPLETED)
                self._wait_anew(answer_s)
        self._complete = True
        self._unsent = self._count_unsent()
        self._settle()

    def _wait_anew(self, answer_s: float) -> bool:
        loop = asyncio.get_running_loop()
        if self._timer is None or loop.time() > self._give_up_s:
            return False
        self._timer.cancel()
        self._timer = loop.call_later(answer_s, self._late, answer_s)
        return True

    def _count_unsent(self) -> int:
        """What the receiver's side has not acknowledged: here, and in the kernel."""
        there = self._transport.get_extra_info("socket")
        in_kernel = (
            fcntl.ioctl(there.fileno(), termios.TIOCOUTQ, bytes(4)) if there.fileno() >= 0 else bytes(4)
        )
        return int(self._transport.get_write_buffer_size()) + int.from_bytes(in_kernel, sys.byteorder)

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.set_write_buffer_limits(high=MIB)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        if reader is None:  # what nobody has asked for
            self.abort()
            return
        try:
            reader.feed(data)
        except NoAnswer as problem:
            self._fail(Unanswered(f"it answers no HTTP: {problem}", connection=False))
            return
        self._settle()

    def eof_received(self) -> None:
        self.is_open = False  # and the transport closes

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._may_write is not None and not self._may_write.done():
            self._may_write.set_result(None)
        reader = self._reader
        if reader is None:
            return
        if error is None and self._complete:
            reader.eof()
            self._settle()
        how = "closed" if error is None else f"cut ({_explained(error)})"
        if reader.status:
            what = f"HTTP {reader.status}, but the connection was {how} before the end of its answer"
        elif reader.taken:
            what = f"the connection was {how} in the middle of its answer"
        else:
            what = f"the connection was {how} without an answer"
        self._fail(Unanswered(what, connection=not reader.taken, silent=not reader.taken))

    def pause_writing(self) -> None:
        self._may_write = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._may_write is not None and not self._may_write.done():
            self._may_write.set_result(None)
        self._may_write = None

    def _settle(self) -> None:
        """Is what has come an answer that counts?"""
        reader, answer = self._reader, self._answer
        if reader is None or answer is None or answer.done() or not reader.status:
            return
        if 200 <= reader.status < 300 and not (self._complete and (reader.whole or reader.cut)):
            if reader.cut:
                self._transport.pause_reading()  # until all is sent
            return
        reader.keep = reader.keep and reader.whole and self._complete
        answer.set_result(reader)

    def _late(self, answer_s: float) -> None:
        assert self._reader is not None
        if self._unsent and self._unsent > (unsent := self._count_unsent()) and self._wait_anew(answer_s):
            self._unsent = unsent  # of a large body: it is still being taken
            return
        status = self._reader.status
        what = f"HTTP {status}, and no end of its answer" if status else "no answer"
        self._fail(Unanswered(f"{what} within {answer_s:g} s", connection=True, busy=True, silent=not self._reader.taken))  # fmt: skip

    def _fail(self, problem: Unanswered) -> None:
        self.is_open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(problem)


def _look_up(host: str) -> asyncio.Future[list[str]]:
    """In a thread of its own, one a receiver: a name server that hangs must not hold the threads that others need."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[str]] = loop.create_future()

    def tell(addresses: list[str], error: Exception | None) -> None:
        if not found.done():
            found.set_result(addresses) if error is None else found.set_exception(error)

    def look() -> None:
        addresses: list[str] = []
        problem: Exception | None = None
        try:
            addresses = _in_turn(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            problem = error if isinstance(error, OSError) else OSError(str(error))
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(tell, addresses, problem)

    threading.Thread(target=look, name="lookup", daemon=True).start()
    return found


def _in_turn(found: list[Any]) -> list[str]:
    """At most six addresses, the families in turn, the resolver's first one first."""
    families: dict[int, list[str]] = {}
    for family, _, _, _, address in found:
        families.setdefault(family, []).append(str(address[0]))
    mixed: list[str] = []
    while any(families.values()):
        mixed += [each.pop(0) for each in families.values() if each]
    return mixed[:_ADDRESSES_MAX]


def _explained(error: Exception) -> str:
    """What is wrong with a connection, for a person."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"no TLS with it: {error.reason or error}"
    if isinstance(error, TimeoutError) and not error.args:
        return "no connection in time"
    if isinstance(error, OSError) and error.strerror and error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
