"""Write intents: do two declared paths overlap? Pure; resolving names on disk is `storage.paths`.

Rules:
1. A path covers itself and, being a folder or not, everything below it.
2. A glob (`*`, `?`, `[...]`; `**` for any depth) covers what it can match, and what lies below that.
3. Where two globs may meet, they do: a false alarm is a wait, a miss is a stomped file.
4. Two paths overlap only if the `head` of one is the other's, or lies above it or below it: so claims are found by it.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Final

_MAGIC: Final = frozenset("*?[")


def has_glob(text: str) -> bool:
    return not _MAGIC.isdisjoint(text)


def overlap(left: str, right: str) -> bool:
    """May something be written under both of these absolute, resolved paths or globs?"""
    if not has_glob(left) and not has_glob(right):
        return (
            left == right
            or left.startswith(right.rstrip("/") + "/")
            or right.startswith(left.rstrip("/") + "/")
        )
    return _meet(_parts(left), _parts(right))


def head(path: str) -> str:
    """The part of a resolved path that is no pattern: the folder that holds all it can match, or a plain path itself."""
    if not has_glob(path):
        return path
    return "/" + "/".join(_before_magic(_parts(path)))


def at_or_above(path: str) -> list[str]:
    """A plain path and every folder that it lies in, the nearest first."""
    found = [path]
    while path != "/":
        path = path[: path.rfind("/")] or "/"
        found.append(path)
    return found


def below(path: str) -> tuple[str, str]:
    """What lies below a plain path sorts (by bytes) between these two."""
    stem = path.rstrip("/")
    return stem + "/", stem + "0"  # "0" follows "/"


def _before_magic(parts: tuple[str, ...]) -> tuple[str, ...]:
    for n, part in enumerate(parts):
        if has_glob(part):
            return parts[:n]
    return parts


@lru_cache(maxsize=4096)
def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part)


def _meet(left: tuple[str, ...], right: tuple[str, ...]) -> bool:
    """Component by component; the end of either covers all that is left of the other."""
    reached = {(0, 0)}
    seen: set[tuple[int, int]] = set()
    while reached:
        i, j = reached.pop()
        if (i, j) in seen:
            continue
        seen.add((i, j))
        if i == len(left) or j == len(right):
            return True
        if left[i] == "**":
            reached |= {(i + 1, j), (i, j + 1)}
        if right[j] == "**":
            reached |= {(i, j + 1), (i + 1, j)}
        if left[i] != "**" and right[j] != "**" and _component(left[i], right[j]):
            reached.add((i + 1, j + 1))
    return False


def _component(left: str, right: str) -> bool:
    if has_glob(left) and has_glob(right):
        return True
    return fnmatchcase(right, left) if has_glob(left) else fnmatchcase(left, right)
