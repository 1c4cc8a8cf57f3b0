"""How attempts and tasks end, what follows, and whom that frees."""

from __future__ import annotations

from typing import Any

import pytest

from agentqd.core.errors import IllegalTransition, NoSuchTask, WriteConflict
from agentqd.core.lifecycle import Event, Result
from agentqd.core.settings import Queue, Settings
from agentqd.core.verdict import FileSeen
from agentqd.loops.evidence import Seen
from agentqd.loops.finishing import finish_waiting, withdraw_claim
from agentqd.loops.operations import hold, must_find, release, retry
from agentqd.loops.waking import Waker
from agentqd.storage import tasks as store

from .harness import Bench

US = 1_000_000


@pytest.fixture
async def ready(bench: Bench) -> Bench:
    await bench.connect()
    return bench


async def _wait_out(bench: Bench, task_id: str) -> float:
    """Let a backoff pass; how long it was."""
    wake = (await bench.task(task_id)).wake_at
    assert wake is not None
    waited = (wake - bench.clock.now_us()) / US
    bench.clock.advance(waited)
    await Waker(bench.box)._turn()
    return waited


async def test_a_success_is_one_result_with_its_outbox_row(ready: Bench) -> None:
    await ready.add(id="a")
    finished = await ready.end("a")
    assert finished is not None
    assert finished.verdict.result is Result.SUCCESS
    (data,) = await ready.results("a")
    assert (data["status"], data["attempt"], data["exit_code"], data["duration_s"]) == ("success", 1, 0, 1.0)
    assert await ready.rows("SELECT sink, state FROM outbox") == [("completions", "pending")]


async def test_an_end_is_recorded_once(ready: Bench) -> None:
    await ready.add(id="a")
    assert await ready.end("a") is not None
    assert await ready.end("a", exit_code=1) is None
    assert (await ready.task("a")).result == "success"
    assert len(await ready.results("a")) == 1


@pytest.mark.parametrize("how", [{"exit_code": 1}, {"exit_code": 75}, {"exit_code": None, "signal": 15, "intent": "run_timeout"},
                                 {"stdout_bytes": 0}, {"pid": None, "error": "no such program"}])  # fmt: skip
async def test_what_can_be_retried_is_retried_until_max_attempts_with_a_doubling_backoff(
    ready: Bench, how: dict[str, Any]
) -> None:
    await ready.add(id="a", max_attempts=4, backoff="2s")
    waits = []
    for _ in range(3):
        await ready.end("a", **how)
        assert (await ready.task("a")).state.value == "retryable"
        assert await ready.results("a") == []
        waits.append(await _wait_out(ready, "a"))
    assert waits == [2, 4, 8]
    await ready.end("a", **how)
    assert (await ready.task("a")).state.value == "finished"
    (data,) = await ready.results("a")
    assert data["attempt"] == 4


async def test_a_schedule_says_how_long_to_wait(ready: Bench) -> None:
    await ready.add(id="a", max_attempts=9, backoff=["1s", "10s", "3s"])
    waits = []
    for _ in range(4):
        await ready.end("a", exit_code=1)
        waits.append(await _wait_out(ready, "a"))
    assert waits == [1, 10, 3, 3]


async def test_no_attempt_follows_after_the_total_timeout(ready: Bench) -> None:
    await ready.add(id="a", max_attempts=9, backoff="60s", total_timeout="61s")
    ready.clock.advance(1)
    await ready.end("a", exit_code=1)
    assert (await ready.task("a")).state.value == "finished"


async def test_a_cancelled_worker_is_never_retried(ready: Bench) -> None:
    await ready.add(id="a", max_attempts=5)
    await ready.do(lambda tx: store.update_attempt(tx, 1, 1, intent="cancelled"))
    await ready.end("a", None, signal=15, intent="cancelled")
    assert (await ready.task("a")).result == "cancelled"


async def test_a_cancel_that_crossed_the_workers_own_failure_ends_it_too(ready: Bench) -> None:
    await ready.add(id="a", max_attempts=5)
    await ready.do(lambda tx: store.update_attempt(tx, 1, 1, intent="cancelled"))
    await ready.end("a", exit_code=1)
    assert (await ready.task("a")).state.value == "finished"


@pytest.mark.parametrize(("on_lost", "state"), [("fail", "finished"), ("requeue", "retryable"), ("hold", "held")])  # fmt: skip
async def test_a_lost_worker_fails_is_queued_again_or_held(ready: Bench, on_lost: str, state: str) -> None:
    await ready.add(id="a", on_lost=on_lost)
    await ready.end("a", lost="supervisor_lost")
    task = await ready.task("a")
    assert task.state.value == state
    assert task.result == ("lost" if state == "finished" else None)
    assert len(await ready.alerts("lost")) == 1


