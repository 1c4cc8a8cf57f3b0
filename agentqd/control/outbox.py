"""The outbox: rows on their way, and one entry with all its tries. (A person's word on rows: outboxchange.py.)

Lists are found as tasklist.py finds tasks: by the kept sums, an index where few rows match, else windows from the newest
entry down. A page never splits an entry, so `before` is an entry's seq.
"""

from __future__ import annotations

import sqlite3
from typing import Any, Final

import msgspec
from aiohttp import web

from agentqd.control import queries
from agentqd.control.missing import REJECTED, must_know_task
from agentqd.control.outboxchange import BOUNDS, STATES, WINDOW, span
from agentqd.control.room import Room
from agentqd.control.route import Call, Param, Route, answer, comma_list
from agentqd.control.rowchoice import must_know_sink
from agentqd.control.tasklist import LIMIT, SEQ_MAX
from agentqd.control.views import ROW_COLUMNS, ROW_TABLES, OutboxRow, outbox_view, shown_state
from agentqd.core.errors import NoSuchDelivery
from agentqd.core.limits import ENTRY_INLINE_BYTES_MAX, LIST_ROWS_MAX
from agentqd.core.units import format_time

FEW: Final = 5_000
ENVELOPE_SHOWN_BYTES_MAX: Final = 2 * ENTRY_INLINE_BYTES_MAX
_TRIES: Final = (
    "SELECT at, outcome, reason FROM tries WHERE entry_seq = ? AND sink = ? ORDER BY n DESC LIMIT ?"
)
_TRIES_SHOWN: Final = 100
_ENTRY: Final = (
    "SELECT e.seq, e.delivery_id, e.type, e.key, t.id, t.name, e.run, e.attempt, e.at, e.bytes, e.sha256, e.payload"
    " FROM entries e LEFT JOIN tasks t ON t.seq = e.task_seq WHERE e.delivery_id = ?"
)
PARKED_SQL: Final = f"SELECT {ROW_COLUMNS} FROM {ROW_TABLES} WHERE o.state IN ('held','dead') AND o.state = ?"  # noqa: S608 - fixed names
OPEN_SQL: Final = (
    f"SELECT {ROW_COLUMNS} FROM {ROW_TABLES} WHERE o.state IN ('pending','delivering','retryable')"  # noqa: S608 - fixed names
    " AND o.sink = ? AND o.due_at IS NOT NULL"
)
WINDOW_SQL: Final = f"SELECT {ROW_COLUMNS} FROM {ROW_TABLES} WHERE o.entry_seq < ? AND o.entry_seq >= ?"  # noqa: S608 - fixed names
OF_TASK_SQL: Final = (
    f"SELECT {ROW_COLUMNS} FROM entries e JOIN outbox o ON o.entry_seq = e.seq JOIN tasks t ON t.seq = e.task_seq"  # noqa: S608 - fixed names
    " WHERE e.task_seq = (SELECT seq FROM tasks WHERE id = ?) AND e.seq < ? ORDER BY e.seq DESC, o.sink LIMIT ?"
)


class Wanted(msgspec.Struct, frozen=True):
    states: tuple[str, ...] = ()  # as shown: `delivering` too
    sink: str | None = None
    since_us: int | None = None  # by when their entry was made, [since, until)
    until_us: int | None = None

    @property
    def stored(self) -> frozenset[str]:
        """The states in the journal that the shown ones can come from."""
        extra = ("pending", "retryable") if "delivering" in self.states else ()
        return frozenset((*self.states, *extra))

    def takes(self, room: Room, row: OutboxRow) -> bool:
        if self.sink not in (None, row.sink):
            return False
        if (self.since_us is not None and row.at < self.since_us) or (
            self.until_us is not None and row.at >= self.until_us
        ):
            return False
        return not self.states or shown_state(room, row.entry_seq, row.sink, row.state) in self.states


async def find_rows(room: Room, wanted: Wanted, before: int, limit: int) -> list[OutboxRow]:
    """At least `limit` matching rows older than entry `before`, newest first, the last entry whole; fewer: there are no more."""
    sums = (await room.box.journal.read(queries.counts)).outbox
    matching = [
        (sink, state, n)
        for sink, state, n in sums
        if wanted.sink in (None, sink) and (not wanted.states or state in wanted.stored)
    ]
    if not matching:
        return []
    if (
        wanted.states
        and not {"delivered", "dropped"} & set(wanted.states)
        and sum(n for _, _, n in matching) <= FEW
    ):
        rows = await room.box.journal.read(lambda c: _few(c, matching))
        found = [row for row in rows if row.entry_seq < before and wanted.takes(room, row)]
        return sorted(found, key=lambda row: (-row.entry_seq, row.sink))
    return await _walk(room, wanted, before, limit)


def _few(connection: sqlite3.Connection, matching: list[tuple[str, str, int]]) -> list[OutboxRow]:
    rows: list[OutboxRow] = []
    for state in {state for _, state, _ in matching if state in {"held", "dead"}}:
        rows += [OutboxRow(*row) for row in connection.execute(PARKED_SQL, (state,))]
    for sink in {sink for sink, state, _ in matching if state not in {"held", "dead"}}:
        rows += [OutboxRow(*row) for row in connection.execute(OPEN_SQL, (sink,))]
    return rows


