"""One queue file, read from a position: what is a line, and whether the file is still the one that was read before.

Invariants:
1. Reading moves nothing. A position moves only by `move_to`, after the journal has committed it.
2. The bytes before the position (at most POSITION_DIGEST_BYTES) are compared at every read, in the same pread that
   fetches the new ones: a file cut or rewritten under our feet is noticed before one of its new lines is handed out.
3. The file is never written, cut or locked. Writers append to it all the time, with whatever they have.
4. Memory is bounded by one chunk and one line of the longest allowed length, whatever writers do.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, Final, Literal, NamedTuple

import msgspec

from agentqd.core import limits
from agentqd.core.lines import Line, split_lines, unusual_line
from agentqd.storage.files import open_regular
from agentqd.system.statx import birth_time_ns

TAIL_BYTES: Final = limits.POSITION_DIGEST_BYTES
SCAN_BYTES_MAX: Final = 64 * limits.MIB  # of one line that is far too long, in one call

Role = Literal["live", "rotated"]
Level = Literal["alert", "info"]


class Position(msgspec.Struct, frozen=True):
    """How far one source was read; what the journal keeps. `source` is its number and never used again.

    `digest`: sha256 (hex) of the at most 4 KiB before `offset`. `since_us`: when it got its role.
    """

    source: int
    name: str
    dev: int
    ino: int
    btime_ns: int
    offset: int
    digest: str
    role: Role
    since_us: int


class Notice(msgspec.Struct, frozen=True):
    """Something that a person should know. `level` alert: must become an alert; info: a log line is enough."""

    code: str
    message: str
    fields: dict[str, Any] = {}
    level: Level = "alert"


class Mark(NamedTuple):
    """Where a chunk ends in its source: what `QueueFolder.committed` moves, if nothing happened to it meanwhile."""

    source: int
    generation: int
    before: int
    after: int
    tail: bytes


class Chunk(msgspec.Struct, frozen=True):
    """What one transaction should make durable: lines, and every position that is new with them.

    Upsert all of `positions` (`position`, after the lines, is one of them), delete the sources `dropped`, raise
    `notices`; then `QueueFolder.committed(chunk)`. `position` is None where no line was consumed.
    """

    lines: list[Line]
    position: Position | None
    notices: list[Notice]
    positions: list[Position]
    dropped: list[int]
    mark: Mark | None = None

    @property
    def is_empty(self) -> bool:
        """Nothing to commit, but more to read: only an endless line was scanned further."""
        return not (self.positions or self.dropped or self.notices)


class Want(NamedTuple):
    """How much a caller takes at once."""

    bytes_max: int
    lines_max: int
    line_bytes_max: int


class Found(NamedTuple):
    """Lines up to `after`, and the bytes before it. `after` unmoved: call again, the scan is not at the end."""

    lines: list[Line]
    after: int
    tail: bytes


class Changed(NamedTuple):
    """The bytes before the position are not those that were consumed."""

    code: Literal["truncated", "changed_in_place"]


class Trace(NamedTuple):
    """What is known of a file that may be gone: enough to recognise a copy of it."""

    btime_ns: int
    offset: int
    digest: str
    gone_ns: int | None  # when it lost its name, as far as its own inode tells


class Source:
    """One open file and how far it was read."""

    __slots__ = (
        "btime_ns", "deleted", "dev", "drained", "fd", "final_size", "generation", "ino", "name", "number", "offset", "role",
        "scanned_to", "since_us", "tail", "trouble",
    )  # fmt: skip

    def __init__(self, number: int, fd: int, name: str, role: Role, since_us: int) -> None:
        found = os.fstat(fd)
        self.number = number
        self.fd = fd
        self.name = name
        self.dev = found.st_dev
        self.ino = found.st_ino
        self.btime_ns = birth_time_ns(fd)
        self.role: Role = role
        self.since_us = since_us
        self.offset = 0
        self.tail = b""
        self.generation = 0  # grows when the file is read from 0 again
        self.scanned_to = 0  # the bytes from offset to here have no newline
        self.drained = False  # a rotated file that was read to its end once
        self.deleted = False  # no name in the folder any more
        self.final_size = -1  # at this size nobody could append to it: its last line will get no newline
        self.trouble = ""  # the read error that was told last

    def position(self) -> Position:
        """As committed."""
        return self.position_at(self.offset, self.tail)

    def position_at(self, offset: int, tail: bytes) -> Position:
        """As it is once the lines before `offset` are committed."""
        return Position(
            self.number,
            self.name,
            self.dev,
            self.ino,
            self.btime_ns,
            offset,
            digest_of(tail),
            self.role,
            self.since_us,
        )

    def trace(self) -> Trace:
        """To recognise a copy. The inode's change time is when it was unlinked, unless somebody wrote to it since."""
        return Trace(self.btime_ns, self.offset, digest_of(self.tail), os.fstat(self.fd).st_ctime_ns)

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def is_unchanged(self) -> bool:
        """Whether the bytes before the position are still those that were consumed."""
        return read_before(self.fd, self.offset) == self.tail

    def move_to(self, offset: int, tail: bytes) -> None:
        """The position is durable; or the same bytes are known to be read from another file."""
        self.offset = offset
        self.tail = tail
        self.scanned_to = max(self.scanned_to, offset)

    def start_over(self) -> None:
        """Read from 0 again; chunks handed out before count no longer."""
        self.offset = self.scanned_to = 0
        self.tail = b""
        self.generation += 1
        self.drained = False

    def find_lines(self, want: Want, size: int) -> Found | Changed | None:
        """The next whole lines, or None. `size`: of the file, looked up just before. Raises OSError."""
        if self.scanned_to > self.offset:
            return self._scan_on(want, size)
        return self._find(want, size, want.bytes_max)

    def _find(self, want: Want, size: int, bytes_max: int) -> Found | Changed | None:
        skip = len(self.tail)
        waiting = max(0, size - self.offset)
        buffer = os.pread(self.fd, skip + min(waiting, bytes_max), self.offset - skip)
        if not buffer.startswith(self.tail):
            return Changed("truncated" if len(buffer) < skip else "changed_in_place")
        lines, consumed = split_lines(buffer, skip, self.offset, want.lines_max, want.line_bytes_max)
        if consumed:
            end = skip + consumed
            return Found(lines, self.offset + consumed, buffer[max(0, end - TAIL_BYTES) : end])
        self.scanned_to = self.offset + len(buffer) - skip
        return self._scan_on(want, size) if skip < len(buffer) < skip + waiting else None

    def _scan_on(self, want: Want, size: int) -> Found | Changed | None:
        """An unfinished line: only what was not looked at before is read, and nothing of it is kept."""
        skip = len(self.tail)
        before = os.pread(self.fd, skip, self.offset - skip)
        if before != self.tail:
            return Changed("truncated" if len(before) < skip else "changed_in_place")
        if size < self.scanned_to:  # a writer took back its own half line
            self.scanned_to = self.offset
            return self._find(want, size, want.bytes_max)
        stop = self.scanned_to + SCAN_BYTES_MAX
        while self.scanned_to < size:
            if self.scanned_to >= stop:
                return Found([], self.offset, self.tail)
            buffer = os.pread(self.fd, min(want.bytes_max, size - self.scanned_to), self.scanned_to)
            newline = buffer.find(b"\n")
            if newline >= 0:
                return self._line_up_to(want, size, self.scanned_to + newline + 1)
            if not buffer:
                break
            self.scanned_to += len(buffer)
        return None

    def _line_up_to(self, want: Want, size: int, end: int) -> Found | Changed | None:
        """The newline has come: the line is read once more from its start, as it stands now."""
        length = end - self.offset
        if length <= want.line_bytes_max + 8:  # CR, newline and byte order mark do not count
            self.scanned_to = self.offset
            return self._find(want, size, max(want.bytes_max, length))
        raw = os.pread(self.fd, want.line_bytes_max, self.offset)
        line = Line(self.offset, length, raw, too_long=True)
        return Found([line], end, read_before(self.fd, end))

    def remainder(self, want: Want, size: int) -> Found | None:
        """The last line of a file that nobody can append to any more. Call only when `find_lines` gives None."""
        length = size - self.offset
        if length <= 0:
            return None
        raw = os.pread(self.fd, min(length, want.line_bytes_max + 8), self.offset)
        line = unusual_line(self.offset, length, raw, want.line_bytes_max, unfinished=True)
        return Found([] if line is None else [line], size, read_before(self.fd, size))


