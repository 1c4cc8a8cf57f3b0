"""A runner's usage limit: no attempt is used, nobody runs into it twice, and everybody hears of it once."""

from __future__ import annotations

import pytest

from agentqd.core.errors import IllegalTransition
from agentqd.core.settings import Defaults, Queue, Runner, Settings
from agentqd.core.units import Duration
from agentqd.core.usage_limit import Limit
from agentqd.loops.operations import hold, release, retry
from agentqd.loops.usage_limits import lift
from agentqd.loops.waking import Waker
from agentqd.storage import runner_limits

from .harness import Bench

US = 1_000_000
HOUR = 3600


@pytest.fixture
def settings() -> Settings:
    return Settings(
        max_workers=2,
        queues={"q": Queue(concurrency=2)},
        runners={"claude": Runner(preset="claude"), "codex": Runner(preset="codex")},
        defaults=Defaults(max_attempts=2),
    )


@pytest.fixture
async def ready(bench: Bench) -> Bench:
    await bench.connect()
    return bench


def _claimed(bench: Bench) -> list[str]:
    return [claim.task.id for claim in bench.claims]


async def _limited(bench: Bench, task_id: str, in_s: float | None = HOUR) -> None:
    until = None if in_s is None else bench.clock.now_us() + int(in_s * US)
    await bench.end(task_id, 1, limit=Limit("usage limit reached", until))


async def _pass(bench: Bench, seconds: float) -> None:
    """Time passes, and is noticed."""
    bench.clock.advance(seconds)
    await bench.do(lambda tx: Waker(bench.box)._wake_due(tx, {}))


async def test_a_limit_uses_no_attempt_and_is_waited_for(ready: Bench) -> None:
    await ready.add(id="a", runner="claude", prompt="x")
    for turn in range(1, 5):
        await _limited(ready, "a")
        task = await ready.task("a")
        assert (task.state, task.reason, task.run_attempts, task.attempt) == (
            "retryable",
            "usage_limit",
            0,
            turn,
        )
        assert task.wake_at == ready.clock.now_us() + HOUR * US
        await _pass(ready, HOUR - 1)
        assert len(ready.claims) == turn
        await _pass(ready, 1)
        assert len(ready.claims) == turn + 1
    await ready.end("a", 1)
    assert (await ready.task("a")).run_attempts == 1  # one of two: it failed by itself
    await _pass(ready, 10)
    await ready.end("a", 1)
    (result,) = await ready.results("a")
    assert (result["status"], result["reason"], result["attempt"]) == ("failed", "exit_code", 6)
    await ready.counts_are_true()


async def test_other_tasks_of_the_runner_wait_too_and_other_runners_go_on(ready: Bench) -> None:
    await ready.add(id="a", runner="claude", priority=9)
    await _limited(ready, "a")
    await ready.admit(
        *({"id": f"c{n}", "runner": "claude", "priority": 5} for n in range(5)),
        {"id": "x", "runner": "codex"},
    )
    assert _claimed(ready) == ["a", "x"]
    assert await ready.states("c0", "c4") == ["queued", "queued"]
    await _pass(ready, HOUR)
    assert _claimed(ready) == ["a", "x", "a"]
    await ready.end("x")
    assert _claimed(ready) == ["a", "x", "a", "c0"]


async def test_a_second_queue_and_a_new_claim_see_the_limit_after_a_restart(ready: Bench) -> None:
    await ready.add(id="a", runner="claude")
    await _limited(ready, "a")
    fresh = type(ready.scheduler)(ready.box, ready.claims.extend)
    fresh.target = ready.scheduler.target
    ready.hooks[:] = [fresh.claim]
    await ready.add(id="b", runner="claude", queue="q")
    assert _claimed(ready) == ["a"]
    await _pass(ready, HOUR)
    assert _claimed(ready) == ["a", "a", "b"]


async def test_everybody_hears_of_it_once_until_it_is_over(ready: Bench) -> None:
    await ready.admit({"id": "a", "runner": "claude"}, {"id": "b", "runner": "claude"})
    await _limited(ready, "a")
    await _limited(ready, "b")
    await _pass(ready, HOUR)
    await _limited(ready, "a")
    (said,) = await ready.alerts("usage_limit")
    assert (said["task_id"], said["runner"]) == ("a", "claude")
    await ready.end("b", 0)
    await _pass(ready, HOUR)
    await ready.end("a", 0)
    await ready.add(id="c", runner="claude")
    await _limited(ready, "c")
    assert len(await ready.alerts("usage_limit")) == 2


async def test_an_unknown_time_is_guessed_and_the_guesses_grow(ready: Bench) -> None:
    await ready.add(id="a", runner="claude")
    for wait_s in (900, 1800, 3600, 3600):
        await _limited(ready, "a", None)
        assert (await ready.task("a")).wake_at == ready.clock.now_us() + wait_s * US
        await _pass(ready, wait_s)


