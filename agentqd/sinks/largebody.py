"""An entry too large for its envelope, as a web receiver gets it: the stored envelope with the content itself in the place
of `path`. `content` where it is UTF-8, else `content_base64`.

Invariants:
1. The bytes are the same at each try: they follow from the envelope and the file alone.
2. The file is read twice, 192 KiB at a time, in threads: once to check it, to sign and to count, once to send. Both
   passes check its sha256, and the body's last piece comes only after that: what was damaged is never sent whole. (What
   stops being UTF-8 far behind its beginning is begun again as base64.)
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import hashlib
import os
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Final, Literal

import msgspec

from agentqd.core.envelope import data_of
from agentqd.core.limits import KIB
from agentqd.sinks.signing import Signer

_CHUNK_BYTES: Final = 192 * KIB  # a multiple of 3: base64 without padding in the middle
Form = Literal["content", "content_base64"]


class Damaged(Exception):
    """The file, or the envelope that names it, is not what was stored."""


class _Data(msgspec.Struct):
    sha256: str
    bytes: int


class LargeBody:
    """`prepare` before `length` and `pieces`."""

    def __init__(self, payload: bytes, path: str) -> None:
        """Raises Damaged: the envelope does not name this file."""
        named = b'"path":' + msgspec.json.encode(
            path
        )  # the first of that name: in a text its quotes would be escaped
        before, found, after = payload.partition(named)
        if not found or after[:1] not in {b"}", b","}:
            raise Damaged("the envelope does not name its content's file")
        try:
            self._data = msgspec.json.decode(data_of(payload), type=_Data)
        except (msgspec.DecodeError, ValueError):
            raise Damaged("the envelope does not say its content's sha256") from None
        self._before, self._after = before, b'"' + after
        self._path = path
        self._form: Form = "content"
        self.length = 0

    async def prepare(self, new_signer: Callable[[], Signer]) -> str:
        """The pass that checks, signs and counts; returns the signature. Raises Damaged, OSError."""
        stopped = threading.Event()
        try:
            return await asyncio.to_thread(self._measure, new_signer, stopped)
        finally:
            stopped.set()

    def _measure(self, new_signer: Callable[[], Signer], stopped: threading.Event) -> str:
        """Taken for text until a byte says otherwise: of most binary files that is one of the first."""
        try:
            return self._count(new_signer(), stopped)
        except UnicodeDecodeError:
            self._form = "content_base64"
            return self._count(new_signer(), stopped)

    def _count(self, signer: Signer, stopped: threading.Event) -> str:
        self.length = 0
        for piece in self._pieces():
            if stopped.is_set():  # nobody waits any more
                break
            self.length += len(piece)
            signer.update(piece)
        return signer.signature()

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body. Raises Damaged before its last piece, OSError."""
        loop = asyncio.get_running_loop()
        made = self._pieces()
        step: asyncio.Future[bytes | None] | None = None
        try:
            while True:
                step = loop.run_in_executor(None, next, made, None)
                try:
                    piece = await asyncio.shield(step)
                except UnicodeDecodeError:
                    raise Damaged("the content's file has changed since it was checked") from None
                if piece is None:
                    return
                yield piece
        finally:  # a thread may still be reading: the file is closed behind it
            if step is None or step.done():
                made.close()
            else:
                step.add_done_callback(lambda done: _give_up(done, made))

    def _pieces(self) -> Generator[bytes, None, None]:
        """Raises UnicodeDecodeError for what is sent as text and is none."""
        yield b'%s"%s":"' % (self._before, self._form.encode())
        digest, size = hashlib.sha256(), 0
        decoder = codecs.getincrementaldecoder("utf-8")()
        with open(self._path, "rb", opener=_opener) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                if self._form == "content":
                    yield msgspec.json.encode(decoder.decode(chunk))[1:-1]
                else:
                    yield base64.b64encode(chunk)
        if size != self._data.bytes or digest.hexdigest() != self._data.sha256:
            raise Damaged(
                "the content's file does not match its sha256: it was damaged on disk and is not sent"
            )
        if self._form == "content":
            decoder.decode(b"", final=True)
        yield self._after


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)


def _give_up(done: asyncio.Future[bytes | None], made: Generator[bytes, None, None]) -> None:
    if not done.cancelled():
        done.exception()  # asked for: nobody else will
    made.close()
