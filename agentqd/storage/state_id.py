"""The state folder's own id: 32 hex digits in STATE/state_id, made once, by whoever comes first."""

from __future__ import annotations

import os
import re

from agentqd.core.errors import StateFolderError

_ID = re.compile(rb"[0-9a-f]{32}\n?")


def load_state_id(path: str) -> str:
    """The id in the file `path`; it is created (atomically, fsynced) if absent.

    Two programs at once end up with the same id. Raises StateFolderError if the file cannot be used.
    """
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    temporary = f"{path}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
    try:
        _create(path, temporary)
    except OSError as problem:
        raise StateFolderError(
            f"{path}: cannot create the state folder's id: {problem.strerror}"
        ) from problem
    return _read(path)


def _create(path: str, temporary: str) -> None:
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, os.urandom(16).hex().encode() + b"\n")
        os.fsync(fd)
    finally:
        os.close(fd)
    try:
        os.link(temporary, path)  # the O_EXCL step: whole content or nothing, the first one wins
    except FileExistsError:
        pass
    finally:
        os.unlink(temporary)
    folder_fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder_fd)
    finally:
        os.close(folder_fd)


def _read(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            content = os.read(fd, 64)
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise StateFolderError(f"{path}: cannot read the state folder's id: {problem.strerror}") from problem
    if not _ID.fullmatch(content):
        raise StateFolderError(
            f"{path}: not a state id (32 hex digits); restore it from a backup, do not make it up"
        )
    return content.decode().strip()
