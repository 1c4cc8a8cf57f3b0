"""Timers: one heap over monotonic time. Pure: the time is handed in.

Invariants:
1. A cancelled timer never fires, even if it was already due.
2. Timers fire in the order of their times, equal times in the order they were set.
3. A timer set while others fire, for a time already past, fires in the next round (no endless loop).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Timer:
    """One call in the future. `cancel` is always allowed."""

    __slots__ = ("_action", "at_s")

    def __init__(self, at_s: float, action: Callable[[], None]) -> None:
        self.at_s = at_s
        self._action: Callable[[], None] | None = action

    @property
    def pending(self) -> bool:
        return self._action is not None

    def cancel(self) -> None:
        self._action = None

    def fire(self) -> None:
        action, self._action = self._action, None
        if action is not None:
            action()


class Deadlines:
    """Every timer of the program."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._sequence = 0

    def at(self, at_s: float, action: Callable[[], None]) -> Timer:
        """Call `action` once when the monotonic clock has reached `at_s`."""
        timer = Timer(at_s, action)
        self._sequence += 1
        heapq.heappush(self._heap, (at_s, self._sequence, timer))
        if self._sequence % 4096 == 0:
            self._drop_cancelled()
        return timer

    def next_s(self) -> float | None:
        """When the earliest timer is due; None if there is none."""
        heap = self._heap
        while heap and not heap[0][2].pending:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def run_due(self, now_s: float) -> int:
        """Fire every timer that is due; returns how many fired."""
        due = []
        while self._heap and self._heap[0][0] <= now_s:
            due.append(heapq.heappop(self._heap)[2])
        fired = 0
        for timer in due:
            if timer.pending:
                fired += 1
                timer.fire()
        return fired

    def _drop_cancelled(self) -> None:
        self._heap = [entry for entry in self._heap if entry[2].pending]
        heapq.heapify(self._heap)
