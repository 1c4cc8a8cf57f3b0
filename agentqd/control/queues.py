"""Pausing queues, and draining the daemon."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from agentqd.control.room import Room
from agentqd.control.route import Call, Handler, NoSuchQueue, Route, answer, is_text, known_fields
from agentqd.core.errors import IllegalTransition, InvalidRequest
from agentqd.core.units import format_time
from agentqd.loops.box import Box
from agentqd.storage import draining
from agentqd.storage.transaction import Transaction


def _pausing(*, on: bool) -> Handler:
    async def handler(call: Call) -> web.StreamResponse:
        known_fields(await call.body(), ())
        room, queue = call.room, call.part("name")
        await check_queue(room, queue)
        options = room.box.settings.queues.get(queue)
        if not on and options is not None and options.paused:
            text = (
                f"queue {queue} is paused by the config (queues.{queue}.paused); say false there and save it"
            )
            raise IllegalTransition(text, queue=queue, paused=True)
        await room.box.journal.commit(lambda tx: _set_paused(tx, room, queue, on=on))
        room.box.log.info("queue_paused" if on else "queue_resumed", queue=queue)
        in_config = queue == "default" or options is not None
        return answer({"queue": queue, "paused": on, "in_config": in_config})

    return handler


async def check_queue(room: Room, queue: str) -> None:
    """Raises NoSuchQueue: neither in the config nor with a task."""
    known = queue == "default" or queue in room.box.settings.queues
    if not known and is_text(queue):
        sql = "SELECT 1 FROM task_counts WHERE queue = ? AND n <> 0 LIMIT 1"
        known = await room.box.journal.read(lambda c: c.execute(sql, (queue,)).fetchone()) is not None
    if not known:
        there_is = ", ".join(sorted({"default", *room.box.settings.queues}))
        raise NoSuchQueue(f"there is no queue {queue[:80]!r}; there is {there_is}", queue=queue[:80])


def _set_paused(tx: Transaction, room: Room, queue: str, *, on: bool) -> None:
    """A unit. The scheduler hears of it here, on its own thread and before the claims that ride on this very commit: after
    the answer to a pause nothing of the queue starts. (A failed commit ends this scheduler together with its journal.)"""
    had = {row[0] for row in tx.execute("SELECT queue FROM paused_queues")}
    if on and queue not in had:
        tx.execute("INSERT INTO paused_queues (queue, at) VALUES (?, ?)", (queue, tx.now_us))
        tx.event(None, "queue_paused", queue=queue)
    elif not on and queue in had:
        tx.execute("DELETE FROM paused_queues WHERE queue = ?", (queue,))
        tx.event(None, "queue_resumed", queue=queue)
    room.parts.supervision.scheduler.paused = frozenset(had | {queue} if on else had - {queue})


async def drain(call: Call) -> web.StreamResponse:
    body = await call.body()
    known_fields(body, ("on",))
    on = body.get("on")
    if not isinstance(on, bool):
        raise InvalidRequest('the body is {"on": true} or {"on": false}', field="on")
    box = call.room.box
    await box.journal.commit(lambda tx: _set_draining(tx, box, on=on))
    box.log.info("draining" if on else "draining_ended")
    return answer({"draining": on, "since": format_time(box.draining_since_us)})


def _set_draining(tx: Transaction, box: Box, *, on: bool) -> None:
    """A unit. As with a pause, the scheduler hears of it before the claims that ride on this very commit."""
    if on:
        box.drain(draining.begin(tx))
    else:
        draining.end(tx)
        box.drain(None)


_MISSING: Final = {404: "no_such_queue"}
ROUTES: Final = (
    Route(
        "POST",
        "/v1/queues/{name}/pause",
        "Start nothing more of a queue.",
        _pausing(on=True),
        body={"type": "object"},
        more_statuses=_MISSING,
    ),
    Route(
        "POST",
        "/v1/queues/{name}/resume",
        "Undo a pause.",
        _pausing(on=False),
        body={"type": "object"},
        more_statuses={**_MISSING, 409: "illegal_transition"},
    ),
    Route(
        "POST",
        "/v1/drain",
        "Accept nothing new over the socket and start nothing, over restarts too, until `false` ends it.",
        drain,
        body={"type": "object", "required": ["on"], "properties": {"on": {"type": "boolean"}}},
    ),
)
