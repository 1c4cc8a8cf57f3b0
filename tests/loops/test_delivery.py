"""One sink's loop, with a plug that does as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from agentqd.core.giveway import GiveWay
from agentqd.core.lifecycle import Event
from agentqd.core.outbox import RowEvent, RowState
from agentqd.core.settings import Alerts, Settings, Sink
from agentqd.core.units import Backoff, Duration
from agentqd.loops import backlog
from agentqd.loops import sinkrunner as module
from agentqd.loops.delivery import DeliveryLoop
from agentqd.loops.sinkrunner import SinkRunner
from agentqd.sinks.base import Context, Deferred, Delivered, Delivery, Found, Outcome, Rejected
from agentqd.storage import outbox
from agentqd.storage.outbox import NewEntry
from agentqd.storage.transaction import Transaction

from .harness import Bench

Answer = Callable[[Sequence[Delivery]], Any]


class Script:
    """A plug: `answers` are used up one a batch, then everything is delivered."""

    def __init__(self) -> None:
        self.batch_max, self.timeout_s, self.concurrency = 1, 30.0, 5
        self.answers: list[Answer] = []
        self.seen: list[list[str]] = []
        self.payloads: list[bytes] = []
        self.open_errors = 0
        self.found: list[Found] = []
        self.closed = 0
        self.opened: list[int] = []
        self.under_way = 0
        self.most_under_way = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def open(self, last_position: int) -> list[Found]:
        self.opened.append(last_position)
        if self.open_errors:
            self.open_errors -= 1
            raise OSError("not yet")
        return self.found

    async def deliver(self, batch: Sequence[Delivery]) -> Sequence[Outcome]:
        self.seen.append([item.delivery_id for item in batch])
        self.payloads += [item.payload for item in batch]
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self.gate.wait()
            answer: Answer = self.answers.pop(0) if self.answers else lambda batch: [Delivered()] * len(batch)
            result = answer(batch)
            return await result if asyncio.iscoroutine(result) else result
        finally:
            self.under_way -= 1

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture
def settings() -> Settings:
    sink = Sink(type="command", command=["x"], backoff=Backoff((10.0,), doubles=True), lifetime=Duration(100))
    return Settings(sinks={"s": sink, "other": sink}, alerts=Alerts(deliver_to=["s", "other"]))


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Script:
    made = Script()
    monkeypatch.setattr(module, "make_sink", lambda context, most: made)
    return made


@asynccontextmanager
async def _running(bench: Bench) -> AsyncIterator[SinkRunner]:
    runner = SinkRunner(bench.box, "s", bench.box.settings.sinks["s"], None, lambda: 0.0, GiveWay())  # type: ignore[arg-type]

    def hook(tx: Transaction) -> None:
        given = tx.sinks_made_pending()
        if "s" in given:
            rows = [row for sink, row in tx.fresh_rows if sink == "s"]
            tx.after_commit(lambda: runner.offer(rows, look=given["s"] > len(rows)))

    bench.hooks.append(hook)
    task = asyncio.create_task(runner.run())
    try:
        yield runner
        if task.done():
            task.result()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _put(bench: Bench, *ids: str, sinks: Sequence[str] = ("s",)) -> None:
    def unit(tx: Transaction) -> None:
        for name in ids:
            outbox.add_entry(
                tx, NewEntry(name, None, 0, 0, "entry", name, "t", b'{"id":"%s"}' % name.encode(), sinks)
            )

    await bench.do(unit)


async def _state(bench: Bench, *states: str, sink: str = "s") -> list[tuple[Any, ...]]:
    """Wait until the sink's rows are in these states; their (attempts, due_at, last_error)."""
    async with asyncio.timeout(10):
        while True:
            rows = await bench.rows("SELECT state, attempts, due_at, last_error FROM outbox WHERE sink = ? ORDER BY entry_seq", sink)  # fmt: skip
            if [row[0] for row in rows] == list(states):
                return [row[1:] for row in rows]
            await asyncio.sleep(0.005)


