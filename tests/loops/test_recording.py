"""Marks on their way into the journal: together, and none takes another with it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from agentqd.core.outbox import RowEvent, RowState
from agentqd.loops import recording
from agentqd.loops.marking import mark_for
from agentqd.loops.recording import Answered, Recorder
from agentqd.sinks.base import Delivered
from agentqd.sinks.registry import SCHEDULES
from agentqd.storage import outbox
from agentqd.storage.journal import LAZY_S
from agentqd.storage.outbox import DueRow, Mark

from .harness import Bench
from .test_delivery import _put

IDS = [f"d{n}" for n in range(10)]


async def answered(bench: Bench) -> list[Answered]:
    await _put(bench, *IDS)
    rows: list[DueRow] = await bench.journal.read(lambda c: outbox.due(c, "s", bench.clock.now_us(), 100))
    schedule = SCHEDULES["webhook"]
    return [
        Answered(
            [row], [Delivered()], [mark_for(row, Delivered(), schedule, 0.0, bench.clock.now_us())], None
        )
        for row in rows
    ]


def recorder(bench: Bench, told: list[tuple[str, bool]]) -> Recorder:
    def marked(rows: list[DueRow], marks: list[Mark], *, failed: bool) -> None:
        assert [row.entry_seq for row in rows] == [mark.entry_seq for mark in marks]
        told.extend((row.delivery_id, failed) for row in rows)

    return Recorder(bench.box, "s", lambda tx, memory: None, marked, lambda: LAZY_S)


async def test_what_is_answered_while_a_commit_is_under_way_shares_the_next_one(bench: Bench) -> None:
    told: list[tuple[str, bool]] = []
    mine, given = recorder(bench, told), await answered(bench)
    before = bench.journal.units
    for each in given:
        mine.take(each)
    await bench.until(lambda: len(told) == 10)
    assert told == [(name, False) for name in IDS]
    assert bench.journal.units - before <= 2
    assert await bench.rows("SELECT DISTINCT state FROM outbox") == [("delivered",)]


async def test_a_batch_that_cannot_be_recorded_takes_no_other_with_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, bool]] = []
    real = recording.record

    def record(tx: Any, box: Any, batch: Sequence[DueRow], *rest: Any) -> None:
        if any(row.delivery_id == "d3" for row in batch):
            raise ValueError("a bug")
        real(tx, box, batch, *rest)

    monkeypatch.setattr(recording, "record", record)
    mine = recorder(bench, told)
    for each in await answered(bench):
        mine.take(each)
    await bench.until(lambda: len(told) == 10)
    assert sorted(told) == [(name, name == "d3") for name in IDS]
    rows = await bench.rows("SELECT e.delivery_id FROM outbox o JOIN entries e ON e.seq = o.entry_seq WHERE o.state = 'pending'")  # fmt: skip
    assert rows == [("d3",)]


async def test_what_waits_when_the_runner_ends_is_in_the_journal_when_it_closes(bench: Bench) -> None:
    told: list[tuple[str, bool]] = []
    mine, given = recorder(bench, told), await answered(bench)
    mine.take(given[0])
    await asyncio.sleep(0)
    for each in given[1:]:
        mine.take(each)
    mine.flush()
    await bench.turn()
    await bench.until(lambda: len(told) == 10)
    assert await bench.rows("SELECT DISTINCT state FROM outbox") == [("delivered",)]


async def test_progress_is_kept_byte_for_byte_until_its_row_is_delivered(bench: Bench) -> None:
    await _put(bench, "d1", "d2")
    rows = await bench.journal.read(lambda c: outbox.due(c, "s", bench.clock.now_us(), 10))
    kept = bytes(range(256))
    deferred = [
        Mark(row.entry_seq, "s", row.state, RowEvent.DEFERRED, 1, 5, None, "later", kept) for row in rows
    ]
    await bench.do(lambda tx: outbox.mark(tx, deferred))
    assert await bench.rows("SELECT progress FROM outbox ORDER BY entry_seq") == [(kept,), (kept,)]
    again = [
        Mark(rows[0].entry_seq, "s", RowState.RETRYABLE, RowEvent.DEFERRED, 2, 5, None, "later"),
        Mark(rows[1].entry_seq, "s", RowState.RETRYABLE, RowEvent.ACKNOWLEDGED, 2),
    ]
    await bench.do(lambda tx: outbox.mark(tx, again))
    assert await bench.rows("SELECT progress FROM outbox ORDER BY entry_seq") == [(kept,), (None,)]
