"""Names of files on this machine for names that strangers chose.

Promises:
1. What comes out is relative, has no `..`, no empty part, no control character, and no part that is too long for a file
   system; joined to a folder it stays below it.
2. The same names in the same order give the same paths; two names never give one path, also where a file system knows no
   difference between `A` and `a`.
"""

from __future__ import annotations

import hashlib

PART_BYTES_MAX = 200
PATH_BYTES_MAX = 700  # macOS takes 1,024 for a whole path
NAME_BYTES_MAX = 100
_IN_NAMES = "._-+@="


def folder_name(name: object, task_id: str) -> str:
    """`NAME-ID`: letters and digits of any script stay, anything else becomes `_`."""
    text = name if isinstance(name, str) else ""
    plain = "".join(char if char.isalnum() or char in _IN_NAMES else "_" for char in text)
    return f"{_fitted(plain.lstrip('.-'), NAME_BYTES_MAX) or 'task'}-{task_id}"


def part_name(part: str) -> str:
    """One part of a path. Raises ValueError where it would lead elsewhere."""
    if part in ("", ".", "..") or "/" in part or "\0" in part:
        raise ValueError(f"{part!r} is not a file's name")
    shown = "".join(char if char.isprintable() else _escaped(char) for char in part)
    if len(shown.encode("utf-8", "surrogatepass")) <= PART_BYTES_MAX:
        return shown
    return f"{_fitted(shown, PART_BYTES_MAX - 17)}~{_digest(part)}"


class LocalNames:
    """The paths of one folder's files, given one after the other."""

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def place(self, path: str) -> str:
        """Where `path` (parts separated by `/`) is kept. Raises ValueError for one that leads out of the folder."""
        parts = [part_name(part) for part in path.split("/")]
        local = "/".join(parts)
        if len(local.encode("utf-8", "surrogatepass")) > PATH_BYTES_MAX or not self._is_free(local):
            local = f"{_digest(path)}~{parts[-1]}"
            if len(local.encode("utf-8", "surrogatepass")) > PART_BYTES_MAX + 17 or not self._is_free(local):
                raise ValueError(f"{path!r} stands there twice")
        key = _folded(local)
        self._files.add(key)
        self._folders.update(_above(key))
        return local

    def _is_free(self, local: str) -> bool:
        key = _folded(local)
        return key not in self._files and key not in self._folders and not self._files & set(_above(key))


def _above(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _folded(path: str) -> str:
    """Equal for what some file system takes for equal (case, and accents in one or two characters)."""
    if path.isascii():
        return path.lower()
    import unicodedata

    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())


def _fitted(text: str, bytes_max: int) -> str:
    return text.encode("utf-8", "replace")[:bytes_max].decode("utf-8", "ignore")


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