def _wait(bench: Bench, runner: SinkRunner, seconds: float) -> None:
    bench.clock.advance(seconds)
    runner.kick.set()


async def test_a_new_row_is_sent_and_marked(bench: Bench, plug: Script) -> None:
    async with _running(bench):
        await _put(bench, "d1", "d2")
        assert await _state(bench, "delivered", "delivered") == [(1, None, None), (1, None, None)]
    assert sorted(plug.seen) == [["d1"], ["d2"]]
    assert plug.closed == 1


async def test_rows_from_before_the_start_are_sent(bench: Bench, plug: Script) -> None:
    await _put(bench, "d1", "d2")
    async with _running(bench):
        await _state(bench, "delivered", "delivered")
    assert sorted(plug.seen) == [["d1"], ["d2"]]


async def test_a_deferred_row_waits_for_its_backoff_and_keeps_id_and_bytes(
    bench: Bench, plug: Script
) -> None:
    plug.answers = [lambda b: [Deferred("busy")]]
    async with _running(bench) as runner:
        await _put(bench, "d1")
        began = bench.clock.now_us()
        assert await _state(bench, "retryable") == [(1, began + 10_000_000, "busy")]
        _wait(bench, runner, 9)
        await _put(bench, "d2")
        await _state(bench, "retryable", "delivered")
        assert plug.seen == [["d1"], ["d2"]]
        plug.answers = [lambda b: [Deferred("busy", retry_after_s=50)]]
        _wait(bench, runner, 1)
        await bench.until(lambda: plug.seen.count(["d1"]) == 2)
        async with asyncio.timeout(10):
            while (await bench.rows("SELECT attempts FROM outbox WHERE entry_seq = 1"))[0][0] != 2:
                await asyncio.sleep(0.005)
        assert (await bench.rows("SELECT due_at FROM outbox WHERE entry_seq = 1")) == [(began + 60_000_000,)]
        _wait(bench, runner, 50)
        assert (await _state(bench, "delivered", "delivered"))[0][0] == 3
    assert len(set(plug.payloads)) == 2
    assert await bench.rows("SELECT n, outcome FROM tries WHERE entry_seq = 1 ORDER BY n") == [(1, "deferred"), (2, "deferred"), (3, "delivered")]  # fmt: skip


async def _hang(batch: Sequence[Delivery]) -> Any:
    await asyncio.Event().wait()


def _raise(batch: Sequence[Delivery]) -> Any:
    raise RuntimeError("plug is broken")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (_raise, "plug is broken"),
        (_hang, "no answer within"),
        (lambda b: [], "answered 0 of 1"),
        (lambda b: [Delivered(), Delivered()], "answered 2 of 1"),
        (lambda b: None, "answered"),
        (lambda b: [None], "answered"),
        (lambda b: ["delivered"], "answered"),
        (lambda b: [Deferred("later", retry_after_s=float("inf"))], "later"),
        (lambda b: [Deferred("x" * 10_000)], "xxx"),
    ],
)
async def test_a_plug_that_raises_hangs_or_answers_nonsense_is_deferred(bench: Bench, plug: Script, answer: Answer, said: str) -> None:  # fmt: skip
    bench.box.apply(Settings(sinks={"s": Sink(type="command", command=["x"], lifetime=Duration(10**6))}))
    plug.timeout_s = 0.05
    plug.answers = [answer]
    async with _running(bench) as runner:
        await _put(bench, "d1")
        ((attempts, _, error),) = await _state(bench, "retryable")
        assert attempts == 1
        assert said in error
        assert len(error) <= 500
        _wait(bench, runner, 86_400)
        await _state(bench, "delivered")


