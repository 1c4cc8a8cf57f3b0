"""A person's word on outbox rows over the socket: retry, hold, release, drop, move; by ids, or all of some state, sink and time.

All of them are changed in steps from the oldest entry on, each a short commit; rows that come meanwhile are not waited for.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable
from typing import Any, Final

import msgspec
from aiohttp import web

from agentqd.control import queries, rowchoice
from agentqd.control.room import Room
from agentqd.control.route import Call, Handler, Route, answer, comma_list, known_fields
from agentqd.control.rowchoice import CHANGED, Tally
from agentqd.core.errors import IllegalTransition, InvalidRequest
from agentqd.core.limits import LIST_ROWS_MAX
from agentqd.core.outbox import RowEvent, RowState
from agentqd.core.routing import COMPLETIONS, REJECTED
from agentqd.core.units import parse_moment_us
from agentqd.loops import rowchanges
from agentqd.loops.rowchanges import Pick, Row
from agentqd.loops.trying import NoSuchSink
from agentqd.storage.transaction import Transaction

STATES: Final = tuple(state.value for state in RowState)
WINDOW: Final = 5_000
CHANGES_A_COMMIT: Final = 500
BOUNDS: Final = "SELECT (SELECT min(seq) FROM entries), (SELECT max(seq) FROM entries)"
_FIELDS: Final = ("delivery_ids", "all", "state", "sink", "since", "until", "dry_run")
_MOVE_FIELDS: Final = ("from", "to", "delivery_ids", "all", "state", "since", "until", "dry_run")


class Asked(msgspec.Struct, frozen=True):
    delivery_ids: tuple[str, ...] | None  # None: all
    pick: Pick
    dry_run: bool
    spares: bool = False  # what is delivered, of ids that have something else (rowchoice)

    @property
    def pieces(self) -> list[list[str]]:
        """Of the ids."""
        return _pieces(list(self.delivery_ids or ()))


def read_change(event: RowEvent, body: dict[str, Any], now_us: int) -> Asked:
    """Raises InvalidRequest."""
    known_fields(body, _FIELDS)
    states = _states(body)
    if body.get("all") and not states and event is RowEvent.RETRY_REQUESTED:
        states = (RowState.DEAD.value,)  # "retry all" never sends delivered entries again
    if event is RowEvent.RETRY_REQUESTED and not (body.get("all") or states or body.get("sink")):
        return msgspec.structs.replace(_asked(body, STATES, "sink", now_us), spares=True)
    allowed = rowchanges.states_for(event)
    return _asked(body, tuple(each for each in allowed if not states or each in states), "sink", now_us)


def read_move(body: dict[str, Any], now_us: int) -> tuple[Asked, str]:
    """And where to. Raises InvalidRequest."""
    known_fields(body, _MOVE_FIELDS)
    states, to = _states(body), body.get("to")
    if not isinstance(body.get("from"), str) or not isinstance(to, str) or body["from"] == to:
        raise InvalidRequest('give "from" and "to": the names of two sinks', field="to")
    allowed = tuple(state.value for state in rowchanges.MOVED_STATES)
    for state in states:
        if state not in allowed:
            raise InvalidRequest(
                f"rows that are {state} are not moved; there is {', '.join(allowed)}", field="state"
            )
    return _asked(body, states or allowed, "from", now_us), to


def _states(body: dict[str, Any]) -> tuple[str, ...]:
    state = body.get("state")
    if state is not None and not isinstance(state, str):
        raise InvalidRequest(f"state is one of {', '.join(STATES)}, or a comma list of them", field="state")
    return comma_list(state, STATES, "state")


def _asked(body: dict[str, Any], states: tuple[str, ...], sink_field: str, now_us: int) -> Asked:
    ids, everything, sink, dry_run = (
        body.get(name) for name in ("delivery_ids", "all", sink_field, "dry_run")
    )
    for name, value in (("all", everything), ("dry_run", dry_run)):
        if value not in (None, True, False):
            raise InvalidRequest(f"{name} is true or left out", field=name)
    if (ids is None) == (not everything):
        raise InvalidRequest('give either "delivery_ids" or "all": true', field="delivery_ids")
    if ids is not None and not (
        isinstance(ids, list) and all(isinstance(item, str) and item.isascii() for item in ids)
    ):
        raise InvalidRequest("delivery_ids is a list of ids", field="delivery_ids")
    if ids is not None and len(ids) > LIST_ROWS_MAX:
        raise InvalidRequest(f"delivery_ids has more than {LIST_ROWS_MAX} items", field="delivery_ids")
    if sink is not None and not isinstance(sink, str):
        raise InvalidRequest(f"{sink_field} is a name", field=sink_field)
    since_us, until_us = span(body.get("since"), body.get("until"), now_us)
    pick = Pick(states, sink, since_us, until_us)
    return Asked(None if ids is None else tuple(dict.fromkeys(ids)), pick, bool(dry_run))


def span(since: Any, until: Any, now_us: int) -> tuple[int | None, int | None]:
    """[since, until) in microseconds. Raises InvalidRequest."""
    found: list[int | None] = []
    for name, value in (("since", since), ("until", until)):
        if value is not None and not isinstance(value, str):
            raise InvalidRequest(f"{name} is a time (RFC 3339), or how long ago (2h)", field=name)
        try:
            found.append(None if value is None else parse_moment_us(value, now_us))
        except ValueError as error:
            raise InvalidRequest(f"{name}: {error}", field=name) from None
    since_us, until_us = found
    if since_us is not None and until_us is not None and since_us >= until_us:
        raise InvalidRequest("since is not before until: no row lies between them", field="since")
    return since_us, until_us


Unit = Callable[[Transaction, list[Row]], Tally]
Look = Callable[[sqlite3.Connection, list[Row]], Tally]


def _changing(event: RowEvent) -> Handler:
    async def handler(call: Call) -> web.StreamResponse:
        room = call.room
        asked = read_change(event, await call.body(), room.box.clock.now_us())
        await rowchoice.must_know_sink(room, asked.pick.sink)
        unknown, flying = await _unknown(room, asked), in_flight(room)
        choose = functools.partial(
            rowchoice.choose, flying=flying, of_all=asked.delivery_ids is None, spares=asked.spares
        )

        def unit(tx: Transaction, rows: list[Row]) -> Tally:
            chosen, tally = choose(tx, event, rows)
            rowchanges.change(tx, event, chosen, flying)
            if event is RowEvent.RETRY_REQUESTED:
                tx.after_commit(lambda: _lift(room, {row.sink for row in chosen}))
            return tally

        if asked.dry_run:
            tally = await _look(room, asked, lambda source, rows: choose(source, event, rows)[1])
            counts = {"changed": 0, "would_change": tally[CHANGED]}
        else:
            tally = await _in_steps(room, asked, unit)
            counts = {"changed": tally[CHANGED]}
        of_dead = asked.delivery_ids is None and asked.pick.states == (RowState.DEAD.value,)
        no_dead = event is RowEvent.RETRY_REQUESTED and of_dead and not (tally[CHANGED] or asked.dry_run)
        more = await rowchoice.waiting(room, asked.pick.sink) if no_dead else {}
        return answer(counts | rowchoice.said(tally) | unknown | more)

    return handler


def _lift(room: Room, sinks: set[str]) -> None:
    """A person wants them tried now, whatever their receivers have asked for."""
    for name in sinks:
        runner = room.parts.delivery.runners.get(name)
        if runner is not None:
            runner.lift()


async def _unknown(room: Room, asked: Asked) -> dict[str, list[str]]:
    """What an answer says of ids that are no delivery's. Raises NoSuchDelivery."""
    missing = await rowchoice.unknown_ids(room, asked.pieces)
    return {"unknown": missing} if missing else {}


