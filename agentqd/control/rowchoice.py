"""Which of the rows that a person's word has found it takes, and what the answer says of those that it leaves.

Promises, for `retry` (the others take whatever their states allow):
1. By ids, with neither a sink nor a state named: what is delivered is not sent again, unless all rows of that id are.
2. Of all: a dead row whose entry cannot be sent as it is (`UNMENDED` begins its reason) is left, and counted. By its id it is sent.
And of `retry` and `release`: a row that a person's `sink disable` holds is left, and counted; others of that sink are counted too.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from agentqd.control import queries
from agentqd.control.room import Room
from agentqd.core.errors import NoSuchDelivery
from agentqd.core.outbox import RowEvent, RowState
from agentqd.core.routing import COMPLETIONS, REJECTED
from agentqd.loops import rowchanges, sinkmemory
from agentqd.loops.rowchanges import InFlight, Row
from agentqd.loops.trying import NoSuchSink
from agentqd.storage.transaction import Transaction

UNMENDED: Final = (
    "not_allowed", "no_such_sink", "malformed", "incomplete", "too_large", "not_a_file", "unreadable", "too_many",
)  # fmt: skip
CHANGED: Final = "changed"
LEFT: Final = "left"
_HELD: Final = "held by the disabled sink "
_WAITING: Final = (RowState.RETRYABLE.value, RowState.HELD.value)
_KNOWN: Final = "SELECT delivery_id FROM entries WHERE delivery_id IN ({})"
Tally = Counter[str]
Source = sqlite3.Connection | Transaction


def choose(
    source: Source, event: RowEvent, rows: Sequence[Row], flying: InFlight, *, of_all: bool, spares: bool
) -> tuple[list[Row], Tally]:
    """The rows that take it, and the tally. `spares`: promise 1."""
    tally = Tally()
    retried = event is RowEvent.RETRY_REQUESTED
    if retried and spares:
        rows = _undelivered(rows)
    able = [row for row in rows if rowchanges.can_take(row, event, flying)]
    if retried and of_all:
        tally[LEFT] = sum(map(_unmended, able))
        able = [row for row in able if not _unmended(row)]
    if retried or event is RowEvent.RELEASED:
        off = {name for name in {row.sink for row in able} if sinkmemory.load_word(source, name).off}
        tally.update(_HELD + row.sink for row in able if row.sink in off)
        able = [row for row in able if row.sink not in off or not row.held_by_its_sink]
    tally[CHANGED] = len(able)
    return able, tally


def _undelivered(rows: Sequence[Row]) -> list[Row]:
    """(All rows of an entry are among them.)"""
    waiting = {row.entry_seq for row in rows if row.state is not RowState.DELIVERED}
    return [row for row in rows if row.state is not RowState.DELIVERED or row.entry_seq not in waiting]


def _unmended(row: Row) -> bool:
    return row.state in {RowState.DEAD, RowState.DROPPED} and (row.last_error or "").startswith(UNMENDED)


def said(tally: Tally) -> dict[str, Any]:
    """What an answer has besides its counts; only what there is."""
    held = {key.removeprefix(_HELD): n for key, n in sorted(tally.items()) if key.startswith(_HELD)}
    return ({"left": tally[LEFT]} if tally[LEFT] else {}) | ({"stay_held": held} if held else {})


async def waiting(room: Room, sink: str | None) -> dict[str, Any]:
    """For a `retry` of all the dead that found none: what else is not delivered, of all times."""
    sums = (await room.box.journal.read(queries.counts)).outbox
    found = Tally()
    for name, state, n in sums:
        if state in _WAITING and sink in (None, name):
            found[state] += n
    return {"waiting": dict(found)} if found else {}


async def must_know_sink(room: Room, name: str | None) -> None:
    """Raises NoSuchSink: it is neither in the config nor in any row."""
    if name is None or name in {COMPLETIONS, REJECTED, *room.box.settings.sinks}:
        return
    sums = (await room.box.journal.read(queries.counts)).outbox
    if not any(name == sink for sink, _, _ in sums):
        there_is = ", ".join([COMPLETIONS, *sorted(room.box.settings.sinks)])
        text = f"there is no sink {name[:64]!r} in the config, and no row of one; there is {there_is}"
        raise NoSuchSink(text, sink=name[:64])


async def unknown_ids(room: Room, pieces: Sequence[list[str]]) -> list[str]:
    """Those that are no delivery's. Raises NoSuchDelivery: all are."""
    missing: list[str] = []
    for ids in pieces:
        sql = _KNOWN.format(",".join("?" * len(ids)))
        known = {row[0] for row in await room.box.journal.read(lambda c: c.execute(sql, ids).fetchall())}  # noqa: B023 - awaited here
        missing += [each for each in ids if each not in known]
    if missing and len(missing) == sum(map(len, pieces)):
        more = f", nor of the {len(missing) - 1} others" if len(missing) > 1 else ""
        text = f"there is no delivery {missing[0][:80]!r}{more}; see: agentqctl outbox list"
        raise NoSuchDelivery(text, delivery_id=missing[0][:80])
    return missing
