"""What one sink's loop sends and what it leaves: breaker, pace, order, turns, a sink that is disabled, large backlogs."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest

from agentqd.core.outbox import RowEvent
from agentqd.core.settings import Alerts, Settings, Sink
from agentqd.core.units import Backoff, Duration
from agentqd.loops import parking, sinkmemory, sinkrunner
from agentqd.loops.delivery import DeliveryLoop
from agentqd.loops.sinkmemory import SinkMemory
from agentqd.sinks.base import Deferred, Delivered, Delivery, Disabled, Rejected
from agentqd.storage import outbox

from .harness import Bench
from .test_delivery import Script, _put, _running, _wait

LIFETIME = Duration(10**6)
PLAIN = Sink(type="command", command=["x"], backoff=Backoff((10.0,), doubles=True), lifetime=LIFETIME)
ORDERED = Sink(
    type="command", command=["x"], backoff=Backoff((10.0,), doubles=False), lifetime=LIFETIME, ordered=True
)
SSH = Sink(type="ssh", host="Laptop.lan", peer="client-7", path="/x", backoff=Backoff((300.0,), doubles=False), lifetime=LIFETIME)  # fmt: skip


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> Settings:
    return Settings(
        sinks={"s": getattr(request, "param", PLAIN), "other": PLAIN},
        alerts=Alerts(deliver_to=["s", "other"]),
    )


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Script:
    made = Script()
    monkeypatch.setattr(
        sinkrunner, "make_sink", lambda context, most: made if context.name == "s" else Script()
    )
    return made


ordered = pytest.mark.parametrize("settings", [ORDERED], indirect=True, ids=["ordered"])
ssh = pytest.mark.parametrize("settings", [SSH], indirect=True, ids=["ssh"])


def down(batch: Sequence[Delivery]) -> Any:
    return [Deferred("connection refused", connection=True)] * len(batch)


def later(batch: Sequence[Delivery]) -> Any:
    return [Deferred("later")] * len(batch)


def gone(batch: Sequence[Delivery]) -> Any:
    return [Disabled("410 Gone")] * len(batch)


def sent(plug: Script) -> list[str]:
    return [name for batch in plug.seen for name in batch]


async def states(bench: Bench, sink: str = "s") -> dict[str, int]:
    return dict(await bench.rows("SELECT state, count(*) FROM outbox WHERE sink = ? GROUP BY 1", sink))


async def until_states(bench: Bench, **wanted: int) -> None:
    async with asyncio.timeout(30):
        while await states(bench) != wanted:
            await asyncio.sleep(0.005)


async def many(bench: Bench, count: int, sinks: Sequence[str] = ("s",), start: int = 0) -> None:
    for lower in range(start, start + count, 2000):
        await _put(bench, *(f"d{n}" for n in range(lower, min(lower + 2000, start + count))), sinks=sinks)


# The breaker.


async def test_a_dead_receiver_rests_and_the_rows_that_wait_use_no_attempts(
    bench: Bench, plug: Script
) -> None:
    plug.answers = [down] * 6
    plug.concurrency = 1
    async with _running(bench) as runner:
        await _put(bench, *(f"d{n}" for n in range(20)))
        await until_states(bench, retryable=5, pending=15)
        assert runner.health()["breaker"] == "open"
        assert runner.health()["next_probe_at"] is not None
        assert await bench.rows("SELECT sum(attempts) FROM outbox WHERE sink = 's'") == [(5,)]
        _wait(bench, runner, 59)
        await asyncio.sleep(0.02)
        assert len(plug.seen) == 5
        _wait(bench, runner, 2)
        await bench.until(lambda: runner.health()["breaker"] == "open" and len(plug.seen) == 6)
        _wait(bench, runner, 119)
        await asyncio.sleep(0.02)
        assert len(plug.seen) == 6, "twice as long"
        _wait(bench, runner, 2)
        await until_states(bench, delivered=20)
        assert runner.health()["breaker"] == "closed"


async def test_a_probe_goes_alone_and_then_it_is_slowly_up(bench: Bench, plug: Script) -> None:
    plug.concurrency = 20
    async with _running(bench) as runner:
        await many(bench, 40, start=1000)
        await until_states(bench, delivered=40)
        assert runner.health()["concurrency"] == 20
        plug.answers = [down] * 5
        await _put(bench, *(f"d{n}" for n in range(5)))
        await until_states(bench, retryable=5, delivered=40)
        assert runner.health()["concurrency"] == 15
        gate = plug.gate = Turnstile()  # type: ignore[assignment]
        await many(bench, 50, start=10)
        _wait(bench, runner, 61)
        before = len(plug.seen)
        for done, most in enumerate(
            (1, 1, 2, 3, 4)
        ):  # the probe; then one at once, and one more for each success
            await bench.until(lambda done=done, most=most: len(plug.seen) - before == done + most)
            await asyncio.sleep(0.02)
            assert plug.under_way == most
            assert runner.health()["breaker"] == ("closed" if done else "half_open")
            gate.let_through(1)
        gate.let_through(1000)
        await until_states(bench, delivered=95)
        assert runner.health()["concurrency"] == 20


class Turnstile(asyncio.Semaphore):
    """A gate that lets through so many."""

    def __init__(self) -> None:
        super().__init__(0)

    async def wait(self) -> None:
        await self.acquire()

    def let_through(self, count: int) -> None:
        for _ in range(count):
            self.release()


async def test_a_restart_does_not_send_a_flood_to_a_receiver_that_was_down(
    bench: Bench, plug: Script
) -> None:
    plug.answers = [down] * 5
    async with _running(bench):
        await _put(bench, *(f"d{n}" for n in range(20)))
        await until_states(bench, retryable=5, pending=15)
        await bench.until(lambda: plug.under_way == 0)
        await bench.turn()
    plug.seen.clear()
    bench.clock.advance(30)
    async with _running(bench) as runner:
        await bench.until(lambda: runner.health()["breaker"] == "open")
        runner.kick.set()
        await asyncio.sleep(0.03)
        assert plug.seen == []
        plug.gate.clear()
        _wait(bench, runner, 31)
        await bench.until(lambda: plug.seen)
        await asyncio.sleep(0.02)
        assert plug.under_way == 1
        plug.gate.set()
        await until_states(bench, delivered=20)


async def test_an_edit_of_the_sink_begins_anew(bench: Bench, plug: Script) -> None:
    plug.answers = [down] * 5
    async with _running(bench):
        await _put(bench, *(f"d{n}" for n in range(5)))
        await until_states(bench, retryable=5)
        await bench.turn()
    mended = Sink(type="command", command=["y"], lifetime=LIFETIME)
    bench.box.apply(Settings(sinks={"s": mended, "other": PLAIN}))
    bench.clock.advance(11)
    async with _running(bench):
        await until_states(bench, delivered=5)


async def test_a_receiver_that_only_says_later_opens_no_breaker(bench: Bench, plug: Script) -> None:
    plug.answers = [later] * 30
    async with _running(bench) as runner:
        await _put(bench, *(f"d{n}" for n in range(30)))
        await until_states(bench, retryable=30)
        assert runner.health()["breaker"] == "closed"
        assert runner.health()["concurrency"] == 1, "one less for each failure"


async def test_what_waits_behind_an_open_breaker_past_its_lifetime_is_dead_and_told_once(bench: Bench, plug: Script) -> None:  # fmt: skip
    plug.answers = [down] * 6
    plug.concurrency = 1
    async with _running(bench) as runner:
        await many(bench, 1200)
        await until_states(bench, retryable=5, pending=1195)
        _wait(bench, runner, float(LIFETIME) + 1)
        await until_states(bench, dead=1200)
        await _put(bench, "young")
    letters = await bench.alerts("dead_letter")
    assert 2 <= len(letters) <= 5, "the probe's own, and one for each five hundred"
    assert all("dead letter" in letter["message"] for letter in letters)


# A peer that contacts the box.


@ssh
async def test_a_peer_that_contacts_the_box_has_its_rows_tried_at_once(bench: Bench, plug: Script) -> None:
    plug.answers = [down] * 5
    plug.concurrency = 1
    async with _running(bench) as runner:
        await _put(bench, *(f"d{n}" for n in range(8)))
        await until_states(bench, retryable=5, pending=3)
        runner.hears_of(frozenset({"somebody-else"}))
        await asyncio.sleep(0.02)
        assert len(plug.seen) == 5
        runner.hears_of(frozenset({"client-7"}))
        await until_states(bench, delivered=8)


@ssh
async def test_contacts_in_a_row_wake_it_once_in_ten_seconds(bench: Bench, plug: Script) -> None:
    plug.answers = [later] * 20
    async with _running(bench) as runner:
        await _put(bench, "d0")
        await bench.until(lambda: waits_in_memory(runner))  # a moment after it is so in the journal
        for n in range(3):
            runner.hears_of(frozenset({"laptop.lan"}))
            await bench.until(lambda: len(plug.seen) == 2)
            await asyncio.sleep(0.01)
            assert (n, len(plug.seen)) == (n, 2)
        await bench.until(lambda: waits_in_memory(runner))
        bench.clock.advance(10)
        runner.hears_of(frozenset({"laptop.lan"}))
        await bench.until(lambda: len(plug.seen) == 3)


def waits_in_memory(runner: sinkrunner.SinkRunner) -> bool:
    return bool(not runner.in_flight and runner.backlog.look_at is not None)


# Order.


@ordered
async def test_nothing_overtakes_a_row_that_waits_for_its_retry(bench: Bench, plug: Script) -> None:
    plug.concurrency = 5
    plug.answers = [lambda b: [Delivered()], later, later]
    async with _running(bench) as runner:
        await _put(bench, "d1", "d2", "d3")
        await until_states(bench, delivered=1, retryable=1, pending=1)
        await _put(bench, "d4")
        runner.offer([], look=True)
        await asyncio.sleep(0.03)
        assert sent(plug) == ["d1", "d2"]
        _wait(bench, runner, 10)
        await bench.until(lambda: sent(plug) == ["d1", "d2", "d2"])
        await asyncio.sleep(0.03)
        _wait(bench, runner, 10)
        await until_states(bench, delivered=4)
    assert sent(plug) == ["d1", "d2", "d2", "d2", "d3", "d4"]
    assert plug.most_under_way == 1


@ordered
async def test_order_holds_over_a_restart_and_a_clock_that_goes_back(bench: Bench, plug: Script) -> None:
    plug.answers = [later]
    async with _running(bench):
        await _put(bench, "d1", "d2")
        await until_states(bench, retryable=1, pending=1)
    bench.clock._now_us -= 3_600_000_000
    await _put(bench, "d3")
    bench.clock._now_us += 3_600_000_000
    async with _running(bench) as runner:
        await asyncio.sleep(0.03)
        assert sent(plug) == ["d1"]
        _wait(bench, runner, 10)
        await until_states(bench, delivered=3)
    assert sent(plug) == ["d1", "d1", "d2", "d3"]


@ordered
async def test_the_dead_and_the_held_do_not_block_and_come_back_in_their_place(
    bench: Bench, plug: Script
) -> None:
    plug.answers = [lambda b: [Rejected("never")], lambda b: [Delivered()], later]
    await _put(bench, "d1", "d2", "d3", "d4")
    await bench.do(lambda tx: outbox.change_row(tx, 2, "s", RowEvent.HELD, due_at=None))
    async with _running(bench) as runner:
        await until_states(bench, dead=1, held=1, delivered=1, retryable=1)
        assert sent(plug) == ["d1", "d3", "d4"]
        for seq in (1, 2):
            event = RowEvent.RETRY_REQUESTED
            await bench.do(
                lambda tx, seq=seq, event=event: outbox.change_row(tx, seq, "s", event, due_at=tx.now_us)
            )
        _wait(bench, runner, 10)
        await until_states(bench, delivered=4)
    assert sent(plug) == ["d1", "d3", "d4", "d1", "d2", "d4"]


@ordered
async def test_a_long_ordered_backlog_goes_out_in_order(bench: Bench, plug: Script, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(outbox, "ORDER_WINDOW", 50)
    await many(bench, 60, sinks=["other"])
    await many(bench, 300, sinks=["s", "other"], start=100)
    async with _running(bench):
        await _put(bench, "last")
        await until_states(bench, delivered=301)
    assert sent(plug) == [*(f"d{n}" for n in range(100, 400)), "last"]


# Fairness.


async def test_one_new_and_one_deferred_row_in_turn(bench: Bench, plug: Script) -> None:
    plug.concurrency = 1
    await _put(bench, *(f"old{n}" for n in range(40)))
    async with _running(bench):
        plug.gate.clear()
        await bench.until(lambda: plug.seen)
        await _put(bench, *(f"new{n}" for n in range(20)))
        plug.gate.set()
        await until_states(bench, delivered=60)
    order = sent(plug)
    assert sorted(set(order)) == sorted(order)
    turns = "".join(name[0] for name in order[1:41])
    assert turns in ("no" * 20, "on" * 20)


async def test_a_row_that_comes_while_the_journal_is_read_is_sent_once(bench: Bench, plug: Script) -> None:
    gate, begun, read = asyncio.Event(), asyncio.Event(), bench.journal.read
    gate.set()

    async def held_up(query: Any) -> Any:
        if "Backlog" in query.__qualname__:
            begun.set()
            await gate.wait()
        return await read(query)

    bench.journal.read = held_up  # type: ignore[method-assign]
    async with _running(bench) as runner:
        await bench.until(begun.is_set)
        await asyncio.sleep(0.01)
        begun.clear()
        gate.clear()
        runner.offer([], look=True)
        await bench.until(begun.is_set)
        await _put(bench, "d1")  # comes as a new row, and this read will find it, too
        gate.set()
        await until_states(bench, delivered=1)
        await _put(bench, "d2")
        await until_states(bench, delivered=2)
    assert sent(plug) == ["d1", "d2"]


# A sink that is disabled.


async def test_a_disabled_sink_holds_its_rows_tells_others_and_goes_on_when_a_person_says_so(bench: Bench, plug: Script) -> None:  # fmt: skip
    plug.concurrency = 1
    loop, task = await _loop(bench, plug)
    plug.answers = [gone]
    await many(bench, 1200)
    await until_states(bench, held=1200)
    await _put(bench, "d9000")
    await until_states(bench, held=1201)
    assert loop.runners["s"].health()["breaker"] == "disabled"
    (data,) = await bench.alerts("sink_disabled")
    assert "410 Gone" in data["message"]
    assert await bench.rows("SELECT DISTINCT sink FROM outbox o JOIN entries e ON e.seq = o.entry_seq WHERE e.kind = 'alert'") == [("other",)]  # fmt: skip
    assert len(plug.seen) == 1
    await bench.do(lambda tx: outbox.change_row(tx, 7, "s", RowEvent.RELEASED, due_at=tx.now_us))
    await until_states(bench, delivered=1201)  # that one enables it, and the others go on, too
    await _put(bench, "d9001")
    await until_states(bench, delivered=1202)
    assert (await bench.journal.read(lambda c: sinkmemory.load_word(c, "s"))).releasing is False
    await _end(task)


async def test_a_disabled_sink_stays_so_over_a_restart_and_an_edit_releases_its_rows_but_not_a_persons(bench: Bench, plug: Script) -> None:  # fmt: skip
    _, task = await _loop(bench, plug)
    plug.answers = [gone]
    await _put(bench, "d1")
    await until_states(bench, held=1)
    await _end(task)
    await _put(bench, "d2", "d3")
    await bench.do(lambda tx: outbox.change_row(tx, 3, "s", RowEvent.HELD, due_at=None))
    held = await bench.rows("SELECT entry_seq FROM outbox WHERE state = 'held' AND sink = 's'")
    _, task = await _loop(bench, plug)
    await until_states(bench, held=3)
    assert len(plug.seen) == 1
    assert len(held) == 2
    mended = Sink(type="command", command=["y"], lifetime=LIFETIME)
    bench.box.apply(Settings(sinks={"s": mended, "other": PLAIN}, alerts=bench.box.settings.alerts))
    await until_states(bench, held=1, delivered=2)
    await _end(task)


async def test_a_sink_that_was_enabled_just_now_has_no_rows_held(bench: Bench, plug: Script) -> None:
    """The hold may have been asked for before the person's word was in the journal."""
    await _put(bench, "d1")
    assert await bench.do(lambda tx: parking.hold_open(tx, "s", frozenset())) == 0
    await bench.do(lambda tx: sinkmemory.save(tx, "s", SinkMemory(disabled="gone")))
    assert await bench.do(lambda tx: parking.hold_open(tx, "s", frozenset({1}))) == 0
    assert await bench.do(lambda tx: parking.hold_open(tx, "s", frozenset())) == 1


