"""Does a folder tell names apart that differ only by case? Asked of the file system; nothing is written.

ext4, f2fs and tmpfs say it for each folder (FS_CASEFOLD_FL); FAT, NTFS, HFS+ and SMB shares never tell them apart; what lies
behind FUSE, 9p or VirtualBox (a share of a Mac, say) is asked by looking one of its names up in the other case.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import os
import sys
import unicodedata
from itertools import islice
from typing import Final

_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_CASEFOLD_FL: Final = 0x40000000
_SAYS: Final = frozenset({0xEF53, 0xF2F52010, 0x01021994})  # ext4, f2fs, tmpfs
_NEVER_TELLS_APART: Final = frozenset({
    0x4D44, 0x2011BAB0, 0x5346544E, 0x7366746E, 0x4244, 0x482B, 0xFF534D42, 0xFE534D42, 0x517B,
})  # vfat, exfat, ntfs, ntfs3, hfs, hfsplus, cifs, smb2, smb  # fmt: skip
_MAY: Final = frozenset(
    {0x65735546, 0x01021997, 0x786F4256, 0x794C7630}
)  # fuse (virtiofs), 9p, vboxsf, overlay
_NAMES_TRIED: Final = 64

_libc: Final = ctypes.CDLL(None, use_errno=True)


def fold(name: str) -> str:
    """One spelling for all that such a folder takes for the same name (ext4: Unicode case folding over NFD)."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


class Folders:
    """Remembers what it was told; for the paths of one task."""

    def __init__(self) -> None:
        self._known: dict[str, bool | None] = {}

    def ignores_case(self, folder: str) -> bool | None:
        """None: there is no such folder, or it cannot be asked."""
        if folder not in self._known:
            self._known[folder] = _ignores_case(folder)
        return self._known[folder]


def _ignores_case(folder: str) -> bool | None:
    kind = _kind(folder)
    if kind is None or not os.path.isdir(folder):
        return None
    if kind in _NEVER_TELLS_APART:
        return True
    if kind in _SAYS:
        return _flagged(folder)
    return kind in _MAY and _answers_in_the_other_case(folder)


def _kind(path: str) -> int | None:
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        return None
    return int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder) & 0xFFFFFFFF


def _flagged(folder: str) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        flags = array.array("l", [0])
        fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, flags, True)
        return bool(flags[0] & _FS_CASEFOLD_FL)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _answers_in_the_other_case(folder: str) -> bool:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in islice(entries, _NAMES_TRIED):
            other = entry.name.swapcase()
            if other != entry.name:
                with contextlib.suppress(OSError):
                    seen = os.stat(os.path.join(folder, other), follow_symlinks=False)
                    return seen.st_ino == entry.inode()
                return False
    return False
