"""Whether one sink may send now: is it enabled, does its breaker allow it, has its receiver asked to be left alone, its pace, its
rate, do others go first. And when to look again.

What it knows is in memory; what of it outlives the daemon is `sinkmemory`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from agentqd.core.breaker import Breaker, BreakerState
from agentqd.core.bucket import Bucket
from agentqd.core.limits import LEFT_ALONE_MAX_S
from agentqd.core.pace import Pace
from agentqd.core.units import Rate, format_time
from agentqd.loops.courtesy import Courtesy
from agentqd.loops.sinkmemory import Kept, Word
from agentqd.sinks.base import Deferred

US: Final = 1_000_000
IDLE_MAX_S: Final = 30.0


class Gate:
    """One runner's. Times are monotonic seconds."""

    def __init__(self, most: int, rate: Rate | None, now_s: float, courtesy: Courtesy) -> None:
        self.pace = Pace(most)
        self.courtesy = courtesy
        self.breaker = Breaker()
        self.rate = rate
        self.bucket = None if rate is None else Bucket(rate, now_s)
        self.word = Word()  # a person's
        self.disabled: str | None = None  # by its receiver: why; until a person acts
        self._alone_until_s: float | None = None  # its receiver has asked for it; gone with the daemon

    @property
    def why_disabled(self) -> str | None:
        """Why nothing is sent until a person acts, or None."""
        return self.word.why or self.disabled

    def resume(self, kept: Kept, now_s: float, now_us: int, *, same_settings: bool) -> None:
        """Take up where the last daemon was. Under edited settings only a person's word and the tokens count."""
        self.word = kept.word
        if self.bucket is not None and kept.bucket is not None:
            self.bucket.resume(kept.bucket, now_s, now_us)
        if not same_settings:
            return
        self.disabled = kept.memory.disabled
        self.breaker = Breaker(kept.memory.breaker_at(now_us), now_s)
        if self.breaker.state is not BreakerState.CLOSED:
            self.pace.begin_anew()

    def enable(self) -> None:
        """A person has had the sink, or rows of it, sent to again."""
        self.word, self.disabled, self.breaker = Word(), None, Breaker()
        self.lift()

    def leave_alone(self, outcomes: Iterable[Deferred], now_s: float) -> float:
        """Of busy answers (429, 503) that name a time the longest counts for all rows, up to LEFT_ALONE_MAX_S: one hostile answer
        must not silence a sink for a day. Until then nothing is sent, then it begins slowly. For how long, if it begins now."""
        asked_s = max(
            (asked for each in outcomes if each.busy and (asked := each.retry_after_s or 0.0) > 0),
            default=0.0,
        )
        if asked_s == 0.0:
            return 0.0
        before_s, for_s = self.alone_s(now_s), min(asked_s, LEFT_ALONE_MAX_S)
        self._alone_until_s = now_s + max(before_s, for_s)
        return 0.0 if before_s > 0 else for_s

    def lift(self) -> None:
        """That it asked to be left alone no longer counts; it begins slowly."""
        if self._alone_until_s is not None:
            self._alone_until_s = None
            self.pace.begin_anew()

    def heard_of(self, now_s: float) -> None:
        """It is there, somebody has seen it: it may be tried at once."""
        self.breaker.heard_of(now_s)
        self.lift()

    def alone_s(self, now_s: float) -> float:
        """For how much longer its receiver has asked to be left alone; 0.0: it has not, or that is over."""
        return 0.0 if self._alone_until_s is None else max(0.0, self._alone_until_s - now_s)

    def allows(self, now_s: float, under_way: int) -> bool:
        """May one more send begin?"""
        self.courtesy.left_s = 0.0
        if self._alone_until_s is not None:
            if now_s < self._alone_until_s:
                return False
            self.lift()
        return (
            self.why_disabled is None
            and under_way < self.pace.limit
            and (self.bucket is None or self.bucket.wait_s(now_s) == 0.0)
            and self.breaker.allows(now_s, under_way)
            and self.courtesy.allows()
        )

    def most(self, batch_max: int, now_s: float) -> int:
        """Of how many rows at most."""
        rows = self.courtesy.most(batch_max)
        return rows if self.bucket is None else min(rows, self.bucket.tokens(now_s))

    def begin(self, rows: int, now_s: float) -> None:
        self.courtesy.begin(rows)
        if self.bucket is not None:
            self.bucket.take(rows, now_s)

    def idle_s(self, now_s: float, under_way: int, look_in_s: float | None) -> float:
        """How long there is nothing to be looked at; `look_in_s`: until the journal is to be looked at by time."""
        waits = [IDLE_MAX_S]
        if self.why_disabled is None and self.rests:
            resting = self.breaker.state is BreakerState.OPEN
            left_s = self.breaker.open_until_s - now_s if resting else 0.0
            waits.append(max(left_s, self.alone_s(now_s)))
        elif self.why_disabled is None and under_way < self.pace.limit:
            token_s = 0.0 if self.bucket is None else self.bucket.wait_s(now_s)
            if self.courtesy.left_s > 0:  # a look that is overdue comes when what is in memory has gone
                waits.append(self.courtesy.left_s)
            elif token_s > 0:
                waits.append(token_s)
            elif look_in_s is not None:
                waits.append(look_in_s)
        return max(0.001, min(waits))

    @property
    def rests(self) -> bool:
        """Does its breaker or its receiver's own word keep it from sending?"""
        return self.breaker.state is BreakerState.OPEN or self._alone_until_s is not None

    def health(self, now_s: float, now_us: int, under_way: int) -> dict[str, Any]:
        """What `status` and `sink list` show of it."""
        resting = self.breaker.state is BreakerState.OPEN
        left_s, alone_s = self.breaker.open_until_s - now_s, self.alone_s(now_s)
        wait_s = 0.0 if self.bucket is None else self.bucket.wait_s(now_s)
        return {
            "breaker": "disabled" if self.why_disabled is not None else self.breaker.state.value,
            "next_probe_at": format_time(now_us + int(max(0.0, left_s) * US)) if resting else None,
            "left_alone_until": format_time(now_us + int(alone_s * US)) if alone_s > 0 else None,
            "disabled": self.why_disabled,
            "disabled_by": "person" if self.word.off else "receiver" if self.disabled is not None else None,
            "disabled_at": format_time(self.word.at_us) if self.word.off else None,
            "concurrency": self.pace.limit,
            "concurrency_max": self.pace.most,
            "in_flight": under_way,
            "rate": None if self.rate is None else str(self.rate),
            "rate_wait_s": round(wait_s, 3),
        }
