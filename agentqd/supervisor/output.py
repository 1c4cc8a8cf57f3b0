"""What a worker writes: how much, when last, and never more on disk than its cap (head and tail stay).

Invariants:
1. The worker is never stopped or slowed; its file keeps its length, the middle becomes a hole.
2. The first quarter of the cap stays from the beginning, three quarters from the end (whole blocks, rounded to keep).
3. On disk lies the cap plus what was written since the last look.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from agentqd.supervisor.limits import OUTPUT_POLL_MAX_S, OUTPUT_POLL_MIN_S
from agentqd.system.fsops import PUNCH_ALIGN_BYTES, open_folder_at, punch_hole


class OutputCap:
    """The cap on one file, open for writing."""

    __slots__ = ("_bytes_max", "_fd", "_no_holes", "_punched_to", "size", "truncated")

    def __init__(self, fd: int, bytes_max: int, no_holes: Callable[[], None]) -> None:
        self._fd = fd
        self._bytes_max = bytes_max
        self._no_holes = no_holes
        self._punched_to = 0
        self.size = 0
        self.truncated = False

    def look(self) -> int:
        """Note the size and punch out what is over; returns by how much the file has grown since the last look."""
        size = os.fstat(self._fd).st_size
        grown, self.size = size - self.size, size
        if size > self._bytes_max:
            self._punch()
        elif size < self._punched_to:
            self._punched_to = 0  # the worker cut its own output
        return max(grown, 0)

    def next_look_s(self, grown: int, last_s: float) -> float:
        """A pace at which about a quarter of the cap is written between two looks."""
        if grown <= 0:
            return min(last_s * 2, OUTPUT_POLL_MAX_S)
        fitting_s = last_s * (self._bytes_max / 4) / grown
        return min(max(fitting_s, OUTPUT_POLL_MIN_S), last_s * 2, OUTPUT_POLL_MAX_S)

    def _punch(self) -> None:
        head_end = _round_up(self._bytes_max // 4)
        tail_start = self.size - self._bytes_max + self._bytes_max // 4
        tail_start -= tail_start % PUNCH_ALIGN_BYTES
        start = max(head_end, self._punched_to)
        if tail_start <= start:
            return
        try:
            done = punch_hole(self._fd, start, tail_start - start)
        except OSError:
            done = False
        if done:
            self._punched_to = tail_start
            self.truncated = True
        else:
            self._no_holes()


class SignsOfLife:
    """Whether an attempt has shown anything since the last look: output, a heartbeat, something in its outbox.

    To be made BEFORE the worker is spawned: what a fast worker does at once must not look like the beginning.
    """

    __slots__ = ("_folder_fd", "_last", "_stderr_fd", "_stdout_fd")

    def __init__(self, folder_fd: int, stdout_fd: int, stderr_fd: int) -> None:
        self._folder_fd = folder_fd
        self._stdout_fd = stdout_fd
        self._stderr_fd = stderr_fd
        self._last = (0, 0, 0, self._changed_at("outbox"), 0)

    def changed(self) -> bool:
        current = self._read()
        changed, self._last = current != self._last, current
        return changed

    def _read(self) -> tuple[int, int, int, int, int]:
        return (
            os.fstat(self._stdout_fd).st_size,
            os.fstat(self._stderr_fd).st_size,
            self._changed_at("heartbeat"),
            self._changed_at("outbox"),
            self._outbox_entries(),  # the kernel's file times move in steps of milliseconds; a count does not
        )

    def _changed_at(self, name: str) -> int:
        with contextlib.suppress(OSError):
            return os.stat(name, dir_fd=self._folder_fd, follow_symlinks=False).st_mtime_ns
        return 0

    def _outbox_entries(self) -> int:
        try:
            fd = open_folder_at("outbox", self._folder_fd)
        except OSError:
            return 0
        try:
            return len(os.listdir(fd))
        finally:
            os.close(fd)


def _round_up(offset: int) -> int:
    return -(-offset // PUNCH_ALIGN_BYTES) * PUNCH_ALIGN_BYTES
