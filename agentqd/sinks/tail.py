"""Reading a file of lines from its end: where its last whole line ends, and its lines, newest first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

_CHUNK_BYTES: Final = 64 * 1024


def last_line_end(fd: int, size: int) -> int:
    """The offset just after the last newline in the first `size` bytes (0: there is none)."""
    at = size
    while at > 0:
        step = min(_CHUNK_BYTES, at)
        at -= step
        found = os.pread(fd, step, at).rfind(b"\n")
        if found >= 0:
            return at + found + 1
    return 0


def lines_backwards(fd: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line without its newline) of each line before `end`, the last first. `end` follows a newline or is 0.

    Memory: one chunk and the longest line. A file that shrinks meanwhile ends the walk early.
    """
    at, tail = end, b""
    while at > 0:
        step = min(max(_CHUNK_BYTES, len(tail)), at)  # doubles inside a long line: linear, not quadratic
        at -= step
        block = os.pread(fd, step, at)
        if len(block) < step:
            return
        block += tail
        begin = 0 if at == 0 else block.find(b"\n") + 1  # the block's first line may lack its beginning
        stop = len(block)
        while stop > begin:
            start = max(block.rfind(b"\n", begin, stop - 1) + 1, begin)
            yield at + start, block[start : stop - 1]
            stop = start
        tail = block[:begin]
