"""A person's word on outbox rows: which they are, and what becomes of them. Units; `control` finds the entries and makes the steps.

Invariants:
1. States move through core.outbox's table only; a row that cannot take the event is left as it is.
2. The delivery id never changes. `retry` begins attempts and lifetime anew; the tries before it stay.
3. A row's reason begins with marking.DISABLED exactly while it is held because of its sink, and not by a person.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from agentqd.core.outbox import TABLE, RowEvent, RowState, next_row_state
from agentqd.loops.marking import DISABLED
from agentqd.storage import outbox
from agentqd.storage.transaction import Transaction

MOVED_STATES: Final = (RowState.PENDING, RowState.RETRYABLE, RowState.HELD, RowState.DEAD)
InFlight = Callable[[int, str], bool]  # (entry, sink): is it being sent?


class Pick(msgspec.Struct, frozen=True):
    """Which rows. `since_us` and `until_us`: by when their entry was made, [since, until)."""

    states: tuple[str, ...]
    sink: str | None = None
    since_us: int | None = None
    until_us: int | None = None

    def clauses(self) -> tuple[str, list[Any]]:
        text = f"+o.state IN ({','.join('?' * len(self.states))})"
        values: list[Any] = list(self.states)
        for clause, value in (
            ("+o.sink = ?", self.sink),
            ("e.at >= ?", self.since_us),
            ("e.at < ?", self.until_us),
        ):
            if value is not None:
                text += f" AND {clause}"
                values.append(value)
        return text, values


class Row(msgspec.Struct, frozen=True):
    entry_seq: int
    sink: str
    state: RowState
    last_error: str | None
    delivered_at: int | None
    delivery_id: str
    task_id: str | None

    @property
    def held_by_its_sink(self) -> bool:
        return self.state is RowState.HELD and (self.last_error or "").startswith(DISABLED)


def states_for(event: RowEvent) -> tuple[str, ...]:
    """The states whose rows may be changed. (`held` ones by HELD: a row held because of its sink becomes a person's.)"""
    more = (RowState.HELD.value,) if event is RowEvent.HELD else ()
    return (*(each.value for each in RowState if event in TABLE[each]), *more)


def find(
    source: sqlite3.Connection | Transaction, pick: Pick, where: str, values: Sequence[Any]
) -> list[Row]:
    """`where` bounds the search: to some entries, ids, or a window of entries."""
    if not pick.states:
        return []
    text, more = pick.clauses()
    rows = source.execute(
        "SELECT o.entry_seq, o.sink, o.state, o.last_error, o.delivered_at, e.delivery_id, t.id FROM outbox o"  # noqa: S608 - fixed clauses
        " JOIN entries e ON e.seq = o.entry_seq LEFT JOIN tasks t ON t.seq = e.task_seq"
        f" WHERE {where} AND {text} ORDER BY o.entry_seq",
        (*values, *more),
    ).fetchall()
    return [Row(seq, sink, RowState(state), *rest) for seq, sink, state, *rest in rows]


def can_take(row: Row, event: RowEvent, in_flight: InFlight) -> bool:
    """`drop` leaves alone what is being sent: whether it arrives is not known."""
    if event is RowEvent.DROPPED and in_flight(row.entry_seq, row.sink):
        return False
    return event in TABLE[row.state] or (event is RowEvent.HELD and row.held_by_its_sink)


def change(tx: Transaction, event: RowEvent, rows: Sequence[Row], in_flight: InFlight) -> int:
    """A unit. How many rows have taken it."""
    changed = [row for row in rows if can_take(row, event, in_flight)]
    for row in changed:
        _change(tx, event, row)
        tx.event(row.task_id, f"outbox_{event.value}", sink=row.sink, delivery_id=row.delivery_id)
    return len(changed)


def _change(tx: Transaction, event: RowEvent, row: Row) -> None:
    columns: dict[str, Any] = {"due_at": None}
    if row.held_by_its_sink:
        columns["last_error"] = None
    if event is RowEvent.HELD and row.held_by_its_sink:
        tx.execute(
            "UPDATE outbox SET last_error = NULL WHERE entry_seq = ? AND sink = ?", (row.entry_seq, row.sink)
        )
        return
    if event in {RowEvent.RELEASED, RowEvent.RETRY_REQUESTED}:
        columns["due_at"] = tx.now_us
    if event is RowEvent.RETRY_REQUESTED:
        columns |= {"attempts": 0, "created_at": tx.now_us, "delivered_at": None, "position": None}
        if row.state is RowState.DELIVERED:
            _remember_delivery(tx, row)
    outbox.change_row(tx, row.entry_seq, row.sink, event, **columns)


def _remember_delivery(tx: Transaction, row: Row) -> None:
    """What was delivered and is sent again keeps the first delivery among its tries."""
    last = tx.one("SELECT outcome FROM tries WHERE entry_seq = ? AND sink = ? ORDER BY n DESC LIMIT 1", (row.entry_seq, row.sink))  # fmt: skip
    if last is None or last[0] != "delivered":
        outbox.record_try(tx, row.entry_seq, row.sink, "delivered", None, row.delivered_at)


class Moved(msgspec.Struct, frozen=True):
    moved: int
    kept: int  # the other sink has a row of that entry already: nothing is sent there twice


def move(tx: Transaction, rows: Sequence[Row], to: str, in_flight: InFlight) -> Moved:
    """A unit: rows go on under another sink's name, with their ids and tries, attempts from 0, and what is remembered of who has
    them (`progress`): nobody gets twice what an earlier sink of that type has brought. What a person holds stays held. A row
    that is being sent stays where it is."""
    moved = kept = 0
    for row in rows:
        if in_flight(row.entry_seq, row.sink):
            continue
        if has_row(tx, row.entry_seq, to):
            kept += 1
            continue
        _move(tx, row, to)
        moved += 1
    return Moved(moved, kept)


def has_row(source: sqlite3.Connection | Transaction, entry_seq: int, sink: str) -> bool:
    sql = "SELECT 1 FROM outbox WHERE entry_seq = ? AND sink = ?"
    return source.execute(sql, (entry_seq, sink)).fetchone() is not None


def _move(tx: Transaction, row: Row, to: str) -> None:
    stays = row.state is RowState.PENDING or (row.state is RowState.HELD and not row.held_by_its_sink)
    state = row.state if stays else next_row_state(row.state, RowEvent.RETRY_REQUESTED)
    due_at = tx.now_us if state is RowState.PENDING else None
    tx.execute(
        "UPDATE outbox SET sink = ?, state = ?, attempts = 0, created_at = ?, due_at = ?, position = NULL, last_error = NULL"
        " WHERE entry_seq = ? AND sink = ?",
        (to, state.value, tx.now_us, due_at, row.entry_seq, row.sink),
    )
    tx.execute("UPDATE tries SET sink = ? WHERE entry_seq = ? AND sink = ?", (to, row.entry_seq, row.sink))
    tx.count_outbox(row.sink, row.state.value, -1)
    tx.count_outbox(to, state.value, 1)
    tx.event(row.task_id, "outbox_moved", sink=row.sink, to=to, delivery_id=row.delivery_id)
