"""What one sink has to send next: new rows as their commits bring them, and what the journal holds.

The journal is read at the start, when a deferred row falls due, when a person has changed rows, and when more came
than is kept here; a page at a time, bounded in rows and bytes, whatever waits.

Invariants:
1. Every open row of the sink is in `in_flight`, in memory here, or found by the next look into the journal.
2. No row is in memory twice, or in memory and in flight: what a read brings is compared with both, before and after.
3. A new row's commit is told (`offer`) before the commit of its mark: the journal's thread posts both in order.
4. `OrderedBacklog`: a row is given out only when every earlier open row of the sink was answered for good.
"""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable, Sequence

from agentqd.core.limits import FRESH_BYTES_MAX, FRESH_ROWS_MAX, PAGE_BYTES_MAX, PAGE_ROWS, PAGE_ROWS_LOW
from agentqd.core.outbox import RowEvent
from agentqd.core.pace import Turns
from agentqd.loops.box import Box
from agentqd.storage import outbox
from agentqd.storage.outbox import DueRow, Mark


class Backlog:
    """One sink's, without an order: one new and one deferred row in turn. Used by one runner."""

    def __init__(
        self,
        box: Box,
        sink: str,
        in_flight: set[int],
        batch_max: int,
        page: Callable[[int], int] = lambda most: most,
    ) -> None:
        """`page`: how many rows are read at once, of so many at most."""
        self._box = box
        self._sink = sink
        self._in_flight = in_flight
        self._page_of = page
        self._page_rows = max(PAGE_ROWS, batch_max)
        self._fresh: deque[DueRow] = deque()
        self._fresh_bytes = 0
        self._page: deque[DueRow] = deque()
        self._page_seqs: set[int] = set()
        self._turns = Turns()
        self._look = True
        self._more = False  # the last read found as many rows as it might take
        self._look_at: int | None = None  # a deferred row falls due
        self._forgotten = 0  # counts `forget`: a read from before it is void

    @property
    def look_at(self) -> int | None:
        """When the journal is to be looked at again (microseconds UTC); None: not by time."""
        return self._look_at

    @property
    def only_fresh(self) -> int:
        """How many new rows wait, if nothing else does."""
        return 0 if self._page else len(self._fresh)

    @property
    def waiting(self) -> int:
        """How many rows are there to be sent; of those that are not in memory only whether there are some: a page of them."""
        return len(self._page) + len(self._fresh) + (self._page_rows if self._more else 0)

    def offer(self, rows: Sequence[DueRow], *, look: bool) -> None:
        """After a commit: new rows, and whether there are others to be looked for in the journal."""
        self._look = self._look or look
        if self._page_seqs or self._in_flight:
            rows = [
                r for r in rows if r.entry_seq not in self._page_seqs and r.entry_seq not in self._in_flight
            ]
        self._fresh.extend(rows)
        self._fresh_bytes += sum([len(row.payload) for row in rows])
        if len(self._fresh) > FRESH_ROWS_MAX or self._fresh_bytes > FRESH_BYTES_MAX:
            self._clear_fresh()
            self._look = True

    def look(self) -> None:
        """There may be rows in the journal that are not known here."""
        self._look = True

    def forget(self) -> None:
        """Rows have changed under our feet (held, dropped, expired): what is in memory is read anew."""
        self._clear_fresh()
        self._clear_page()
        self._look = True
        self._forgotten += 1

    def put_back(self, batch: Sequence[DueRow]) -> None:
        """They were taken and not sent."""
        self._page.extendleft(reversed(batch))
        self._page_seqs.update(row.entry_seq for row in batch)

    def answered(self, marks: Sequence[Mark]) -> None:
        """The receiver's word on a batch is known, and not yet in the journal."""

    def marked(self, marks: Sequence[Mark]) -> None:
        """It is in the journal now; the batch is no longer in flight."""
        due = [mark.due_at for mark in marks if mark.due_at is not None]
        if due:
            self._look_at = min([*due, *([] if self._look_at is None else [self._look_at])])

    @property
    def runs_low(self) -> bool:
        """There is more in the journal, and what is here will not last until it has been read."""
        return self._look and 0 < len(self._page) <= PAGE_ROWS_LOW

    async def refill(self) -> None:
        """Look into the journal, if it is time. Raises JournalError."""
        if self.runs_low or (not self._page and (self._look or self._is_due())):
            await self._read()

    def take(self, most: int) -> list[DueRow]:
        """The next batch, of at most so many rows, in the order of entries; empty if nothing is to be sent now."""
        fresh, page = self._fresh, self._page
        batch: list[DueRow] = []
        mixed = bool(page)
        while len(batch) < most and (fresh or page):
            if page and self._turns.deferred_next(new=bool(fresh), deferred=True):
                row = page.popleft()
                self._page_seqs.discard(row.entry_seq)
            else:
                row = fresh.popleft()
                self._fresh_bytes -= len(row.payload)
            batch.append(row)
        if mixed and len(batch) > 1:
            batch.sort(key=lambda row: row.entry_seq)
        return batch

    def _is_due(self) -> bool:
        return self._look_at is not None and self._look_at <= self._box.clock.now_us()

    async def _read(self) -> None:
        self._look, self._look_at = False, None
        now, limit, forgotten = self._box.clock.now_us(), self._page_of(self._page_rows), self._forgotten
        # The read may see rows in flight as they were before their marks became durable.
        skip = {*self._in_flight, *self._page_seqs, *(row.entry_seq for row in self._fresh)}

        def query(connection: sqlite3.Connection) -> tuple[list[DueRow], int | None]:
            rows = outbox.due(connection, self._sink, now, limit, skip, PAGE_BYTES_MAX)
            return rows, outbox.next_due(connection, self._sink, now)

        rows, later = await self._box.journal.read(query)
        self._more = len(rows) == limit
        if rows:
            self._look = True  # once these are sent: there may be more
        if later is not None:  # a send that was deferred meanwhile has set its own
            self._look_at = later if self._look_at is None else min(later, self._look_at)
        if forgotten != self._forgotten:
            return
        known = {*skip, *self._in_flight, *self._page_seqs, *(row.entry_seq for row in self._fresh)}
        self._page.extend(row for row in rows if row.entry_seq not in known)
        self._page_seqs.update(row.entry_seq for row in self._page)

    def _clear_fresh(self) -> None:
        self._fresh.clear()
        self._fresh_bytes = 0

    def _clear_page(self) -> None:
        self._page.clear()
        self._page_seqs.clear()