async def test_a_rejected_row_is_dead_and_told_over_the_other_sinks_only(bench: Bench, plug: Script) -> None:
    plug.answers = [lambda b: [Rejected("never")]]
    async with _running(bench):
        await _put(bench, "d1")
        await _state(bench, "dead")
        (data,) = await bench.alerts("dead_letter")
        assert data["delivery_id"] == "d1"
        assert await bench.rows("SELECT DISTINCT sink FROM outbox WHERE entry_seq > 1") == [("other",)]


async def test_a_row_gives_up_after_its_lifetime(bench: Bench, plug: Script) -> None:
    plug.answers = [lambda b: [Deferred("down")]] * 9
    async with _running(bench) as runner:
        await _put(bench, "d1")
        for tries, wait in ((1, 10), (2, 20), (3, 40)):
            async with asyncio.timeout(10):
                while (await bench.rows("SELECT attempts FROM outbox"))[0][0] != tries:
                    await asyncio.sleep(0.005)
            _wait(bench, runner, wait)
        assert (await _state(bench, "dead"))[0][0] == 4
    assert len(await bench.alerts("dead_letter")) == 1


async def test_nothing_is_sent_twice_while_it_is_in_flight(bench: Bench, plug: Script) -> None:
    plug.gate.clear()
    async with _running(bench) as runner:
        await _put(bench, "d1", "d2")
        await bench.until(lambda: len(plug.seen) == 2)
        for _ in range(5):
            runner.offer([], look=True)
            await asyncio.sleep(0.01)
        await _put(bench, "d3")
        await bench.until(lambda: len(plug.seen) == 3)
        plug.gate.set()
        await _state(bench, "delivered", "delivered", "delivered")
    assert sorted(plug.seen) == [["d1"], ["d2"], ["d3"]]


async def test_fresh_rows_and_those_read_from_the_journal_are_never_sent_both(
    bench: Bench, plug: Script
) -> None:
    """Rows come with their commits while the runner looks into the journal again and again."""
    async with _running(bench) as runner:
        for n in range(30):
            await asyncio.gather(
                _put(bench, *(f"d{n}-{m}" for m in range(3))), *(asyncio.sleep(0) for _ in range(n % 4))
            )
            runner.offer([], look=n % 2 == 0)
        await _state(bench, *["delivered"] * 90)
    sent = [name for batch in plug.seen for name in batch]
    assert sorted(sent) == sorted(set(sent))
    assert len(sent) == 90


async def test_a_fresh_row_that_a_look_into_the_journal_has_brought_already_is_sent_once(bench: Bench, plug: Script) -> None:  # fmt: skip
    plug.batch_max, plug.concurrency = 10, 1
    plug.gate.clear()
    async with _running(bench) as runner:
        await _put(bench, "d0")
        await bench.until(lambda: plug.seen)
        await _put(bench, "d1", "d2")  # kept as fresh rows
        runner.offer([], look=True)  # and to be found in the journal, too
        plug.gate.set()
        await _state(bench, "delivered", "delivered", "delivered")
        await _put(bench, "d3")
        await _state(bench, "delivered", "delivered", "delivered", "delivered")
    assert plug.seen == [["d0"], ["d1", "d2"], ["d3"]]