async def test_a_task_that_takes_the_box_down_is_not_requeued_for_ever(ready: Bench) -> None:
    await ready.add(id="a", on_lost="requeue")
    for _ in range(9):
        await ready.end("a", lost="supervisor_lost")
        await _wait_out(ready, "a")
    await ready.end("a", lost="supervisor_lost")
    assert (await ready.task("a")).result == "lost"


async def test_exit_zero_without_anything_to_show_alerts_at_once(ready: Bench) -> None:
    await ready.add(id="a")
    await ready.end("a", stdout_bytes=0)
    assert (await ready.task("a")).result == "no_work"
    assert len(await ready.alerts("no_work")) == 1


async def test_an_unmet_expectation_is_a_failure_that_says_which(ready: Bench) -> None:
    await ready.add(id="a", expect={"files": ["out"]})
    await ready.end("a", seen=Seen("", 0, (FileSeen("out", None, False),), [], False, []))
    (data,) = await ready.results("a")
    assert (data["status"], data["reason"], data["detail"]) == ("failed", "expect_files", "out is not there")


async def test_a_withdrawn_claim_uses_its_number_again_and_no_attempt(ready: Bench) -> None:
    ready.box.draining = True
    ready.box.draining = False
    await ready.add(id="a")
    ready.box.draining = True
    await ready.do(lambda tx: withdraw_claim(tx, ready.box, store.get(tx, 1)))
    task = await ready.task("a")
    assert (task.state.value, task.attempt, task.run_attempts) == ("queued", 0, 0)
    assert await ready.rows("SELECT count(*) FROM attempts") == [(0,)]


async def test_a_withdrawn_claim_of_a_cancelled_task_ends_it(ready: Bench) -> None:
    await ready.add(id="a")
    await ready.do(lambda tx: store.update_attempt(tx, 1, 1, intent="cancelled"))
    await ready.do(lambda tx: withdraw_claim(tx, ready.box, store.get(tx, 1)))
    assert (await ready.task("a")).result == "cancelled"


async def test_a_retry_is_a_new_run_with_a_new_result_id(ready: Bench) -> None:
    await ready.add(id="a")
    await ready.end("a", exit_code=1)
    await ready.do(lambda tx: retry(tx, ready.box, "a"))
    task = await ready.task("a")
    assert (task.state.value, task.run, task.attempt, task.run_attempts) == ("running", 2, 2, 1)
    await ready.end("a")
    assert [(data["status"], data["run"]) for data in await ready.results("a")] == [
        ("failed", 1),
        ("success", 2),
    ]
    ids = [row[0] for row in await ready.rows("SELECT delivery_id FROM entries WHERE kind='result'")]
    assert len(set(ids)) == 2


async def test_what_cannot_be_done_to_a_task_raises_and_changes_nothing(ready: Bench) -> None:
    await ready.add(id="a")
    for unit, error in (
        (lambda tx: retry(tx, ready.box, "a"), IllegalTransition),
        (lambda tx: hold(tx, "a"), IllegalTransition),
        (lambda tx: release(tx, ready.box, "a"), IllegalTransition),
        (lambda tx: must_find(tx, "nope"), NoSuchTask),
        (
            lambda tx: store.move_task(tx, store.get(tx, 1), Event.EXPIRED, result="expired"),
            IllegalTransition,
        ),
    ):
        with pytest.raises(error):
            await ready.do(unit)
    assert await ready.events("a") == ["accepted", "claimed"]


async def test_a_retry_into_a_claim_of_another_task_is_refused(ready: Bench) -> None:
    await ready.add(id="a", writes_to=["/w"])
    await ready.end("a", exit_code=1)
    await ready.add(id="b", writes_to=["/w/x"])
    with pytest.raises(WriteConflict):
        await ready.do(lambda tx: retry(tx, ready.box, "a"))
    assert (await ready.task("a")).state.value == "finished"
    await ready.end("b")
    await ready.do(lambda tx: retry(tx, ready.box, "a"))
    assert await ready.rows("SELECT path FROM intents") == [("/w",)]


# Whom an end frees.


@pytest.mark.parametrize(
    ("policy", "exit_code", "becomes"),
    [("success", 0, "running"), ("success", 1, "refused"), ("any", 0, "running"), ("any", 1, "running"), ("failure", 1, "running"), ("failure", 0, "refused")],
)  # fmt: skip
async def test_what_comes_after_starts_or_ends_as_its_policy_says(
    ready: Bench, policy: str, exit_code: int, becomes: str
) -> None:
    await ready.add(id="a")
    await ready.add(id="b", after="a", after_policy=policy)
    assert await ready.states("b") == ["blocked"]
    await ready.end("a", exit_code=exit_code)
    task = await ready.task("b")
    assert becomes == (task.result or task.state.value)
    if task.result:
        (data,) = await ready.results("b")
        assert data["reason"] == "dependency_failed"


async def test_a_task_waits_for_all_that_it_comes_after(ready: Bench) -> None:
    await ready.admit({"id": "a"}, {"id": "b"}, {"id": "c", "after": ["a", "b"]})
    await ready.end("a")
    assert (await ready.task("c")).reason == "dependency"
    await ready.end("b")
    assert await ready.states("c") == ["running"]


