"""Which task runs next."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from budget import tries
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentqd.core.lifecycle import Event, Result
from agentqd.core.settings import Queue, Settings, slots_default
from agentqd.loops.finishing import finish_waiting, withdraw_claim
from agentqd.loops.operations import hold, release
from agentqd.loops.scheduling import waiting_reason
from agentqd.storage import tasks as store

from .harness import Bench


def _claimed(bench: Bench) -> list[str]:
    return [claim.task.id for claim in bench.claims]


@pytest.fixture
def queues(bench: Bench) -> Bench:
    bench.box.apply(
        Settings(max_workers=3, queues={"flood": Queue(concurrency=3), "quiet": Queue(concurrency=3), "one": Queue(concurrency=1)})
    )  # fmt: skip
    return bench


async def test_nothing_is_claimed_without_a_supervisor(bench: Bench) -> None:
    await bench.add(id="a")
    await bench.turn()
    assert bench.claims == []
    await bench.connect()
    assert _claimed(bench) == ["a"]


async def test_a_claim_names_attempt_epoch_and_instance_and_is_made_with_the_acceptance(bench: Bench) -> None:
    await bench.connect()
    commits = bench.journal.commits
    await bench.add(id="a")
    assert bench.journal.commits == commits + 1
    attempt = await bench.journal.read(lambda c: store.attempt_of(c, 1, 1))
    assert (attempt.attempt, attempt.epoch, attempt.instance, attempt.boot_id) == (
        1,
        bench.journal.epoch,
        "inst",
        "boot",
    )
    assert await bench.events("a") == ["accepted", "claimed"]


async def test_the_higher_priority_goes_first_and_then_the_older(queues: Bench) -> None:
    await queues.admit(*({"id": f"t{n}", "queue": "one", "priority": n % 2} for n in range(4)))
    await queues.connect()
    for expected in (["t1"], ["t1", "t3"], ["t1", "t3", "t0"], ["t1", "t3", "t0", "t2"]):
        assert _claimed(queues) == expected
        await queues.end(expected[-1])


async def test_a_queue_never_runs_more_than_its_concurrency(queues: Bench) -> None:
    await queues.connect()
    await queues.admit(*({"queue": "one"} for _ in range(3)))
    assert len(queues.claims) == 1


async def test_all_queues_together_never_run_more_than_max_workers(queues: Bench) -> None:
    await queues.admit(*({"queue": name} for name in ("flood", "quiet", "one") for _ in range(3)))
    await queues.connect()
    assert len(queues.claims) == 3


async def test_a_flood_in_one_queue_does_not_delay_another(queues: Bench) -> None:
    await queues.admit(*({"id": f"f{n}", "queue": "flood", "priority": 9} for n in range(50)))
    await queues.connect()
    await queues.add(id="quiet", queue="quiet")
    assert "quiet" not in _claimed(queues)
    await queues.end("f0")
    assert _claimed(queues)[-1] == "quiet"


async def test_a_paused_queue_starts_nothing_until_it_is_resumed(queues: Bench) -> None:
    queues.scheduler.paused = frozenset({"one"})
    await queues.connect()
    await queues.add(id="a", queue="one")
    await queues.add(id="b", queue="quiet")
    assert _claimed(queues) == ["b"]
    queues.scheduler.paused = frozenset()
    await queues.turn()
    assert _claimed(queues) == ["b", "a"]


async def test_a_persons_pause_is_kept_over_a_restart_and_the_configs_needs_no_keeping(bench: Bench) -> None:
    await bench.do(lambda tx: tx.execute("INSERT INTO paused_queues VALUES ('default', 0)"))
    await bench.scheduler.load()
    assert bench.scheduler.is_paused("default")
    bench.box.apply(Settings(queues={"q": Queue(paused=True)}))
    assert bench.scheduler.is_paused("q")
    assert not bench.scheduler.is_paused("r")


async def test_a_draining_box_starts_nothing(bench: Bench) -> None:
    bench.box.draining = True
    await bench.connect()
    await bench.add(id="a")
    assert bench.claims == []
    bench.box.draining = False
    await bench.turn()
    assert _claimed(bench) == ["a"]


async def test_an_edit_that_gives_more_slots_uses_them(queues: Bench) -> None:
    await queues.admit(*({"queue": "one"} for _ in range(3)))
    await queues.connect()
    queues.box.apply(Settings(max_workers=3, queues={"one": Queue(concurrency=2)}))
    queues.scheduler.wake()
    await queues.turn()
    assert len(queues.claims) == 2


async def test_a_queue_that_was_found_empty_is_looked_at_again_when_a_task_comes_back(bench: Bench) -> None:
    await bench.connect()
    await bench.add(id="a")
    await bench.do(lambda tx: withdraw_claim(tx, bench.box, store.get(tx, 1)))
    assert _claimed(bench) == ["a", "a"]
    assert (await bench.task("a")).attempt == 1


async def test_why_a_task_waits_is_said(bench: Bench) -> None:
    await bench.add(id="a")
    task = await bench.task("a")
    says = {"paused": False, "connected": True, "busy": False}
    assert waiting_reason(task, bench.box, **says) == "starting"
    assert waiting_reason(task, bench.box, **{**says, "busy": True}) == "no_free_slot"
    assert waiting_reason(task, bench.box, **{**says, "paused": True}) == "queue_paused"
    assert waiting_reason(task, bench.box, **{**says, "connected": False}) == "no_supervisor"
    bench.box.draining = True
    assert waiting_reason(task, bench.box, **says) == "draining"
    held = await bench.do(lambda tx: hold(tx, "a"))
    assert waiting_reason(held, bench.box, **says) == "held"


# Against a plain reference: the same choices, worked out from a list.


class _Reference:
    def __init__(self, workers: int, slots: dict[str, int]) -> None:
        self.workers, self.slots = workers, slots
        self.waiting: list[tuple[str, int, str]] = []  # (queue, priority, id), in order of acceptance
        self.running: dict[str, str] = {}
        self.paused: set[str] = set()

    def choose(self) -> list[str]:
        claimed = []
        while len(self.running) < self.workers:
            used = Counter(self.running.values())
            open_ = [
                (used[queue] / self.slots[queue], -priority, n)
                for n, (queue, priority, _) in enumerate(self.waiting)
                if used[queue] < self.slots[queue] and queue not in self.paused
            ]
            heads: dict[str, tuple[float, int, int]] = {}
            for each in open_:
                queue = self.waiting[each[2]][0]
                heads[queue] = min(heads.get(queue, each), each)
            if not heads:
                return claimed
            queue, _, task_id = self.waiting.pop(min(heads.values())[2])
            self.running[task_id] = queue
            claimed.append(task_id)
        return claimed


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1, 1)), min_size=1, max_size=6)),
        st.tuples(st.just("end"), st.integers(0, 9)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("pause"), st.sampled_from("abc")),
    ),
    max_size=12,
)  # fmt: skip


@settings(
    max_examples=tries(40),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.integers(1, 5), st.fixed_dictionaries({name: st.integers(1, 3) for name in "abc"}), STEPS)
def test_the_scheduler_chooses_as_a_plain_reference_does(workers: int, slots: dict[str, int], steps: list[tuple[str, Any]]) -> None:  # fmt: skip
    with TemporaryDirectory() as folder:
        asyncio.run(_compare(Path(folder), workers, slots, steps))


async def _compare(root: Path, workers: int, slots: dict[str, int], steps: list[tuple[str, Any]]) -> None:
    reference = _Reference(workers, slots)
    queues = {name: Queue(concurrency=slots[name]) for name in slots}
    made = 0
    async with Bench(root, Settings(max_workers=workers, queues=queues)) as bench:
        await bench.connect()
        for what, how in steps:
            bench.claims.clear()
            if what == "add":
                new = [{"id": f"t{made + n}", "queue": queue, "priority": priority} for n, (queue, priority) in enumerate(how)]  # fmt: skip
                made += len(new)
                reference.waiting += [(each["queue"], each["priority"], each["id"]) for each in new]
                await bench.admit(*new)
            elif what == "end" and reference.running:
                task_id = sorted(reference.running)[how % len(reference.running)]
                del reference.running[task_id]
                await bench.end(task_id)
            elif what == "cancel" and reference.waiting:
                _, _, task_id = reference.waiting.pop(how % len(reference.waiting))
                await bench.do(
                    lambda tx, task_id=task_id: finish_waiting(tx, bench.box, store.find(tx, task_id), Event.CANCELLED, Result.CANCELLED, "cancelled")  # type: ignore[arg-type,misc]
                )  # fmt: skip
            elif what == "pause":
                reference.paused ^= {how}
                bench.scheduler.paused = frozenset(reference.paused)
                await bench.turn()
            else:
                continue
            assert _claimed(bench) == reference.choose()
        await bench.counts_are_true()


async def test_a_released_task_is_claimed_at_once(bench: Bench) -> None:
    await bench.add(id="a")
    await bench.do(lambda tx: hold(tx, "a"))
    await bench.connect()
    assert bench.claims == []
    await bench.do(lambda tx: release(tx, bench.box, "a"))
    assert _claimed(bench) == ["a"]


def test_by_default_there_are_at_least_four_slots() -> None:
    assert slots_default() >= 4
