"""Posts to one receiver over aiohttp, and tells how much of an answer there was.

Two ways to the same end. A body of up to 48 KiB goes straight over a connection of aiohttp's pool and its parser: head and body
in one write, half of the CPU of a session's request (decision 9). A larger one, and one in pieces, goes through the session,
which knows how to wait for a receiver that takes it slowly.

Invariants:
1. An answer that is no 2xx counts as soon as its head is there; a 2xx only when it is whole, or has said 64 KiB, and when
   all of the request was sent.
2. A request that was cancelled, timed out or answered in part takes its connection with it.
3. A kept connection that turns out to be closed before a word of an answer is no failure of the receiver (RFC 9112, 9.3.1:
   it may close an idle one at any time): the request is sent again at once. It may have been taken before; it bears the
   same id, so that this is what a retry five seconds later would do.
4. `post` ends within its times whatever the receiver does: nobody needs to put a limit around it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncGenerator, Mapping
from http import HTTPStatus
from typing import Final, Protocol

import aiohttp
import msgspec
from yarl import URL

from agentqd.core.limits import KIB
from agentqd.core.weburl import WebUrl
from agentqd.sinks.httpline import SEAT, Fields, Line, Seat

CONNECT_S: Final = 10.0
WHOLE_S: Final = 3000.0  # of one large request, however slowly its receiver takes it
ANSWER_BYTES_MAX: Final = 64 * KIB
_LARGE_ANSWER_S: Final = 120.0  # after a large body's last piece: the kernel may still hold some MiB of it
_STALE_MAX: Final = 3
_AT_ONCE_BYTES: Final = (
    48 * KIB
)  # a transport takes it whole (its mark is 64 KiB): no write of it is ever waited for


class Unanswered(Exception):
    """There is no answer that counts."""

    def __init__(self, reason: str, *, connection: bool, busy: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.connection, self.busy = reason, connection, busy


class Answer(msgspec.Struct, frozen=True):
    status: int
    retry_after: str | None


class Pieces(Protocol):
    """A body that is too large for memory."""

    length: int

    def pieces(self) -> AsyncGenerator[bytes, None]: ...


class _Try(Seat):
    """What is known of one try, for the words about its end."""

    __slots__ = ("deadline", "flaw", "status", "unsent")

    def __init__(self, unsent: int) -> None:
        super().__init__()
        self.deadline: asyncio.Timeout | None = None
        self.status = 0
        self.unsent = unsent  # bytes of a body in pieces that were not handed on
        self.flaw: Exception | None = None  # of the body's own


class HttpPost:
    def __init__(self, url: WebUrl, headers: Mapping[str, str], answer_s: float, at_once: int) -> None:
        """`headers` are those of every request. `answer_s` is for all of one, connecting too; of a body in pieces it begins anew
        with each one taken."""
        self._url = URL(f"http{'s' if url.tls else ''}://{url.host_header}{url.target}", encoded=True)
        self._where = url.where
        self._answer_s = answer_s
        self._at_once = at_once
        self._headers = dict(headers)
        self._to_connect = aiohttp.ClientTimeout(total=None, connect=min(CONNECT_S, answer_s))
        self._line: Line | None = None

    async def post(self, headers: Mapping[str, str], body: bytes | Pieces) -> Answer:
        """The receiver's answer. `headers` are this request's own, ASCII on one line each, and nobody's words; Content-Length is
        one of them. Raises Unanswered, and whatever `body.pieces` raises."""
        for turn in range(1, _STALE_MAX + 1):
            this = _Try(0 if isinstance(body, bytes) else body.length)
            SEAT.set(this)
            try:
                if isinstance(body, bytes) and len(body) <= _AT_ONCE_BYTES:
                    return await self._ask(this, headers, body)
                async with asyncio.timeout(self._answer_s) as this.deadline:
                    data = body if isinstance(body, bytes) else self._in_pieces(this, body)
                    return await self._exchange(this, headers, data)
            except (aiohttp.ClientError, TimeoutError) as error:
                if this.flaw is not None:
                    raise this.flaw from None
                stale = isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError)
                if not (stale and this.reused and not this.status and turn < _STALE_MAX):
                    raise self._unanswered(this, error) from error
        raise AssertionError("the last turn returns or raises")

    async def close(self) -> None:
        if self._line is not None:
            line, self._line = self._line, None
            await line.close()
            await asyncio.sleep(0)  # the transports close their sockets at the loop's next turn

    async def _ask(self, this: _Try, headers: Mapping[str, str], body: bytes) -> Answer:
        """Straight over a connection of the pool. Raises aiohttp.ClientError, TimeoutError."""
        until = asyncio.get_running_loop().time() + self._answer_s
        line = self._line or await self._opened()
        connection = await line.connect()
        whole = False
        try:
            status, fields, content = await line.ask(connection, headers, body, until)
            this.status = status
            if not 200 <= status < 300:  # what it says beside is not asked for
                whole = _is_there(content)
                return Answer(status, fields.get("Retry-After"))
            whole = await _is_whole(this, status, fields, content, until)
            return Answer(status, None)
        finally:
            if whole:
                connection.release()
            else:
                connection.close()

    async def _exchange(
        self, this: _Try, headers: Mapping[str, str], data: bytes | AsyncGenerator[bytes, None]
    ) -> Answer:
        """Through the session."""
        line = self._line or await self._opened()
        async with line.session.post(
            self._url, data=data, headers=headers, allow_redirects=False, timeout=self._to_connect
        ) as response:  # fmt: skip
            this.status = status = response.status
            if not 200 <= status < 300:
                response.close()  # what it says is not asked for
                return Answer(status, response.headers.get("Retry-After"))
            if not await _is_whole(this, status, response.headers, response.content) or this.unsent:
                response.close()
            if this.unsent:
                raise Unanswered("it said yes before it had taken the whole request", connection=False)
            return Answer(status, None)

    async def _in_pieces(self, this: _Try, body: Pieces) -> AsyncGenerator[bytes, None]:
        """The body for aiohttp; the deadline moves on with each piece that the receiver's side has taken."""
        loop = asyncio.get_running_loop()
        assert this.deadline is not None
        give_up_at = loop.time() + WHOLE_S
        try:
            async with contextlib.aclosing(body.pieces()) as pieces:
                async for piece in pieces:
                    this.unsent -= len(piece)
                    wait_s = self._answer_s if this.unsent else max(self._answer_s, _LARGE_ANSWER_S)
                    this.deadline.reschedule(min(loop.time() + wait_s, give_up_at))
                    yield piece
        except Exception as flaw:
            this.flaw = flaw
            raise

    async def _opened(self) -> Line:
        """Made when first used: it belongs to the running loop."""
        if self._line is None:
            # In a thread: it reads some hundred certificates.
            tls = await asyncio.to_thread(ssl.create_default_context) if self._url.scheme == "https" else True
            self._line = self._line or Line(self._url, self._headers, self._at_once, tls, self._to_connect)
        return self._line

    def _unanswered(self, this: _Try, error: Exception) -> Unanswered:
        where, status = self._where, this.status
        match error:
            case aiohttp.ServerTimeoutError():
                return Unanswered(
                    f"{where}: no connection within {self._to_connect.connect:g} s", connection=True
                )
            case TimeoutError():
                what = f"HTTP {status}, and no end of its answer" if status else "no answer"
                return Unanswered(f"{what} within {self._answer_s:g} s", connection=True, busy=True)
            case aiohttp.ClientConnectorDNSError():
                known = error.os_error.strerror or str(error.os_error)
                return Unanswered(f"{where}: its name is not known: {known}", connection=True)
            case aiohttp.ClientConnectorCertificateError():
                return Unanswered(f"{where}: {_explained(error.certificate_error)}", connection=True)
            case aiohttp.ClientConnectorError():
                return Unanswered(f"{where}: {_explained(error.os_error)}", connection=True)
            case aiohttp.ServerDisconnectedError() | aiohttp.ClientOSError() if not status:
                how = f"cut ({_explained(error)})" if isinstance(error, aiohttp.ClientOSError) else "closed"
                return Unanswered(f"the connection was {how} before an answer was there", connection=True)
            case _ if status:
                return Unanswered(
                    f"HTTP {status}, but its answer was cut off or cannot be read", connection=False
                )
            case _:  # its words may be the receiver's
                return Unanswered("what it answers is no HTTP that can be read", connection=False)


