"""A web receiver on a real socket that misbehaves on cue, in every way of docs/delivery.md and some more.

In a test: `async with Receiver() as web: web.does = trickles(...)`. As a program (`python httpreceiver.py`) it prints its port
and serves the conformance suite: the URL's path is a folder, whose file `mode` says what it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
import sys
from collections.abc import Awaitable, Callable
from typing import Self
from urllib.parse import unquote

_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Request:
    def __init__(self, target: str, headers: dict[str, str], line: str) -> None:
        self.target, self.headers, self.line = target, headers, line
        self.body = b""

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


class Exchange:
    """One request as its receiver sees it. `request` is None where it misbehaves before it has read one."""

    def __init__(
        self, web: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> None:
        self.web, self.reader, self.writer = web, reader, writer
        self.number = number  # of the connection, from 1
        self.request: Request | None = None
        self.open = True

    @property
    def asked(self) -> Request:
        assert self.request is not None
        return self.request

    def take(self) -> None:
        """Commit it."""
        self.web.took(self.asked)

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, status: int, *headers: str, body: bytes = b"") -> None:
        lines = [f"HTTP/1.1 {status} Said", *headers, f"Content-Length: {len(body)}"]
        await self.say("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)

    async def until_gone(self) -> None:
        """Until the sender has hung up."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass
        self.open = False

    async def reset(self) -> None:
        await asyncio.sleep(0.01)  # what was said before is on its way
        self.open = False
        wire = self.writer.get_extra_info("socket")
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def close(self) -> None:
        self.open = False
        self.writer.close()


Behaviour = Callable[[Exchange], Awaitable[None]]
_EARLY: set[Behaviour] = set()


def early(behaviour: Behaviour) -> Behaviour:
    """It begins with the connection, not with a request that was read."""
    _EARLY.add(behaviour)
    return behaviour


async def good(x: Exchange) -> None:
    x.take()
    await x.say(_OK)


class Receiver:
    """`seen`: every request that was read whole; `taken`: the ids that it has committed, in order, repeats included."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.does: Behaviour = good
        self.plan: list[Behaviour] = []  # used up first, one a request
        self.seen: list[Request] = []
        self.taken: list[str] = []
        self.connections = 0
        self.port = 0
        self._tls = tls
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/hook"

    def took(self, request: Request) -> None:
        self.taken.append(request.id)

    def asked(self, request: Request) -> None:
        self.seen.append(request)

    def next(self, request: Request | None) -> Behaviour:
        return self.plan.pop(0) if self.plan else self.does

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, ssl=self._tls, limit=2**20
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def drop_all(self) -> None:
        """Every connection is reset."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        x = Exchange(self, reader, writer, self.connections)
        try:
            while x.open:
                if not self.plan and self.does in _EARLY:
                    await self.does(x)
                    break
                x.request = await self._read(reader)
                self.asked(x.request)
                await self.next(x.request)(x)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, ssl.SSLError):
            pass
        finally:
            writer.transport.abort()
            self._writers.discard(writer)
            self._tasks.discard(task)

    async def _read(self, reader: asyncio.StreamReader) -> Request:
        request = await read_head(reader)
        request.body = await reader.readexactly(int(request.headers["content-length"]))
        return request


async def read_head(reader: asyncio.StreamReader) -> Request:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = [line.split(": ", 1) for line in lines[1:] if line]
    headers = {name.lower(): value for name, value in pairs}
    assert len(headers) == len(pairs), f"a header twice: {lines}"
    return Request(lines[0].split(" ")[1], headers, lines[0])


# Ways to answer.


def says(status: int, *headers: str, body: bytes = b"") -> Behaviour:
    async def behave(x: Exchange) -> None:
        if 200 <= status < 300:
            x.take()
        await x.answer(status, *headers, body=body)

    return behave


def raw(data: bytes, then: str = "keep") -> Behaviour:
    """These bytes, then: keep, close, reset, hang."""

    async def behave(x: Exchange) -> None:
        x.take()
        await x.say(data)
        await {
            "keep": _nothing,
            "close": Exchange.close,
            "reset": Exchange.reset,
            "hang": Exchange.until_gone,
        }[then](x)

    return behave


async def _nothing(x: Exchange) -> None: ...


async def resets(x: Exchange) -> None:
    """Before it has committed anything."""
    await x.reset()


async def takes_and_resets(x: Exchange) -> None:
    """It has committed, and the answer is lost."""
    x.take()
    await x.reset()


async def hangs(x: Exchange) -> None:
    await x.until_gone()


@early
async def never_reads(x: Exchange) -> None:
    await asyncio.Event().wait()


@early
async def refuses_unread(x: Exchange) -> None:
    """413 after the head; the body stays in the sockets, which are reset."""
    x.request = await read_head(x.reader)
    x.web.asked(x.request)
    await x.answer(413, "Connection: close")
    await x.reset()


@early
async def agrees_unread(x: Exchange) -> None:
    """200 after the head, and then no more."""
    x.request = await read_head(x.reader)
    x.web.asked(x.request)
    await x.say(_OK)
    await x.reset()


def trickles(head: bytes, every_s: float = 0.01) -> Behaviour:
    """A byte at a time, for ever."""

    async def behave(x: Exchange) -> None:
        x.take()
        await x.say(head)
        while True:
            await x.say(b"x")
            await asyncio.sleep(every_s)

    return behave


def floods(head: bytes, piece: bytes, times: int = 1 << 40) -> Behaviour:
    async def behave(x: Exchange) -> None:
        x.take()
        await x.say(head)
        for _ in range(times):
            await x.say(piece)

    return behave


def closes_the_next(within: Behaviour = good) -> Behaviour:
    """Good, and then gone when the next request comes over the kept connection: not one byte of an answer."""

    async def behave(x: Exchange) -> None:
        await within(x)
        await x.reader.read(1)
        await x.reset()

    return behave


# As a program, for the conformance suite.


class ByFolder(Receiver):
    def asked(self, request: Request) -> None:
        with open(f"{_folder(request)}/asked", "ab") as file:
            file.write(b"%s\n" % request.id.encode())

    def took(self, request: Request) -> None:
        folder = _folder(request)
        with open(f"{folder}/taken-{request.id}", "wb") as file:
            file.write(request.body)
        with open(f"{folder}/received", "ab") as file:
            file.write(b"%s\n" % request.id.encode())

    def next(self, request: Request | None) -> Behaviour:
        assert request is not None
        with open(f"{_folder(request)}/mode") as file:
            return _MODES[file.read().strip()]


def _folder(request: Request) -> str:
    return unquote(request.target)


_MODES: dict[str, Behaviour] = {
    "good": good,
    "deferring": says(503, "Retry-After: 1"),
    "hanging": hangs,
    "crashing": resets,
    "ambiguous": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\ntaken, and", then="reset"),
    "huge answer": floods(b"HTTP/1.1 500 No\r\nContent-Length: 100000000\r\n\r\n", b"no, \x1b[31m" * 5000),
}


async def _main() -> None:
    async with ByFolder() as web:
        print(web.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)  # whoever started it is gone
        os._exit(0)


if __name__ == "__main__":
    asyncio.run(_main())
