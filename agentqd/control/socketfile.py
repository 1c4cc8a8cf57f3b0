"""The control socket's file: made under a temporary name with its final mode, then renamed into place.

Promises:
1. Nobody can connect before mode and group are what the config says.
2. A socket that somebody serves is never replaced; a dead one, or none, is.
3. The folder is entered by descriptor, so that a long path does not hit the kernel's 107 bytes.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import socket
import stat
from typing import Final, NamedTuple

from agentqd.core.errors import StateFolderError
from agentqd.core.settings import Control

BACKLOG: Final = 512
_PROBE_S: Final = 1.0


class Mode(NamedTuple):
    mode: int
    gid: int | None


class SocketFile(NamedTuple):
    """A listening socket, and which file it is."""

    listener: socket.socket
    identity: tuple[int, int]  # device, inode


def mode_for(control: Control) -> Mode:
    """0600; 0660 with a group; or what `control.mode` says. A group that does not exist opens the socket to nobody."""
    gid = None
    if control.group is not None:
        try:
            gid = grp.getgrnam(control.group).gr_gid
        except KeyError:
            return Mode(0o600, None)
    default = 0o600 if gid is None else 0o660
    if control.mode is None:
        return Mode(default, gid)
    try:
        return Mode(int(control.mode, 8) & 0o777, gid)
    except ValueError:
        return Mode(default, gid)


def make_socket(path: str, wanted: Mode) -> SocketFile:
    """Raises StateFolderError: somebody serves it already, or the file cannot be made."""
    folder, name = os.path.split(path)
    try:
        folder_fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StateFolderError(
            f"{folder}: {error.strerror}; the control socket goes there", path=folder
        ) from error
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = f".{name}.{os.getpid()}.tmp"
    try:
        _require_unused(folder_fd, name, path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder_fd)
        listener.bind(f"/proc/self/fd/{folder_fd}/{temporary}")
        identity = _finish(folder_fd, temporary, wanted)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        os.rename(temporary, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
    except OSError as error:
        _give_up(listener, folder_fd, temporary)
        raise StateFolderError(f"cannot listen on {path}: {error.strerror or error}", path=path) from error
    except BaseException:
        _give_up(listener, folder_fd, temporary)
        raise
    finally:
        os.close(folder_fd)
    return SocketFile(listener, identity)


def _finish(folder_fd: int, name: str, wanted: Mode) -> tuple[int, int]:
    if wanted.gid is not None:
        os.chown(name, -1, wanted.gid, dir_fd=folder_fd)
    os.chmod(name, wanted.mode, dir_fd=folder_fd)
    found = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    return found.st_dev, found.st_ino


def _give_up(listener: socket.socket, folder_fd: int, temporary: str) -> None:
    listener.close()
    with contextlib.suppress(OSError):
        os.unlink(temporary, dir_fd=folder_fd)


def _require_unused(folder_fd: int, name: str, path: str) -> None:
    try:
        found = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise StateFolderError(f"{path} is there and is no socket; move it away", path=path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(f"/proc/self/fd/{folder_fd}/{name}")
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.ENOENT):
                return  # a dead daemon's
            raise
    raise StateFolderError(f"another agentqd serves {path}; give this one another --runtime-dir", path=path)


def apply_mode(path: str, wanted: Mode) -> None:
    """An edited `control.group` or `control.mode`, on the file that is there. Raises OSError."""
    if wanted.gid is not None:
        os.chown(path, -1, wanted.gid, follow_symlinks=False)
    os.chmod(path, wanted.mode)


def is_ours(path: str, identity: tuple[int, int]) -> bool | None:
    """None: there is no such file."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino) == identity


def remove_ours(path: str, identity: tuple[int, int]) -> None:
    with contextlib.suppress(OSError):
        if is_ours(path, identity):
            os.unlink(path)
