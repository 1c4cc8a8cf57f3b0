"""Sinks as a person sees and moves them: list, test, disable, enable. `status` shows a shorter form of the same object."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import Any, Final

import msgspec
from aiohttp import web

from agentqd.control import queries
from agentqd.control.room import Room
from agentqd.control.route import Call, Route, answer, is_text, known_fields
from agentqd.control.views import in_config
from agentqd.core.errors import IllegalTransition, InvalidRequest
from agentqd.core.limits import ROWS_A_COMMIT, SINK_REASON_CHARS_MAX
from agentqd.core.outbox import RowState
from agentqd.core.routing import COMPLETIONS, REJECTED
from agentqd.core.units import format_time
from agentqd.loops import parking, sinkmemory
from agentqd.loops.sinkmemory import Word
from agentqd.loops.trying import NoSuchSink, try_sink
from agentqd.storage.transaction import Transaction
from agentqd.system.peercred import peer_of

US: Final = 1_000_000
UNSENT: Final = frozenset({RowState.PENDING, RowState.DELIVERING, RowState.RETRYABLE})
NOT_IN_CONFIG: Final = "not in the config"


class SinksSeen(msgspec.Struct, frozen=True):
    """What the journal says of sinks."""

    sums: dict[str, dict[str, int]]  # sink: state: rows
    oldest: dict[str, int | None]  # of those with rows to send
    words: dict[str, Word]  # of those that a person has disabled


def look(connection: sqlite3.Connection) -> SinksSeen:
    sums: dict[str, dict[str, int]] = {}
    for sink, state, n in queries.counts(connection).outbox:
        sums.setdefault(sink, {})[state] = n
    return SinksSeen(
        sums,
        {
            sink: queries.oldest_open(connection, sink)
            for sink, states in sums.items()
            if UNSENT & states.keys()
        },
        {name: sinkmemory.load_word(connection, name) for name in sinkmemory.disabled_names(connection)},
    )


def names_of(room: Room, seen: SinksSeen) -> list[str]:
    """All in the config, all that a person has disabled, and of the others (`rejected`, those no longer in the config) those
    with rows that are not at their end: to send, held or dead."""
    unfinished = {sink for sink, states in seen.sums.items() if states.keys() - {"delivered", "dropped"}}
    return sorted({COMPLETIONS, *room.box.settings.sinks, *unfinished, *seen.words})


def sink_view(room: Room, name: str, seen: SinksSeen, now_us: int) -> dict[str, Any]:
    """As `status` shows it."""
    settings, states = room.box.settings.sinks, seen.sums.get(name, {})
    runner = room.parts.delivery.runners.get(name)
    known = in_config(room, name)
    pending = sum(states.get(state, 0) for state in UNSENT)
    health = runner.health() if runner is not None else _without_runner(seen.words.get(name))
    return {
        "type": settings[name].type if name in settings else name if known else None,
        "in_config": known,
        "pending": pending,
        "held": states.get(RowState.HELD, 0),
        "dead": states.get(RowState.DEAD, 0),
        "delivered": states.get(RowState.DELIVERED, 0),
        "oldest_pending_s": _age_s(seen.oldest.get(name), now_us),
        **health,
        "rate_limited": bool(pending and health.get("rate_wait_s")) and health["breaker"] != "disabled",
        "last_error": runner.last_error
        if runner is not None
        else NOT_IN_CONFIG
        if not known
        else "it cannot be used; the daemon's log says why"
        if states
        else None,
    }


def _without_runner(word: Word | None) -> dict[str, Any]:
    if word is None:
        return {"breaker": "closed"}
    return {
        "breaker": "disabled",
        "disabled": word.why,
        "disabled_by": "person",
        "disabled_at": format_time(word.at_us),
    }


def _whole_view(room: Room, name: str, seen: SinksSeen, now_us: int) -> dict[str, Any]:
    """As `sink list` shows it."""
    states, runner = seen.sums.get(name, {}), room.parts.delivery.runners.get(name)
    flying = 0 if runner is None else len(runner.in_flight)
    backlog = {state.value: states.get(state, 0) for state in RowState if state is not RowState.DELIVERING}
    for state in ("pending", "retryable"):
        taken = min(flying, backlog[state])
        backlog[state] -= taken
        flying -= taken
    backlog["delivering"] = (
        states.get("delivering", 0) + (0 if runner is None else len(runner.in_flight)) - flying
    )
    return {
        "name": name,
        **sink_view(room, name, seen, now_us),
        "backlog": backlog,
        **(
            runner.counts.told(runner.box.clock.monotonic_s())
            if runner is not None
            else {"delivered_last": None, "failed_last": None, "counted_since": None}
        ),
    }


def _age_s(since: int | None, now: int) -> float | None:
    return None if since is None else round(max(0, now - since) / US, 3)


async def list_sinks(call: Call) -> web.StreamResponse:
    room = call.room
    seen, now = await room.box.journal.read(look), room.box.clock.now_us()
    return answer({"sinks": [_whole_view(room, name, seen, now) for name in names_of(room, seen)]})


async def test_sink(call: Call) -> web.StreamResponse:
    known_fields(await call.body(), ())
    tried = await try_sink(call.room.parts.delivery, call.part("name"))
    if tried.outcome == "delivered":  # it is there: what waits behind a breaker need not
        runner = call.room.parts.delivery.runners.get(tried.sink)
        if runner is not None:
            runner.wake()
    return answer(msgspec.to_builtins(tried))


async def disable_sink(call: Call) -> web.StreamResponse:
    body = await call.body()
    known_fields(body, ("reason",))
    reason = body.get("reason") or ""
    if not isinstance(reason, str) or len(reason) > SINK_REASON_CHARS_MAX or not reason.isprintable():
        text = f"reason is at most {SINK_REASON_CHARS_MAX} printable characters"
        raise InvalidRequest(text, field="reason")
    room, name = call.room, call.part("name")
    if name in {COMPLETIONS, REJECTED}:
        text = f"{name} is not disabled: it is the box's own file, what every result, pull and wait rests on"
        raise IllegalTransition(text, sink=name)
    if name not in room.box.settings.sinks:
        there_is = ", ".join(sorted(room.box.settings.sinks)) or "none but completions"
        raise NoSuchSink(f"there is no sink {name[:64]!r} in the config; there is {there_is}", sink=name[:64])
    uid = _uid(call)

    def unit(tx: Transaction) -> bool:
        word = parking.disable(tx, name, reason, uid)
        if word is not None:
            tx.after_commit(lambda: _tell_disabled(room, name, word))
        return word is not None

    changed = await room.box.journal.commit(unit)
    if changed:
        room.box.log.info("sink_disabled", sink=name, by="person", uid=uid)
    return answer({"sink": name, "disabled": True, "changed": changed})


async def enable_sink(call: Call) -> web.StreamResponse:
    known_fields(await call.body(), ())
    room, name, uid = call.room, call.part("name"), _uid(call)
    seen = await room.box.journal.read(look)
    if not is_text(name) or name not in {*names_of(room, seen), *seen.sums}:
        raise NoSuchSink(f"there is no sink {name[:64]!r}, and no row of one", sink=name[:64])

    def unit(tx: Transaction) -> tuple[bool, int]:
        tx.after_commit(lambda: _tell_enabled(room, name))
        return parking.enable(tx, name, uid), parking.held_by_it(tx, name)

    changed, releasing = await room.box.journal.commit(unit)
    if name not in room.parts.delivery.runners:  # nobody else releases them
        while await room.box.journal.commit(lambda tx: parking.release_disabled(tx, name)) >= ROWS_A_COMMIT:
            pass
    if changed:
        room.box.log.info("sink_enabled", sink=name, by="person", uid=uid)
    return answer({"sink": name, "disabled": False, "changed": changed, "releasing": releasing})


def _tell_disabled(room: Room, name: str, word: Word) -> None:
    runner = room.parts.delivery.runners.get(name)
    if runner is not None:
        runner.disable(word)


def _tell_enabled(room: Room, name: str) -> None:
    runner = room.parts.delivery.runners.get(name)
    if runner is not None:
        runner.enable()


def _uid(call: Call) -> int | None:
    """Whose word it is, as the kernel says (from a laptop: the user who logs in here)."""
    transport = call.request.transport
    sock = None if transport is None else transport.get_extra_info("socket")
    if sock is None:
        return None
    with contextlib.suppress(OSError):
        return peer_of(sock).uid
    return None


_MISSING: Final = {404: "no_such_sink", 409: "illegal_transition"}
_REASON: Final = {"type": "object", "properties": {"reason": {"type": "string"}}}
ROUTES: Final = (
    Route(
        "GET",
        "/v1/sinks",
        "All sinks, also those no longer in the config that have rows to send, held or dead.",
        list_sinks,
    ),
    Route(
        "POST",
        "/v1/sinks/{name}/test",
        "Send a test entry (type agentq.test) right now, past breaker and backlog; no row is left of it.",
        test_sink,
        body={"type": "object"},
        more_statuses=_MISSING,
    ),
    Route(
        "POST",
        "/v1/sinks/{name}/disable",
        "Send nothing to it until it is enabled; its rows are held.",
        disable_sink,
        body=_REASON,
        more_statuses=_MISSING,
    ),
    Route(
        "POST",
        "/v1/sinks/{name}/enable",
        "Send to it again; what was held because it was disabled is released, and that it asked to be left alone is lifted.",
        enable_sink,
        body={"type": "object"},
        more_statuses={404: "no_such_sink"},
    ),
)
