"""The rules of durable files. "Visible" and "durable" are two things; each function says which one it gives.

Every function raises OSError; what it had done by then is said at the function.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat

from agentqd.system.fsops import write_all

OPEN_SAFELY = (
    os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
)  # no link followed, no FIFO waited for
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_NO_RENAMEAT2 = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})
_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def printable_name(name: str) -> str:
    """A file's name as a record can hold it: bytes that are not UTF-8 stand as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def fsync_folder(path: str) -> None:
    """The names in this folder are durable when it returns."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: str, content: bytes, mode: int = 0o600) -> None:
    """`path` has this content, durably: file fsync, rename, folder fsync. A reader sees the old content or the new.

    On an error before the rename the old file stands; on one after it, the new one is visible, perhaps not durable.
    """
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            os.fchmod(fd, mode)  # whatever the umask
            write_all(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    fsync_folder(folder or ".")


def append_durably(path: str, content: bytes, mode: int = 0o600) -> None:
    """`content` (whole lines) stands at the end of `path`, durably; one write() call. The file is made if missing.

    If an earlier append was cut off in mid-line, a newline goes first, so that the torn line costs only itself.
    On an error a part of `content` may stand there.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    created = False
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        fd = os.open(path, flags | os.O_CREAT, mode)
        created = True
    try:
        found = require_regular(fd, path)
        if found.st_size and os.pread(fd, 1, found.st_size - 1) != b"\n":
            content = b"\n" + content
        write_all(fd, content)
        os.fsync(fd)
    finally:
        os.close(fd)
    if created:
        fsync_folder(os.path.dirname(path) or ".")


def require_regular(fd: int, path: str) -> os.stat_result:
    """What fstat says of a regular file. Raises OSError (EINVAL) for anything else."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, f"{kind_of(found.st_mode)}, not a regular file", path)
    return found


def open_regular(path: str) -> tuple[int, os.stat_result]:
    """A descriptor for reading and what fstat says; regular files only, never through a link, never waiting."""
    fd = os.open(path, OPEN_SAFELY)
    try:
        return fd, require_regular(fd, path)
    except BaseException:
        os.close(fd)
        raise


def kind_of(mode: int) -> str:
    """What a person calls it."""
    kinds = {
        stat.S_IFREG: "a regular file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symlink", stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "something unknown")


def create_empty(path: str, mode: int, group: int | None) -> None:
    """A new empty file with this mode and group, its name durable. Raises FileExistsError: whoever made it wins."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        if group is not None:
            os.fchown(fd, -1, group)
        os.fchmod(fd, mode)  # after chown, which may clear bits; whatever the umask
        os.fsync(fd)
    finally:
        os.close(fd)
    fsync_folder(os.path.dirname(path) or ".")


def make_folder(path: str, mode: int, group: int | None) -> None:
    """A folder with this mode and group, its name durable. One that is there already stays as it is."""
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        return
    if group is not None:
        os.chown(path, -1, group)
    os.chmod(path, mode)
    fsync_folder(os.path.dirname(os.path.abspath(path)))


def regular_files(folder: str, preferred: str) -> dict[tuple[int, int], str]:
    """Names by device and inode, of regular files only; `preferred`, where a file has several. Empty if unreadable."""
    names: dict[tuple[int, int], str] = {}
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                key = (found.st_dev, found.st_ino)
                if stat.S_ISREG(found.st_mode) and (key not in names or entry.name == preferred):
                    names[key] = entry.name
    return names


def rename_to_free_name(old: str, new: str) -> None:
    """Rename that never overwrites. Raises FileExistsError if `new` is taken."""
    if _renameat2 is not None:
        if _renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in _NO_RENAMEAT2:
            raise OSError(code, os.strerror(code), old, None, new)
    if os.path.lexists(
        new
    ):  # an old kernel or file system: only the daemon makes such names, so this will do
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), old, None, new)
    os.rename(old, new)