async def _walk(room: Room, wanted: Wanted, before: int, limit: int) -> list[OutboxRow]:
    least, newest = await room.box.journal.read(lambda c: c.execute(BOUNDS).fetchone())
    found: list[OutboxRow] = []
    upper, size = min(before, (newest or 0) + 1), min(WINDOW, max(limit, 100))
    while least is not None and upper > least and len(found) < limit:
        lower = max(least, upper - size)

        def query(connection: sqlite3.Connection, lower: int = lower, upper: int = upper) -> list[OutboxRow]:
            return [OutboxRow(*row) for row in connection.execute(WINDOW_SQL, (upper, lower))]

        rows = [row for row in await room.box.journal.read(query) if wanted.takes(room, row)]
        found += sorted(rows, key=lambda row: (-row.entry_seq, row.sink))
        upper, size = lower, min(WINDOW, 2 * size)
    return found


def whole_entries(rows: list[OutboxRow], limit: int) -> tuple[list[OutboxRow], int | None]:
    """The first `limit` rows and the rest of the last entry among them; and where the next page begins, if there is one."""
    if len(rows) <= limit:
        return rows, None
    last = rows[limit - 1].entry_seq
    page = [row for row in rows if row.entry_seq >= last]
    return page, last if len(page) < len(rows) else None


async def list_rows(call: Call) -> web.StreamResponse:
    room, query = call.room, call.query
    since_us, until_us = span(query["since"], query["until"], room.box.clock.now_us())
    wanted = Wanted(comma_list(query["state"], STATES, "state"), query["sink"], since_us, until_us)
    limit, before, task_id = query["limit"], query["before"], query["task"]
    await must_know_sink(room, wanted.sink)
    if task_id is None:
        rows = await find_rows(room, wanted, before, limit + 1)
    else:
        sql, values = OF_TASK_SQL, (task_id, before, 10 * LIST_ROWS_MAX)
        of_task = await room.box.journal.read(lambda c: [OutboxRow(*row) for row in c.execute(sql, values)])
        if not of_task:
            await room.box.journal.read(lambda c: must_know_task(c, task_id))
        rows = [row for row in of_task if wanted.takes(room, row)]
    page, next_before = whole_entries(rows, limit)
    return answer({"rows": [outbox_view(room, row) for row in page], "next_before": next_before})


class _Entry(msgspec.Struct):
    row: tuple[Any, ...]
    rows: list[OutboxRow]
    tries: list[list[tuple[int, str, str | None]]]


def _read_entry(connection: sqlite3.Connection, delivery_id: str) -> _Entry | None:
    row = connection.execute(_ENTRY, (delivery_id,)).fetchone()
    if row is None:
        return None
    rows = OutboxRow.fetch(connection, "WHERE o.entry_seq = ? ORDER BY o.sink", (row[0],))
    tries = [
        connection.execute(_TRIES, (each.entry_seq, each.sink, _TRIES_SHOWN)).fetchall()[::-1]
        for each in rows
    ]
    return _Entry(row, rows, tries)


async def show_entry(call: Call) -> web.StreamResponse:
    room, delivery_id = call.room, call.part("delivery_id")
    entry = None
    if delivery_id.isascii():
        entry = await room.box.journal.read(lambda c: _read_entry(c, delivery_id))
    if entry is None:
        raise NoSuchDelivery(f"there is no delivery {delivery_id[:80]!r}", delivery_id=delivery_id[:80])
    _, _, type_, key, task_id, name, run, attempt, at, size, sha256, payload = entry.row
    shown = payload is not None and len(payload) <= ENVELOPE_SHOWN_BYTES_MAX
    view = {
        "delivery_id": delivery_id,
        "type": type_,
        "key": key,
        "task_id": task_id,
        "name": name,
        "run": run,
        "attempt": attempt,
        "created_at": format_time(at),
        "bytes": size,
        "sha256": bytes(sha256).hex(),
        "envelope": msgspec.Raw(payload) if shown else None,
        "rows": [
            {
                **outbox_view(room, row),
                "tries": [
                    {"at": format_time(when), "outcome": what, "reason": why} for when, what, why in tries
                ],
            }
            for row, tries in zip(entry.rows, entry.tries, strict=True)
        ],
    }
    return answer(view)


ROUTES: Final = (
    Route(
        "GET",
        "/v1/outbox",
        "Outbox rows, newest first.",
        list_rows,
        more_statuses={404: "no_such_sink, no_such_task", 422: REJECTED},
        query=(
            Param("state", f"comma list of {', '.join(STATES)}"),
            Param("sink", "a sink's name"),
            Param("task", "a task's id"),
            Param("since", "entries made since then: RFC 3339, or how long ago (2h)"),
            Param("until", "entries made before then"),
            LIMIT,
            Param(
                "before", "only older ones (next_before of the page before)", "integer", SEQ_MAX, 0, SEQ_MAX
            ),
        ),
    ),
    Route(
        "GET",
        "/v1/outbox/{delivery_id}",
        "One entry, its envelope, and every try at every sink.",
        show_entry,
        more_statuses={404: "no_such_delivery"},
    ),
)
