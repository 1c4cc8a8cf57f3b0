"""A sink with a backlog, on a real loop and journal: slowed down while somebody else needs the box, then as fast as it can."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from agentqd.core.giveway import BATCH_GAP_S, BATCH_ROWS, FREE_MAX, PAGE_ROWS, SEND_GAP_S, GiveWay
from agentqd.core.limits import PAGE_ROWS as WHOLE_PAGE
from agentqd.core.settings import Settings
from agentqd.loops.backlog import Backlog
from agentqd.loops.box import Box
from agentqd.loops.courtesy import Courtesy
from agentqd.loops.gate import Gate

from .harness import Bench
from .test_delivery import Script, _put, _running, plug, settings

__all__ = ["plug", "settings"]

ROWS = 900


@contextmanager
def _stirred() -> Iterator[None]:
    """Somebody needs the box, whenever it is asked: also when a busy machine has let no one run for a while."""
    with pytest.MonkeyPatch.context() as patch:
        always = itertools.count(10**9)
        patch.setattr(Box, "stirs", property(lambda box: next(always)))
        yield


async def _delivered(bench: Bench) -> int:
    sql = "SELECT coalesce(sum(n), 0) FROM outbox_counts WHERE sink = 's' AND state = 'delivered'"
    return int((await bench.rows(sql))[0][0])


async def test_its_sends_have_a_gap_while_others_need_the_box_and_none_after(
    bench: Bench, plug: Script
) -> None:
    await _put(bench, *(f"d{n}" for n in range(ROWS)))
    began = time.monotonic()
    with ExitStack() as stirring:
        stirring.enter_context(_stirred())
        async with _running(bench):
            await bench.until(lambda: len(plug.seen) > 60)
            sent, took = len(plug.seen), time.monotonic() - began
            stirring.close()
            await bench.until(lambda: len(plug.seen) == ROWS)
            while await _delivered(bench) < ROWS:
                await asyncio.sleep(0.005)
    assert sent <= took / SEND_GAP_S + plug.concurrency
    assert sorted(batch[0] for batch in plug.seen) == sorted(f"d{n}" for n in range(ROWS))


async def test_what_few_rows_wait_for_has_no_gap(bench: Bench, plug: Script) -> None:
    """A healthy sink beside it: its gap would be an hour here."""
    with _stirred():
        async with _running(bench) as runner:
            runner.gate.courtesy._gap_s = 3600.0
            await _put(bench, *(f"d{n}" for n in range(50)))
            await bench.until(lambda: len(plug.seen) == 50)


async def test_an_append_sink_takes_small_batches_meanwhile(bench: Bench, plug: Script) -> None:
    plug.batch_max, plug.concurrency = 1000, 1
    await _put(bench, *(f"d{n}" for n in range(ROWS)))
    began = time.monotonic()
    with ExitStack() as stirring:
        stirring.enter_context(_stirred())
        async with _running(bench):
            await bench.until(lambda: len(plug.seen) >= 4)
            took, batches = time.monotonic() - began, list(plug.seen)
            stirring.close()
            await bench.until(lambda: sum(map(len, plug.seen)) == ROWS)
        assert max(map(len, batches)) <= BATCH_ROWS
        assert len(batches) <= took / BATCH_GAP_S + 2
    assert max(map(len, plug.seen)) > BATCH_ROWS
    assert [name for batch in plug.seen for name in batch] == [f"d{n}" for n in range(ROWS)]


async def test_no_row_is_lost_or_doubled_while_others_come_and_go(bench: Bench, plug: Script) -> None:
    await _put(bench, *(f"d{n}" for n in range(ROWS)))
    async with _running(bench):
        for n in range(12):
            with _stirred():
                await _put(bench, *(f"e{n}-{k}" for k in range(20)))
                await asyncio.sleep(0.03)
            await asyncio.sleep(0.06 if n % 3 else 0.0)
        while await _delivered(bench) < ROWS + 240:
            await asyncio.sleep(0.005)
    assert len(plug.seen) == ROWS + 240
    assert len({batch[0] for batch in plug.seen}) == ROWS + 240


@pytest.mark.parametrize("most", [PAGE_ROWS, WHOLE_PAGE])
async def test_pages_are_as_long_as_is_said(bench: Bench, settings: Settings, most: int) -> None:
    await _put(bench, *(f"d{n}" for n in range(WHOLE_PAGE + 10)))
    in_flight: set[int] = set()
    backlog = Backlog(bench.box, "s", in_flight, 1, lambda rows: min(rows, most))
    left = WHOLE_PAGE + 10
    while left >= most:
        await backlog.refill()
        assert backlog.waiting == most + WHOLE_PAGE, "and there may be more"
        in_flight.update(row.entry_seq for row in backlog.take(most))
        left -= most
    await backlog.refill()
    assert backlog.waiting == left


def _courtesy(waiting: int) -> Courtesy:
    """Somebody needs the box now, and its gap is an hour."""
    return Courtesy(GiveWay(), "s", 3600.0, itertools.count(1).__next__, lambda: waiting)


def test_twice_as_many_as_come_go_without_a_gap() -> None:
    courtesy = _courtesy(500)
    assert courtesy.allows()
    courtesy.begin(1)
    assert not courtesy.allows()
    courtesy.offered(3)
    for _ in range(6):
        assert courtesy.allows()
        assert courtesy.left_s == 0.0
        courtesy.begin(1)
    assert not courtesy.allows()
    assert 3000.0 < courtesy.left_s <= 3600.0
    assert courtesy.most(1000) == BATCH_ROWS
    courtesy.offered(100)
    assert courtesy.most(1000) == 200
    courtesy.offered(10**6)
    assert courtesy.most(10**6) == FREE_MAX


def test_pages_are_short_while_others_need_the_box_however_few_rows_are_in_memory() -> None:
    """With an order there are none in memory when the journal is read."""
    assert _courtesy(0).page(WHOLE_PAGE) == PAGE_ROWS
    assert Courtesy(GiveWay(), "s", 1.0, lambda: 0, lambda: 10**6).page(WHOLE_PAGE) == WHOLE_PAGE


def test_a_sink_that_gives_way_sleeps_though_a_look_is_overdue() -> None:
    gate = Gate(5, None, 0.0, _courtesy(500))
    assert gate.allows(0.0, 0)
    gate.begin(1, 0.0)
    assert not gate.allows(0.0, 1)
    assert gate.idle_s(0.0, 1, -5.0) > 1.0
