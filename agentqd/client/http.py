"""One strict HTTP/1.1 exchange over a channel. Small on purpose: http.client and email cost more time to import
than a whole `agentqctl status` takes.

Promises:
1. A body is whole or an error: Content-Length or chunked, nothing that ends with the connection.
2. What is not HTTP as agentqd speaks it is `BadAnswer`, never a half-read value. Sizes are bounded.
3. One exchange a channel (`Connection: close`), so an answer can never belong to another request.
4. Before the first byte was sent the failure is `Unreachable`; after it, `AnswerLost`: the outcome is unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Self

from agentqd.client.channel import Channel, Transport
from agentqd.client.errors import AnswerLost, BadAnswer
from agentqd.core.limits import CONTROL_BODY_BYTES_MAX

HEAD_BYTES_MAX = 64 * 1024
READ_BYTES = 64 * 1024
BODY_READ_BYTES = 256 * 1024  # as much as a Unix socket holds
UNRESERVED = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
CHUNK_LINE_BYTES_MAX = 1024


def make_target(path: tuple[str, ...], query: dict[str, str | int | None]) -> str:
    """`/v1/...` with every part quoted, so that an id can never become another path."""
    target = "/v1/" + "/".join(map(_quoted, path))
    given = "&".join(f"{name}={_quoted(str(value))}" for name, value in query.items() if value is not None)
    return f"{target}?{given}" if given else target


def _quoted(text: str) -> str:
    """Percent-encoded, but for what RFC 3986 calls unreserved. (urllib.parse takes 2 ms to import.)"""
    if text in (".", ".."):
        return text.replace(".", "%2E")
    raw = text.encode("utf-8", "surrogateescape")
    return "".join(chr(byte) if byte in UNRESERVED else f"%{byte:02X}" for byte in raw)


class Answer:
    """The head of an answer; the body is read by `read` or `pieces`, within the timeout for each wait."""

    def __init__(self, reader: _Reader, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.headers = headers
        self._reader = reader

    def read(self) -> bytes:
        """The whole body. Raises AnswerLost or BadAnswer, also when it is larger than any true answer."""
        parts: list[bytes] = []
        size = 0
        for piece in self.pieces():
            size += len(piece)
            if size > CONTROL_BODY_BYTES_MAX:
                raise self._reader.bad(f"the answer is larger than {CONTROL_BODY_BYTES_MAX} bytes")
            parts.append(piece)
        return b"".join(parts)

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes."""
        coding = self.headers.get("transfer-encoding")
        if self.status in (204, 304):
            return iter(())
        if coding is not None:
            if coding.strip().lower() != "chunked":
                raise self._reader.bad(f"unknown transfer coding {coding!r}")
            return self._reader.chunked()
        return self._reader.counted(_content_length(self._reader, self.headers))

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def exchange(
    transport: Transport,
    method: str,
    target: str,
    *,
    body: bytes | None,
    timeout_s: float,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Sends one request and reads the head of its answer. The caller closes the answer. `headers`: our own, plain ASCII."""
    channel = transport.open()
    reader = _Reader(channel, transport.name)
    head = f"{method} {target} HTTP/1.1\r\nHost: box\r\nConnection: close\r\nAccept: application/json\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    for name, value in (headers or {}).items():
        head += f"{name}: {value}\r\n"
    try:
        channel.set_timeout(timeout_s)
        try:
            channel.send_all(head.encode("ascii") + b"\r\n" + (body or b""))
        except TimeoutError as error:
            raise AnswerLost(f"{transport.name}: the request could not be sent in {timeout_s:g} s") from error
        except OSError:
            pass  # a server may answer and close before it has read a large body: its answer says why
        return reader.head()
    except BaseException:
        reader.close()
        raise


def _content_length(reader: _Reader, headers: dict[str, str]) -> int:
    text = headers.get("content-length", "")
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise reader.bad("neither a Content-Length nor a chunked body")
    return int(text)


class _Reader:
    """A buffered reader that knows how HTTP bodies end."""

    def __init__(self, channel: Channel, name: str) -> None:
        self._channel = channel
        self._name = name
        self._buffer = b""

    def bad(self, what: str) -> BadAnswer:
        return BadAnswer(f"{self._name}: what answers there does not speak agentqd's protocol: {what}")

    def close(self) -> None:
        self._channel.close()

    def head(self) -> Answer:
        while True:
            lines = self._head_lines()
            parts = lines[0].split(" ", 2)
            if (
                len(parts) < 2
                or parts[0] not in ("HTTP/1.1", "HTTP/1.0")
                or not (len(parts[1]) == 3 and parts[1].isdigit())
            ):
                raise self.bad(f"it says {lines[0][:60]!r}")
            status = int(parts[1])
            if status >= 200:
                return Answer(self, status, self._headers(lines[1:]))

    def _head_lines(self) -> list[str]:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if not b"HTTP/1.".startswith(self._buffer[:7]):
                raise self.bad(f"it says {self._buffer[:60].decode('latin-1')!r}")
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise self.bad(f"its headers are larger than {HEAD_BYTES_MAX} bytes")
            self._fill()
        head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
        return head.decode("latin-1").split("\r\n")

    def _headers(self, lines: list[str]) -> dict[str, str]:
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise self.bad(f"a header line {line[:60]!r}")
            key = name.lower()
            if key in headers and key in ("content-length", "transfer-encoding"):
                raise self.bad(f"two {name} headers")
            headers[key] = value.strip()
        if "content-length" in headers and "transfer-encoding" in headers:
            raise self.bad("a Content-Length beside a Transfer-Encoding")
        return headers

    def counted(self, left: int) -> Iterator[bytes]:
        while left:
            if not self._buffer:
                self._fill(BODY_READ_BYTES)
            piece, self._buffer = self._buffer[:left], self._buffer[left:]
            left -= len(piece)
            yield piece

    def chunked(self) -> Iterator[bytes]:
        while size := self._chunk_size():
            yield from self.counted(size)
            if self._line() != b"":
                raise self.bad("a chunk that is longer than it says")
        while self._line():
            pass  # trailers

    def _chunk_size(self) -> int:
        digits = self._line().partition(b";")[0].strip()
        if not 0 < len(digits) <= 8 or digits.strip(b"0123456789abcdefABCDEF"):
            raise self.bad(f"a chunk size {digits[:20]!r}")
        return int(digits, 16)

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            if len(self._buffer) > CHUNK_LINE_BYTES_MAX:
                raise self.bad("a chunk line without an end")
            self._fill()
        line, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
        return line

    def _fill(self, bytes_max: int = READ_BYTES) -> None:
        try:
            more = self._channel.receive(bytes_max)
        except TimeoutError as error:
            raise AnswerLost(
                f"{self._name}: agentqd does not answer in time (is it stopped or overloaded?)"
            ) from error
        except OSError as error:
            raise AnswerLost(
                f"{self._name}: the connection broke before the answer: {error.strerror or error}"
            ) from error
        if not more:
            raise AnswerLost(f"{self._name}: the connection ended in mid-answer (was agentqd stopped?)")
        self._buffer += more
