"""One file of an attempt's output, opened and read: blocking work, for a thread.

Promises:
1. Nothing in a request is ever a path. A file is what the journal has on record; its path is gone down from a folder that
   the daemon or the task named, part by part, following no link, to a regular file (a worker may put links and FIFOs there
   after its end).
2. A file that is not as large as it was recorded is `FileChanged`, before its first byte is given.
3. What was punched out of a stream (limits.stdout_bytes_max) is never given as zeros: its bytes are those before the hole
   and those behind it.
"""

from __future__ import annotations

import errno
import hashlib
import os
from typing import Final, Literal

import msgspec

from agentqd.core.errors import AgentqError
from agentqd.core.limits import MIB
from agentqd.storage.files import printable_name
from agentqd.system.fsops import OPEN_FOLDER, open_beneath

Kind = Literal["stream", "artifact", "entry"]
CHUNK_BYTES: Final = MIB
DIGEST_STEP_BYTES: Final = 16 * MIB
SEGMENTS_MAX: Final = 1000


class FileGone(AgentqError):
    code = "file_gone"
    http_status = 404


class FileChanged(AgentqError):
    code = "file_changed"
    http_status = 409


class FileUnreadable(AgentqError):
    """It is there and is not given: a link, no regular file, outside of its folder, an I/O error."""

    code = "file_unreadable"
    http_status = 409


class Recorded(msgspec.Struct, frozen=True):
    """A file as the journal knows it."""

    file: str  # how a request names it
    kind: Kind
    name: str
    bytes: int | None  # None: not recorded
    sha256: str | None
    base: str  # the folder it lies below
    inner: tuple[str, ...] = ()  # folders below `base` that the worker could have replaced
    punched: bool = False  # a hole in it may be what was punched out
    may_be_missing: bool = False  # a stream to which nothing was written, as far as anybody knows


class OpenFile:
    """The bytes that are given of one file. Close it."""

    def __init__(self, fd: int, segments: list[tuple[int, int]], length: int) -> None:
        self._fd = fd
        self._segments = segments
        self.size = sum(end - begin for begin, end in segments)
        self.left_out_bytes = length - self.size
        self.left_out_at = segments[0][1] if self.left_out_bytes else 0

    def close(self) -> None:
        os.close(self._fd)

    def read(self, offset: int, most: int) -> bytes:
        """At least one byte unless `offset` is the end. Raises OSError, and EOFError for a file that was cut meanwhile."""
        before = 0
        for begin, end in self._segments:
            inside = offset - before
            if inside < end - begin:
                data = os.pread(self._fd, min(most, end - begin - inside), begin + inside)
                if not data:
                    raise EOFError
                return data
            before += end - begin
        return b""

    def hash_step(self, digest: hashlib._Hash, offset: int) -> int:
        """Feeds some bytes from `offset` on; returns where it goes on."""
        until = min(self.size, offset + DIGEST_STEP_BYTES)
        while offset < until:
            data = self.read(offset, CHUNK_BYTES)
            digest.update(data)
            offset += len(data)
        return offset


def open_recorded(recorded: Recorded) -> OpenFile:
    """Raises FileGone, FileChanged, FileUnreadable."""
    fd = -1
    try:
        fd = _open(recorded)
        length = os.fstat(fd).st_size
        opened = OpenFile(fd, _segments(fd, length) if recorded.punched else [(0, length)], length)
    except FileNotFoundError:
        raise FileGone(f"{recorded.name}: it is no longer there", file=recorded.file) from None
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise unreadable(recorded, error) from error
    if recorded.bytes is not None and opened.size != recorded.bytes:
        opened.close()
        raise FileChanged(
            f"{recorded.name}: it has {opened.size} bytes now, {recorded.bytes} when it was recorded",
            file=recorded.file,
            bytes=opened.size,
            recorded_bytes=recorded.bytes,
        )
    return opened


def unreadable(recorded: Recorded, error: OSError) -> FileUnreadable:
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        why = "a link or no folder stands in its way"
    else:
        why = error.strerror or str(error)
    return FileUnreadable(f"{recorded.name}: {why}", file=recorded.file)


def _open(recorded: Recorded) -> int:
    base = os.open(recorded.base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        parts = [*recorded.inner, *recorded.name.split("/")] if recorded.kind != "entry" else recorded.inner
        try:
            return open_beneath(base, parts)
        except FileNotFoundError:
            if "\\x" not in recorded.name or recorded.kind != "artifact":
                raise
            return open_beneath(base, _as_on_disk(base, parts))
    finally:
        os.close(base)


def _as_on_disk(base: int, parts: list[str] | tuple[str, ...]) -> list[bytes]:
    """The names behind a recorded path whose bytes were no UTF-8 (`\\xNN` stands for one). Raises OSError."""
    real: list[bytes] = []
    folder = os.dup(base)
    try:
        for place, part in enumerate(parts):
            name = os.fsencode(part)
            if "\\x" in part:
                found = [entry for entry in os.listdir(folder) if printable_name(entry) == part]
                name = (
                    os.fsencode(max(found)) if found else name
                )  # the one that was recorded, if two look alike
            real.append(name)
            if place < len(parts) - 1:
                below = os.open(name, OPEN_FOLDER, dir_fd=folder)
                os.close(folder)
                folder = below
    finally:
        os.close(folder)
    return real


def _segments(fd: int, length: int) -> list[tuple[int, int]]:
    """(begin, end) of what is not a hole. A file system without holes: all of it."""
    found: list[tuple[int, int]] = []
    at = 0
    while at < length:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
            end = length if len(found) == SEGMENTS_MAX else min(length, os.lseek(fd, begin, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:
                end = length  # nothing but a hole up to the end: not ours (a tail is never punched out)
                begin = at
            elif error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return [(0, length)]
            else:
                raise
        found.append((begin, end))
        at = end
    return found or [(0, 0)]
