"""A person's word on a sink, a sink's rate, and sinks that change under their rows: with the real delivery loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentqd.control import alerts as alerts_seen
from agentqd.core.limits import ALERTS_A_GROUP_MAX, ROWS_A_COMMIT
from agentqd.core.outbox import RowEvent
from agentqd.core.settings import Alerts, Settings, Sink
from agentqd.core.units import Backoff, Duration, Rate
from agentqd.loops import liveness, parking, rowchanges, sinkmemory, sinkrunner
from agentqd.loops.delivery import DeliveryLoop
from agentqd.loops.notices import SecretWatch
from agentqd.loops.rowchanges import Moved, Pick
from agentqd.sinks.base import Context, Deferred, Delivered, Rejected
from agentqd.storage import outbox

from .harness import Bench
from .test_delivery import Script, _put
from .test_sinkrunner import gone, later, many, sent, until_states

LONG = Duration(10**6)
PLAIN = Sink(type="command", command=["x"], backoff=Backoff((10.0,), doubles=False), lifetime=LONG)
SLOW = Sink(
    type="command", command=["x"], backoff=Backoff((10.0,), doubles=False), lifetime=LONG, rate=Rate(10, "s")
)
ALERTS = Alerts(deliver_to=["s", "other"])


class Plugs(dict[str, Script]):
    """By their sink's name: the next plug that is made for it is the one that stands here."""

    def __init__(self) -> None:
        self.contexts: list[Context] = []

    def make(self, context: Context, most: int) -> Script:
        self.contexts.append(context)
        if context.name not in self:
            self[context.name] = Script()
        return self[context.name]


@pytest.fixture
def plugs(monkeypatch: pytest.MonkeyPatch) -> Plugs:
    made = Plugs()
    monkeypatch.setattr(sinkrunner, "make_sink", made.make)
    made["s"] = Script()
    return made


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> Settings:
    return Settings(sinks={"s": getattr(request, "param", PLAIN), "other": PLAIN}, alerts=ALERTS)


@asynccontextmanager
async def delivering(bench: Bench) -> AsyncIterator[DeliveryLoop]:
    """A daemon's delivery; leaving it and entering again is a restart."""
    loop = DeliveryLoop(bench.box, None, lambda: 0.0)  # type: ignore[arg-type]
    bench.hooks[1:] = [loop.before_commit]
    task = asyncio.create_task(loop.run())
    try:
        await bench.until(lambda: len(loop.runners) >= len(bench.box.settings.sinks))
        yield loop
        if task.done():
            task.result()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def apply(bench: Bench, **sinks: Sink) -> None:
    bench.box.apply(
        Settings(sinks=sinks, alerts=Alerts(deliver_to=[name for name in ("s", "other") if name in sinks]))
    )


async def disable(bench: Bench, loop: DeliveryLoop, name: str = "s") -> None:
    def unit(tx: Any) -> None:
        word = parking.disable(tx, name, "it floods us", 7)
        assert word is not None
        tx.after_commit(lambda: loop.runners[name].disable(word))

    await bench.do(unit)


async def enable(bench: Bench, loop: DeliveryLoop, name: str = "s") -> None:
    def unit(tx: Any) -> None:
        assert parking.enable(tx, name, 7)
        tx.after_commit(loop.runners[name].enable)

    await bench.do(unit)


async def person(bench: Bench, event: RowEvent, *ids: str, sink: str = "s") -> int:
    """What `agentqctl outbox` does with ids."""
    pick = Pick(rowchanges.states_for(event), sink)
    where = f"e.delivery_id IN ({','.join('?' * len(ids))})"
    return await bench.do(
        lambda tx: rowchanges.change(tx, event, rowchanges.find(tx, pick, where, ids), lambda *_: False)
    )


async def state_of(bench: Bench, delivery_id: str, sink: str = "s") -> tuple[str, str | None]:
    rows = await bench.rows("SELECT o.state, o.last_error FROM outbox o JOIN entries e ON e.seq = o.entry_seq WHERE delivery_id = ? AND sink = ?", delivery_id, sink)  # fmt: skip
    return rows[0] if rows else ("none", None)


# A person's word.


