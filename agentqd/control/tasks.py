"""One task: shown whole, and a person's word on it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any, Final, get_args

import msgspec
from aiohttp import web

from agentqd.control import queries
from agentqd.control.logs import size_of
from agentqd.control.queries import Written
from agentqd.control.reasons import Looker, SeenWaiting
from agentqd.control.room import Room
from agentqd.control.route import Call, Handler, Route, answer, known_fields
from agentqd.control.tasklist import pid_of
from agentqd.control.views import (
    OutboxRow,
    attempt_view,
    declared_view,
    outbox_view,
    settings_view,
    task_summary,
)
from agentqd.core.errors import InvalidRequest, NoSuchTask
from agentqd.core.lifecycle import State
from agentqd.core.limits import LIST_ROWS_MAX
from agentqd.core.resolve import resolve
from agentqd.core.settings import Conflict
from agentqd.core.task import TASK_ID, read_task
from agentqd.core.units import format_time
from agentqd.loops import operations
from agentqd.storage import runner_limits
from agentqd.storage import tasks as store
from agentqd.storage.tasks import AttemptRow, TaskRow
from agentqd.storage.transaction import Transaction

EVENTS_SHOWN_MAX: Final = 1000
_NO_BODY: Final[dict[str, Any]] = {"type": "object", "properties": {}}
_POLICIES: Final = get_args(Conflict)
_RETRY_BODY: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"on_conflict": {"enum": list(_POLICIES)}},
}
_MISSING: Final = {404: "no_such_task"}
_OF_TASK: Final = "WHERE e.task_seq = ? ORDER BY e.seq, o.sink LIMIT ?"


class Shown(msgspec.Struct):
    """Everything that the journal knows of one task."""

    task: TaskRow
    spec: bytes
    waiting: SeenWaiting
    pid: int | None
    attempts: list[AttemptRow]
    rows: list[OutboxRow]
    events: list[tuple[int, int, str, str]]
    conflicts: list[dict[str, str]]


def task_id_of(call: Call) -> str:
    """The id in the path. Raises NoSuchTask for what can be no id."""
    task_id = call.part("id")
    if not TASK_ID.fullmatch(task_id):
        raise no_such_task(task_id)
    return task_id


def no_such_task(task_id: str) -> NoSuchTask:
    return NoSuchTask(f"there is no task {task_id[:80]!r}", id=task_id[:80])


def _read_shown(room: Room, connection: sqlite3.Connection, task_id: str) -> Shown | None:
    task = store.find(connection, task_id)
    if task is None:
        return None
    events = connection.execute(queries.EVENTS_OF, (task.id, EVENTS_SHOWN_MAX)).fetchall()
    return Shown(
        task=task,
        spec=store.spec_of(connection, task.seq)[0],
        waiting=Looker(room, connection).look(task),
        pid=pid_of(connection, task),
        attempts=store.attempts_of(connection, task.seq),
        rows=OutboxRow.fetch(connection, _OF_TASK, (task.seq, LIST_ROWS_MAX)),
        events=events[::-1],
        conflicts=queries.conflicts_met(connection, task),
    )


async def show_task(call: Call) -> web.StreamResponse:
    room, task_id = call.room, task_id_of(call)
    shown = await room.box.journal.read(lambda c: _read_shown(room, c, task_id))
    if shown is None:
        raise no_such_task(task_id)
    task, request = shown.task, read_task(shown.spec)
    written = Written(request.labels, request.not_before, request.prompt_ref)
    view = task_summary(room, task, written, shown.waiting, shown.pid)
    view["attempts"] = [_with_sizes(attempt_view(room, task, request, attempt)) for attempt in shown.attempts]
    view["outbox"] = [outbox_view(room, row) for row in shown.rows]
    view["events"] = [
        {"seq": seq, "at": format_time(at), "event": event, "data": msgspec.json.decode(data)}
        for seq, at, event, data in shown.events
    ]
    view["conflicts"] = shown.conflicts
    view["declared"] = declared_view(request)
    view["settings"] = settings_view(resolve(request, task.queue, task.runner, room.box.settings))
    return answer(view)


def _with_sizes(attempt: dict[str, Any]) -> dict[str, Any]:
    """How much an attempt has written so far, where its end has not said it yet."""
    for stream in ("stdout", "stderr"):
        if attempt[f"{stream}_bytes"] is None and attempt["ended_at"] is None:
            attempt[f"{stream}_bytes"] = size_of(attempt["folder"], stream)
    return attempt


Unit = Callable[[Transaction, Room, str], TaskRow]
Asked = Callable[[dict[str, Any]], Unit]  # from the body of the request


def _cancel(tx: Transaction, room: Room, task_id: str) -> TaskRow:
    return operations.cancel(tx, room.box, room.parts.supervision, task_id)


def _hold(tx: Transaction, room: Room, task_id: str) -> TaskRow:  # noqa: ARG001 - one signature for all
    return operations.hold(tx, task_id)


def _release(tx: Transaction, room: Room, task_id: str) -> TaskRow:
    return operations.release(tx, room.box, task_id)


def _as_asked(unit: Unit) -> Asked:
    """A verb that takes nothing but the id."""

    def asked(body: dict[str, Any]) -> Unit:
        known_fields(body, ())
        return unit

    return asked


def _retry(body: dict[str, Any]) -> Unit:
    """Raises InvalidRequest."""
    known_fields(body, ("on_conflict",))
    policy = body.get("on_conflict")
    if policy is not None and policy not in _POLICIES:
        raise InvalidRequest(f"on_conflict is one of {', '.join(_POLICIES)}", field="on_conflict")
    return lambda tx, room, task_id: operations.retry(tx, room.box, task_id, policy)


def _action(asked: Asked, *, says_run: bool = False) -> Handler:
    async def handler(call: Call) -> web.StreamResponse:
        unit = asked(await call.body())
        room, task_id = call.room, task_id_of(call)

        def acted(tx: Transaction) -> tuple[TaskRow, str | None]:
            """And the runner whose usage limit this has lifted, for all of its tasks."""
            before = runner_limits.closed(tx, tx.now_us)
            task = unit(tx, room, task_id)
            return task, task.runner if task.runner in before - runner_limits.closed(tx, tx.now_us) else None

        task, opened = await room.box.journal.commit(acted)
        room.box.task_changed(task_id)
        said: dict[str, Any] = {"id": task.id, "state": task.state.value, "result": task.result}
        if opened is not None:
            said["runner_opened"] = opened
        if says_run:
            said["run"] = task.run
            if task.state is State.BLOCKED:
                said |= {"reason": task.reason, "message": task.detail}
        return answer(said)

    return handler


def _route(verb: str, summary: str, handler: Handler, body: dict[str, Any] = _NO_BODY) -> Route:
    more = {**_MISSING, 409: "illegal_transition"}
    return Route("POST", f"/v1/tasks/{{id}}/{verb}", summary, handler, body=body, more_statuses=more)


ROUTES: Final = (
    Route(
        "GET",
        "/v1/tasks/{id}",
        "One task, from its line to its deliveries.",
        show_task,
        more_statuses=_MISSING,
    ),
    _route("cancel", "End a task; a running worker is ended first.", _action(_as_asked(_cancel))),
    _route("hold", "Keep a waiting task from starting.", _action(_as_asked(_hold))),
    _route("release", "Undo a hold, or end a backoff.", _action(_as_asked(_release))),
    _route(
        "retry",
        "A new run of a finished task; of one that backs off, its next attempt now.",
        _action(_retry, says_run=True),
        _RETRY_BODY,
    ),
)
