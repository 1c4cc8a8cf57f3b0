"""Where a keeper is found on the laptop: `BOX.sock` and `BOX.lock` in a folder that only its user can open.

Small and quick to import: every verb with `--box` loads it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import NamedTuple

from agentqd.core.errors import NotPermitted

PATH_BYTES_MAX = 100  # sun_path has 104 bytes on macOS, 108 on Linux
FOLDER_MODE = 0o700


class Place(NamedTuple):
    """The files of one box's keeper."""

    socket: str
    lock: str
    log: str  # what a keeper says when it falls over; emptied by the next one


def config_file(env: Mapping[str, str]) -> str:
    """The laptop's config, whether it is there or not."""
    return f"{_xdg(env, 'XDG_CONFIG_HOME', '.config')}/agentqctl/config.yaml"


def state_folder(env: Mapping[str, str]) -> str:
    """What the laptop keeps: its client id, its spool."""
    return f"{_xdg(env, 'XDG_STATE_HOME', '.local/state')}/agentqctl"


def spool_root(env: Mapping[str, str]) -> str:
    """The folder of the spools: one of each box, if anything was ever kept for it."""
    return f"{state_folder(env)}/spool"


def find_place(box: str, env: Mapping[str, str], uid: int) -> Place:
    """The keeper's files; the folder is made, and is ours alone. Raises NotPermitted where it is somebody else's.

    A runtime folder whose path is too long for a socket is replaced by one below /tmp.
    """
    xdg = env.get("XDG_RUNTIME_DIR", "")
    short = f"/tmp/agentqctl-{uid}"  # noqa: S108 - checked below: ours, and closed to others
    folder = f"{xdg.rstrip('/')}/agentqctl" if xdg.startswith("/") and os.path.isdir(xdg) else short
    name = box
    if len(os.fsencode(f"{folder}/{box}.sock")) > PATH_BYTES_MAX:
        import hashlib

        name = f"{box}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]}"
        folder = short
    _make_private(folder, uid)
    return Place(f"{folder}/{name}.sock", f"{folder}/{name}.lock", f"{folder}/{name}.log")


def config_stamp(path: str) -> list[str | int]:
    """Tells a keeper that was started from another config, or before it was edited."""
    try:
        found = os.stat(path)
    except OSError:
        return [path, 0, 0]
    return [path, found.st_mtime_ns, found.st_size]


def _make_private(folder: str, uid: int) -> None:
    try:
        os.mkdir(folder, FOLDER_MODE)
    except FileExistsError:
        pass
    except OSError as error:
        raise NotPermitted(f"{folder}: {error.strerror}; set XDG_RUNTIME_DIR to a folder of yours") from None
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid:
        raise NotPermitted(f"{folder} is not a folder of yours: somebody else made it; remove it")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise NotPermitted(f"{folder} is open to others; mend it: chmod 700 {folder}")


def _xdg(env: Mapping[str, str], name: str, below_home: str) -> str:
    given = env.get(name, "")
    if given.startswith("/"):
        return given.rstrip("/") or "/"
    return f"{env.get('HOME') or os.path.expanduser('~')}/{below_home}"
