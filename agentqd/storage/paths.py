"""Declared paths made comparable: one spelling for everything that names the same place, as far as it exists.

Promises:
1. The part before the first pattern is resolved as the kernel would: from the workdir, `~`, `..`, symlinks; a tail that does
   not exist yet through the folder that does. What was written there as a plain name stays one, whatever letters it has.
2. Where a folder does not tell names apart by case, names below it are folded; elsewhere `A` and `a` are two places.
3. What cannot be compared soundly is refused (InvalidTask says what to write instead), never guessed.

Not seen: hard links, what a pattern passes over (symlinks, other mounts), and symlinks that change after the admission.
"""

from __future__ import annotations

import glob
import os
import re
from typing import Final

from agentqd.core.errors import InvalidTask
from agentqd.core.intents import has_glob
from agentqd.core.limits import PATH_BYTES_MAX, PATH_NAME_BYTES_MAX
from agentqd.system.letters import Folders, fold

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_BRACES: Final = re.compile(r"\{[^{}/]*,[^{}/]*\}")
_ESCAPED: Final = re.compile(r"\\[*?\[]")
_NOT_THESE: Final = re.compile(r"\[!.[^\]]*\]")


def expand_workdir(workdir: str | None) -> str | None:
    """A workdir as the worker gets it: `~` is the daemon's user's home."""
    return None if workdir is None else os.path.expanduser(workdir)


def resolve_intents(paths: list[str], workdir: str | None) -> list[tuple[str, str]]:
    """(resolved, as given) for each path, each resolved one once. Raises InvalidTask."""
    found: dict[str, str] = {}
    folders = Folders()
    for given in paths:
        _check(given)
        resolved = _resolve(given, workdir, folders)
        _check_length(resolved, given)
        found.setdefault(resolved, given)
    return list(found.items())


def _resolve(given: str, workdir: str | None, folders: Folders) -> str:
    parts = _without_dots(given)
    n = next((n for n, part in enumerate(parts) if has_glob(part)), len(parts))
    plain = os.path.expanduser("/".join(parts[:n])) or ("/" if given.startswith("/") else "")
    if not os.path.isabs(plain):
        if workdir is None:
            raise _invalid(
                given, "is relative and the task has no workdir; give an absolute path, or a workdir"
            )
        plain = os.path.join(os.path.expanduser(workdir), plain)
    names = [name for name in os.path.realpath(plain).split("/") if name]
    names, ignores_case = _folded(names, folders)
    pattern = parts[n:]
    if ignores_case:
        pattern = [fold(_NOT_THESE.sub("?", part)) for part in pattern]
    return "/" + "/".join([*map(glob.escape, names), *pattern])


def _without_dots(given: str) -> list[str]:
    """Its components; a `..` behind a pattern takes away what stands before it, one before is left to the file system."""
    parts: list[str] = []
    for part in given.split("/"):
        if part != ".." or not any(map(has_glob, parts)):
            parts += [] if part == "." or (part == "" and parts) else [part]
        elif parts.pop() == "**":
            raise _invalid(given, "has `..` behind `**`; write the path without it")
    return parts


def _folded(names: list[str], folders: Folders) -> tuple[list[str], bool]:
    """The names, folded where their folder does not tell case apart; and whether the last one is such a folder."""
    ignores_case = bool(folders.ignores_case("/"))
    folder, there = "", True
    found = []
    for name in names:
        found.append(fold(name) if ignores_case else name)
        if there:
            folder = f"{folder}/{name}"
            answer = folders.ignores_case(folder)
            if answer is None:
                there = False  # what is made below takes after the last folder that is there
            else:
                ignores_case = answer
    return found, ignores_case


def _check(given: str) -> None:
    """What a path may hold at all. The text is shown in pages, alerts and logs."""
    if not given.strip():
        raise _invalid(given, "is empty; name a file or a folder")
    if found := _CONTROL.search(given):
        raise _invalid(
            given, f"holds the control character U+{ord(found[0]):04X}; write intents cannot name such files"
        )
    if found := _BRACES.search(given):
        raise _invalid(
            given, f"holds {found[0]}: braces are not expanded; give each path by itself ([{{] is the letter)"
        )
    if found := _ESCAPED.search(given):
        raise _invalid(
            given, f"holds {found[0]}: a backslash quotes nothing here; [{found[0][1]}] is the letter"
        )


def _check_length(resolved: str, given: str) -> None:
    if _CONTROL.search(resolved):
        raise _invalid(
            given,
            f"leads to {ascii(resolved)[:200]}: names with control characters or other than UTF-8 cannot be claimed",
        )
    if len(os.fsencode(resolved)) > PATH_BYTES_MAX:
        raise _invalid(given, f"is longer than {PATH_BYTES_MAX} bytes when resolved")
    if any(len(os.fsencode(name)) > PATH_NAME_BYTES_MAX for name in resolved.split("/")):
        raise _invalid(given, f"has a name of more than {PATH_NAME_BYTES_MAX} bytes")


def _invalid(given: str, what: str) -> InvalidTask:
    shown = ascii(given) if _CONTROL.search(given) else repr(given)
    if len(shown) > 200:
        shown = shown[:200] + "..."
    return InvalidTask(f"writes_to: {shown} {what}", code="invalid_field", field="writes_to")
