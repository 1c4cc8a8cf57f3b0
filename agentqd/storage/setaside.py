"""Task folders on their way out: set aside before the commit that forgets their task, removed after it.

An id that retention frees may be given to a new task at once, and its worker must not find the old one's folder: there would be
an `exit.json` in it. So the old folder loses its name first.

Invariants:
1. When the commit is durable, nothing stands under the freed id: the renames are durable before it.
2. A folder whose commit did not happen goes back to its name. Which of the two it was, the journal tells at the next start: the
   name set aside holds the task's seq, and a seq is never used again.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterable
from typing import Final

from agentqd.storage.files import fsync_folder

_NAME: Final = re.compile(r"([0-9]{1,19})\.([A-Za-z0-9_-]+)")


def set_aside(tasks: str, aside: str, seq: int, task_id: str) -> str | None:
    """The folder's new path; None if it has none. Not yet durable: `make_durable`. Raises OSError."""
    path, folder = f"{aside}/{seq}.{task_id}", f"{tasks}/{task_id}"
    if not os.path.lexists(folder):
        return None
    with contextlib.suppress(FileExistsError):
        os.mkdir(aside, 0o700)
    try:
        os.rename(folder, path)
    except PermissionError:  # its worker has taken the right to write away
        _open_up(folder)
        os.rename(folder, path)
    return path


def make_durable(tasks: str, aside: str) -> None:
    """Raises OSError."""
    fsync_folder(aside)
    fsync_folder(tasks)


def put_back(tasks: str, paths: Iterable[str]) -> None:
    """Their tasks stay. Raises OSError; then the rest is found at the next start."""
    for path in paths:
        match = _NAME.fullmatch(os.path.basename(path))
        assert match is not None, path
        os.rename(path, f"{tasks}/{match[2]}")


def remove(paths: Iterable[str]) -> None:
    """What cannot be removed now is found at the next start. Raises nothing."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
        if os.path.lexists(path):  # folders in it that their worker has closed
            for folder, inner, _ in os.walk(path):
                for name in inner:
                    with contextlib.suppress(OSError):
                        _open_up(f"{folder}/{name}")
            shutil.rmtree(path, ignore_errors=True)


def left_over(aside: str) -> dict[str, int]:
    """What lies there, with the seq of its task. What is not ours is left out. Raises OSError."""
    try:
        names = os.listdir(aside)
    except FileNotFoundError:
        return {}
    found = {name: _NAME.fullmatch(name) for name in names}
    return {f"{aside}/{name}": int(match[1]) for name, match in found.items() if match is not None}


def _open_up(folder: str) -> None:
    """A link, whatever it leads to, stays as it is. Raises OSError."""
    if stat.S_ISDIR(os.lstat(folder).st_mode):
        os.chmod(folder, 0o700)
