"""The completion queue as consumers pull it: line objects exactly as the sink writes them, `pulled` worked out when shown."""

from __future__ import annotations

import re
import sqlite3
from typing import Any, Final

import msgspec
from aiohttp import web

from agentqd.control import queries
from agentqd.control.route import Call, Param, Route, answer, answer_raw, known_fields
from agentqd.core.errors import InvalidRequest
from agentqd.core.limits import COMPLETIONS_BATCH_MAX, LIST_ROWS_MAX, MIB
from agentqd.core.units import format_time
from agentqd.sinks.base import Delivery
from agentqd.sinks.completions import CompletionLines
from agentqd.storage.transaction import Transaction

CONSUMER: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
CONSUMERS_MAX: Final = 10_000
PAGE_BYTES_MAX: Final = 16 * MIB
WAIT_MAX_S: Final = 300
SEQ_MAX: Final = 2**53 - 1
_LOOK_AGAIN_S: Final = 5.0
_NOT_PULLED: Final = b'"pulled":false}\n'
_quoted: Final = msgspec.json.Encoder().encode


class Page(msgspec.Struct):
    acknowledged: int
    lines: list[bytes]
    more: bool


def read_page(connection: sqlite3.Connection, consumer: str, after: int | None, limit: int) -> Page:
    """What lies after `after`, or after what the consumer has acknowledged; bounded in rows and in bytes."""
    mark = queries.acknowledged(connection, consumer)
    lines: list[bytes] = []
    size = 0
    for row in connection.execute(queries.COMPLETIONS, (mark if after is None else after, limit + 1)):
        if len(lines) == limit or (lines and size + len(row[4]) > PAGE_BYTES_MAX):
            return Page(mark, lines, more=True)
        lines.append(line_of(row, mark))
        size += len(row[4])
    return Page(mark, lines, more=False)


def line_of(row: tuple[Any, ...], acknowledged: int) -> bytes:
    """The line's bytes as in completions.jsonl, without the newline."""
    position, type_, kind, delivery_id, payload = row
    delivery = Delivery(delivery_id, 0, type_, kind, "", None, payload, 0, 0)
    line = CompletionLines().line(delivery, position)
    assert line.endswith(_NOT_PULLED), "the sink's line ends otherwise"
    pulled = b"true" if position <= acknowledged else b"false"
    return line[: -len(_NOT_PULLED)] + b'"pulled":' + pulled + b"}"


async def pull(call: Call) -> web.StreamResponse:
    room, query = call.room, call.query
    consumer, after, limit = query["consumer"], query["after"], query["limit"]
    _check_name(consumer)
    deadline = room.deadline(query["wait_s"])
    while True:
        commits = room.box.journal.commits  # before the look: a commit during it is not missed
        page = await room.box.journal.read(lambda c: read_page(c, consumer, after, limit))
        left_s = room.left_s(deadline)
        if page.lines or left_s <= 0:
            break
        await room.commit_after(commits, min(left_s, _LOOK_AGAIN_S))
    head = b'{"consumer":%b,"acknowledged":%d,"rows":[' % (_quoted(consumer), page.acknowledged)
    tail = b'],"more":%b}' % (b"true" if page.more else b"false")
    return answer_raw(head + b",".join(page.lines) + tail)


async def list_consumers(call: Call) -> web.StreamResponse:
    def query(connection: sqlite3.Connection) -> dict[str, Any]:
        last = queries.last_position(connection)
        rows = connection.execute(queries.CONSUMERS).fetchall()
        return {
            "consumers": [
                {
                    "name": name,
                    "acknowledged": mark,
                    "behind": max(0, last - mark),
                    "updated_at": format_time(at),
                }
                for name, mark, at in rows
            ]
        }

    return answer(await call.room.box.journal.read(query))


async def acknowledge(call: Call) -> web.StreamResponse:
    consumer, body = call.part("name"), await call.body()
    _check_name(consumer)
    known_fields(body, ("seq",))
    seq = body.get("seq")
    if not isinstance(seq, int) or isinstance(seq, bool) or not 0 <= seq <= SEQ_MAX:
        raise InvalidRequest("seq is the number of the last line that was put away", field="seq")
    mark = await call.room.box.journal.commit(lambda tx: _acknowledge(tx, consumer, seq))
    return answer({"consumer": consumer, "acknowledged": mark})


def _acknowledge(tx: Transaction, consumer: str, seq: int) -> int:
    """A unit: never back, never past the last seq."""
    before = tx.one(queries.CONSUMER, (consumer,))
    if before is None and tx.one("SELECT count(*) FROM consumers")[0] >= CONSUMERS_MAX:
        raise InvalidRequest(f"there are {CONSUMERS_MAX} consumers already", field="name")
    mark = max(before[0] if before else 0, min(seq, queries.last_position(tx.connection)))
    if before is None or mark > before[0]:
        tx.execute(
            "INSERT INTO consumers (name, acknowledged, updated_at) VALUES (?, ?, ?)"
            " ON CONFLICT DO UPDATE SET acknowledged = excluded.acknowledged, updated_at = excluded.updated_at",
            (consumer, mark, tx.now_us),
        )
        tx.event(None, "acknowledged", consumer=consumer, seq=mark)
    return int(mark)


def _check_name(name: str) -> None:
    if not CONSUMER.fullmatch(name):
        raise InvalidRequest("a consumer's name is 1 to 64 of A-Z a-z 0-9 _ . -", field="consumer")


ROUTES: Final = (
    Route(
        "GET",
        "/v1/completions",
        "What a consumer has not acknowledged (or what lies after `after`), in order.",
        pull,
        query=(
            Param("consumer", "whose position", default="default"),
            Param("limit", "at most so many rows", "integer", COMPLETIONS_BATCH_MAX, 1, LIST_ROWS_MAX),
            Param("wait_s", "wait so long for the first row", "number", 0.0, 0, WAIT_MAX_S),
            Param("after", "rows after this seq, whatever is acknowledged", "integer", None, 0, SEQ_MAX),
        ),
    ),
    Route("GET", "/v1/consumers", "Every consumer and how far it has come.", list_consumers),
    Route(
        "POST",
        "/v1/consumers/{name}/ack",
        "Acknowledge everything up to a seq; never moves back.",
        acknowledge,
        body={
            "type": "object",
            "required": ["seq"],
            "properties": {"seq": {"type": "integer", "minimum": 0}},
        },
    ),
)
