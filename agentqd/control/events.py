"""`GET /v1/events`: the event chain as it grows, one JSON object a line."""

from __future__ import annotations

import contextlib
from typing import Any, Final

import msgspec
from aiohttp import web

from agentqd.control import queries
from agentqd.control.audit import SEQ_MAX, event_view
from agentqd.control.route import Call, Param, Route
from agentqd.core.errors import JournalError

PAGE_EVENTS: Final = 1000
EMPTY_LINE_S: Final = 15.0
TYPE: Final = "application/jsonl"
_encode: Final = msgspec.json.Encoder().encode


async def stream(call: Call) -> web.StreamResponse:
    """Until whoever listens goes, or the server closes; a slow listener holds up only itself."""
    room = call.room
    after: int = call.query["after"] if call.query["after"] is not None else await _newest(call)
    response = web.StreamResponse(headers={"Content-Type": TYPE, "Cache-Control": "no-store"})
    await response.prepare(call.request)
    said_s = room.box.clock.monotonic_s()
    with contextlib.suppress(
        JournalError
    ):  # the daemon opens it anew; the listener comes back with after=SEQ
        while not room.closing.is_set():
            commits = room.box.journal.commits
            rows = await _after(call, after)
            if rows:
                after = rows[-1][0]
                await response.write(b"".join(_encode(event_view(row)) + b"\n" for row in rows))
                said_s = room.box.clock.monotonic_s()
            if len(rows) == PAGE_EVENTS:
                continue
            left_s = EMPTY_LINE_S - (room.box.clock.monotonic_s() - said_s)
            if left_s <= 0:
                await response.write(b"\n")
                said_s = room.box.clock.monotonic_s()
                left_s = EMPTY_LINE_S
            await room.commit_after(commits, left_s)
    with contextlib.suppress(ConnectionError):
        await response.write_eof()
    return response


async def _after(call: Call, seq: int) -> list[tuple[Any, ...]]:
    return await call.room.box.journal.read(
        lambda c: c.execute(queries.EVENTS, (seq, PAGE_EVENTS)).fetchall()
    )


async def _newest(call: Call) -> int:
    row = await call.room.box.journal.read(lambda c: c.execute(queries.LAST_EVENT).fetchone())
    return row[0] if row else 0


ROUTES: Final = (
    Route(
        "GET",
        "/v1/events",
        "The event stream: one object a line, an empty line every 15 s. Without `after`, from now on.",
        stream,
        query=(Param("after", "go on after this seq", "integer", None, 0, SEQ_MAX),),
        answer=TYPE,
    ),
)
