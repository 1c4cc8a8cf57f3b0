"""The event chain: read in pages, and checked from end to end."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from aiohttp import web

from agentqd.control import queries
from agentqd.control.route import Call, Param, Route, answer
from agentqd.core.limits import LIST_ROWS_MAX
from agentqd.core.units import format_time
from agentqd.storage import audit

SEQ_MAX: Final = 2**62


def event_view(row: tuple[Any, ...]) -> dict[str, Any]:
    seq, at, task, event, data, digest = row
    shown = {
        "seq": seq,
        "at": format_time(at),
        "task_id": task,
        "event": event,
        "data": msgspec.Raw(data.encode()),
    }
    return {**shown, "hash": bytes(digest).hex()}


async def list_events(call: Call) -> web.StreamResponse:
    values = (call.query["after"], call.query["limit"] + 1)
    rows = await call.room.box.journal.read(lambda c: c.execute(queries.EVENTS, values).fetchall())
    page = rows[: call.query["limit"]]
    return answer({"events": [event_view(row) for row in page], "more": len(rows) > len(page)})


async def verify(call: Call) -> web.StreamResponse:
    """Step by step, so that other reads come between."""
    journal = call.room.box.journal
    progress = await journal.read(audit.begin)
    while not progress.done:
        progress = await journal.read(lambda c, progress=progress: audit.step(c, progress))  # type: ignore[misc]
    return answer(progress.as_json())


AFTER: Final = Param("after", "only events after this seq", "integer", 0, 0, SEQ_MAX)
ROUTES: Final = (
    Route(
        "GET",
        "/v1/audit/events",
        "The events, in order, with their hashes.",
        list_events,
        query=(AFTER, Param("limit", "at most so many", "integer", 1000, 1, LIST_ROWS_MAX)),
    ),
    Route("GET", "/v1/audit/verify", "Works out every hash of the chain anew.", verify),
)
