"""The birth time of a file, which `os.stat` does not give on Linux: statx(2) through ctypes.

With device and inode it names a file for good: an inode number is used again, a birth time is not.
"""

from __future__ import annotations

import ctypes
import struct

AT_EMPTY_PATH = 0x1000
STATX_BTIME = 0x800
_BUFFER_BYTES = 256
_BTIME_OFFSET = 0x50  # struct statx: stx_btime {s64 tv_sec, u32 tv_nsec}

_statx = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
if _statx is not None:
    _statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p]
    _statx.restype = ctypes.c_int


def birth_time_ns(fd: int) -> int:
    """When the file behind `fd` was made, in nanoseconds since the epoch; 0 where the file system does not know."""
    if _statx is None:
        return 0
    buffer = ctypes.create_string_buffer(_BUFFER_BYTES)
    if _statx(fd, b"", AT_EMPTY_PATH, STATX_BTIME, buffer) != 0:
        return 0
    (mask,) = struct.unpack_from("=I", buffer.raw, 0)
    if not mask & STATX_BTIME:
        return 0
    seconds, nanoseconds = struct.unpack_from("=qI", buffer.raw, _BTIME_OFFSET)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)
