"""Reads one HTTP/1.1 answer as it comes (RFC 9112). Pure; whoever reads it knows at each byte what the receiver has said.

Invariants:
1. `status` is set once the whole head of the final answer is there; answers 1xx before it are skipped.
2. `whole` is set once the end of the body is there, by its length, its last chunk, or the end of a connection that was
   closed in order. An answer that stops before is not whole, whatever its status.
3. No more than ANSWER_BYTES_MAX are taken, 1xx and all: beyond them `cut` is set, or, without a status, it is no answer.
4. What can be read in two ways (two lengths, a folded header) is no answer; a connection is reused (`keep`) only after
   a whole answer with nothing behind it.
"""

from __future__ import annotations

import re
from typing import Final

from agentqd.core.limits import KIB

ANSWER_BYTES_MAX: Final = 64 * KIB
_HEAD_END: Final = re.compile(rb"\r?\n\r?\n")
_STATUS: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [^\x00\r\n]*)?\r?")
_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_DIGITS: Final = re.compile(rb"[0-9]{1,18}")
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r?")
_BODILESS: Final = frozenset({204, 304})
_LINE_MAX: Final = 4 * KIB  # of a chunk's size


class NoAnswer(Exception):
    """What came is no HTTP answer."""


class AnswerReader:
    __slots__ = (
        "_buffer",
        "_left",
        "_read",
        "_searched",
        "cut",
        "keep",
        "retry_after",
        "status",
        "taken",
        "whole",
    )

    def __init__(self) -> None:
        self.status = 0
        self.retry_after: str | None = None
        self.whole = False
        self.cut = False
        self.keep = False
        self.taken = 0
        self._buffer = bytearray()
        self._searched = 0
        self._left = 0  # bytes of the body, or of its chunk
        self._read = (
            AnswerReader._read_head
        )  # of the class: a bound one would be a cycle, left to the collector

    def feed(self, data: bytes) -> None:
        """More of it. Raises NoAnswer."""
        room = ANSWER_BYTES_MAX - self.taken
        self.taken += len(data)
        self._buffer += data if len(data) <= room else data[: max(0, room)]
        while not self.whole and self._read(self):
            pass
        if self._buffer and self.whole:
            self.keep = False
        if self.taken > ANSWER_BYTES_MAX and not self.whole:
            if not self.status:
                raise NoAnswer(f"more than {ANSWER_BYTES_MAX} bytes and no end of a head")
            self.cut = True

    def eof(self) -> None:
        """The receiver has closed the connection in order."""
        if self.status and self._read == AnswerReader._read_to_the_end:
            self.whole = True

    # Each takes what it can from the buffer; False: it needs more.

    def _read_head(self) -> bool:
        end = _HEAD_END.search(self._buffer, max(0, self._searched - 3))
        if end is None:
            self._searched = len(self._buffer)
            if not b"HTTP/1.".startswith(self._buffer[:7]):
                raise NoAnswer("it does not speak HTTP/1")
            return False
        lines = bytes(self._buffer[: end.start()]).split(b"\n")
        del self._buffer[: end.end()]
        self._searched = 0
        line = _STATUS.fullmatch(lines[0])
        if line is None:
            raise NoAnswer("its status line is none")
        status = int(line[2])
        if 100 <= status < 200 and status != 101:
            return True
        self._begin_body(status, line[1] == b"1", _headers(lines[1:]))
        return True

    def _begin_body(self, status: int, modern: bool, headers: dict[bytes, bytes]) -> None:
        connection = headers.get(b"connection", b"").lower()
        self.keep = b"close" not in connection if modern else b"keep-alive" in connection
        length, coding = headers.get(b"content-length"), headers.get(b"transfer-encoding")
        retry_after = headers.get(b"retry-after")
        if retry_after is not None:
            self.retry_after = retry_after.decode("latin-1")
        if coding is not None:
            self.keep = self.keep and length is None
            chunked = coding.lower() == b"chunked"
            self._read = AnswerReader._read_chunk_size if chunked else AnswerReader._read_to_the_end
        elif length is None:
            self._read = AnswerReader._read_to_the_end
        elif _DIGITS.fullmatch(length) is None:
            raise NoAnswer("its Content-Length is none")
        else:
            self._left, self._read = int(length), AnswerReader._read_rest
        self.status = status
        if status in _BODILESS or (self._read == AnswerReader._read_rest and not self._left):
            self.whole = True
        elif self._read == AnswerReader._read_to_the_end:
            self.keep = False

    def _take(self) -> None:
        taken = min(self._left, len(self._buffer))
        del self._buffer[:taken]
        self._left -= taken

    def _read_rest(self) -> bool:
        self._take()
        self.whole = not self._left
        return False

    def _read_to_the_end(self) -> bool:
        self._buffer.clear()
        return False

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\n", 0, _LINE_MAX)
        if end < 0:
            if len(self._buffer) >= _LINE_MAX:
                raise NoAnswer("a chunk with no size")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _read_chunk_size(self) -> bool:
        line = self._line()
        if line is None:
            return False
        size = _CHUNK.fullmatch(line)
        if size is None:
            raise NoAnswer("a chunk with no size")
        self._left = int(size[1], 16)
        self._read = AnswerReader._read_chunk if self._left else AnswerReader._read_trailer
        return True

    def _read_chunk(self) -> bool:
        self._take()
        if self._left:
            return False
        self._read = AnswerReader._read_chunk_end
        return True

    def _read_chunk_end(self) -> bool:
        line = self._line()
        if line is None:
            return False
        if line not in {b"", b"\r"}:
            raise NoAnswer("a chunk that is longer than it says")
        self._read = AnswerReader._read_chunk_size
        return True

    def _read_trailer(self) -> bool:
        line = self._line()
        if line is None:
            return False
        self.whole = line in {b"", b"\r"}
        return True


def _headers(lines: list[bytes]) -> dict[bytes, bytes]:
    """By lower-case name; of several with one name the first, but of what says how long the body is there may be only one."""
    found: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or _NAME.fullmatch(name) is None:
            raise NoAnswer("a header that is none")
        key, value = name.lower(), value.strip()
        if found.setdefault(key, value) != value and key in {b"content-length", b"transfer-encoding"}:
            raise NoAnswer("two lengths")
        if key == b"connection" and found[key] != value:
            found[key] += b"," + value
    return found