async def test_a_release_does_not_take_back_a_no_that_is_not_in_the_journal_yet(bench: Bench, plug: Script) -> None:  # fmt: skip
    """Rows are released some hundred a commit; the receiver may say no again in between."""
    await _put(bench, "d1")
    await bench.do(lambda tx: outbox.change_row(tx, 1, "s", RowEvent.HELD, due_at=None))
    loop, task = await _loop(bench, plug)
    runner = loop.runners["s"]
    await bench.until(lambda: runner.is_open)
    runner.gate.disabled = "410 Gone"
    await bench.do(lambda tx: outbox.change_row(tx, 1, "s", RowEvent.RELEASED, due_at=tx.now_us))
    assert runner.disabled_by_receiver
    await _end(task)


async def test_what_was_under_way_when_the_sink_was_disabled_is_held_too(bench: Bench, plug: Script) -> None:
    _, task = await _loop(bench, plug)
    plug.gate.clear()
    plug.answers = [gone, later, lambda b: [Delivered()]]
    await _put(bench, "d1", "d2", "d3")
    await bench.until(lambda: plug.under_way == 3)
    plug.gate.set()
    await until_states(bench, held=2, delivered=1)
    assert [row for row in await bench.rows("SELECT last_error FROM outbox WHERE state = 'held'") if "disabled" not in row[0]] == []  # fmt: skip
    await _end(task)


