"""Time passes for waiting tasks; the clock moves only when a test says so."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from agentqd.core.settings import Defaults, Settings
from agentqd.core.units import Duration, format_time
from agentqd.loops.operations import hold
from agentqd.loops.waking import Waker

from .harness import Bench


@pytest.fixture
def waker(bench: Bench) -> Waker:
    made = Waker(bench.box)
    bench.hooks.append(made.before_commit)
    return made


async def _pass(bench: Bench, waker: Waker, seconds: float) -> None:
    bench.clock.advance(seconds)
    await waker._turn()


def _in(bench: Bench, seconds: float) -> str:
    return format_time(bench.clock.now_us() + int(seconds * 1_000_000)) or ""


async def test_a_task_starts_at_its_time_and_not_before(bench: Bench, waker: Waker) -> None:
    await bench.add(id="a", not_before=_in(bench, 10))
    await _pass(bench, waker, 9.999)
    assert await bench.states("a") == ["scheduled"]
    await _pass(bench, waker, 0.001)
    assert await bench.states("a") == ["queued"]


async def test_a_task_that_did_not_start_in_time_ends_as_expired(bench: Bench, waker: Waker) -> None:
    await bench.add(id="a", expires_at=_in(bench, 10))
    await _pass(bench, waker, 10)
    (data,) = await bench.results("a")
    assert (data["status"], data["reason"]) == ("expired", "expires_at")


async def test_expiry_ends_a_held_and_a_blocked_task_too(bench: Bench, waker: Waker) -> None:
    await bench.add(id="a", expires_at=_in(bench, 10))
    await bench.do(lambda tx: hold(tx, "a"))
    await bench.admit({"id": "x"}, {"id": "b", "after": "x", "expires_at": _in(bench, 10)})
    await _pass(bench, waker, 10)
    assert await bench.states("a", "b", "x") == ["finished", "finished", "queued"]


async def test_a_task_that_has_reached_its_start_time_or_ended_its_backoff_can_still_expire(bench: Bench, waker: Waker) -> None:  # fmt: skip
    await bench.connect()
    await bench.add(id="b", max_attempts=2, backoff="10s", expires_at=_in(bench, 20))
    await bench.end("b", exit_code=1)
    bench.box.draining = True
    await bench.add(id="a", not_before=_in(bench, 10), expires_at=_in(bench, 20))
    await _pass(bench, waker, 10)
    assert await bench.states("a", "b") == ["queued", "queued"]
    await _pass(bench, waker, 10)
    assert [(await bench.task(name)).result for name in "ab"] == ["expired", "expired"]


async def test_total_timeout_ends_a_waiting_task(bench: Bench, waker: Waker) -> None:
    await bench.add(id="a", total_timeout="5s")
    await _pass(bench, waker, 5)
    assert (await bench.task("a")).reason == "total_timeout"
    assert (await bench.task("a")).result == "timeout"


async def test_queue_timeout_alerts_once_and_ends_nothing(bench: Bench, waker: Waker) -> None:
    await bench.add(id="a", queue_timeout="5s", expires_at=_in(bench, 60))
    await _pass(bench, waker, 4)
    assert await bench.alerts("queue_timeout") == []
    for _ in range(3):
        await _pass(bench, waker, 5)
    assert len(await bench.alerts("queue_timeout")) == 1
    assert await bench.states("a") == ["queued"]
    await _pass(bench, waker, 45)
    assert (await bench.task("a")).result == "expired"


async def test_a_running_task_is_not_woken(bench: Bench, waker: Waker) -> None:
    await bench.connect()
    await bench.add(id="a", expires_at=_in(bench, 5), queue_timeout="1s")
    await _pass(bench, waker, 10)
    assert await bench.states("a") == ["running"]
    assert await bench.alerts("queue_timeout") == []


async def test_a_late_prompt_is_found_and_the_task_runs_with_it(bench: Bench, waker: Waker) -> None:
    await bench.add(id="a", prompt=None, prompt_ref="late.txt")
    assert (await bench.task("a")).reason == "prompt_missing"
    await _pass(bench, waker, 2)
    assert await bench.states("a") == ["blocked"]
    Path(bench.folders.prompts, "late.txt").write_text("do it")
    await _pass(bench, waker, 1)
    assert await bench.states("a") == ["queued"]
    await bench.connect()
    assert [claim.prompt for claim in bench.claims] == [b"do it"]


async def test_a_prompt_that_never_comes_refuses_the_task(bench: Bench, waker: Waker) -> None:
    await bench.add(id="a", prompt=None, prompt_ref="late.txt")
    await _pass(bench, waker, 59)
    assert await bench.states("a") == ["blocked"]
    await _pass(bench, waker, 1)
    task = await bench.task("a")
    assert (task.result, task.reason) == ("refused", "prompt_missing")
    assert len(await bench.alerts("prompt_missing")) == 1


async def test_a_late_prompt_that_is_no_prompt_refuses_the_task(bench: Bench, waker: Waker) -> None:
    await bench.add(id="a", prompt=None, prompt_ref="late.txt")
    Path(bench.folders.prompts, "late.txt").write_text(" \n")
    await _pass(bench, waker, 1)
    assert (await bench.task("a")).reason == "empty_prompt"


async def test_a_late_prompt_does_not_overtake_a_dependency(bench: Bench, waker: Waker) -> None:
    await bench.admit({"id": "x"}, {"id": "a", "after": "x", "prompt": None, "prompt_ref": "late.txt"})
    Path(bench.folders.prompts, "late.txt").write_text("do it")
    await _pass(bench, waker, 1)
    task = await bench.task("a")
    assert (task.state.value, task.reason) == ("blocked", "dependency")


async def test_an_edit_that_shortens_a_clock_counts_at_the_next_look(bench: Bench, waker: Waker) -> None:
    bench.box.apply(Settings(defaults=Defaults(total_timeout=Duration(100), queue_timeout=Duration(10))))
    await bench.add(id="a")
    bench.box.apply(Settings(defaults=Defaults(total_timeout=Duration(10))))
    await _pass(bench, waker, 10)
    assert (await bench.task("a")).reason == "total_timeout"


async def test_the_loop_hears_of_an_earlier_time_with_the_commit_that_sets_it(
    bench: Bench, waker: Waker
) -> None:
    await bench.add(id="later", expires_at=_in(bench, 1000))
    loop = asyncio.create_task(waker.run())
    await bench.until(lambda: waker._next_us is not None)
    bench.clock.advance(5)
    await bench.add(id="due", expires_at=_in(bench, -1))
    async with asyncio.timeout(5):
        while (await bench.task("due")).result != "expired":
            await asyncio.sleep(0.002)
    loop.cancel()
    with suppress(asyncio.CancelledError):
        await loop
