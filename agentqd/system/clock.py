"""Time, handed in: monotonic seconds for timeouts, UTC microseconds for records."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What every loop and timer asks for the time."""

    def monotonic_s(self) -> float:
        """Seconds that only ever grow; the zero point means nothing. For timeouts."""

    def now_us(self) -> int:
        """Microseconds since the epoch, UTC; may jump. For records only."""


class SystemClock:
    """The machine's own clocks."""

    __slots__ = ()

    def monotonic_s(self) -> float:
        return time.monotonic()

    def now_us(self) -> int:
        return time.time_ns() // 1000


class ManualClock:
    """A clock for tests: it stands still until `advance`."""

    def __init__(self, monotonic_s: float = 1000.0, now_us: int = 1_700_000_000_000_000) -> None:
        self._monotonic_s = monotonic_s
        self._now_us = now_us

    def monotonic_s(self) -> float:
        return self._monotonic_s

    def now_us(self) -> int:
        return self._now_us

    def advance(self, seconds: float) -> None:
        """Both clocks move on together. Time never goes back."""
        assert seconds >= 0
        self._monotonic_s += seconds
        self._now_us += round(seconds * 1_000_000)