async def test_a_task_after_one_that_is_over_starts_at_once(ready: Bench) -> None:
    await ready.add(id="a")
    await ready.end("a")
    await ready.add(id="b", after="a")
    assert await ready.states("b") == ["running"]


async def test_a_freed_task_still_waits_for_its_start_time(ready: Bench) -> None:
    await ready.add(id="a")
    await ready.add(id="b", after="a", not_before="2030-01-01T00:00:00Z")
    await ready.end("a")
    assert await ready.states("b") == ["scheduled"]


async def test_the_failure_of_the_first_of_two_thousand_ends_the_whole_chain(bench: Bench) -> None:
    """A chain is settled by a list, not by recursion."""
    await bench.admit({"id": "t0"}, *({"id": f"t{n}", "after": f"t{n - 1}"} for n in range(1, 2000)))
    await bench.connect()
    await bench.end("t0", exit_code=1)
    assert await bench.rows("SELECT state, result, count(*) FROM tasks GROUP BY 1, 2 ORDER BY 2") == [
        ("finished", "failed", 1),
        ("finished", "refused", 1999),
    ]
    assert len(await bench.entries("result")) == 2000


async def test_a_cancelled_task_ends_those_that_come_after_it(bench: Bench) -> None:
    await bench.admit({"id": "a"}, {"id": "b", "after": "a"}, {"id": "c", "after": "b"})
    await bench.do(lambda tx: finish_waiting(tx, bench.box, must_find(tx, "a"), Event.CANCELLED, Result.CANCELLED, "cancelled"))  # fmt: skip
    assert [(await bench.task(name)).result for name in "abc"] == ["cancelled", "refused", "refused"]


async def test_those_that_queue_for_a_place_get_it_in_order(ready: Bench) -> None:
    ready.box.apply(Settings(max_workers=9))
    await ready.add(id="a", writes_to=["/w"])
    for name, path in (("b", "/w/x"), ("c", "/w/x/y"), ("d", "/w/z")):
        await ready.add(id=name, writes_to=[path], on_conflict="queue")
    assert await ready.states("b", "c", "d") == ["blocked"] * 3
    await ready.end("a")
    assert await ready.states("b", "c", "d") == ["running", "blocked", "running"]
    await ready.end("b", exit_code=1)
    assert await ready.states("c") == ["running"]


async def test_a_claim_is_held_through_a_backoff(ready: Bench) -> None:
    await ready.add(id="a", writes_to=["/w"], max_attempts=2)
    await ready.add(id="b", writes_to=["/w"], on_conflict="queue")
    await ready.end("a", exit_code=1)
    assert await ready.states("a", "b") == ["retryable", "blocked"]


async def test_queueing_for_each_others_places_ends_without_a_deadlock(ready: Bench) -> None:
    """Many tasks, each wanting two of three places, in every order: all run, none beside one that it conflicts with."""
    ready.box.apply(Settings(max_workers=20, queues={"default": Queue(concurrency=20)}))
    pairs = [("/x", "/y"), ("/y", "/z"), ("/z", "/x"), ("/y", "/x"), ("/z", "/y"), ("/x", "/z")] * 3
    await ready.admit(*({"id": f"t{n}", "writes_to": list(pair), "on_conflict": "queue"} for n, pair in enumerate(pairs)))  # fmt: skip
    order = []
    while running := [row[0] for row in await ready.rows("SELECT id FROM tasks WHERE state = 'running'")]:
        held = [path for name in running for path in pairs[int(name[1:])]]
        assert len(held) == len(set(held))
        order += running[:1]
        await ready.end(running[0])
    assert sorted(order) == sorted(f"t{n}" for n in range(len(pairs)))
    assert await ready.rows("SELECT count(*) FROM intents") == [(0,)]


async def test_tasks_related_by_after_do_not_conflict(ready: Bench) -> None:
    await ready.add(id="a", writes_to=["/w"])
    await ready.add(id="b", writes_to=["/w"], after="a")
    assert (await ready.task("b")).reason == "dependency"
    await ready.end("a")
    assert await ready.states("b") == ["running"]


async def test_a_release_looks_again_at_what_blocks(ready: Bench) -> None:
    await ready.add(id="a")
    await ready.add(id="b", after="a")
    await ready.do(lambda tx: hold(tx, "b"))
    await ready.end("a", exit_code=1)
    assert await ready.states("b") == ["held"]
    await ready.do(lambda tx: release(tx, ready.box, "b"))
    assert (await ready.task("b")).result == "refused"


async def test_a_released_task_keeps_its_start_time(ready: Bench) -> None:
    await ready.add(id="a", not_before="2030-01-01T00:00:00Z")
    await ready.do(lambda tx: hold(tx, "a"))
    await ready.do(lambda tx: release(tx, ready.box, "a"))
    assert await ready.states("a") == ["scheduled"]