async def move_rows(call: Call) -> web.StreamResponse:
    room = call.room
    asked, to = read_move(await call.body(), room.box.clock.now_us())
    source, flying = str(asked.pick.sink), in_flight(room)
    for name in (source, to):
        if name in {COMPLETIONS, REJECTED}:
            raise IllegalTransition(
                f"rows are not moved from or to {name}: it is built in, and has what it must have", sink=name
            )
    if to not in room.box.settings.sinks:
        raise NoSuchSink(f"there is no sink {to[:64]!r} in the config to move rows to", sink=to[:64])
    await rowchoice.must_know_sink(room, source)
    unknown = await _unknown(room, asked)
    if asked.dry_run:

        def look(connection: sqlite3.Connection, rows: list[Row]) -> Tally:
            may = [row for row in rows if not flying(row.entry_seq, row.sink)]
            return Tally({CHANGED: sum(not rowchanges.has_row(connection, row.entry_seq, to) for row in may)})

        tally = await _look(room, asked, look)
        return answer({"changed": 0, "would_change": tally[CHANGED], "kept": 0} | unknown)

    def unit(tx: Transaction, rows: list[Row]) -> Tally:
        moved = rowchanges.move(tx, rows, to, flying)
        runner = room.parts.delivery.runners.get(source)
        if runner is not None:
            tx.after_commit(runner.forget)
        return Tally({CHANGED: moved.moved, "kept": moved.kept})

    done = await _in_steps(room, asked, unit)
    return answer({"changed": done[CHANGED], "kept": done["kept"]} | unknown)


