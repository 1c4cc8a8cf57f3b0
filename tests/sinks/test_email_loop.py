"""The email sink in the delivery loop: answers lost before and after the server's commit, and what a row remembers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from loops.harness import Bench

from agentqd.core.giveway import GiveWay
from agentqd.core.outbox import RowEvent
from agentqd.core.settings import Alerts, Settings
from agentqd.core.settings import Sink as SinkSettings
from agentqd.loops import rowchanges
from agentqd.loops.sinkrunner import SinkRunner
from agentqd.sinks import email
from agentqd.storage import outbox
from agentqd.storage.outbox import NewEntry
from agentqd.storage.transaction import Transaction

from .smtpadapter import EmailAdapter, a_mail

TIMES = 100


@asynccontextmanager
async def bench_of(post: EmailAdapter, tmp_path: Path) -> AsyncIterator[Bench]:
    post.more |= {"allow_to": ["*@example.org"]}
    other = SinkSettings(type="command", command=["x"])
    settings = Settings(
        sinks={"mail": post.settings(), "other": other}, alerts=Alerts(deliver_to=["mail", "other"])
    )
    async with Bench(tmp_path / "bench", settings) as bench:
        yield bench


@asynccontextmanager
async def runner_on(bench: Bench) -> AsyncIterator[SinkRunner]:
    """The sink's loop as a daemon has it: one at a time."""
    runner = SinkRunner(bench.box, "mail", bench.box.settings.sinks["mail"], None, lambda: 0.0, GiveWay())  # type: ignore[arg-type]

    def hook(tx: Transaction) -> None:
        given = tx.sinks_made_pending()
        if "mail" in given:
            rows = [row for sink, row in tx.fresh_rows if sink == "mail"]
            tx.after_commit(lambda: runner.offer(rows, look=given["mail"] > len(rows)))

    bench.hooks.append(hook)
    task = asyncio.create_task(runner.run())
    try:
        yield runner
    finally:
        bench.hooks.remove(hook)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def loop_of(post: EmailAdapter, tmp_path: Path) -> AsyncIterator[tuple[Bench, SinkRunner]]:
    async with bench_of(post, tmp_path) as bench, runner_on(bench) as runner:
        yield bench, runner


async def put(bench: Bench, *names: str, to: object = "a@example.org") -> None:
    def unit(tx: Transaction) -> None:
        for name in names:
            item = a_mail({"to": to, "subject": name, "body": "x"}, name=name)
            outbox.add_entry(
                tx,
                NewEntry(item.delivery_id, None, 0, 0, "entry", item.key, item.type, item.payload, ["mail"]),
            )

    await bench.do(unit)


def _sent_again(tx: Transaction) -> int:
    """A person's `outbox retry`."""
    pick = rowchanges.Pick(rowchanges.states_for(RowEvent.RETRY_REQUESTED), "mail")
    rows = rowchanges.find(tx, pick, "e.delivery_id = ?", ("dm",))
    return rowchanges.change(tx, RowEvent.RETRY_REQUESTED, rows, lambda *_: False)


async def states(bench: Bench, **wanted: int) -> list[tuple[Any, ...]]:
    """Wait for these; the rows' attempts, due_at, last_error, progress."""
    async with asyncio.timeout(30):
        while True:
            rows = await bench.rows("SELECT state, attempts, due_at, last_error, progress FROM outbox WHERE sink = 'mail' ORDER BY entry_seq")  # fmt: skip
            if Counter(row[0] for row in rows) == Counter(wanted):
                return [row[1:] for row in rows]
            await asyncio.sleep(0.01)


def later(bench: Bench, runner: SinkRunner, seconds: float) -> None:
    bench.clock.advance(seconds)
    runner.kick.set()


@pytest.mark.slow
@pytest.mark.parametrize("taken", [False, True], ids=["before", "after"])
async def test_an_answer_lost_around_the_commit_has_one_effect_a_hundred_times(
    post: EmailAdapter, tmp_path: Path, taken: bool
) -> None:
    post.more |= {"tls": "none", "username": None, "password_file": None}
    post.server.plan(plain=True, at="dot", do="drop", take=taken, once=True)
    async with loop_of(post, tmp_path) as (bench, runner):
        await put(bench, *[f"m{n}" for n in range(TIMES)])
        rows = await states(bench, retryable=TIMES)
        assert {row[0] for row in rows} == {1}
        later(bench, runner, 400)
        await states(bench, delivered=TIMES)
    by_id = Counter(mail["Message-ID"] for mail in post.server.mails())
    assert len(by_id) == TIMES, "none is lost"
    assert set(by_id.values()) == {2 if taken else 1}, "the same id again: a receiver that dedupes has one"
    by_bytes = Counter(post.server.raw())
    assert len(by_bytes) == TIMES


