"""Where the laptop's spool lies, and the few file operations that make it durable."""

from __future__ import annotations

import errno
import os
import stat

from agentqd.client.boxname import check_box_name
from agentqd.client.durable import PRIVATE_MODE, fsync_file
from agentqd.core.errors import StateFolderError

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


def check_ours(path: str) -> None:
    """What lies here is sent in our name, and may hold secrets: nobody else may write or read. Raises StateFolderError."""
    found = os.stat(path, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise StateFolderError(f"{path} is not a folder of ours; move it away", path=path)
    if found.st_mode & 0o077:
        os.chmod(path, PRIVATE_MODE)


def write_whole(draft: str, data: bytes) -> int:
    """A new private file with these bytes, on the disk; its descriptor. Removed again if that fails. Raises OSError."""
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        fsync_file(fd)
    except BaseException:
        os.close(fd)
        os.unlink(draft)
        raise
    return fd
