"""What one sink has to send next: pages of the journal, and the next one read before the last has run out."""

from __future__ import annotations

import asyncio

from agentqd.core.limits import PAGE_ROWS, PAGE_ROWS_LOW
from agentqd.loops.backlog import Backlog, OrderedBacklog
from agentqd.storage import outbox

from .harness import Bench
from .test_delivery import _put

ROWS = 2 * PAGE_ROWS


async def test_the_next_page_is_read_before_the_last_has_run_out_and_no_row_comes_twice(bench: Bench) -> None:
    await _put(bench, *(f"d{n}" for n in range(ROWS)))
    in_flight: set[int] = set()
    backlog = Backlog(bench.box, "s", in_flight, 1)
    await backlog.refill()
    taken = backlog.take(PAGE_ROWS - PAGE_ROWS_LOW - 1)
    assert not backlog.runs_low
    taken += backlog.take(1)
    assert backlog.runs_low
    in_flight.update(row.entry_seq for row in taken)
    reading = asyncio.create_task(backlog.refill())
    await asyncio.sleep(0)
    sent_meanwhile = backlog.take(10)  # while the journal is read
    in_flight.update(row.entry_seq for row in sent_meanwhile)
    taken += sent_meanwhile
    await reading
    assert not backlog.runs_low
    while rows := backlog.take(50):
        taken += rows
        in_flight.update(row.entry_seq for row in rows)
        await backlog.refill()
    assert [row.delivery_id for row in taken] == [f"d{n}" for n in range(ROWS)]


async def test_rows_that_a_person_has_changed_are_void_in_a_page_that_was_read_ahead(bench: Bench) -> None:
    await _put(bench, *(f"d{n}" for n in range(ROWS)))
    backlog = Backlog(bench.box, "s", set(), 1)
    await backlog.refill()
    backlog.take(PAGE_ROWS - PAGE_ROWS_LOW)
    reading = asyncio.create_task(backlog.refill())
    await asyncio.sleep(0)
    backlog.forget()
    await reading
    assert backlog.take(ROWS) == []
    await backlog.refill()
    assert backlog.take(1)[0].delivery_id == "d0", "read anew: nothing was in flight"


async def test_with_an_order_nothing_is_read_ahead(bench: Bench) -> None:
    await _put(bench, *(f"d{n}" for n in range(ROWS)))
    backlog = OrderedBacklog(bench.box, "s", set(), 1)
    await backlog.refill()
    assert backlog.take(PAGE_ROWS - 1)
    assert not backlog.runs_low


async def test_the_last_page_is_not_read_again_and_again(bench: Bench) -> None:
    await _put(bench, *(f"d{n}" for n in range(10)))
    in_flight: set[int] = set()
    backlog = Backlog(bench.box, "s", in_flight, 1)
    await backlog.refill()
    in_flight.update(row.entry_seq for row in backlog.take(1))
    assert backlog.runs_low, "there may be more"
    await backlog.refill()
    assert not backlog.runs_low, "there is not"
    due = await bench.journal.read(lambda c: outbox.due(c, "s", bench.clock.now_us(), 100))
    assert len(due) == 10
