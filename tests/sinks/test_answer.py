"""The reader of answers, against the standard library's and however the bytes are cut."""

from __future__ import annotations

import http.client
import io
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentqd.sinks.answer import ANSWER_BYTES_MAX, AnswerReader, NoAnswer

Seen = tuple[int, str | None, bool, bool, bool] | str


def read(data: bytes, cuts: int = 1 << 30, *, eof: bool = False) -> Seen:
    reader = AnswerReader()
    try:
        for start in range(0, len(data), cuts):
            reader.feed(data[start : start + cuts])
    except NoAnswer as problem:
        return str(problem)
    if eof:
        reader.eof()
    return reader.status, reader.retry_after, reader.whole, reader.cut, reader.keep


@st.composite
def answers(draw: Any) -> tuple[bytes, int, bytes]:
    """A well-formed answer, its status and its body."""
    status = draw(st.sampled_from([200, 201, 204, 302, 404, 429, 500, 503]))
    body = b"" if status == 204 else draw(st.binary(max_size=300))
    end = draw(st.sampled_from([b"\r\n", b"\n"]))
    lines = [b"HTTP/1.1 %d %s" % (status, draw(st.sampled_from([b"", b"OK", b"not \xff ok"])))]
    lines += draw(st.lists(st.sampled_from([b"X-A: b", b"Retry-After: 5", b"x-b:", b"Connection: close", b"Date:  now "]), max_size=4, unique=True))  # fmt: skip
    how = draw(st.sampled_from(["length", "close"] if status == 204 else ["length", "chunked", "close"]))
    if how == "length":
        lines.append(b"content-LENGTH: %d" % len(body))
        wire = body
    elif how == "chunked":
        lines.append(b"Transfer-Encoding: chunked")
        size = draw(st.integers(1, 100))
        parts = [body[n : n + size] for n in range(0, len(body), size)]
        wire = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    else:
        wire = body
    early = b"HTTP/1.1 100 Continue\r\nLink: x\r\n\r\n" * draw(st.integers(0, 2))
    return early + end.join(lines) + end * 2 + wire, status, body


@given(answers(), st.integers(1, 40))
def test_a_well_formed_answer_is_whole_with_its_last_byte_however_it_is_cut(
    made: tuple[bytes, int, bytes], cuts: int
) -> None:
    data, status, _ = made
    whole = read(data, eof=True)
    assert isinstance(whole, tuple)
    assert whole[:1] + whole[2:4] == (status, True, False)
    assert read(data, cuts, eof=True) == whole
    assert read(data, 1, eof=True) == whole


@given(answers())
def test_the_standard_library_sees_the_same(made: tuple[bytes, int, bytes]) -> None:
    data, status, body = made

    class Wire:
        def makefile(self, *_: Any) -> io.BytesIO:
            return io.BytesIO(data)

    theirs = http.client.HTTPResponse(Wire(), method="POST")  # type: ignore[arg-type]
    theirs.begin()
    assert theirs.status == status
    assert theirs.read() == body
    ours = read(data, eof=True)
    assert isinstance(ours, tuple)
    assert ours[1] == theirs.getheader("Retry-After")


@given(answers(), st.data())
def test_less_than_all_of_it_is_never_whole(made: tuple[bytes, int, bytes], data: st.DataObject) -> None:
    wire, _, _ = made
    length = data.draw(st.integers(0, len(wire) - 1))
    seen = read(wire[:length])
    whole = read(wire)
    assert isinstance(seen, tuple)
    assert isinstance(whole, tuple)
    if whole[2]:
        assert not seen[2]


@given(st.binary(max_size=400) | st.binary(max_size=400).map(lambda tail: b"HTTP/1.1 200 OK\r\n" + tail), st.integers(1, 20))  # fmt: skip
@example(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n", 3)
def test_garbage_breaks_nothing_and_is_the_same_however_it_is_cut(data: bytes, cuts: int) -> None:
    whole, cut = read(data), read(data, cuts)
    assert isinstance(whole, str) == isinstance(cut, str)
    if isinstance(whole, tuple):
        assert whole == cut


@pytest.mark.parametrize(
    "length", ["5,5", "+5", "5 5", "0x5", "", "1e3", "\u0665".encode().decode("latin-1"), "9" * 40]
)
def test_a_length_that_is_none_is_no_answer(length: str) -> None:
    assert isinstance(read(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode("latin-1")), str)


def test_a_length_beside_chunks_is_not_believed_and_the_connection_not_kept() -> None:
    data = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert read(data) == (200, None, True, False, False)


@pytest.mark.parametrize("coding", [b"gzip", b"gzip, chunked", b"identity", b"xchunked"])
def test_a_coding_that_is_not_known_ends_with_the_connection(coding: bytes) -> None:
    data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: %s\r\n\r\n0\r\n\r\n" % coding
    assert read(data) == (200, None, False, False, False)
    assert read(data, eof=True) == (200, None, True, False, False)


def test_beyond_the_limit_it_is_cut_and_nothing_is_kept_in_memory() -> None:
    reader = AnswerReader()
    reader.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
    for _ in range(100):
        reader.feed(b"x" * 65536)
        assert len(reader._buffer) <= ANSWER_BYTES_MAX
    assert reader.cut
    assert not reader.whole


@pytest.mark.parametrize(
    ("head", "keep"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True), (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 0\r\n\r\n", True), (b"HTTP/1.1 204 No\r\n\r\n", True), (b"HTTP/1.1 204 No\r\n\r\nmore", False),
        (b"HTTP/1.1 200 OK\r\nConnection: x\r\nConnection: CLOSE\r\nContent-Length: 0\r\n\r\n", False), (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxy", False),
    ],
)  # fmt: skip
def test_a_connection_is_kept_only_where_that_is_certain(head: bytes, keep: bool) -> None:
    assert read(head) == (int(head[9:12]), None, True, False, keep)
