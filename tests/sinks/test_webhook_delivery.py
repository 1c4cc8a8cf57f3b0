"""The webhook through the real delivery loop: lost answers and a receiver that dedupes, ten tries and then dead, 410."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from loops.harness import Bench

from agentqd.core.retry import JITTER
from agentqd.core.settings import Alerts, Settings, Sink
from agentqd.core.units import Backoff, Duration
from agentqd.loops.delivery import DeliveryLoop
from agentqd.sinks.registry import SCHEDULES
from agentqd.storage import outbox
from agentqd.storage.outbox import NewEntry
from agentqd.storage.transaction import Transaction

from .conformance import delivery
from .httpreceiver import Behaviour, Exchange, Receiver, good, raw, resets, says, takes_and_resets
from .test_webhook import web
from .webadapter import keep_secret

__all__ = ["web"]
GAPS_S = [5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400]  # docs/delivery.md


@asynccontextmanager
async def delivering(
    tmp_path: Path, sink: Sink, draw: float = 0.0
) -> AsyncIterator[tuple[Bench, DeliveryLoop]]:
    other = Sink(type="file", path=str(tmp_path / "other.jsonl"))
    settings = Settings(sinks={"hook": sink, "other": other}, alerts=Alerts(deliver_to=["hook", "other"]))
    async with Bench(tmp_path, settings) as bench:
        loop = DeliveryLoop(bench.box, None, lambda: draw)  # type: ignore[arg-type]
        bench.hooks.append(loop.before_commit)
        task = asyncio.create_task(loop.run())
        try:
            yield bench, loop
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await bench.counts_are_true()


async def put(bench: Bench, count: int, start: int = 1) -> None:
    def unit(tx: Transaction) -> None:
        for number in range(start, start + count):
            one = delivery(number)
            outbox.add_entry(
                tx, NewEntry(one.delivery_id, None, 0, 0, "entry", one.key, one.type, one.payload, ("hook",))
            )

    await bench.do(unit)


async def rows(bench: Bench) -> list[tuple[Any, ...]]:
    return await bench.rows("SELECT state, attempts, due_at, last_error FROM outbox WHERE sink = 'hook' ORDER BY entry_seq")  # fmt: skip


async def until_row(bench: Bench, state: str, attempts: int) -> tuple[Any, ...]:
    async with asyncio.timeout(10):
        while True:
            row = (await rows(bench))[0]
            if row[:2] == (state, attempts):
                return row
            await asyncio.sleep(0.002)


def pass_time(bench: Bench, loop: DeliveryLoop, seconds: float) -> None:
    bench.clock.advance(seconds)
    for runner in loop.runners.values():
        runner.kick.set()


LOSSES: dict[str, list[Behaviour]] = {
    "before the commit": [resets, raw(b"HTTP/1.1 200", "reset")],
    "after the commit": [
        takes_and_resets,
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", "reset"),
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", "close"),
    ],
}


@pytest.mark.parametrize("when", LOSSES)
async def test_an_answer_lost_100_times_leaves_one_effect_for_each_at_a_receiver_that_dedupes(
    web: Receiver, tmp_path: Path, when: str
) -> None:
    """Every entry's first answer is lost (G6)."""
    lost: set[str] = set()
    effects: dict[str, bytes] = {}

    async def dedupes(x: Exchange) -> None:
        asked = x.asked
        loses = LOSSES[when][len(lost) % len(LOSSES[when])] if asked.id not in lost else None
        if loses is None or when == "after the commit":
            effects.setdefault(asked.id, asked.body)
        lost.add(asked.id)
        await (loses or good)(x)

    web.does = dedupes
    sink = Sink(
        type="webhook", url=web.url, secret_file=keep_secret(tmp_path / "s"), backoff=Backoff((1.0,), doubles=False), lifetime=Duration(10**7)
    )  # fmt: skip
    async with delivering(tmp_path, sink) as (bench, loop):
        await put(bench, 100)
        async with asyncio.timeout(40):
            while {row[0] for row in await rows(bench)} != {"delivered"}:
                pass_time(bench, loop, 1000)  # the breaker, too
                await asyncio.sleep(0.002)
    seen = Counter(request.id for request in web.seen)
    assert min(seen.values()) >= 2
    assert len(effects) == len(lost) == 100
    assert effects == {delivery(number).delivery_id: delivery(number).payload for number in range(1, 101)}
    if when == "after the commit":
        assert len(web.taken) >= 200, "without dedup there would be twice as many effects"


