"""`after`: who waits for whom, what can never run, and that neither many nor a circle can hurt."""

from __future__ import annotations

import time

import pytest

from agentqd.core.errors import InvalidTask
from agentqd.core.limits import AFTER_MAX, FREED_AT_ONCE
from agentqd.core.settings import Retention, Settings
from agentqd.core.units import Duration, format_time
from agentqd.loops.admission import Accepted
from agentqd.loops.operations import hold, must_find, release, retry
from agentqd.loops.retention import Retention as RetentionLoop
from agentqd.loops.waking import Waker

from .harness import Bench

US = 1_000_000


@pytest.fixture
def settings() -> Settings:
    return Settings(max_workers=1, retention=Retention(tasks=Duration(3600)))


@pytest.fixture
async def ready(bench: Bench) -> Bench:
    await bench.connect()
    return bench


async def _pass(bench: Bench, seconds: float) -> None:
    bench.clock.advance(seconds)
    await bench.do(lambda tx: Waker(bench.box)._wake_due(tx, {}))


async def test_a_chain_of_a_thousand_runs_in_order_and_one_that_breaks_ends_all_after_it(
    ready: Bench,
) -> None:
    await ready.admit(*({"id": f"t{n}", **({"after": f"t{n - 1}"} if n else {})} for n in range(1000)))
    for n in range(3):
        assert ready.claims[-1].task.id == f"t{n}"
        await ready.end(f"t{n}")
    began = time.process_time()
    await ready.end("t3", 1)
    assert time.process_time() - began < 10
    (last,) = await ready.results("t999")
    assert (last["status"], last["reason"], last["detail"]) == ("refused", "dependency_failed", "t998 did not end with success")  # fmt: skip
    assert len(await ready.entries("result")) == 1000


@pytest.mark.slow
async def test_a_thousand_may_come_before_one(bench: Bench) -> None:
    names = [f"t{n}" for n in range(AFTER_MAX)]
    await bench.admit(*({"id": name, "prompt": "x"} for name in names), {"id": "last", "after": names})
    await bench.connect()
    for name in names[:-1]:
        await bench.end(name)
    assert await bench.states("last") == ["blocked"]
    await bench.end(names[-1])
    assert bench.claims[-1].task.id == "last"


async def test_more_than_the_limit_are_refused_with_the_limit(bench: Bench) -> None:
    (wrong,) = await _refused(bench, {"after": [f"t{n}" for n in range(AFTER_MAX + 1)]})
    assert str(AFTER_MAX) in wrong


async def _refused(bench: Bench, fields: dict[str, object]) -> list[str]:
    try:
        outcomes = await bench.admit(fields)
    except InvalidTask as error:
        return [error.message]
    return [each.message for each in outcomes if isinstance(each, InvalidTask)]


async def test_the_end_of_one_frees_very_many_in_bounded_steps(ready: Bench) -> None:
    many = FREED_AT_ONCE + 700
    await ready.add(id="first")
    await ready.admit(*({"id": f"t{n}", "after": "first"} for n in range(many)))
    await ready.end("first")
    counts = dict(await ready.rows("SELECT state, n FROM task_counts WHERE n > 0"))
    assert counts["queued"] + counts["running"] == FREED_AT_ONCE
    while (await ready.rows("SELECT count(*) FROM tasks WHERE state = 'blocked'"))[0][0]:
        await _pass(ready, 0)
    assert [claim.task.id for claim in ready.claims] == ["first", "t0"]


async def test_an_unknown_id_is_refused_and_named_also_where_it_comes_in_a_later_line(ready: Bench) -> None:
    first, second = await ready.admit({"id": "a", "after": "b"}, {"id": "b"})
    assert isinstance(first, InvalidTask)
    assert (first.code, "there is no task b" in first.message, "earlier" in first.message) == (
        "unknown_dependency",
        True,
        True,
    )
    assert isinstance(second, Accepted)
    assert isinstance((await ready.admit({"id": "a", "after": "b"}))[0], Accepted)


async def test_a_task_cannot_come_after_itself(ready: Bench) -> None:
    assert "cannot come after itself" in (await _refused(ready, {"id": "a", "after": ["a"]}))[0]


