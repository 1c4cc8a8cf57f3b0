"""`POST /v1/tasks`: the second door. Answered only once the task is durable.

With `spooled=KEY` nobody waits for the answer (a laptop's spool is being flushed): a refusal is recorded as that of a line
of the queue file is, and answered too. KEY names the spooled entry: sent twice, it is recorded once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, NamedTuple

from aiohttp import web

from agentqd.control.queries import conflicts_met
from agentqd.control.room import Room
from agentqd.control.route import Call, Param, Route, answer
from agentqd.core.errors import AgentqError, InvalidRequest, InvalidTask, RefusedForNow
from agentqd.core.lifecycle import WAITING_STATES, Result, State
from agentqd.core.limits import KIB
from agentqd.loops.admission import Accepted, Duplicate, admit
from agentqd.loops.preparing import Candidate, prepare
from agentqd.loops.rejection import Rejected, reject
from agentqd.storage import tasks as store
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction

_SMALL_BYTES: Final = 64 * KIB
_SOURCE: Final = {"kind": "socket"}
_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_WAITING: Final = ",".join(f"'{state.value}'" for state in sorted(WAITING_STATES))
_COUNT_WAITING: Final = (
    f"SELECT coalesce(sum(n), 0) FROM task_counts WHERE queue = ? AND state IN ({_WAITING})"  # noqa: S608 - fixed names
)


class Settled(NamedTuple):
    """What became of a task; the rest of one that has ended."""

    outcome: Accepted | Duplicate
    result: str | None
    reason: str | None
    detail: str | None
    conflicts: Sequence[dict[str, str]] = ()


async def submit(call: Call) -> web.StreamResponse:
    room = call.room
    raw = await call.request.read()
    key: str | None = call.query["spooled"]
    if key is None:
        return _said(room, await _submit(room, raw, _SOURCE))
    source = _spool_source(key)
    try:
        return _said(room, await _submit(room, raw, source))
    except InvalidTask as wrong:
        told = wrong
    most = int(room.box.settings.limits.line_bytes_max)
    place = f"spool:{key}:{hashlib.sha256(raw).hexdigest()[:16]}"
    at = Rejected(place, "from a laptop's spool", raw[:most], too_long=len(raw) > most)
    await room.box.journal.commit(lambda tx: reject(tx, room.box, at, told))
    raise told


def _spool_source(key: str) -> dict[str, Any]:
    if not _KEY.fullmatch(key):
        raise InvalidRequest("spooled: a key has 1 to 64 of a-z, A-Z, 0-9, _, -", field="spooled")
    return {"kind": "spool", "entry": key}


async def _submit(room: Room, raw: bytes, source: dict[str, Any]) -> Settled:
    """Raises InvalidTask, IdConflict, WriteConflict, RefusedForNow."""
    _check_size(room, raw)
    candidate = await _prepare(room, raw, source)
    async with _turn(room, candidate.new.queue):
        settled = await room.box.journal.commit(lambda tx: _decide(tx, room, candidate))
    if isinstance(settled, AgentqError):  # invalid, id_conflict, write_conflict
        raise settled
    return settled


def _said(room: Room, settled: Settled) -> web.Response:
    outcome = settled.outcome
    fresh = isinstance(outcome, Accepted)
    if fresh:
        room.box.log.info("task_accepted", task=outcome.task_id, state=outcome.state.value, door="socket")
    said: dict[str, Any] = {
        "task_id": outcome.task_id,
        "state": outcome.state.value,
        "result": settled.result,
        "duplicate": not fresh,
        "where": "accepted",
    }
    if settled.result == Result.REFUSED:
        said |= {"reason": settled.reason, "message": settled.detail}
        if settled.conflicts:
            said["conflicts"] = settled.conflicts
    return answer(said, 201 if fresh else 200)


def _check_size(room: Room, raw: bytes) -> None:
    limits = room.box.settings.limits
    most = int(limits.prompt_bytes_max) + int(limits.line_bytes_max)
    if len(raw) > most:
        raise InvalidTask(
            f"the task has {len(raw)} bytes; the limit (limits.prompt_bytes_max + limits.line_bytes_max) is {most}",
            code="task_too_large",
        )


async def _prepare(room: Room, raw: bytes, source: dict[str, Any]) -> Candidate:
    """What is small is checked at once; what is large, or reads a file, does not hold up the loop."""
    place = os.urandom(16)
    if len(raw) <= _SMALL_BYTES and b"prompt_ref" not in raw:
        return prepare(raw, source, place, room.box)
    return await asyncio.to_thread(prepare, raw, source, place, room.box)


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


def _decide(tx: Transaction, room: Room, candidate: Candidate) -> Settled | AgentqError:
    """A unit. A replay is told of its first even while nothing new is taken. Raises RefusedForNow.

    Admission's own refusals are values here: what it has recorded of them (a write conflict seen) is kept.
    """
    before = _refused_before(tx, candidate)
    if before is not None:
        return before
    outcome = admit(tx, room.box, [candidate])[0]
    if isinstance(outcome, AgentqError):
        return outcome
    if isinstance(outcome, Duplicate):
        return Settled(outcome, outcome.result, None, None)
    refusal = _refusal(tx, room, candidate.new.queue)
    if refusal is not None:
        raise refusal  # the unit's changes are undone
    task = store.get(tx, outcome.seq) if outcome.state is State.FINISHED else None
    return Settled(outcome, None, None, None) if task is None else _settled(tx, outcome, task)


def _settled(tx: Transaction, outcome: Accepted | Duplicate, task: TaskRow) -> Settled:
    return Settled(outcome, task.result, task.reason, task.detail, conflicts_met(tx, task))


def _refused_before(tx: Transaction, candidate: Candidate) -> Settled | None:
    """The very entry that was refused before, whose answer was lost: not refused again, and not let in by now either.
    (Another one with this id is new: the id of a refused task is free again.)"""
    task = store.find(tx, candidate.new.id) if b"spool" in candidate.new.source.encode() else None
    if task is None or task.result != Result.REFUSED or task.source != candidate.new.source:
        return None
    return _settled(tx, Duplicate(task.id, task.state, task.result), task)


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


_QUERY: Final = (
    Param(
        "spooled",
        "Nobody waits: a refusal is recorded (a task that has finished, refused; or a rejection). The spooled entry's key.",
    ),
)
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
        query=_QUERY,
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
