"""The connections to one web receiver: aiohttp's pool, what it knows of each and does not tell, and requests straight over one.

`ask` writes head and body at once and reads the answer with aiohttp's own parser. It uses `TCPConnector.connect`,
`ResponseHandler.set_response_params` and `read`: public names that aiohttp's docs do not describe, hence the upper bound of its
version in pyproject.toml (docs/decisions/0009).
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import ssl
from collections.abc import Callable, Mapping
from typing import Any, Final

import aiohttp
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

KEEP_S: Final = 15.0  # many receivers close an idle connection after 5 to 75 s
_SWITCHING: Final = 101

Fields = Mapping[str, str]


class Wire:
    """One connection."""

    __slots__ = ("cut", "used")

    def __init__(self) -> None:
        self.cut: Exception | None = None  # it did not end by the receiver's close
        self.used = False


class Seat:
    """Which connection a request got: set as `SEAT` before it asks for one."""

    __slots__ = ("reused", "wire")

    def __init__(self) -> None:
        self.reused = False
        self.wire: Wire | None = None


SEAT: Final[contextvars.ContextVar[Seat]] = contextvars.ContextVar("seat")


class _Connector(aiohttp.TCPConnector):
    """Takes up no kept connection over which something has come unasked, and says which one a request got."""

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Any],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - the library's signature
    ) -> aiohttp.connector.Connection:
        while True:
            connection = await super().connect(req, traces, timeout)
            protocol: Any = connection.protocol
            if not protocol.should_close:
                break
            connection.close()
            if getattr(protocol, "wire", None) is None:  # a new one: it speaks before it is asked
                raise aiohttp.ClientPayloadError
        wire = getattr(protocol, "wire", None)
        if wire is None:
            wire = protocol.wire = Wire()
            protocol.connection_lost = functools.partial(_lost, wire, protocol.connection_lost)
        seat = SEAT.get()
        seat.wire, seat.reused, wire.used = wire, wire.used, True
        return connection


def _lost(wire: Wire, tell: Callable[[Exception | None], None], error: Exception | None) -> None:
    wire.cut = error
    tell(error)


class _Where(aiohttp.ClientRequest):
    """Never sent: the pool is asked by it, and it knows how `Host` is written."""

    @functools.cached_property
    def connection_key(self) -> ConnectionKey:
        return super().connection_key


class Line:
    """Belongs to the running loop. `headers` are those of every request."""

    def __init__(
        self, url: URL, headers: Fields, at_once: int, tls: ssl.SSLContext | bool, within: aiohttp.ClientTimeout
    ) -> None:  # fmt: skip
        self._connector = _Connector(limit=at_once, keepalive_timeout=KEEP_S, ssl=tls)
        self.session = aiohttp.ClientSession(
            connector=self._connector,
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )
        self._within = within
        self._loop = asyncio.get_running_loop()
        self._where = _Where("POST", url, loop=self._loop, session=self.session)
        target, host = self._where.url.raw_path_qs, self._where.headers["Host"]
        self._head = f"POST {target} HTTP/1.1\r\n".encode("ascii") + lines({"Host": host, **headers})

    async def connect(self) -> aiohttp.connector.Connection:
        """From the pool, or a new one. Raises aiohttp.ClientError; ConnectionTimeoutError after `within.connect`."""
        try:
            return await self._connector.connect(self._where, [], self._within)
        except TimeoutError:
            raise aiohttp.ConnectionTimeoutError from None

    async def ask(
        self, connection: aiohttp.connector.Connection, headers: Fields, body: bytes, until: float
    ) -> tuple[int, Fields, aiohttp.StreamReader]:
        """The answer's status, its header, and the beginning of its content; `until` is by the loop's clock.

        The body is small enough for the transport to take it whole. Raises aiohttp.ClientError, TimeoutError.
        """
        protocol, transport = connection.protocol, connection.transport
        if protocol is None or transport is None:
            raise aiohttp.ServerDisconnectedError
        protocol.set_response_params(read_until_eof=True, auto_decompress=False)
        transport.write(b"".join((self._head, lines(headers), b"\r\n", body)))
        # A timer by itself: `asyncio.timeout` costs three times as much, a twentieth of a request.
        timer = self._loop.call_at(until, protocol.set_exception, TimeoutError())
        try:
            while True:
                message, content = await protocol.read()
                if not 100 <= message.code < 200 or message.code == _SWITCHING:
                    return message.code, message.headers, content
        except HttpProcessingError as problem:
            raise aiohttp.ClientPayloadError from problem
        except (aiohttp.ClientError, TimeoutError):
            raise
        except OSError as problem:
            raise aiohttp.ClientOSError(*problem.args) from problem
        finally:
            timer.cancel()

    async def close(self) -> None:
        await self.session.close()


def lines(fields: Fields) -> bytes:
    """A header's, as they are sent. Raises ValueError for a value that would be more than one."""
    text = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
    if text.count("\n") != len(fields) or text.count("\r") != len(fields) or "\0" in text:
        raise ValueError("a header with a line end in it")
    return text.encode()
