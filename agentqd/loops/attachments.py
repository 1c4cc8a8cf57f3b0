"""Files that a handed-over mail brings along: copied into our own storage when the entry is taken.

Afterwards the worker may change or delete them, and retention the whole folder: what is sent is the copy. Only regular files
below the drop folder or `work/` count; no link is followed at any step of the path. Blocking file work (evidence thread).
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Any, Final

import msgspec

from agentqd.core.limits import ATTACHMENTS_MAX
from agentqd.core.selfaddress import brings_files
from agentqd.storage.blobs import Copies
from agentqd.storage.files import printable_name
from agentqd.system.leases import has_writer

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_ITS_FAULT: Final = {
    errno.ENOENT: "is not there",
    errno.ENOTDIR: "lies behind a symlink or a file",
    errno.ELOOP: "is a symlink",
    errno.ENXIO: "is no regular file",
    errno.EACCES: "may not be read",
    errno.ENAMETOOLONG: "has too long a name",
}


class Attached(msgspec.Struct, frozen=True):
    """As it stands in the entry's data."""

    path: str  # of our copy
    name: str
    bytes: int
    sha256: str


class Unfit(Exception):
    """The entry cannot be taken with these attachments; the text begins with the word that becomes the reason."""


class BeingWritten(Exception):
    """Somebody still has one of them open for writing."""


def capture(
    drop: str, fields: dict[str, Any], copies: Copies, bytes_max: int, *, wait_for_writers: bool
) -> tuple[Attached, ...]:
    """Copies of what the entry's `attachments` name. Raises Unfit, BeingWritten, or OSError where our own disk fails."""
    if not brings_files(fields) or fields["attachments"] is None:
        return ()
    paths = fields["attachments"]
    if not (isinstance(paths, list) and all(isinstance(path, str) for path in paths)):
        raise Unfit("malformed: attachments is not a list of paths")
    if len(paths) > ATTACHMENTS_MAX:
        raise Unfit(f"malformed: more than {ATTACHMENTS_MAX} attachments")
    opened: list[tuple[str, int, int]] = []
    try:
        for path in paths:
            descriptor = _open(os.path.dirname(drop), path)
            opened.append((path, descriptor, os.fstat(descriptor).st_size))
            if wait_for_writers and has_writer(descriptor):
                raise BeingWritten
        total = sum(size for _, _, size in opened)
        if total > bytes_max:
            raise Unfit(
                f"too_large: its attachments have {total} bytes; limits.entry_bytes_max leaves {bytes_max}"
            )
        return tuple(_copy(path, descriptor, size, copies) for path, descriptor, size in opened)
    finally:
        for _, descriptor, _ in opened:
            os.close(descriptor)


def _copy(path: str, descriptor: int, size: int, copies: Copies) -> Attached:
    copy = copies.add(descriptor, size)
    return Attached(copy.path, printable_name(os.path.basename(path)), copy.bytes, copy.sha256)


def _open(attempt: str, path: str) -> int:
    """The file, found step by step from the attempt's folder. Raises Unfit or OSError."""
    *folders, name = _steps(attempt, path)
    at = os.open(attempt, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            below = os.open(folder, _FOLDER, dir_fd=at)
            os.close(at)
            at = below
        descriptor = os.open(name, _FILE, dir_fd=at)
    except OSError as error:
        if error.errno in _ITS_FAULT:
            raise Unfit(f"malformed: the attachment {path[:120]!r} {_ITS_FAULT[error.errno]}") from error
        raise
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unfit(f"malformed: the attachment {path[:120]!r} is no regular file")
    return descriptor


def _steps(attempt: str, path: str) -> list[str]:
    """The names from the attempt's folder down to the file: `outbox` or `work`, then the rest. Raises Unfit."""
    if "\0" in path:
        raise Unfit("malformed: an attachment's path holds a NUL")
    whole = os.path.normpath(os.path.join(attempt, "outbox", path))
    for base in (os.path.normpath(attempt), os.path.realpath(attempt)):
        steps = whole.removeprefix(f"{base}/").split("/")
        if whole.startswith(f"{base}/") and steps[0] in {"outbox", "work"} and len(steps) > 1:
            return steps
    raise Unfit(f"malformed: the attachment {path[:120]!r} lies outside the drop and output folders")