def digest_of(tail: bytes) -> str:
    return hashlib.sha256(tail).hexdigest()


def read_before(fd: int, offset: int) -> bytes:
    """The at most 4 KiB before `offset`; fewer bytes than that if the file is shorter."""
    length = min(offset, TAIL_BYTES)
    return os.pread(fd, length, offset - length)


def matching_tail(fd: int, offset: int, digest: str) -> bytes | None:
    """The bytes before `offset`, if they are those of `digest`."""
    tail = read_before(fd, offset)
    return tail if len(tail) == min(offset, TAIL_BYTES) and digest_of(tail) == digest else None


def is_newer_than_end_of(trace: Trace, btime_ns: int) -> bool:
    """A file born after the other had lost its name: a new beginning, whatever stands in it.

    In doubt (no birth times, the same tick) it may be a replacement, and its content says.
    """
    return bool(btime_ns) and trace.gone_ns is not None and btime_ns > trace.gone_ns


def skip_common(old: Source, new: Source, bytes_max: int, *, whole_lines: bool, once: bool = False) -> None:
    """Move `old` over what `new` has at the same place and hands out itself.

    Only whole lines; or also a last line without newline, where nobody will end it in `old` but `new` has it.
    `bytes_max` at a time, or (`once`) in all.
    """
    while True:
        left = os.pread(old.fd, bytes_max, old.offset)
        right = os.pread(new.fd, len(left), old.offset)
        common = _common_bytes(left, right)
        if whole_lines or common < len(left):
            common = left.rfind(b"\n", 0, common) + 1
        if common:
            old.move_to(old.offset + common, (old.tail + left[:common])[-TAIL_BYTES:])
        if common < len(left) or not left or once:
            return


def _common_bytes(left: bytes, right: bytes) -> int:
    if left == right:
        return len(left)
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[:middle] == right[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def open_source(path: str, number: int, name: str, role: Role, since_us: int) -> Source:
    """A file as a new source at 0. Raises OSError: not there, not regular, a link, not permitted."""
    fd, _ = open_regular(path)
    try:
        return Source(number, fd, name, role, since_us)
    except BaseException:
        os.close(fd)
        raise