def _is_there(content: aiohttp.StreamReader) -> bool:
    """All of it has come."""
    return content.is_eof() and content.exception() is None


async def _is_whole(
    this: _Try, status: int, fields: Fields, content: aiohttp.StreamReader, until: float | None = None
) -> bool:
    """Reads to the end, or as much as is listened to. Raises aiohttp.ClientPayloadError: a part is missing; TimeoutError."""
    whole = _is_there(content)
    if not whole:
        async with asyncio.timeout_at(until):
            whole = await _read_to_end(content)
    if this.wire is not None and this.wire.cut is not None and _ends_with_connection(status, fields):
        raise aiohttp.ClientPayloadError
    return whole


async def _read_to_end(content: aiohttp.StreamReader) -> bool:
    taken = 0
    while chunk := await content.readany():
        taken += len(chunk)
        if taken > ANSWER_BYTES_MAX:
            return False
    return True


def _ends_with_connection(status: int, fields: Fields) -> bool:
    """It says neither its length nor its last chunk: only an orderly end of the connection is its end."""
    return (
        "Content-Length" not in fields
        and "Transfer-Encoding" not in fields
        and status != HTTPStatus.NO_CONTENT
    )


def _explained(error: Exception) -> str:
    """What is wrong with a connection, for a person."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"no TLS with it: {error.reason or error}"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
