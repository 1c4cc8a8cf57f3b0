"""When to try again: a task's next attempt, and an outbox row's next send."""

from __future__ import annotations

import math
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

import msgspec

from agentqd.core.lifecycle import Result
from agentqd.core.limits import RETRY_AFTER_MAX_S
from agentqd.core.units import Backoff

RETRIED_RESULTS: Final = frozenset({Result.FAILED, Result.TIMEOUT, Result.SPAWN_FAILED, Result.NO_WORK})
TASK_BACKOFF_MAX_S: Final = 3600.0
LOST_REQUEUES_MAX: Final = 10  # a task that takes the box down with it must not do so for ever
JITTER: Final = 0.2  # Svix; drawn once and stored (delivery defaults)


class Schedule(msgspec.Struct, frozen=True):
    """A sink's retry schedule: seconds before each further try; the last one repeats; `lifetime_s` ends it (None: never).

    `busy_min_s`: after a time-out or a 429 the next try comes no earlier than that, whatever the schedule says.
    """

    steps_s: tuple[float, ...]
    doubles: bool
    max_s: float
    lifetime_s: float | None
    busy_min_s: float = 0.0
    by_age: bool = False  # Postfix: wait as long as the row is old, between the first step and `max_s`


def wait_s(backoff: Backoff, failures: int, max_s: float = TASK_BACKOFF_MAX_S) -> float:
    """Seconds to wait after the `failures`-th failure in a row (1 is the first)."""
    assert failures >= 1
    if not backoff.doubles:
        return backoff.steps_s[min(failures, len(backoff.steps_s)) - 1]
    return min(backoff.steps_s[0] * 2.0 ** min(failures - 1, 60), max_s)


def next_try_s(
    schedule: Schedule,
    failures: int,
    draw: float,
    retry_after_s: float | None,
    *,
    busy: bool = False,
    age_s: float = 0.0,
) -> float:
    """Seconds until an outbox row's next try. `draw` in [0, 1) is the jitter's random number.

    Retry-After is a floor, up to a day; negative or NaN, it is none. `busy`: the schedule's `busy_min_s` is one, too.
    """
    if schedule.by_age:
        base = min(max(age_s, schedule.steps_s[0]), schedule.max_s)
    else:
        base = wait_s(Backoff(schedule.steps_s, doubles=schedule.doubles), failures, schedule.max_s)
    floor_s = schedule.busy_min_s if busy else 0.0
    jittered = max(base, floor_s) * (1 + JITTER * draw)
    return max(jittered, min(retry_after_s or 0.0, RETRY_AFTER_MAX_S))  # jittered first: NaN never wins


def read_retry_after_s(value: str | None, now_us: int) -> float | None:
    """Seconds from a Retry-After header (seconds or an HTTP date), 0 to a day; None for what is neither."""
    text = (value or "").strip()[:64]
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            moment = parsedate_to_datetime(text)
            moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
            seconds = moment.timestamp() - now_us / 1_000_000
        except (ValueError, OverflowError, TypeError, IndexError):
            return None
    if math.isnan(seconds):
        return None
    return min(max(0.0, seconds), RETRY_AFTER_MAX_S)
