"""File operations that Python lacks or that need care, each with the system call it stands for."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Sequence

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
PUNCH_ALIGN_BYTES = 4096
OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", _libc.fallocate)
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_fallocate.restype = ctypes.c_int
_renameat2 = getattr(_libc, "renameat2", None)
if _renameat2 is not None:
    _renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    _renameat2.restype = ctypes.c_int
_RENAME_NOREPLACE = 1
_NO_NOREPLACE = frozenset({errno.ENOSYS, errno.EINVAL})
_NO_HOLES = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Free the blocks of [offset, offset+length) of a file open for writing; its size stays.

    False if the file system cannot do that. Raises OSError for anything else.
    """
    while _fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) != 0:
        code = ctypes.get_errno()
        if code in _NO_HOLES:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code), f"fd {fd}: punching a hole")
    return True


def open_folder_at(name: str, parent_fd: int) -> int:
    """A descriptor of the folder `name` in `parent_fd`; a symlink there is an error (ENOTDIR or ELOOP)."""
    return os.open(name, OPEN_FOLDER, dir_fd=parent_fd)


def open_beneath(folder_fd: int, parts: Sequence[bytes | str]) -> int:
    """A descriptor of the regular file that `parts` lead to below `folder_fd`: folder by folder, following no link, never
    waiting on a FIFO. Raises OSError; EINVAL for a part that leads elsewhere ('..', '/') and for what is no regular file."""
    names = [os.fsencode(part) for part in parts]
    if not names or any(name in (b"", b".", b"..") or b"/" in name or b"\0" in name for name in names):
        raise OSError(errno.EINVAL, "not a path below its folder")
    with contextlib.ExitStack() as opened:
        folder = folder_fd
        for name in names[:-1]:
            folder = os.open(name, OPEN_FOLDER, dir_fd=folder)
            opened.callback(os.close, folder)
        fd = os.open(names[-1], OPEN_FILE, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


def write_all(fd: int, content: bytes) -> None:
    """Every byte, or OSError."""
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def create_file_at(name: str, parent_fd: int, content: bytes) -> None:
    """A new 0600 file with this content. Raises FileExistsError if the name is taken, even by a dangling link."""
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=parent_fd)
    try:
        write_all(fd, content)
    finally:
        os.close(fd)


def replace_file_at(name: str, temporary: str, parent_fd: int, content: bytes) -> None:
    """`name` has this content or its old one, never half of either (no fsync: a crash of the machine is not covered)."""
    try:
        create_file_at(temporary, parent_fd, content)
    except FileExistsError:  # a crash left it
        os.unlink(temporary, dir_fd=parent_fd)
        create_file_at(temporary, parent_fd, content)
    os.rename(temporary, name, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)


def rename_new_at(old: str, new: str, parent_fd: int) -> None:
    """Give `old` the name `new`, if that is free; one operation. Raises FileExistsError if it is taken, and changes nothing."""
    code = errno.ENOSYS
    if _renameat2 is not None:
        if _renameat2(parent_fd, os.fsencode(old), parent_fd, os.fsencode(new), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
    if code not in _NO_NOREPLACE:
        raise OSError(code, os.strerror(code), new)
    os.link(
        old, new, src_dir_fd=parent_fd, dst_dir_fd=parent_fd, follow_symlinks=False
    )  # as exclusive, in two steps
    os.unlink(old, dir_fd=parent_fd)


def read_file_at(name: str, parent_fd: int, bytes_max: int) -> bytes:
    """A regular file's content, at most `bytes_max`. Never follows a link, never waits on a FIFO. Raises OSError."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent_fd)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", name)
        parts = []
        while bytes_max > 0 and (part := os.read(fd, min(bytes_max, 1 << 20))):
            parts.append(part)
            bytes_max -= len(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def remove_tree_at(name: str, parent_fd: int) -> None:
    """Remove a folder and all that is in it, following no link. What has gone meanwhile is no error."""
    try:
        folder_fd = open_folder_at(name, parent_fd)
    except FileNotFoundError:
        return
    except OSError as problem:
        if problem.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        os.unlink(name, dir_fd=parent_fd)
        return
    try:
        with os.scandir(folder_fd) as entries:
            children = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for child, is_folder in children:
            if is_folder:
                remove_tree_at(child, folder_fd)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(child, dir_fd=folder_fd)
    finally:
        os.close(folder_fd)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(name, dir_fd=parent_fd)