async def test_a_time_that_was_said_beats_a_guess_and_the_later_word_the_earlier(ready: Bench) -> None:
    await ready.admit({"id": "a", "runner": "claude"}, {"id": "b", "runner": "claude"})
    await _limited(ready, "a", 7200)
    await _limited(ready, "b", None)
    assert (await ready.task("b")).wake_at == (await ready.task("a")).wake_at
    await ready.do(lambda tx: lift(tx, "claude", "test"))
    await _pass(ready, 0)
    await _limited(ready, "a", 60)
    await _limited(ready, "b", 120)
    (limit,) = (
        await ready.journal.read(lambda c: runner_limits.all_closed(c, ready.clock.now_us()))
    ).values()
    assert limit.until == ready.clock.now_us() + 120 * US


async def test_what_ends_while_the_limit_holds_does_not_end_it(ready: Bench) -> None:
    await ready.admit({"id": "a", "runner": "claude"}, {"id": "b", "runner": "claude"})
    await _limited(ready, "a")
    await ready.end("b", 0)
    await ready.add(id="c", runner="claude")
    assert _claimed(ready) == ["a", "b"]


@pytest.mark.parametrize("how", [retry, release])
async def test_a_person_ends_the_wait_of_the_whole_runner(ready: Bench, how: object) -> None:
    await ready.admit(
        {"id": "a", "runner": "claude"}, {"id": "b", "runner": "claude"}, {"id": "c", "runner": "claude"}
    )
    await _limited(ready, "a")
    await _limited(ready, "b")
    assert _claimed(ready) == ["a", "b"]
    await ready.do(lambda tx: how(tx, ready.box, "a"))  # type: ignore[operator]
    await _pass(ready, 0)
    assert _claimed(ready)[2:] == ["a", "c"]  # b's wait ends an instant later
    await ready.end("a")
    assert _claimed(ready)[4:] == ["b"]


async def test_a_person_may_say_so_on_a_task_that_only_waits_for_the_runner(ready: Bench) -> None:
    await ready.add(id="a", runner="claude")
    await _limited(ready, "a")
    await ready.add(id="b", runner="claude")
    await ready.do(lambda tx: retry(tx, ready.box, "b"))
    assert _claimed(ready) == ["a", "b"]


async def test_a_backoff_is_ended_by_a_person_and_what_is_no_wait_is_a_clear_error(ready: Bench) -> None:
    await ready.add(id="a", backoff="1h")
    with pytest.raises(IllegalTransition, match="is running"):
        await ready.do(lambda tx: retry(tx, ready.box, "a"))
    await ready.end("a", 1)
    await ready.do(lambda tx: retry(tx, ready.box, "a"))
    assert _claimed(ready) == ["a", "a"]
    await ready.end("a", 1)
    assert (await ready.task("a")).result == "failed"  # the person's word gave no attempt more
    await ready.add(id="later", not_before="2099-01-01T00:00:00Z")
    with pytest.raises(IllegalTransition, match="start time"):
        await ready.do(lambda tx: retry(tx, ready.box, "later"))
    await ready.do(lambda tx: hold(tx, "later"))
    with pytest.raises(IllegalTransition, match="agentqctl release later"):
        await ready.do(lambda tx: retry(tx, ready.box, "later"))


@pytest.mark.parametrize("field", ["total_timeout", "expires_at"])
async def test_a_limit_beyond_the_last_start_ends_the_task_with_its_own_reason(
    ready: Bench, field: str
) -> None:
    await ready.add(
        id="a", runner="claude", **{field: "30m" if field == "total_timeout" else _in(ready, 1800)}
    )
    await _limited(ready, "a", 1799)
    assert await ready.states("a") == ["retryable"]
    await _pass(ready, 1799)
    await _limited(ready, "a", 1)
    task = await ready.task("a")
    assert (task.result, task.reason) == ("failed", "usage_limit")


async def test_a_queue_timeout_in_a_backoff_does_not_end_the_backoff(ready: Bench) -> None:
    await ready.add(id="a", backoff="1h", total_timeout="2h", queue_timeout="10m")
    await ready.end("a", 1)
    await _pass(ready, 1800)
    assert await ready.states("a") == ["retryable"]
    await _pass(ready, 1800)
    assert _claimed(ready) == ["a", "a"]


def _in(bench: Bench, seconds: float) -> str:
    from agentqd.core.units import format_time

    return format_time(bench.clock.now_us() + int(seconds * US)) or ""


async def test_a_held_task_that_was_lost_still_ends_with_its_time(ready: Bench) -> None:
    ready.box.apply(Settings(defaults=Defaults(on_lost="hold", total_timeout=Duration(600))))
    await ready.add(id="a")
    await ready.end("a", lost="supervisor_lost")
    assert await ready.states("a") == ["held"]
    await _pass(ready, 600)
    task = await ready.task("a")
    assert (task.result, task.reason) == ("timeout", "total_timeout")
