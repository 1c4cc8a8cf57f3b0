"""The exclusive lock of a state folder. Never the only guard: the journal checks the daemon's epoch in every transaction."""

from __future__ import annotations

import errno
import fcntl
import os

from agentqd.core.errors import StateFolderError


def take_lock(path: str, who: str) -> int:
    """Hold the lock as long as the returned descriptor is open (it is not inherited).

    Raises StateFolderError naming the pid that holds it. The lock is taken exclusive at once, never upgraded.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StateFolderError(f"cannot open {path}: {error.strerror}", path=path) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        if error.errno not in {errno.EAGAIN, errno.EACCES}:
            raise StateFolderError(f"cannot lock {path}: {error.strerror}", path=path) from error
        raise StateFolderError(
            f"another {who} (pid {holder}) already serves this state folder: it holds {path}",
            pid=holder,
            path=path,
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    return descriptor