class OrderedBacklog(Backlog):
    """Rows in the order of their entries: nothing overtakes a row that waits for its retry; the dead and the held do not block.

    A row that a person sends again goes where its entry stands: before all later ones that are still open.
    """

    _floor = 0  # no open row below it
    _deferring = 0  # deferred rows whose mark is not durable yet

    def offer(self, rows: Sequence[DueRow], *, look: bool) -> None:  # noqa: ARG002 - they are read in their order
        self._look = True
        if look:
            self._floor = 0
            self._clear_page()
            self._forgotten += 1

    def forget(self) -> None:
        super().forget()
        self._floor = 0

    def answered(self, marks: Sequence[Mark]) -> None:
        deferred = _deferred(marks)
        if deferred:
            self._deferring += deferred
            self._clear_page()

    def marked(self, marks: Sequence[Mark]) -> None:
        super().marked(marks)
        self._deferring -= _deferred(marks)
        self._look = True

    @property
    def runs_low(self) -> bool:
        return False  # what may go next is known when the last has been answered

    async def refill(self) -> None:
        if self._deferring == 0:
            await super().refill()

    async def _read(self) -> None:
        self._look, self._look_at = False, None
        now, floor, forgotten = self._box.clock.now_us(), self._floor, self._forgotten
        skip = frozenset(self._in_flight)  # all of them answered for good: deferred ones are waited for
        limit = self._page_of(self._page_rows)
        rows, floor, later = await self._box.journal.read(
            lambda c: outbox.next_in_order(c, self._sink, now, limit, floor, skip, PAGE_BYTES_MAX)
        )
        self._more = len(rows) == limit
        if rows:
            self._look = True
        if later is not None:
            self._look_at = later if self._look_at is None else min(later, self._look_at)
        if forgotten != self._forgotten or self._deferring:
            self._look = True
            return
        self._floor = floor
        self._page.extend(rows)
        self._page_seqs.update(row.entry_seq for row in rows)


def _deferred(marks: Sequence[Mark]) -> int:
    return sum([mark.event is RowEvent.DEFERRED for mark in marks])