async def test_who_has_the_mail_does_not_get_it_again_after_a_restart_either(post: EmailAdapter, tmp_path: Path) -> None:  # fmt: skip
    post.plan(rcpt={"c@example.org": "451 later"})
    async with bench_of(post, tmp_path) as bench:
        async with runner_on(bench):
            await put(bench, "m", to=["a@example.org", "b@example.org", "c@example.org"])
            ((_, due_at, _, progress),) = await states(bench, retryable=1)
            assert progress is not None
            assert due_at - bench.clock.now_us() == 300_000_000
        bench.clock.advance(400)
        post.plan()
        async with runner_on(bench) as runner:
            ((_, _, _, progress),) = await states(bench, delivered=1)
            assert progress is None, "forgotten with the delivery"
            assert [facts["to"] for facts in post.server.facts()] == [
                ["a@example.org", "b@example.org"],
                ["c@example.org"],
            ]
            assert await bench.do(_sent_again) == 1
            runner.kick.set()
            await bench.until(lambda: len(post.server.facts()) == 3)
            await states(bench, delivered=1)
        assert len(post.server.facts()[2]["to"]) == 3, "a person has a delivered one sent again: to all"


async def test_a_dead_letter_that_is_sent_again_goes_only_to_those_who_have_not_got_it(post: EmailAdapter, tmp_path: Path) -> None:  # fmt: skip
    post.plan(rcpt={"b@example.org": "550 5.1.1 nobody"})
    async with loop_of(post, tmp_path) as (bench, runner):
        await put(bench, "m", to=["a@example.org", "b@example.org"])
        ((_, _, error, progress),) = await states(bench, dead=1)
        assert "b@example.org (550 5.1.1 nobody); 1 have it" in error
        assert progress is not None
        (alert,) = await bench.alerts("dead_letter")
        assert "b@example.org" in alert["message"]
        post.plan()
        await bench.do(_sent_again)
        runner.kick.set()
        await states(bench, delivered=1)
    assert [facts["to"] for facts in post.server.facts()] == [["a@example.org"], ["b@example.org"]]


@pytest.mark.parametrize("state", ["retryable", "dead"])
async def test_a_row_that_is_moved_to_another_mail_sink_goes_to_those_who_have_not_got_it(post: EmailAdapter, tmp_path: Path, state: str) -> None:  # fmt: skip
    """`outbox move`: who has it from the first server does not get it from the second; whom that one refused is asked."""
    answers = {"b@example.org": "550 5.1.1 nobody"} | (
        {"c@example.org": "451 later"} if state == "retryable" else {}
    )
    post.plan(rcpt=answers)
    async with loop_of(post, tmp_path) as (bench, _):
        await put(bench, "m", to=["a@example.org", "b@example.org", "c@example.org"])
        await states(bench, **{state: 1})
        post.plan()
        pick = rowchanges.Pick(tuple(each.value for each in rowchanges.MOVED_STATES), "mail")
        moved = await bench.do(lambda tx: rowchanges.move(tx, rowchanges.find(tx, pick, "true", ()), "second", lambda *_: False))  # fmt: skip
        assert moved == rowchanges.Moved(1, 0)
        post.more |= {"from_": "second@example.org"}
        second = SinkRunner(bench.box, "second", post.settings(), None, lambda: 0.0, GiveWay())  # type: ignore[arg-type]
        task = asyncio.create_task(second.run())
        async with asyncio.timeout(30):
            while await bench.rows("SELECT state, progress FROM outbox WHERE sink = 'second'") != [("delivered", None)]:  # fmt: skip
                await asyncio.sleep(0.01)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    first, then = post.server.facts()
    others = {"b@example.org"} | ({"c@example.org"} if state == "retryable" else set())
    assert (set(first["to"]), set(then["to"])) == ({"a@example.org", "b@example.org", "c@example.org"} - others, others)  # fmt: skip
    assert (first["from"], then["from"]) == ("agent@example.org", "second@example.org")
    assert len({mail["Message-ID"] for mail in post.server.mails()}) == 1


async def test_a_wrong_password_is_one_alert_and_the_breaker_keeps_the_account_from_being_locked(post: EmailAdapter, tmp_path: Path) -> None:  # fmt: skip
    post.plan(auth="other:word")
    async with loop_of(post, tmp_path) as (bench, runner):
        await put(bench, *[f"m{n}" for n in range(20)])
        await bench.until(lambda: runner.health()["breaker"] == "open")
        await bench.until(lambda: not runner.in_flight)  # all marked; the notice's unit was handed in before
        alerts = await bench.alerts("email_setup")
        assert len(alerts) == 1
        assert "refuses the login" in alerts[0]["message"]
        used = await bench.rows("SELECT sum(attempts) FROM outbox WHERE sink = 'mail'")
        assert used[0][0] <= 2 * email.CONCURRENCY


async def test_a_memory_that_is_too_large_is_not_kept(post: EmailAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("agentqd.loops.sending.PROGRESS_BYTES_MAX", 10)
    post.plan(rcpt={"b@example.org": "451 later"})
    async with loop_of(post, tmp_path) as (bench, _):
        await put(bench, "m", to=["a@example.org", "b@example.org"])
        ((_, _, _, progress),) = await states(bench, retryable=1)
        assert progress is None
        assert any(event == "sink_progress_too_large" for event, _ in bench.log.lines)
