"""Declared paths made comparable: relative to the workdir, `~`, `..` and symlinks resolved, as far as they exist."""

from __future__ import annotations

import os

from agentqd.core.errors import InvalidTask
from agentqd.core.intents import has_glob


def expand_workdir(workdir: str | None) -> str | None:
    """A workdir as the worker gets it: `~` is the daemon's user's home."""
    return None if workdir is None else os.path.expanduser(workdir)


def resolve_intents(paths: list[str], workdir: str | None) -> list[tuple[str, str]]:
    """(resolved, as given) for each path, each resolved one once. Raises InvalidTask for a relative path without a workdir."""
    found: dict[str, str] = {}
    for given in paths:
        path = os.path.expanduser(given)
        if not os.path.isabs(path):
            if workdir is None:
                raise InvalidTask(
                    f"writes_to: {given!r} is relative and the task has no workdir; give an absolute path, or a workdir",
                    code="invalid_field",
                    field="writes_to",
                )
            path = os.path.join(os.path.expanduser(workdir), path)
        found.setdefault(_resolve(path), given)
    return list(found.items())


def _resolve(path: str) -> str:
    """realpath of the part before the first glob component; the rest is kept as it is, `..` folded."""
    parts = os.path.normpath(path).split("/") if not has_glob(path) else path.split("/")
    for n, part in enumerate(parts):
        if has_glob(part):
            head = os.path.realpath("/".join(parts[:n]) or "/")
            return os.path.normpath(os.path.join(head, *parts[n:]))
    return os.path.realpath(path)