async def test_a_person_disables_a_sink_its_rows_are_held_and_enable_releases_exactly_those(
    bench: Bench, plugs: Plugs
) -> None:
    plug = plugs["s"]
    plug.gate.clear()
    plug.concurrency = 1
    async with delivering(bench) as loop:
        await many(bench, ROWS_A_COMMIT + 50)
        await bench.until(lambda: plug.under_way == 1)
        assert await person(bench, RowEvent.HELD, "d7") == 1
        await disable(bench, loop)
        await until_states(bench, held=ROWS_A_COMMIT + 49, pending=1)  # but for what was under way
        assert await state_of(bench, "d9") == (
            "held",
            "the sink is disabled: by a person (uid 7): it floods us",
        )
        assert await person(bench, RowEvent.HELD, "d8") == 1  # held because of the sink, now by a person, too
        health = loop.runners["s"].health()
        assert (health["breaker"], health["disabled_by"]) == ("disabled", "person")
        plug.gate.set()
        await _put(bench, "new")
        await until_states(bench, held=ROWS_A_COMMIT + 50, delivered=1)
        assert await bench.alerts("sink_disabled") == []
        await enable(bench, loop)
        await until_states(bench, held=2, delivered=ROWS_A_COMMIT + 49)
        assert await state_of(bench, "d7") == await state_of(bench, "d8") == ("held", None)
        assert sorted(sent(plug)) == sorted(set(sent(plug)))
    await bench.counts_are_true()
    assert [row[0] for row in await bench.rows("SELECT event FROM events WHERE event LIKE 'sink_%abled' ORDER BY seq")] == ["sink_disabled", "sink_enabled"]  # fmt: skip


async def test_a_persons_word_stands_over_restarts_and_edits_and_while_the_sink_is_away(
    bench: Bench, plugs: Plugs
) -> None:
    async with delivering(bench) as loop:
        await disable(bench, loop)
    async with delivering(bench) as loop:
        await _put(bench, "d1")
        await until_states(bench, held=1)
        apply(bench, s=Sink(type="command", command=["mended"]), other=PLAIN)
        await bench.until(lambda: loop.runners["s"].settings.command == ["mended"])
        await _put(bench, "d2")
        await until_states(bench, held=2)
        apply(bench, other=PLAIN)
        await bench.until(lambda: "s" not in loop.runners)
        await _put(bench, "d3")
        apply(bench, s=PLAIN, other=PLAIN)
        await until_states(bench, held=3)
        assert sent(plugs["s"]) == []
        await enable(bench, loop)
        await until_states(bench, delivered=3)


async def test_rows_that_a_person_sends_again_do_not_enable_what_a_person_has_disabled(
    bench: Bench, plugs: Plugs
) -> None:
    async with delivering(bench) as loop:
        await disable(bench, loop)
        await _put(bench, "d1", "d2")
        await until_states(bench, held=2)
        assert await person(bench, RowEvent.RETRY_REQUESTED, "d1") == 1
        await until_states(bench, held=2)
        assert loop.runners["s"].health()["breaker"] == "disabled"
        assert sent(plugs["s"]) == []


async def test_a_receivers_no_and_a_persons_are_both_taken_back_by_enable(bench: Bench, plugs: Plugs) -> None:
    plugs["s"].answers = [gone]
    async with delivering(bench) as loop:
        await _put(bench, "d1")
        await until_states(bench, held=1)
        assert loop.runners["s"].health()["disabled_by"] == "receiver"
        await disable(bench, loop)
        await _put(bench, "d2")
        await until_states(bench, held=2)
        await enable(bench, loop)
        await until_states(bench, delivered=2)


async def test_what_a_person_has_released_and_holds_is_theirs(bench: Bench, plugs: Plugs) -> None:
    async with delivering(bench) as loop:
        await disable(bench, loop)
        await _put(bench, "d1", "d2")
        await until_states(bench, held=2)
        apply(bench, other=PLAIN)  # nobody holds it again at once
        await bench.until(lambda: "s" not in loop.runners)
        assert await person(bench, RowEvent.RELEASED, "d1") == 1
        assert await state_of(bench, "d1") == ("pending", None)
        assert await person(bench, RowEvent.HELD, "d1") == 1
        apply(bench, s=PLAIN, other=PLAIN)
        await bench.until(lambda: "s" in loop.runners)
        await enable(bench, loop)
        await until_states(bench, delivered=1, held=1)
        assert await state_of(bench, "d1") == ("held", None)


async def test_a_release_that_a_crash_has_cut_goes_on_at_the_next_start(bench: Bench, plugs: Plugs) -> None:
    count = ROWS_A_COMMIT + 20
    async with delivering(bench) as loop:
        await disable(bench, loop)
        await many(bench, count)
        await until_states(bench, held=count)
    await bench.do(lambda tx: parking.enable(tx, "s", None))
    assert (
        await bench.do(lambda tx: parking.release_disabled(tx, "s")) == ROWS_A_COMMIT
    )  # and the daemon dies
    async with delivering(bench):
        await until_states(bench, delivered=count)
    assert (await bench.journal.read(lambda c: sinkmemory.load_word(c, "s"))).releasing is False


