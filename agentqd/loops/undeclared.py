"""What an attempt changed below its workdir and had not declared: a warning, never a verdict. Blocking file work.

A file counts as changed if its change time (ctime, which nobody can set) is not older than the attempt's `started` file; both
come from the same kernel's clock, so there is no snapshot to keep, and a restart of the daemon changes nothing. Hence:
1. What others changed below the same workdir at the same time counts too; nobody can tell them apart.
2. A removed file shows only as a change of its folder (`folder/`), if nothing else was changed in that folder.
3. On a network file system the times are its server's.
Links are not followed, other mounts and the insides of `.git` not entered, our own state left out. Bounded in files and time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from agentqd.core import limits
from agentqd.core.errors import InvalidTask
from agentqd.core.intents import overlap
from agentqd.storage.files import printable_name
from agentqd.storage.paths import resolve_intents

_SKIPPED: Final = frozenset({".git"})
_NAME_CHARS_MAX: Final = 300
_PLAIN: Final = str.maketrans("*?[", "\x01\x01\x01")  # a file that is called `*` is no pattern


class Undeclared(msgspec.Struct, frozen=True):
    """`paths` are relative to the workdir, in order, the first UNDECLARED_NAMED_MAX of `count`."""

    paths: list[str]
    count: int
    incomplete: bool  # too many files, or too slow: what was not looked at may hold more

    def as_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "paths": self.paths,
            "count": self.count,
            "truncated": self.count > len(self.paths),
        }
        return {**data, "incomplete": True} if self.incomplete else data


class Asked(msgspec.Struct, frozen=True):
    workdir: str
    attempt_folder: str
    writes_to: list[str]  # as declared
    ours: tuple[str, ...]  # the daemon's own folders


def look(asked: Asked, clock: Callable[[], float] = time.monotonic) -> Undeclared | None:
    """None: it cannot be known (no `started` file, no such workdir)."""
    try:
        began_ns = os.stat(f"{asked.attempt_folder}/started", follow_symlinks=False).st_ctime_ns
        root = os.path.realpath(asked.workdir)
        device = os.stat(root).st_dev
    except OSError:
        return None
    declared = _declared(asked, root)
    ours = frozenset(os.path.realpath(folder) for folder in asked.ours)
    walk = _Walk(root, device, ours, clock)
    found = [path for path in walk.changed(began_ns) if not _is_declared(path, declared)]
    names = sorted(_shown(os.path.relpath(path, root)) + "/" * path.endswith("/") for path in found)
    return Undeclared(names[: limits.UNDECLARED_NAMED_MAX], len(found), walk.incomplete)


def _declared(asked: Asked, root: str) -> list[str]:
    """As the claim was resolved, and as it was written: a declared name may have become a link since."""
    found = [os.path.normpath(os.path.join(root, os.path.expanduser(path))) for path in asked.writes_to]
    with contextlib.suppress(InvalidTask):
        found += [path for path, _ in resolve_intents(asked.writes_to, asked.workdir)]
    return found


def _is_declared(path: str, declared: list[str]) -> bool:
    """A changed folder is declared if something that was may lie in it."""
    plain = path.translate(_PLAIN)
    return any(overlap(each, f"{plain}*" if path.endswith("/") else plain) for each in declared)


def _shown(name: str) -> str:
    name = printable_name(name)
    return (
        name
        if len(name) <= _NAME_CHARS_MAX
        else f"{name[: _NAME_CHARS_MAX // 2]}...{name[-_NAME_CHARS_MAX // 2 :]}"
    )


class _Walk:
    """One look over a tree, folder by folder."""

    def __init__(self, root: str, device: int, ours: frozenset[str], clock: Callable[[], float]) -> None:
        self._waiting = [root]
        self._device = device
        self._ours = ours
        self._clock = clock
        self._until = clock() + limits.UNDECLARED_LOOK_S
        self._left = limits.UNDECLARED_FILES_MAX
        self.incomplete = False

    def changed(self, began_ns: int) -> Iterator[str]:
        """Changed files, and folders (with a slash at the end) that have changed without a changed file in them."""
        while self._waiting and not self.incomplete:
            folder = self._waiting.pop()
            touched = False
            for entry, status in self._entries(folder):
                is_changed = status.st_ctime_ns >= began_ns
                touched = touched or is_changed
                if entry.is_dir(follow_symlinks=False):
                    if (
                        status.st_dev == self._device
                        and entry.name not in _SKIPPED
                        and entry.path not in self._ours
                    ):
                        self._waiting.append(entry.path)
                elif is_changed:
                    yield entry.path
            if not touched and not self.incomplete and _changed_at(folder) >= began_ns:
                yield f"{folder}/"

    def _entries(self, folder: str) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
        try:
            entries = os.scandir(folder)
        except OSError:
            return
        with entries:
            for entry in entries:
                self._left -= 1
                if self._left < 0 or self._clock() > self._until:
                    self.incomplete = True
                    return
                try:
                    yield entry, entry.stat(follow_symlinks=False)
                except OSError:
                    continue


def _changed_at(folder: str) -> int:
    try:
        return os.stat(folder, follow_symlinks=False).st_ctime_ns
    except OSError:
        return 0
