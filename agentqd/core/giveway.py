"""Whose sends wait while somebody else needs the box. Pure: times are handed in, monotonic seconds.

A sink behind which much waits gives way: while anything else is under way (a task that comes, starts or ends, a claim from
outside, a person's word: whatever waits for a commit), its sends begin one by one with a gap between them, those of an append
sink in small batches. Twice as many as come go without a gap, so that a backlog shrinks under a steady load. With nobody else
there it sends as fast as it can. It is slowed down, never stopped.

Why: the loop's thread, the journal's commits and the cores are shared. Three hundred sends a second leave most of each to others; a
receiver that answers at once can take thirty times as many, and then each hand-over between threads waits for a turn.
"""

from __future__ import annotations

import math
from typing import Final

CROWD_ROWS: Final = 100  # waiting behind one sink; below that it never gives way
OTHERS_S: Final = 0.05  # for so long after its commit was asked for something counts as under way: its own delivery comes then
SEND_GAP_S: Final = 0.003
BATCH_GAP_S: Final = 0.02
BATCH_ROWS: Final = 50
FREE_FOR_ONE: Final = 2  # sends without a gap for each new row: what comes steadily never piles up
FREE_MAX: Final = 2000
PAGE_ROWS: Final = 64  # read from the journal at once
MARKS_S: Final = 0.02  # what its receivers have said is gathered for so long


class GiveWay:
    """One box's: its sinks share what is left to them.

    Invariant: a sink with rows to send waits for at most `gap * sinks` seconds.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._until_s = -math.inf
        self._begun_s: dict[str, float] = {}

    def heard(self, asked: int, now_s: float) -> None:
        """`asked`: how often something has come that somebody waits for."""
        if asked != self._asked:
            self._asked, self._until_s = asked, now_s + OTHERS_S

    def others(self, now_s: float) -> bool:
        """Is anything else under way?"""
        return now_s < self._until_s

    def must(self, waiting: int, now_s: float) -> bool:
        """Does a sink behind which so many rows wait give way now?"""
        return waiting > CROWD_ROWS and self.others(now_s)

    def wait_s(self, sink: str, waiting: int, gap_s: float, now_s: float) -> float:
        """For how much longer its next send is not to begin."""
        if not self.must(waiting, now_s):
            return 0.0
        began_s = self._begun_s.get(sink)
        if began_s is None:
            return 0.0
        return max(0.0, began_s + gap_s * self._sending(now_s) - now_s)

    def begun(self, sink: str, waiting: int, now_s: float) -> None:
        """A send begins."""
        if waiting > CROWD_ROWS:
            self._begun_s[sink] = now_s
        else:
            self._begun_s.pop(sink, None)

    def forget(self, sink: str) -> None:
        """It is no more."""
        self._begun_s.pop(sink, None)

    def _sending(self, now_s: float) -> int:
        """How many share: those behind which much waits, and that have begun a send lately."""
        return max(1, sum(now_s - began_s < OTHERS_S for began_s in self._begun_s.values()))