async def test_a_sink_that_cannot_be_opened_holds_its_rows_too(bench: Bench, plugs: Plugs, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(sinkrunner, "_OPEN_RETRY_S", (0.01,))
    plugs["s"].open_errors = 10**6
    async with delivering(bench) as loop:
        await _put(bench, "d1")
        await disable(bench, loop)
        await until_states(bench, held=1)
        plugs["s"].open_errors = 0
        await enable(bench, loop)
        await until_states(bench, delivered=1)


async def test_what_a_send_learns_while_a_person_speaks_does_not_overwrite_their_word(
    bench: Bench, plugs: Plugs
) -> None:
    """The breaker's memory is written with the marks of what was under way."""
    plug = plugs["s"]
    plug.gate.clear()
    plug.answers = [lambda batch: [Deferred("no route", connection=True)]] * 5
    async with delivering(bench) as loop:
        await _put(bench, "d1", "d2", "d3", "d4", "d5")
        await bench.until(lambda: plug.under_way == 5)
        await disable(bench, loop)
        plug.gate.set()
        await until_states(bench, held=5)
    async with delivering(bench) as loop:
        await bench.until(lambda: loop.runners["s"].is_open)
        assert loop.runners["s"].health()["disabled_by"] == "person"


# A rate.


@pytest.mark.parametrize("settings", [SLOW], indirect=True)
async def test_a_sink_with_a_rate_gets_no_more_than_that_and_waiting_costs_no_attempt(
    bench: Bench, plugs: Plugs
) -> None:
    plug = plugs["s"]
    plug.concurrency = 1  # more at once begin in no order of their own
    async with delivering(bench) as loop:
        runner = loop.runners["s"]
        await many(bench, 40)
        await until_states(bench, delivered=10, pending=30)
        assert runner.health()["rate_wait_s"] == 0.1
        for tenths in range(1, 31):
            bench.clock.advance(0.1)
            runner.kick.set()
            await until_states(bench, **({"delivered": 10 + tenths, "pending": 30 - tenths} if tenths < 30 else {"delivered": 40}))  # fmt: skip
        assert sent(plug) == [f"d{n}" for n in range(40)]  # in their order
        assert {row[0] for row in await bench.rows("SELECT attempts FROM outbox WHERE sink = 's'")} == {1}
        told = runner.counts.told(bench.clock.monotonic_s())
        assert (told["delivered_last"], told["failed_last"]) == ({"1m": 40, "5m": 40, "1h": 40}, {"1m": 0, "5m": 0, "1h": 0})  # fmt: skip


@pytest.mark.parametrize("settings", [SLOW], indirect=True)
async def test_a_restart_gives_no_second_bucket(bench: Bench, plugs: Plugs) -> None:
    plug = plugs["s"]
    async with delivering(bench):
        await many(bench, 30)
        await until_states(bench, delivered=10, pending=20)
    async with delivering(bench) as loop:
        bench.clock.advance(0.3)
        loop.runners["s"].kick.set()
        await until_states(bench, delivered=13, pending=17)
    bench.clock.advance(3600)
    async with delivering(bench):
        await until_states(bench, delivered=23, pending=7)
    assert len(sent(plug)) == 23


@pytest.mark.parametrize("settings", [SLOW], indirect=True)
async def test_new_and_deferred_rows_take_turns_at_the_tokens(bench: Bench, plugs: Plugs) -> None:
    plug = plugs["s"]
    plug.concurrency = 1
    plug.answers = [later] * 10
    async with delivering(bench) as loop:
        await many(bench, 10)
        await until_states(bench, retryable=10)
        bench.clock.advance(11)
        plug.gate.clear()
        await many(bench, 10, start=100)
        await bench.until(lambda: plug.under_way == 1)
        plug.gate.set()
        loop.runners["s"].kick.set()
        await bench.until(lambda: len(sent(plug)) == 20)
        second = [name.startswith("d10") for name in sent(plug)[10:]]  # new ones
        assert second.count(True) == second.count(False) == 5


@pytest.mark.parametrize("settings", [SLOW], indirect=True)
async def test_a_batch_takes_no_more_rows_than_there_are_tokens(bench: Bench, plugs: Plugs) -> None:
    plug = plugs["s"]
    plug.batch_max = 1000
    async with delivering(bench):
        await many(bench, 50)
        await until_states(bench, delivered=10, pending=40)
        assert sum(len(batch) for batch in plug.seen) == 10


# Sinks that change under their rows.


async def test_rows_of_a_sink_that_is_taken_from_the_config_wait_for_its_return(
    bench: Bench, plugs: Plugs
) -> None:
    async with delivering(bench) as loop:
        plugs["s"].answers = [later]
        await _put(bench, "d1")
        await until_states(bench, retryable=1)
        apply(bench, other=PLAIN)
        await bench.until(lambda: "s" not in loop.runners)
        await _put(bench, "d2")
        await until_states(bench, retryable=1, pending=1)
        bench.clock.advance(11)
        apply(bench, s=Sink(type="command", command=["z"], lifetime=LONG), other=PLAIN)
        await until_states(bench, delivered=2)
        assert sorted(sent(plugs["s"])) == ["d1", "d1", "d2"]


async def test_rows_of_a_renamed_sink_go_on_under_its_new_name_with_their_ids(
    bench: Bench, plugs: Plugs
) -> None:
    async with delivering(bench) as loop:
        plugs["s"].answers = [later, lambda batch: [Rejected("no")], later]
        plugs["s"].concurrency = 1
        await _put(bench, "late", "dead", "held")
        await until_states(bench, retryable=2, dead=1)
        await person(bench, RowEvent.HELD, "held")
        apply(bench, new=PLAIN, other=PLAIN)
        await bench.until(lambda: "s" not in loop.runners and "new" in loop.runners)
        await _put(bench, "twice", sinks=("s", "new"))
        await until_states(bench, retryable=1, dead=1, held=1, pending=1)
        pick = Pick(tuple(state.value for state in rowchanges.MOVED_STATES), "s")

        def unit(tx: Any) -> Moved:
            return rowchanges.move(tx, rowchanges.find(tx, pick, "true", ()), "new", lambda *_: False)

        def while_sent(tx: Any) -> Moved:
            return rowchanges.move(tx, rowchanges.find(tx, pick, "true", ()), "new", lambda *_: True)

        assert await bench.do(while_sent) == Moved(0, 0)
        done = await bench.do(unit)
        assert (done.moved, done.kept) == (3, 1)
        assert await bench.do(unit) == Moved(0, 1)
        await bench.until(lambda: len(sent(plugs["new"])) == 3)
        assert sorted(sent(plugs["new"])) == ["dead", "late", "twice"]
        assert await state_of(bench, "held", "new") == ("held", None)
        assert (await state_of(bench, "twice"))[0] == "pending"
        tries = await bench.rows("SELECT t.outcome FROM tries t JOIN entries e ON e.seq = t.entry_seq WHERE t.sink = 'new' AND delivery_id = 'late'")  # fmt: skip
        assert tries == [("deferred",)]
    await bench.counts_are_true()


async def test_what_is_sent_after_an_edit_goes_the_new_way_and_what_was_under_way_is_sent_again(
    bench: Bench, plugs: Plugs
) -> None:
    """Other credentials, path, command or type: the runner is made anew. Its cut send is ambiguous: the same id again."""
    old = plugs["s"]
    old.gate.clear()
    async with delivering(bench) as loop:
        await _put(bench, "d1")
        await bench.until(lambda: old.under_way == 1)
        plugs["s"] = new = Script()
        mended = Sink(type="ssh", host="h", path="/p", identity_file="/new/key", lifetime=LONG)
        apply(bench, s=mended, other=PLAIN)
        await until_states(bench, delivered=1)
        await _put(bench, "d2")
        await until_states(bench, delivered=2)
        assert (sent(old), sent(new), old.closed, old.under_way) == (["d1"], ["d1", "d2"], 1, 0)
        assert plugs.contexts[-1].settings == mended
        assert loop.runners["s"].schedule.lifetime_s == LONG
        (row,) = await bench.rows("SELECT attempts FROM outbox o JOIN entries e ON e.seq = o.entry_seq WHERE delivery_id = 'd1' AND sink = 's'")  # fmt: skip
        assert row == (1,)


# Dead letters and their alerts.


async def test_two_dead_sinks_do_not_tell_each_other_of_each_other_for_ever(
    bench: Bench, plugs: Plugs
) -> None:
    plugs["other"] = Script()
    no = [lambda batch: [Rejected("no")]] * 100
    plugs["s"].answers, plugs["other"].answers = list(no), list(no)
    async with delivering(bench):
        await _put(bench, "d1")
        await _settled(bench)
        alerts = await bench.alerts("dead_letter")
        assert (
            len(alerts) == 2
        )  # d1 is dead; so is the alert about it; that one is only kept, shown and logged
        shown = await bench.journal.read(
            lambda c: alerts_seen.grouped(alerts_seen.look(c, 0))
        )  # what `status` reads
        assert {(each.type, each.sink, each.count) for each in shown} == {
            ("agentq.alert.dead_letter", "s", 1),
            ("agentq.alert.dead_letter", "other", 1),
        }
        assert len([event for event, _ in bench.log.lines if event == "alert"]) == 2
        rows = await bench.rows("SELECT sink, state FROM outbox ORDER BY entry_seq")
        assert rows == [("s", "dead"), ("other", "dead")]


async def _settled(bench: Bench) -> None:
    async with asyncio.timeout(10):
        while await bench.rows("SELECT 1 FROM outbox WHERE state IN ('pending','retryable')"):
            await asyncio.sleep(0.01)


async def test_a_receiver_that_refuses_everything_causes_no_storm_of_alerts(
    bench: Bench, plugs: Plugs
) -> None:
    count = ALERTS_A_GROUP_MAX + 150
    plugs["s"].answers = [lambda batch: [Rejected("no")]] * count
    async with delivering(bench):
        await many(bench, count)
        await until_states(bench, dead=count)
        await _settled(bench)
        assert len(await bench.alerts("dead_letter")) == ALERTS_A_GROUP_MAX + 1
        assert len(sent(plugs["other"])) == ALERTS_A_GROUP_MAX + 1
        told = await bench.rows("SELECT count(*) FROM events WHERE event = 'delivery_dead'")
        assert told == [(count,)]


# What `outbox show` tells.


async def test_a_row_that_is_sent_again_keeps_every_try_and_answer_from_before(
    bench: Bench, plugs: Plugs
) -> None:
    plugs["s"].answers = [later, lambda batch: [Delivered(detail="250 queued")], lambda batch: [Rejected("550 no")], lambda batch: [Delivered()]]  # fmt: skip
    async with delivering(bench) as loop:
        await _put(bench, "d1", "d2", sinks=())
        await bench.do(lambda tx: outbox.add_row(tx, 1, "s"))
        await until_states(bench, retryable=1)
        bench.clock.advance(11)
        loop.runners["s"].kick.set()
        await until_states(bench, delivered=1)
        for state in ("dead", "delivered"):
            await person(bench, RowEvent.RETRY_REQUESTED, "d1")
            await until_states(bench, **{state: 1})
        await person(
            bench, RowEvent.RETRY_REQUESTED, "d1"
        )  # its last delivery said nothing: it is remembered now
        await until_states(bench, delivered=1)
        tries = await bench.rows("SELECT n, outcome, reason FROM tries ORDER BY n")
        assert tries == [(1, "deferred", "later"), (2, "delivered", "250 queued"), (3, "rejected", "550 no"), (4, "delivered", None)]  # fmt: skip


# Secrets that lie open.


async def test_a_secret_file_that_everybody_may_read_is_told_once(
    bench: Bench, plugs: Plugs, tmp_path: Path
) -> None:
    for name, mode in (("open", 0o644), ("closed", 0o640)):
        (tmp_path / name).write_text("whsec_x")
        (tmp_path / name).chmod(mode)
    files = [str(tmp_path / "open"), str(tmp_path / "closed")]
    apply(bench, s=Sink(type="webhook", url="http://127.0.0.1:9/", secret_file=files), other=PLAIN)
    for _ in range(2):  # twice: a restart
        watch = SecretWatch(bench.box)
        for _ in range(2):
            await watch.look()
    (told,) = await bench.alerts("secret_file")
    assert f"{tmp_path}/open is open to every user" in told["message"]
    assert "whsec" not in told["message"]


async def test_a_secret_file_that_is_opened_while_the_daemon_runs_is_told_each_time(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("whsec_x")
    secret.chmod(0o600)
    apply(bench, s=Sink(type="webhook", url="http://127.0.0.1:9/", secret_file=str(secret)), other=PLAIN)
    monkeypatch.setattr(liveness, "_EVERY_S", 0.005)
    parts: Any = SimpleNamespace(scheduler=bench.scheduler, live={})
    looks = liveness.Liveness(bench.box, parts)
    task = asyncio.create_task(looks.run())
    try:
        await bench.until(lambda: "liveness" in bench.box.beats)
        await asyncio.sleep(0.03)
        assert await bench.alerts("secret_file") == []
        for times in (1, 2):
            secret.chmod(0o644)
            async with asyncio.timeout(10):
                while len(await bench.alerts("secret_file")) < times:
                    await asyncio.sleep(0.005)
            await asyncio.sleep(0.03)
            assert len(told := await bench.alerts("secret_file")) == times, "once, as long as it is so"
            assert told[-1]["file"] == str(secret)
            secret.chmod(0o600)
            await bench.until(lambda: not looks._secrets._told)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
