"""A receiver that asks for a time (429 or 503 with Retry-After) is left alone by the whole sink, not only by the row it said it to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from agentqd.core.giveway import GiveWay
from agentqd.core.limits import LEFT_ALONE_MAX_S
from agentqd.core.settings import Alerts, Settings, Sink
from agentqd.core.units import Backoff, Duration
from agentqd.loops import parking
from agentqd.loops.courtesy import Courtesy
from agentqd.loops.gate import Gate
from agentqd.loops.sinkrunner import SinkRunner
from agentqd.sinks.base import Deferred, Delivery

from .harness import Bench
from .test_delivery import Script, _put, _running, _wait
from .test_sinkrunner import SSH, Turnstile, gone, many, plug, sent, ssh, until_states
from .test_sinks_by_hand import delivering

__all__ = ["plug"]
LIFETIME = Duration(10**6)
PLAIN = Sink(type="command", command=["x"], backoff=Backoff((1.0,), doubles=False), lifetime=LIFETIME)


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> Settings:
    sinks = {"s": getattr(request, "param", PLAIN), "other": PLAIN}
    return Settings(sinks=sinks, alerts=Alerts(deliver_to=["s", "other"]))


def busy(retry_after_s: float | None) -> Callable[[Sequence[Delivery]], Any]:
    return lambda batch: [Deferred("HTTP 429", retry_after_s=retry_after_s, busy=True)] * len(batch)


async def asked(bench: Bench, runner: SinkRunner, plug: Script, seconds: float = 20.0) -> None:
    """One row is sent, and answered with 429 and Retry-After."""
    plug.answers = [busy(seconds)]
    await _put(bench, "d0")
    await until_states(bench, retryable=1)
    assert runner.health()["left_alone_until"] is not None


async def quiet(plug: Script, sends: int) -> None:
    await asyncio.sleep(0.03)
    assert len(plug.seen) == sends


async def test_no_row_is_sent_and_no_attempt_used_until_the_time_it_asked_for(
    bench: Bench, plug: Script
) -> None:
    async with _running(bench) as runner:
        await asked(bench, runner, plug)
        await many(bench, 8, start=1)
        _wait(bench, runner, 19.5)
        await quiet(plug, 1)
        assert await bench.rows("SELECT sum(attempts) FROM outbox WHERE sink = 's'") == [(1,)]
        assert runner.health()["breaker"] == "closed"
        _wait(bench, runner, 0.6)
        await until_states(bench, delivered=9)
        assert runner.health()["left_alone_until"] is None


async def test_it_wakes_by_itself_when_the_time_is_over(bench: Bench, plug: Script) -> None:
    async with _running(bench) as runner:
        await asked(bench, runner, plug)
        await many(bench, 2, start=1)
        await bench.turn()
        assert 19 < runner._idle_s() <= 20


async def test_then_it_begins_slowly(bench: Bench, plug: Script) -> None:
    plug.concurrency = 20
    async with _running(bench) as runner:
        await many(bench, 20, start=100)
        await until_states(bench, delivered=20)
        plug.answers = [busy(20.0)]
        await _put(bench, "d0")
        await until_states(bench, retryable=1, delivered=20)
        gate = plug.gate = Turnstile()  # type: ignore[assignment]
        await many(bench, 10, start=1)
        _wait(bench, runner, 21)
        await bench.until(lambda: len(plug.seen) == 22)
        await asyncio.sleep(0.02)
        assert plug.under_way == 1
        gate.let_through(100)
        await until_states(bench, delivered=31)


async def test_of_several_times_the_longest_counts(bench: Bench, plug: Script) -> None:
    gate = plug.gate = Turnstile()  # type: ignore[assignment]
    plug.answers = [busy(20.0), busy(100.0), busy(5.0)]
    async with _running(bench) as runner:
        await many(bench, 3)
        await bench.until(lambda: len(plug.seen) == 3)
        gate.let_through(100)
        await until_states(bench, retryable=3)
        await many(bench, 1, start=10)
        _wait(bench, runner, 99)
        await quiet(plug, 3)
        _wait(bench, runner, 1.5)
        await until_states(bench, delivered=4)


async def test_a_day_silences_the_sink_for_a_quarter_of_an_hour_and_the_row_for_the_day(bench: Bench, plug: Script) -> None:  # fmt: skip
    async with _running(bench) as runner:
        await asked(bench, runner, plug, 86_400.0)
        await _put(bench, "d1")
        _wait(bench, runner, LEFT_ALONE_MAX_S - 1)
        await quiet(plug, 1)
        _wait(bench, runner, 2)
        await until_states(bench, delivered=1, retryable=1)
        _wait(bench, runner, 86_400 - LEFT_ALONE_MAX_S - 10)
        await quiet(plug, 2)
        _wait(bench, runner, 10)
        await until_states(bench, delivered=2)


@pytest.mark.parametrize(
    "answer",
    [busy(None), busy(0.0), busy(-5.0), busy(float("nan")), lambda b: [Deferred("HTTP 500", retry_after_s=60.0)] * len(b)],
    ids=["no time", "the past", "negative", "no number", "not busy"],
)  # fmt: skip
async def test_others_are_not_held_back_without_a_busy_answer_and_a_time(
    bench: Bench, plug: Script, answer: Any
) -> None:
    plug.answers = [answer]
    async with _running(bench) as runner:
        await _put(bench, "d0")
        await until_states(bench, retryable=1)
        assert runner.health()["left_alone_until"] is None
        await many(bench, 3, start=1)
        await until_states(bench, retryable=1, delivered=3)


async def test_a_person_who_has_rows_sent_again_lifts_it(bench: Bench, plug: Script) -> None:
    async with _running(bench) as runner:
        await asked(bench, runner, plug)
        await _put(bench, "d1")
        await quiet(plug, 1)
        runner.lift()
        await until_states(bench, delivered=1, retryable=1)
        assert runner.health()["concurrency"] <= 2, "it begins slowly"


@ssh
async def test_a_peer_that_is_heard_of_lifts_it(bench: Bench, plug: Script) -> None:
    async with _running(bench) as runner:
        await asked(bench, runner, plug)
        await _put(bench, "d1")
        await quiet(plug, 1)
        assert SSH.peer is not None
        runner.hears_of(frozenset({SSH.peer}))
        await until_states(bench, delivered=2)


@pytest.mark.parametrize("settings", [msgspec.structs.replace(SSH, lifetime=Duration(10))], indirect=True)
async def test_a_peer_that_is_heard_of_lifts_it_when_no_row_waits_for_its_retry(bench: Bench, plug: Script) -> None:  # fmt: skip
    """It asked for longer than the row lives: that one is dead, the others are held back."""
    plug.answers = [busy(20.0)]
    async with _running(bench) as runner:
        await _put(bench, "d0")
        await until_states(bench, dead=1)
        await _put(bench, "d1")
        await quiet(plug, 1)
        assert SSH.peer is not None
        runner.hears_of(frozenset({SSH.peer}))
        await until_states(bench, dead=1, delivered=1)


async def test_an_enabled_sink_goes_on_and_the_row_that_was_asked_to_wait_waits(bench: Bench, plug: Script) -> None:  # fmt: skip
    """Its own time outlives that it was held because of the sink, by a receiver's 410 or a person."""
    async with delivering(bench) as loop:
        runner = loop.runners["s"]
        await asked(bench, runner, plug)
        runner.lift()
        plug.answers = [gone]
        await _put(bench, "d1")
        await until_states(bench, held=2)
        assert runner.health()["left_alone_until"] is None
        await bench.do(lambda tx: (tx.after_commit(runner.enable), parking.enable(tx, "s", None)))
        await until_states(bench, delivered=1, pending=1)
        await quiet(plug, 3)
        assert sent(plug) == ["d0", "d1", "d1"]
        _wait(bench, runner, 19)
        await quiet(plug, 3)
        _wait(bench, runner, 1.1)
        await until_states(bench, delivered=2)


async def test_enable_lifts_it_for_a_sink_that_is_not_disabled(bench: Bench, plug: Script) -> None:
    async with delivering(bench) as loop:
        runner = loop.runners["s"]
        await asked(bench, runner, plug)
        await _put(bench, "d1")
        await quiet(plug, 1)
        await bench.do(lambda tx: (tx.after_commit(runner.enable), parking.enable(tx, "s", None)))
        await until_states(bench, delivered=1, retryable=1)


def test_an_open_breaker_and_a_time_it_asked_for_are_both_waited_for() -> None:
    gate = Gate(5, None, 0.0, Courtesy(GiveWay(), "s", 0.0, lambda: 0, lambda: 0))
    for _ in range(5):
        gate.breaker.failed(0.0, 0.0)
    assert gate.leave_alone([Deferred("HTTP 503", retry_after_s=15.0, busy=True)], 0.0) == 15.0
    assert gate.leave_alone([Deferred("HTTP 503", retry_after_s=10.0, busy=True)], 0.0) == 0.0, "it is known"
    assert not gate.allows(16.0, 0)
    assert gate.idle_s(50.0, 0, None) == pytest.approx(10.0)
    assert gate.allows(60.0, 0)
    assert gate.pace.limit == 1