@pytest.mark.parametrize("draw", [0.0, 0.999])
async def test_ten_tries_at_the_gaps_of_the_delivery_page_and_then_a_dead_letter(
    web: Receiver, tmp_path: Path, draw: float
) -> None:
    web.does = says(500)
    async with delivering(tmp_path, Sink(type="webhook", url=web.url), draw) as (bench, loop):
        await put(bench, 1)
        for n, gap_s in enumerate(GAPS_S, 1):
            _, _, due_at, error = await until_row(bench, "retryable", n)
            assert len(web.seen) == n
            assert error == "HTTP 500 Internal Server Error"
            wait_s = (due_at - bench.clock.now_us()) / 1_000_000
            assert wait_s == pytest.approx(gap_s * (1 + JITTER * draw), abs=0.01)
            pass_time(bench, loop, wait_s - 0.5)
            await asyncio.sleep(0.01)
            assert len(web.seen) == n, "not before its time"
            pass_time(bench, loop, 0.51)
            await bench.until(lambda n=n: len(web.seen) == n + 1)
        await until_row(bench, "dead", 10)
        told = tmp_path / "other.jsonl"
        await bench.until(lambda: told.exists() and "dead_letter" in told.read_text())
        (alert,) = map(json.loads, told.read_text().splitlines())
        assert alert["type"] == "agentq.alert.dead_letter"
    assert len(web.seen) == 10
    assert len({request.id for request in web.seen}) == 1
    assert len({request.body for request in web.seen}) == 1
    assert len({request.headers["webhook-timestamp"] for request in web.seen}) == 10


async def test_after_a_429_it_waits_a_minute_and_for_retry_after_as_long_as_asked(
    web: Receiver, tmp_path: Path
) -> None:
    web.plan = [says(429), says(503, "Retry-After: 7000")]
    async with delivering(tmp_path, Sink(type="webhook", url=web.url)) as (bench, loop):
        await put(bench, 1)
        began = bench.clock.now_us()
        _, _, due_at, _ = await until_row(bench, "retryable", 1)
        assert due_at == began + 60_000_000
        pass_time(bench, loop, 61)
        _, _, due_at, _ = await until_row(bench, "retryable", 2)
        assert due_at == began + 7_061_000_000
        pass_time(bench, loop, 7001)
        await until_row(bench, "delivered", 3)


async def test_a_429_with_retry_after_holds_back_what_comes_after_it(web: Receiver, tmp_path: Path) -> None:
    web.plan = [says(429, "Retry-After: 20")]
    async with delivering(tmp_path, Sink(type="webhook", url=web.url)) as (bench, loop):
        await put(bench, 1)
        await until_row(bench, "retryable", 1)
        for number in range(2, 9):
            await put(bench, 1, start=number)
        pass_time(bench, loop, 19.9)
        await asyncio.sleep(0.05)
        assert len(web.seen) == 1
        pass_time(bench, loop, 0.2)
        await bench.until(lambda: len(web.taken) == 7)
        assert {row[:2] for row in (await rows(bench))[1:]} <= {("pending", 0), ("delivered", 1)}
        pass_time(bench, loop, 60)
        await bench.until(lambda: len(web.taken) == 8)


async def test_a_410_holds_what_waits_and_tells_it_over_another_sink(web: Receiver, tmp_path: Path) -> None:
    web.does = says(410)
    async with delivering(tmp_path, Sink(type="webhook", url=web.url)) as (bench, loop):
        await put(bench, 30)
        told = tmp_path / "other.jsonl"
        await bench.until(lambda: told.exists() and "sink_disabled" in told.read_text())
        async with asyncio.timeout(10):
            while {row[0] for row in await rows(bench)} != {"held"}:
                await asyncio.sleep(0.005)
        asked = len(web.seen)
        assert asked <= 5
        await put(bench, 5, start=100)
        pass_time(bench, loop, 100_000)
        await asyncio.sleep(0.05)
        assert len(web.seen) == asked, "not one more"
        assert {row[0] for row in await rows(bench)} == {"held"}


async def test_a_secret_that_is_gone_is_told_once_and_nothing_goes_out_unsigned(
    web: Receiver, tmp_path: Path
) -> None:
    sink = Sink(type="webhook", url=web.url, secret_file=str(tmp_path / "gone"), backoff=Backoff((1.0,), doubles=False))  # fmt: skip
    async with delivering(tmp_path, sink) as (bench, loop):
        await put(bench, 20)
        told = tmp_path / "other.jsonl"
        await bench.until(lambda: told.exists() and "webhook_secret" in told.read_text())
        async with asyncio.timeout(10):
            while {row[0] for row in await rows(bench)} != {"retryable"}:
                await asyncio.sleep(0.005)
        assert told.read_text().count("agentq.alert.webhook_secret") == 1
        assert web.connections == 0
        keep_secret(tmp_path / "gone")
        pass_time(bench, loop, 10)
        async with asyncio.timeout(10):
            while {row[0] for row in await rows(bench)} != {"delivered"}:
                await asyncio.sleep(0.005)
    assert all("webhook-signature" in request.headers for request in web.seen)


def test_the_schedule_is_that_of_the_delivery_page() -> None:
    assert list(SCHEDULES["webhook"].steps_s) == GAPS_S