def in_flight(room: Room) -> rowchanges.InFlight:
    def flying(entry_seq: int, sink: str) -> bool:
        runner = room.parts.delivery.runners.get(sink)
        return runner is not None and entry_seq in runner.in_flight

    return flying


async def _in_steps(room: Room, asked: Asked, unit: Unit) -> Tally:
    tally = Tally()

    async def step(where: str, values: list[Any]) -> None:
        tally.update(
            await room.box.journal.commit(lambda tx: unit(tx, rowchanges.find(tx, asked.pick, where, values)))
        )

    if asked.delivery_ids is not None:
        for ids in asked.pieces:
            await step(f"e.delivery_id IN ({_marks(ids)})", ids)
        return tally
    for lower, upper in await _windows(room, asked.pick):
        rows = await _found(room, asked.pick, "o.entry_seq >= ? AND o.entry_seq < ?", [lower, upper])
        for seqs in _pieces(list(dict.fromkeys(row.entry_seq for row in rows))):
            await step(f"o.entry_seq IN ({_marks(seqs)})", seqs)
    return tally


async def _look(room: Room, asked: Asked, look: Look) -> Tally:
    """How many rows it would be, with nothing changed."""
    tally = Tally()

    async def step(where: str, values: list[Any]) -> None:
        tally.update(
            await room.box.journal.read(lambda c: look(c, rowchanges.find(c, asked.pick, where, values)))
        )

    if asked.delivery_ids is not None:
        for ids in asked.pieces:
            await step(f"e.delivery_id IN ({_marks(ids)})", ids)
        return tally
    for window in await _windows(room, asked.pick):
        await step("o.entry_seq >= ? AND o.entry_seq < ?", [*window])
    return tally


async def _found(room: Room, pick: Pick, where: str, values: list[Any]) -> list[Row]:
    return await room.box.journal.read(lambda c: rowchanges.find(c, pick, where, values))


async def _windows(room: Room, pick: Pick) -> list[tuple[int, int]]:
    """Of entries, oldest first; none if the kept sums say that nothing is there."""
    sums = (await room.box.journal.read(queries.counts)).outbox
    if not any(state in pick.states and pick.sink in (None, sink) for sink, state, _ in sums):
        return []
    least, newest = await room.box.journal.read(lambda c: c.execute(BOUNDS).fetchone())
    return [(lower, lower + WINDOW) for lower in range(least or 0, (newest or -1) + 1, WINDOW)]


def _pieces(items: list[Any]) -> list[list[Any]]:
    return [items[start : start + CHANGES_A_COMMIT] for start in range(0, len(items), CHANGES_A_COMMIT)]


def _marks(items: list[Any]) -> str:
    return ",".join("?" * len(items))


_TIME: Final = {"type": "string", "description": "RFC 3339, or how long ago (2h): by when the entry was made"}
_PICK: Final[dict[str, Any]] = {
    "delivery_ids": {"type": "array", "items": {"type": "string"}},
    "all": {"type": "boolean"},
    "state": {"type": "string", "description": f"one of {', '.join(STATES)}, or a comma list"},
    "since": _TIME,
    "until": _TIME,
    "dry_run": {"type": "boolean", "description": "change nothing, say how many (`would_change`)"},
}
_MISSING: Final = {404: "no_such_sink"}
_NAME: Final = {"type": "string", "description": "a sink's name"}


def _route(verb: str, event: RowEvent, summary: str) -> Route:
    body = {"type": "object", "properties": {**_PICK, "sink": _NAME}}
    return Route("POST", f"/v1/outbox/{verb}", summary, _changing(event), body=body, more_statuses=_MISSING)


ROUTES: Final = (
    _route("retry", RowEvent.RETRY_REQUESTED, "Send again, now; the delivery id stays."),
    _route("hold", RowEvent.HELD, "Keep rows from being sent."),
    _route("release", RowEvent.RELEASED, "Let held rows go on."),
    _route("drop", RowEvent.DROPPED, "Never send these; they are kept as `dropped`."),
    Route(
        "POST",
        "/v1/outbox/move",
        "Let rows of one sink go on under another's name, with their ids.",
        move_rows,
        body={
            "type": "object",
            "required": ["from", "to"],
            "properties": {**_PICK, "from": _NAME, "to": _NAME},
        },
        more_statuses={404: "no_such_sink", 409: "illegal_transition"},
    ),
)