async def test_a_circle_through_the_id_of_a_refused_task_is_refused_and_named(ready: Bench) -> None:
    """Only so can one be closed: the refused task's row, older than those that came after it, is taken over."""
    await ready.admit({"id": "x"}, {"id": "a", "after": "x"})
    await ready.end("x", 1)
    await ready.admit({"id": "b", "after": "a", "after_policy": "any"}, {"id": "c", "after": "b", "after_policy": "any"})  # fmt: skip
    (wrong,) = await _refused(ready, {"id": "a", "after": ["c"]})
    assert wrong == "after: c comes after a itself: neither could ever run"
    assert (await ready.task("a")).result == "refused"
    assert not await _refused(ready, {"id": "a", "after": ["x"]})


@pytest.mark.parametrize(("verb", "result"), [("cancelled", "refused"), ("success", "success")])
async def test_after_a_held_task_is_waiting_until_it_has_ended(bench: Bench, verb: str, result: str) -> None:
    from agentqd.core.lifecycle import Event, Result
    from agentqd.loops.finishing import finish_waiting

    await bench.admit({"id": "a"}, {"id": "b", "after": "a"})
    await bench.do(lambda tx: hold(tx, "a"))
    await bench.connect()
    assert await bench.states("a", "b") == ["held", "blocked"]
    if verb == "cancelled":
        await bench.do(lambda tx: finish_waiting(tx, bench.box, must_find(tx, "a"), Event.CANCELLED, Result.CANCELLED, "cancelled"))  # fmt: skip
    else:
        await bench.do(lambda tx: release(tx, bench.box, "a"))
        await bench.end("a")
        await bench.end("b")
    assert (await bench.task("b")).result == result


async def test_a_task_that_is_retried_anew_is_waited_for_again_and_what_it_failed_stays_ended(ready: Bench) -> None:  # fmt: skip
    await ready.admit({"id": "a"}, {"id": "b", "after": "a"})
    await ready.end("a", 1)
    assert (await ready.task("b")).result == "refused"
    await ready.do(lambda tx: retry(tx, ready.box, "a"))
    await ready.add(id="c", after="a")
    assert await ready.states("b", "c") == ["finished", "blocked"]
    await ready.do(lambda tx: retry(tx, ready.box, "b"))  # waits for a's new run
    assert await ready.states("b") == ["blocked"]
    await ready.end("a", 0)
    assert [claim.task.id for claim in ready.claims] == ["a", "a", "b"]


async def test_a_persons_retry_runs_what_its_dependency_had_ended(ready: Bench) -> None:
    await ready.admit({"id": "a"}, {"id": "w", "priority": -1}, {"id": "b", "after": ["a"]})
    await ready.end("a", 1)
    await ready.end("w")
    await ready.do(lambda tx: retry(tx, ready.box, "b"))
    await ready.end("b")
    assert [(data["status"], data["run"]) for data in await ready.results("b")] == [("refused", 1), ("success", 2)]  # fmt: skip


async def test_of_an_id_that_was_used_again_the_newest_task_is_meant(ready: Bench) -> None:
    await ready.add(id="nightly", dedup_ttl="1s")
    await ready.end("nightly")
    await ready.deliver_all()
    ready.clock.advance(10)
    assert await ready.add(id="nightly", dedup_ttl="1s") == "nightly-2"
    await ready.add(id="report", after="nightly")
    assert await ready.states("report") == ["blocked"]
    await ready.end("nightly-2")
    assert ready.claims[-1].task.id == "report"


async def test_retention_keeps_what_a_waiting_task_comes_after_and_names_itself_where_it_removed(ready: Bench) -> None:  # fmt: skip
    await ready.admit(
        {"id": "a", "dedup_ttl": "1s"}, {"id": "w", "prompt": "x"}, {"id": "b", "after": ["a", "w"]}
    )
    await ready.end("a")
    await ready.deliver_all()
    ready.clock.advance(7200)
    loop = RetentionLoop(ready.box)
    await loop._step()
    assert (await ready.task("a")).result == "success"
    await ready.end("w")
    await ready.end("b")
    await loop._step()
    (wrong,) = await _refused(ready, {"after": "a"})
    assert "retention.tasks" in wrong


async def test_two_that_fall_due_at_once_do_not_trip_over_each_other(bench: Bench) -> None:
    """The end of the first ends the second in the same transaction; the second was due, too."""
    soon = format_time(bench.clock.now_us() + 10 * US)
    await bench.admit({"id": "a", "expires_at": soon}, {"id": "b", "after": "a", "expires_at": soon})
    await _pass(bench, 10)
    assert [(await bench.task(name)).result for name in ("a", "b")] == ["expired", "refused"]
