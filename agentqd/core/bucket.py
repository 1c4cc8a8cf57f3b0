"""How many sends a sink's `rate` allows now: a token bucket. Pure: times are handed in, monotonic seconds.

It holds at most one second's worth of tokens, and at least one: `10/s` may send ten at once, `1000/h` one every 3.6 s.

Invariants:
1. In any span of w seconds at most `burst + rate * w` tokens are taken.
2. Whoever waits for `wait_s` gets a token then: nobody starves.
3. What is stored and clocks that jump give at most one full bucket, and at least none.
"""

from __future__ import annotations

import math

import msgspec

from agentqd.core.units import Rate


class BucketMemory(msgspec.Struct, frozen=True):
    """What outlives a restart."""

    at_us: int = 0
    tokens: float = 0.0


class Bucket:
    """One sink's. Full at first."""

    __slots__ = ("_at_s", "_tokens", "burst", "per_s")

    def __init__(self, rate: Rate, now_s: float) -> None:
        self.per_s = rate.per_s
        self.burst = max(1.0, self.per_s)
        self._tokens = self.burst
        self._at_s = now_s

    def resume(self, memory: BucketMemory, now_s: float, now_us: int) -> None:
        """Go on where the last daemon was: what has come in since then, never more than one bucket."""
        gone_s = max(0.0, (now_us - memory.at_us) / 1_000_000)
        had = memory.tokens if math.isfinite(memory.tokens) else 0.0
        self._tokens = min(self.burst, max(0.0, had) + gone_s * self.per_s)
        self._at_s = now_s

    def memory(self, now_s: float, now_us: int) -> BucketMemory:
        self._fill(now_s)
        return BucketMemory(now_us, self._tokens)

    def tokens(self, now_s: float) -> int:
        """How many sends may begin now."""
        self._fill(now_s)
        return int(self._tokens + _NEARLY)

    def take(self, count: int, now_s: float) -> None:
        """`count` sends begin; at most `tokens` of them."""
        self._fill(now_s)
        assert count <= self._tokens + _NEARLY, "more than there are tokens"
        self._tokens = max(0.0, self._tokens - count)

    def wait_s(self, now_s: float) -> float:
        """Seconds until the next token; 0: there is one."""
        self._fill(now_s)
        return 0.0 if self._tokens + _NEARLY >= 1.0 else (1.0 - self._tokens) / self.per_s

    def _fill(self, now_s: float) -> None:
        gone_s = max(0.0, now_s - self._at_s)
        self._tokens = min(self.burst, self._tokens + gone_s * self.per_s)
        self._at_s = max(self._at_s, now_s)


_NEARLY = 1e-6  # sums of floats: 0.1 s at 10/s is one token, not 0.99999
