"""`POST /v1/tasks`: the second door. Answered only once the task is durable."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any, Final

from aiohttp import web

from agentqd.control.room import Room
from agentqd.control.route import Call, Route, answer
from agentqd.core.errors import AgentqError, InvalidTask, RefusedForNow
from agentqd.core.lifecycle import WAITING_STATES
from agentqd.core.limits import KIB
from agentqd.loops.admission import Accepted, Duplicate, Outcome, admit
from agentqd.loops.preparing import Candidate, prepare
from agentqd.storage.transaction import Transaction

_SMALL_BYTES: Final = 64 * KIB
_SOURCE: Final = {"kind": "socket"}
_WAITING: Final = ",".join(f"'{state.value}'" for state in sorted(WAITING_STATES))
_COUNT_WAITING: Final = (
    f"SELECT coalesce(sum(n), 0) FROM task_counts WHERE queue = ? AND state IN ({_WAITING})"  # noqa: S608 - fixed names
)


async def submit(call: Call) -> web.StreamResponse:
    room = call.room
    raw = await call.request.read()
    _check_size(room, raw)
    candidate = await _prepare(room, raw)
    async with _turn(room, candidate.new.queue):
        outcome = await room.box.journal.commit(lambda tx: _decide(tx, room, candidate))
    if isinstance(outcome, AgentqError):  # invalid, id_conflict, write_conflict
        raise outcome
    fresh = isinstance(outcome, Accepted)
    if fresh:
        room.box.log.info("task_accepted", task=outcome.task_id, state=outcome.state.value, door="socket")
    said = {
        "task_id": outcome.task_id,
        "state": outcome.state.value,
        "result": outcome.result if isinstance(outcome, Duplicate) else None,
        "duplicate": not fresh,
        "where": "accepted",
    }
    return answer(said, 201 if fresh else 200)


def _check_size(room: Room, raw: bytes) -> None:
    limits = room.box.settings.limits
    most = int(limits.prompt_bytes_max) + int(limits.line_bytes_max)
    if len(raw) > most:
        raise InvalidTask(
            f"the task has {len(raw)} bytes; the limit (limits.prompt_bytes_max + limits.line_bytes_max) is {most}",
            code="task_too_large",
        )


async def _prepare(room: Room, raw: bytes) -> Candidate:
    """What is small is checked at once; what is large, or reads a file, does not hold up the loop."""
    place = os.urandom(16)
    if len(raw) <= _SMALL_BYTES and b"prompt_ref" not in raw:
        return prepare(raw, _SOURCE, place, room.box)
    return await asyncio.to_thread(prepare, raw, _SOURCE, place, room.box)


@contextlib.asynccontextmanager
async def _turn(room: Room, queue: str) -> AsyncIterator[None]:
    """A queue with a limit takes one submit a commit: the sums that the limit is held against move with commits."""
    if _waiting_max(room, queue) is None:
        yield
        return
    async with room.one_at_a_time.setdefault(queue, asyncio.Lock()):
        yield


def _waiting_max(room: Room, queue: str) -> int | None:
    options = room.box.settings.queues.get(queue)
    return None if options is None else options.waiting_max


def _decide(tx: Transaction, room: Room, candidate: Candidate) -> Outcome:
    """A unit. A replay is told of its first even while nothing new is taken. Raises RefusedForNow.

    Admission's own refusals are values here: what it has recorded of them (a write conflict seen) is kept.
    """
    outcome = admit(tx, room.box, [candidate])[0]
    if isinstance(outcome, Accepted):
        refusal = _refusal(tx, room, candidate.new.queue)
        if refusal is not None:
            raise refusal  # the unit's changes are undone
    return outcome


def _refusal(tx: Transaction, room: Room, queue: str) -> RefusedForNow | None:
    if room.box.draining:
        return RefusedForNow(
            "this agentqd is draining and takes nothing new; try later, or another box", reason="draining"
        )
    if room.box.disk_low:
        text = "the disk of this box is nearly full (limits.disk_free_min): nothing new is taken until there is space"
        return RefusedForNow(text, reason="disk_low")
    most = _waiting_max(room, queue)
    if most is not None and tx.one(_COUNT_WAITING, (queue,))[0] >= most:
        text = f"queue {queue} is full: {most} tasks wait (queues.{queue}.waiting_max); try later"
        return RefusedForNow(text, reason="queue_full", queue=queue)
    return None


_BODY: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["task"],
    "description": "the task object, as a line of the queue file",
}
ROUTES: Final = (
    Route(
        "POST",
        "/v1/tasks",
        "Submit one task; answered once it is durable. The same id again is a duplicate of the first.",
        submit,
        body=_BODY,
        status=201,
        more_statuses={
            200: "duplicate",
            409: "id_conflict, write_conflict",
            422: "invalid_task and its kinds",
            503: "refused_for_now",
        },
    ),
)
