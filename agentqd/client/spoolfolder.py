"""Where the laptop's spool lies, and the few file operations that make it durable."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from agentqd.client.boxname import check_box_name
from agentqd.core.errors import StateFolderError

FOLDER_MODE = 0o700
FILE_MODE = 0o600
FULL = (errno.ENOSPC, errno.EDQUOT)


def spooled_boxes(root: str) -> list[str]:
    """Names of the boxes that have a spool folder."""
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if _is_box_name(name))


def _is_box_name(name: str) -> bool:
    try:
        check_box_name(name)
    except ValueError:
        return False
    return True


def make_folder(path: str) -> None:
    """The folder with its parents, each entry durable; those that are made here are private."""
    try:
        os.mkdir(path, FOLDER_MODE)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_folder(os.path.dirname(path))
        os.mkdir(path, FOLDER_MODE)
    sync_folder(os.path.dirname(path) or "/")


def check_ours(path: str) -> None:
    """What lies here is sent in our name, and may hold secrets: nobody else may write or read. Raises StateFolderError."""
    found = os.stat(path, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise StateFolderError(f"{path} is not a folder of ours; move it away", path=path)
    if found.st_mode & 0o077:
        os.chmod(path, FOLDER_MODE)


def sync_file(fd: int) -> None:
    """To the disk itself: on macOS fsync alone leaves it in the drive's cache."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(fd, full)
        except OSError:
            pass  # not on this file system
        else:
            return
    os.fsync(fd)


def sync_folder(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return  # not ours (a parent that was there before): its entries are its owner's concern
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(draft: str, data: bytes) -> int:
    """A new private file with these bytes, on the disk; its descriptor. Removed again if that fails. Raises OSError."""
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        sync_file(fd)
    except BaseException:
        os.close(fd)
        os.unlink(draft)
        raise
    return fd