async def test_more_rows_than_memory_holds_are_all_sent_once(bench: Bench, plug: Script, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(backlog, "FRESH_ROWS_MAX", 5)
    plug.batch_max, plug.concurrency = 3, 1
    async with _running(bench):
        for n in range(6):
            await _put(bench, *(f"d{n}-{m}" for m in range(4)))
        await _state(bench, *["delivered"] * 24)
    sent = [name for batch in plug.seen for name in batch]
    assert sorted(sent) == sorted(set(sent))
    assert all(len(batch) <= 3 for batch in plug.seen)


async def test_no_more_batches_are_under_way_than_the_plug_allows(bench: Bench, plug: Script) -> None:
    plug.concurrency = 2
    plug.gate.clear()
    async with _running(bench):
        await _put(bench, *(f"d{n}" for n in range(6)))
        await bench.until(lambda: plug.under_way == 2)
        plug.gate.set()
        await _state(bench, *["delivered"] * 6)
    assert plug.most_under_way == 2


async def test_a_damaged_payload_is_rejected_and_its_neighbours_are_sent(bench: Bench, plug: Script) -> None:
    plug.batch_max, plug.concurrency = 10, 1
    await _put(bench, "d1", "d2")
    await bench.do(lambda tx: tx.execute("UPDATE entries SET payload = x'00' WHERE seq = 1"))
    async with _running(bench):
        await _state(bench, "dead", "delivered")
    assert plug.seen == [["d2"]]


async def test_a_plug_that_cannot_be_opened_is_tried_again(bench: Bench, plug: Script, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(module, "_OPEN_RETRY_S", (0.01,))
    plug.open_errors = 3
    async with _running(bench):
        await _put(bench, "d1")
        await _state(bench, "delivered")
    assert len(plug.opened) == 4


async def test_what_the_file_already_holds_is_marked_and_not_sent_again(bench: Bench, plug: Script) -> None:
    await _put(bench, "d1", "d2")
    plug.found = [Found("d1", 7), Found("unknown", 8)]
    async with _running(bench):
        await _state(bench, "delivered", "delivered")
    assert plug.seen == [["d2"]]
    assert await bench.rows("SELECT position FROM outbox WHERE entry_seq = 1") == [(7,)]


async def test_a_person_who_drops_a_row_in_flight_has_the_last_word(bench: Bench, plug: Script) -> None:
    plug.gate.clear()
    plug.answers = [lambda b: [Deferred("down")]]
    async with _running(bench) as runner:
        await _put(bench, "d1")
        await bench.until(lambda: plug.seen)
        await bench.do(lambda tx: outbox.change_row(tx, 1, "s", RowEvent.DROPPED))
        plug.gate.set()
        await bench.until(lambda: not runner.in_flight)
        assert await bench.rows("SELECT state FROM outbox") == [(RowState.DROPPED.value,)]


async def test_the_loop_starts_and_ends_runners_as_the_config_says_and_none_delays_another(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    plugs: dict[str, list[Script]] = {}

    def make(context: Context, most: int) -> Script:
        plugs.setdefault(context.name, []).append(Script())
        return plugs[context.name][-1]

    monkeypatch.setattr(module, "make_sink", make)
    loop = DeliveryLoop(bench.box, None, lambda: 0.0)  # type: ignore[arg-type]
    bench.hooks.append(loop.before_commit)
    task = asyncio.create_task(loop.run())
    await bench.until(lambda: set(loop.runners) == {"completions", "rejected", "s", "other"})
    plugs["s"][0].gate.clear()
    await _put(bench, "d1", "d2", sinks=["s", "other"])
    await _state(bench, "delivered", "delivered", sink="other")
    assert await bench.rows("SELECT DISTINCT state FROM outbox WHERE sink = 's'") == [("pending",)]
    bench.box.apply(Settings(sinks={"other": bench.box.settings.sinks["other"]}))
    await bench.until(lambda: "s" not in loop.runners)
    assert plugs["s"][0].closed == 1
    assert len(plugs["other"]) == 1
    bench.box.apply(Settings(sinks={**bench.box.settings.sinks, "s": Sink(type="command", command=["y"])}))
    await _state(bench, "delivered", "delivered", sink="s")
    assert sorted(plugs["s"][1].seen) == [["d1"], ["d2"]]
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_a_result_of_a_real_task_goes_out_with_the_commit_that_ends_it(
    bench: Bench, plug: Script
) -> None:
    await bench.connect()
    async with _running(bench):
        await bench.add(id="a", deliver_to=["s"])
        await bench.end("a")
        await _state(bench, "delivered")
    assert (await bench.task("a")).state.value == "finished"
    assert Event.FINISHED.value in await bench.events("a")
