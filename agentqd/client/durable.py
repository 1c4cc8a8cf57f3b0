"""What is on this machine's disk when a call returns. macOS's fsync leaves data in the drive's cache; F_FULLFSYNC does not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os

PRIVATE_MODE = 0o700
_FULLFSYNC = getattr(fcntl, "F_FULLFSYNC", None)


def fsync_file(fd: int) -> None:
    """The file's bytes are on the disk."""
    if _FULLFSYNC is not None:
        with contextlib.suppress(OSError):  # a file system that does not know it
            fcntl.fcntl(fd, _FULLFSYNC)
            return
    os.fsync(fd)


def fsync_folder(path: str) -> None:
    """The names in this folder are on the disk. One that is closed to us is not ours (a parent that was there before): its
    names are its owner's concern."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        fsync_file(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that syncs no folders
            raise
    finally:
        os.close(fd)


def make_private_folder(path: str) -> None:
    """The folder with its parents, each entry durable; those that are made here are private."""
    try:
        os.mkdir(path, PRIVATE_MODE)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_private_folder(os.path.dirname(path))
        os.mkdir(path, PRIVATE_MODE)
    fsync_folder(os.path.dirname(path) or ".")


def write_durably(path: str, content: bytes) -> None:
    """`path` has this content, durably, or its old one: written beside it, fsynced, renamed."""
    draft = f"{path}.tmp"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        fsync_file(fd)
    finally:
        os.close(fd)
    os.rename(draft, path)
    fsync_folder(os.path.dirname(path))
