"""`blobs/`: our own copies of large or attached files. The states between a copy and its removal: docs/crash-states.md.

Invariants:
1. Each copy has a name of its own, `SHA256-RANDOM`, that is never given again. It belongs to the hand-over that made it until a
   commit gives it to ONE entry, and goes with that entry. Nobody removes what another names, in whatever order they come.
2. It is durable before anything names it.
3. The same content lies on the disk once, as far as the file system has hard links: copies of it are names of one file. The
   name `.once-SHA256` is only where the next copy finds it. The kernel counts the names, so no order of two of these steps
   loses content; at worst it lies there twice.
(The copies of an agentqd before schema 7 are called `SHA256`, and several entries may name one. None is made any more.)
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Collection, Iterable
from typing import Final

import msgspec

from agentqd.storage.files import fsync_folder
from agentqd.system.fsops import write_all

_CHUNK: Final = 1024 * 1024
_PIECE: Final = ".tmp-"
_ONCE: Final = ".once-"
_COPY: Final = re.compile(r"[0-9a-f]{64}(-[0-9a-f]{16})?")


class Copy(msgspec.Struct, frozen=True):
    sha256: str
    path: str
    bytes: int


class Copies:
    """The copies that one scan makes; `keep_only` removes those that nothing came of."""

    def __init__(self, blobs: str) -> None:
        self._blobs = blobs
        self._made: list[str] = []

    def add(self, descriptor: int, size: int) -> Copy:
        """Raises OSError."""
        copy = copy_in(descriptor, size, self._blobs)
        self._made.append(copy.path)
        return copy

    def keep_only(self, paths: Collection[str]) -> None:
        remove(path for path in self._made if path not in paths)


def copy_in(descriptor: int, size: int, blobs: str) -> Copy:
    """The first `size` bytes (fewer, if the file has shrunk), hashed while copied, fsynced with its folder. Raises OSError."""
    os.makedirs(blobs, mode=0o700, exist_ok=True)
    temporary = f"{blobs}/{_PIECE}{os.getpid()}-{os.urandom(6).hex()}"
    out = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    made = [temporary]
    try:
        sha256, copied = _copy(descriptor, size, out)
        path = f"{blobs}/{sha256}-{os.urandom(8).hex()}"
        made.append(path)
        if _linked(blobs, sha256, path):
            os.unlink(temporary)
        else:
            os.fsync(out)
            os.rename(temporary, path)
            _offer(blobs, sha256, path)
        fsync_folder(blobs)
    except BaseException:
        with contextlib.suppress(OSError):  # the next start finds what cannot be removed now
            remove(made)
        raise
    finally:
        os.close(out)
    return Copy(sha256, path, copied)


def remove(paths: Iterable[str]) -> None:
    """These copies' names; what has gone already is no error. Raises OSError."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        blobs, name = os.path.split(path)
        _forget_if_last(f"{blobs}/{_ONCE}{digest_of(name)}")


def digest_of(name: str) -> str:
    """The sha256 that a copy's name says."""
    return os.path.basename(name).partition("-")[0]


def names_of(blobs: str) -> list[str]:
    """All that lies there now. Raises OSError."""
    try:
        return os.listdir(blobs)
    except FileNotFoundError:
        return []


def remove_left_over(blobs: str, names: Iterable[str], older_than_s: float) -> tuple[int, list[str]]:
    """Of `names`, which no entry has: pieces of copies, copies that are older, and `.once-...` of which no copy is left.

    Returns how many copies have gone, and the names that are still too young. What is not ours stays. Raises OSError.
    """
    gone, young = 0, []
    for name in names:
        path = f"{blobs}/{name}"
        if name.startswith(_ONCE):
            _forget_if_last(path)
        elif name.startswith(_PIECE):
            remove([path])
        elif _COPY.fullmatch(name):
            try:
                is_old = os.stat(path, follow_symlinks=False).st_mtime < older_than_s
            except FileNotFoundError:
                continue
            if is_old:
                remove([path])
                gone += 1
            else:
                young.append(name)
    return gone, young


def _copy(descriptor: int, size: int, out: int) -> tuple[str, int]:
    digest, offset = hashlib.sha256(), 0
    while offset < size and (chunk := os.pread(descriptor, min(_CHUNK, size - offset), offset)):
        digest.update(chunk)
        write_all(out, chunk)
        offset += len(chunk)
    return digest.hexdigest(), offset


# The same content once.


def _linked(blobs: str, sha256: str, path: str) -> bool:
    """`path` is now one more name of a file that has this content already, and is durable."""
    once = f"{blobs}/{_ONCE}{sha256}"
    try:
        descriptor = os.open(once, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        digest = hashlib.sha256()
        while chunk := os.read(descriptor, _CHUNK):
            digest.update(chunk)
        if digest.hexdigest() != sha256:  # damaged on disk: what is handed over now is sound
            os.unlink(once)
            return False
        os.link(once, path, follow_symlinks=False)
    except OSError:  # gone meanwhile, as many names as the file system allows, a block that cannot be read
        return False
    finally:
        os.close(descriptor)
    return True


def _offer(blobs: str, sha256: str, path: str) -> None:
    with contextlib.suppress(OSError):  # another has done so; a file system without hard links
        os.link(path, f"{blobs}/{_ONCE}{sha256}", follow_symlinks=False)


def _forget_if_last(once: str) -> None:
    """A copy that takes its name from it in this very instant keeps its file: it is a name like any other."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(once, follow_symlinks=False).st_nlink == 1:
            os.unlink(once)
