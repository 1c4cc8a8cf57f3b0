"""One sink's part in `core.giveway`, by the real clock: it is about turns of a thread, and tests whose clock stands still have them too."""

from __future__ import annotations

import time
from collections.abc import Callable

from agentqd.core.giveway import BATCH_ROWS, FREE_FOR_ONE, FREE_MAX, MARKS_S, PAGE_ROWS, GiveWay
from agentqd.storage.journal import LAZY_S


class Courtesy:
    def __init__(
        self, way: GiveWay, sink: str, gap_s: float, asked: Callable[[], int], waiting: Callable[[], int]
    ) -> None:
        """`asked`: how often something has come that somebody waits for; `waiting`: rows that are there to be sent."""
        self.left_s = 0.0  # at the last look: until the next send may begin
        self._free = 0  # sends without a gap
        self._way = way
        self._sink = sink
        self._gap_s = gap_s
        self._asked = asked
        self._waiting = waiting

    def allows(self) -> bool:
        """May one more send begin?"""
        self.left_s = 0.0
        now_s = self._look()
        if self._free == 0 and self._way.others(now_s):
            self.left_s = self._way.wait_s(self._sink, self._waiting(), self._gap_s, now_s)
        return self.left_s == 0.0

    def most(self, rows: int) -> int:
        """Of how many rows at most."""
        if rows > BATCH_ROWS and self._way.must(self._waiting(), time.monotonic()):
            return min(rows, max(BATCH_ROWS, self._free))
        return rows

    def page(self, rows: int) -> int:
        """How many rows to read from the journal at once, of so many at most: each takes the interpreter's lock for a moment."""
        return min(rows, PAGE_ROWS) if self._way.others(self._look()) else rows

    def within_s(self) -> float:
        """How soon what its receiver has said is to be recorded, if no other commit comes: each commit is an fdatasync."""
        return MARKS_S if self._way.must(self._waiting(), time.monotonic()) else LAZY_S

    def offered(self, rows: int) -> None:
        """New rows have come. Twice as many may go without a gap: a backlog shrinks however many come."""
        self._free = min(FREE_MAX, self._free + FREE_FOR_ONE * rows)

    def begin(self, rows: int) -> None:
        self._free = max(0, self._free - rows)
        if self._way.others(now_s := time.monotonic()):  # with nobody else it does not matter when it began
            self._way.begun(self._sink, self._waiting(), now_s)

    def _look(self) -> float:
        now_s = time.monotonic()
        self._way.heard(self._asked(), now_s)
        return now_s
