"""Whether one destination may be tried now: its circuit breaker. Pure: time and randomness are handed in.

    closed ──5 connection failures in a row, or 7 of the last 10 tries within 5 min──► open
    open ──its time is over, or its peer was heard of──► half_open: one probe
    half_open ──the probe reached the receiver──► closed        ──it did not──► open, for twice as long

Only connection failures count: a receiver that says "later" is there. While it is open nothing is sent, so no row
uses an attempt. It stays open for 60 s, doubling to 15 min, up to a fifth longer by chance (so that many boxes do not
come back in one instant). The doubling is forgotten after five tries in a row that reached the receiver.

Invariants:
1. While half open, at most one try is under way.
2. It never stays open for longer than BREAKER_OPEN_MAX_S and its jitter, whatever was stored and however clocks jump.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum
from typing import Final

import msgspec

from agentqd.core.limits import (
    BREAKER_OPEN_MAX_S,
    BREAKER_OPEN_S,
    BREAKER_RATIO,
    BREAKER_ROW,
    BREAKER_WINDOW,
    BREAKER_WINDOW_S,
)
from agentqd.core.retry import JITTER

_OPENINGS_MAX: Final = 16  # the doubling has long reached its end


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerMemory(msgspec.Struct, frozen=True):
    """What outlives a restart: a receiver that was down is probed, not flooded."""

    openings: int = 0  # in a row
    open_for_s: float = 0.0  # from the moment of writing; 0: closed


class Breaker:
    """One destination's. Times are monotonic seconds."""

    def __init__(self, memory: BreakerMemory | None = None, now_s: float = 0.0) -> None:
        self.state = BreakerState.CLOSED
        self.open_until_s = 0.0
        self._openings = 0
        self._failures = 0  # connection failures in a row
        self._successes = 0  # tries in a row that reached the receiver
        self._tries: deque[tuple[float, bool]] = deque(maxlen=BREAKER_WINDOW)
        if memory is not None and memory.openings > 0:
            self._openings = min(memory.openings, _OPENINGS_MAX)
            if memory.open_for_s > 0:
                self.state = BreakerState.OPEN
                self.open_until_s = now_s + min(memory.open_for_s, BREAKER_OPEN_MAX_S * (1 + JITTER))

    def memory(self, now_s: float) -> BreakerMemory:
        """To be stored whenever `state` has changed. A probe under way counts as not made."""
        if self.state is BreakerState.CLOSED:
            return BreakerMemory(self._openings, 0.0)
        return BreakerMemory(self._openings, max(1.0, self.open_until_s - now_s))

    def allows(self, now_s: float, under_way: int) -> bool:
        """May one more try begin? Moves from open to half open when the time is over."""
        if self.state is BreakerState.OPEN and now_s >= self.open_until_s:
            self.state = BreakerState.HALF_OPEN
        if self.state is BreakerState.CLOSED:
            return True
        return self.state is BreakerState.HALF_OPEN and under_way == 0

    def reached(self, now_s: float) -> None:
        """A try has reached the receiver, whatever it said."""
        self._failures = 0
        self._successes += 1
        self._tries.append((now_s, True))
        if self._successes >= BREAKER_ROW:
            self._openings = 0
        if self.state is not BreakerState.CLOSED:  # also a try that began before it opened
            self.state = BreakerState.CLOSED
            self._tries.clear()

    def failed(self, now_s: float, draw: float) -> None:
        """A try could not reach the receiver. `draw` in [0, 1) is the random number of the jitter."""
        self._failures += 1
        self._successes = 0
        self._tries.append((now_s, False))
        if self.state is BreakerState.HALF_OPEN or (
            self.state is BreakerState.CLOSED
            and (self._failures >= BREAKER_ROW or self._mostly_failing(now_s))
        ):
            self._open(now_s, draw)

    def heard_of(self, now_s: float) -> bool:
        """The peer is awake (it has contacted us): an open breaker probes at once. True if that changes anything."""
        if self.state is not BreakerState.OPEN or self.open_until_s <= now_s:
            return False
        self.open_until_s = now_s
        return True

    def _open(self, now_s: float, draw: float) -> None:
        for_s = min(BREAKER_OPEN_S * 2.0**self._openings, BREAKER_OPEN_MAX_S) * (1 + JITTER * draw)
        self._openings = min(self._openings + 1, _OPENINGS_MAX)
        self.state = BreakerState.OPEN
        self.open_until_s = now_s + for_s
        self._failures = 0
        self._tries.clear()

    def _mostly_failing(self, now_s: float) -> bool:
        if len(self._tries) < BREAKER_WINDOW or self._tries[0][0] < now_s - BREAKER_WINDOW_S:
            return False
        return sum(not reached for _, reached in self._tries) >= BREAKER_RATIO * BREAKER_WINDOW
