"""Who has a file open: fcntl(2) leases, taken and given back at once.

Invariants:
1. A lease is never held beyond the `with` block; a writer that opens the file meanwhile waits for just that long.
2. A lease being broken never kills the process: the kernel's word is set to SIGURG, which is ignored by default
   (the default, SIGIO, ends a process that does not expect it).
3. None means "cannot say" (file system, or a file of another user without CAP_LEASE): callers go by age then.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
from collections.abc import Iterator

_CANNOT_SAY = frozenset({
    errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOMEM, errno.ENOTTY,
})  # fmt: skip


def _take(fd: int, kind: int) -> bool | None:
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # must stand before the lease does
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
    except OSError as problem:
        if problem.errno == errno.EAGAIN:
            return False
        if problem.errno in _CANNOT_SAY:
            return None
        raise
    return True


def _give_back(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def has_writer(fd: int) -> bool | None:
    """Whether any process has this file open for writing. `fd` must be O_RDONLY. None: cannot say."""
    granted = _take(fd, fcntl.F_RDLCK)
    if granted:
        _give_back(fd)
    return None if granted is None else not granted


@contextlib.contextmanager
def sole_holder(fd: int) -> Iterator[bool | None]:
    """Whether `fd` (O_RDONLY) is the only open descriptor; nobody can open the file inside the `with` block.

    Writers are always seen; mere readers only on kernels that count them. None: cannot say.
    """
    granted = _take(fd, fcntl.F_WRLCK)
    try:
        yield granted
    finally:
        if granted:
            _give_back(fd)


def is_open_elsewhere(path: str) -> bool | None:
    """Whether any process, this one included, has the file open. None: cannot say. Raises OSError if it cannot be opened."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        with sole_holder(fd) as alone:
            return None if alone is None else not alone
    finally:
        os.close(fd)
