"""What a supervisor takes hold of at its start: folders, the lock, the socket."""

from __future__ import annotations

import contextlib
import os
import socket

from agentqd.core.errors import StateFolderError
from agentqd.core.folders import Folders
from agentqd.supervisor.limits import LISTEN_BACKLOG


def make_folders(folders: Folders) -> int:
    """Create what is missing (0700); returns a descriptor of STATE/tasks. Raises StateFolderError."""
    try:
        for path in (folders.state, folders.tasks, folders.runtime):
            os.makedirs(path, 0o700, exist_ok=True)
        return os.open(folders.tasks, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as problem:
        raise StateFolderError(
            f"cannot use {problem.filename or folders.state}: {problem.strerror}"
        ) from problem


def bind_socket(path: str) -> socket.socket:
    """A listening socket, 0600. A stale one is replaced, one that answers is not. Raises StateFolderError.

    The folder is entered by descriptor, so that a long path does not hit the kernel's 107 bytes.
    """
    folder_fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        address = f"/proc/self/fd/{folder_fd}/{os.path.basename(path)}"
        _check_unused(address, path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)
        old_umask = os.umask(0o177)
        try:
            listener.bind(address)
        finally:
            os.umask(old_umask)
        listener.listen(LISTEN_BACKLOG)
    except OSError as problem:
        listener.close()
        raise StateFolderError(f"cannot listen on {path}: {problem.strerror}") from problem
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(folder_fd)
    return listener


def _check_unused(address: str, path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            return
        except OSError:
            pass  # a full backlog, for one: somebody is there
    raise StateFolderError(f"{path} is in use by another supervisor, of another state folder")
