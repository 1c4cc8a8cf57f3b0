"""How a transfer goes: one line on stderr, drawn over itself, where a person looks at it. Nothing in a pipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from agentqd.cli.output import write_error
from agentqd.cli.text import cut, safe, size
from agentqd.core.units import format_duration

EVERY_S = 0.1
FIRST_AFTER_S = 0.3  # what is done sooner needs no bar
BAR_CELLS = 20
_CLEAR = "\r\x1b[K"


class ProgressLine:
    """Begin, add, end; the same again for the next one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._clock = clock
        self._drawn = False
        self._begin_s = self._drawn_s = 0.0
        self._name, self._done, self._total = "", 0, 0

    def begin(self, name: str, total_bytes: int) -> None:
        self._name, self._done, self._total = safe(name), 0, total_bytes
        self._begin_s = self._clock()
        self._drawn_s = self._begin_s + FIRST_AFTER_S - EVERY_S

    def add(self, count: int) -> None:
        self._done += count
        now = self._clock()
        if self._is_terminal and now - self._drawn_s >= EVERY_S:
            self._drawn_s = now
            self._drawn = True
            write_error(_CLEAR + self.line(now - self._begin_s))

    def end(self) -> None:
        if self._drawn:
            write_error(_CLEAR)
            self._drawn = False

    def line(self, took_s: float) -> str:
        """`name  [#####...]  45%  1.2 GiB of 2.7 GiB  88.1 MiB/s  17s left`, within the terminal's width."""
        share = min(1.0, self._done / self._total) if self._total else 1.0
        filled = int(share * BAR_CELLS)
        pace = self._done / took_s if took_s > 0 else 0.0
        left = f"  {format_duration(round((self._total - self._done) / pace))} left" if pace > 0 else ""
        bar = "#" * filled + "." * (BAR_CELLS - filled)
        figures = (
            f"[{bar}] {share * 100:3.0f}%  {size(self._done)} of {size(self._total)}  {size(pace)}/s{left}"
        )
        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
        except (OSError, ValueError):
            columns = 80
        room = max(8, columns - len(figures) - 3)
        return cut(f"{cut(self._name, room)}  {figures}", max(20, columns - 1))
