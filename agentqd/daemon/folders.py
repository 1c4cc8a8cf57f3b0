"""The state and runtime folders, made ready: modes, group, file system, lock."""

from __future__ import annotations

import grp
import os
from typing import Final

from agentqd.core.errors import ConfigError, StateFolderError
from agentqd.core.folders import Folders
from agentqd.system.mounts import file_system_of, is_network

_PRIVATE: Final = 0o700


def group_id(name: str | None) -> int | None:
    """Raises ConfigError if control.group names no group of this machine."""
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"control.group: there is no group {name!r} on this machine", problems=[]) from None


def make_ready(folders: Folders, gid: int | None) -> None:
    """Create what is missing and refuse what cannot be relied on. Raises StateFolderError."""
    _folder(folders.state, _PRIVATE)
    kind = file_system_of(folders.state)
    if is_network(kind):
        raise StateFolderError(
            f"{folders.state} lies on a network file system ({kind}); locks and fsync cannot be relied on there:"
            " use a folder on a local disk (--state-dir)",
            file_system=kind,
        )
    for path in (folders.tasks, folders.prompts, folders.queue, folders.runtime):
        _folder(path, _PRIVATE)
    if gid is not None:
        _open_to_group(folders, gid)


def _folder(path: str, mode: int) -> None:
    try:
        os.makedirs(path, mode, exist_ok=True)
    except OSError as error:
        raise StateFolderError(
            f"{path}: cannot be created: {error.strerror}; choose another with --state-dir / --runtime-dir",
            path=path,
        ) from error
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise StateFolderError(f"{path}: is not writable for uid {os.geteuid()}", path=path)


def _open_to_group(folders: Folders, gid: int) -> None:
    """Members may append to queue/, write prompts/ and reach the socket; nothing else."""
    try:
        for path, mode in (
            (folders.state, 0o710),
            (folders.runtime, 0o750),
            (folders.queue, 0o2770),
            (folders.prompts, 0o2770),
        ):
            os.chown(path, -1, gid)
            os.chmod(path, mode)
        if os.path.isfile(folders.queue_file) and not os.path.islink(folders.queue_file):
            os.chown(folders.queue_file, -1, gid)  # made before there was a group, or by a client
            os.chmod(folders.queue_file, 0o660)
    except OSError as error:
        raise StateFolderError(
            f"{error.filename}: cannot be opened to control.group: {error.strerror}"
        ) from error