async def test_rows_that_a_person_holds_or_drops_are_not_sent_from_memory(bench: Bench, plug: Script) -> None:
    plug.concurrency = 1
    plug.gate.clear()
    _, task = await _loop(bench, plug)
    await _put(bench, "d1", "d2", "d3", "d4")
    await bench.until(lambda: plug.seen)
    await bench.do(lambda tx: outbox.change_row(tx, 2, "s", RowEvent.HELD, due_at=None))
    await bench.do(lambda tx: outbox.change_row(tx, 3, "s", RowEvent.DROPPED, due_at=None))
    plug.gate.set()
    await until_states(bench, delivered=2, held=1, dropped=1)
    assert sent(plug) == ["d1", "d4"]
    await _end(task)


async def _loop(bench: Bench, plug: Script) -> tuple[DeliveryLoop, asyncio.Task[None]]:
    loop = DeliveryLoop(bench.box, None, lambda: 0.0)  # type: ignore[arg-type]
    bench.hooks[1:] = [loop.before_commit]
    task = asyncio.create_task(loop.run())
    await bench.until(lambda: "s" in loop.runners)
    return loop, task


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


# Large backlogs.


@pytest.mark.timeout(240)
@pytest.mark.slow
@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.real)])
async def test_a_hundred_thousand_rows_for_a_dead_sink_cost_no_memory_and_delay_no_other(bench: Bench, count: int, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    plugs = {"s": Script(), "other": Script()}
    plugs["s"].concurrency = plugs["other"].concurrency = 20
    plugs["s"].answers = [down] * 10**6
    monkeypatch.setattr(sinkrunner, "make_sink", lambda context, most: plugs.get(context.name) or Script())
    loop, task = await _loop(bench, plugs["s"])
    tracemalloc.start()
    for n in range(count // 2000):
        await many(bench, 2000, start=n * 2000)
    assert tracemalloc.get_traced_memory()[0] < 30 * 2**20
    tracemalloc.stop()
    assert len(plugs["s"].seen) < 50, "a dead sink is left alone"
    took = [await _time_to_other(bench, n) for n in range(30)]
    plugs["s"].answers = []
    loop.runners["s"].gate.breaker.heard_of(bench.clock.monotonic_s())
    bench.clock.advance(3000)
    loop.runners["s"].kick.set()
    reads = _count_reads(bench)
    began = time.monotonic()
    took += [await _time_to_other(bench, 100 + n) for n in range(30)]
    async with asyncio.timeout(200):
        while (await states(bench)).get("delivered") != count:
            await asyncio.sleep(0.2)
    assert sorted(took)[len(took) * 9 // 10] < 3.0
    assert len(reads) < count / 30, f"{len(reads)} reads in {time.monotonic() - began:.0f} s"
    names = sent(plugs["s"])
    assert len(set(names)) == count
    await _end(task)


def _count_reads(bench: Bench) -> list[Any]:
    reads: list[Any] = []
    read = bench.journal.read

    async def counted(query: Any) -> Any:
        if "Backlog" in query.__qualname__:
            reads.append(query)
        return await read(query)

    bench.journal.read = counted  # type: ignore[method-assign]
    return reads


async def _time_to_other(bench: Bench, n: int) -> float:
    began = time.monotonic()
    await _put(bench, f"other{n}", sinks=["other"])
    async with asyncio.timeout(20):
        while not await bench.rows("SELECT 1 FROM outbox o JOIN entries e ON e.seq = o.entry_seq WHERE e.delivery_id = ? AND o.state = 'delivered'", f"other{n}"):  # fmt: skip
            await asyncio.sleep(0.002)
    return time.monotonic() - began
