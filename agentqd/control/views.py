"""The objects of docs/api.md, made from rows. Pure: what is known only in memory is handed in."""

from __future__ import annotations

import signal
import sqlite3
from typing import Any, Final

import msgspec

from agentqd.control.queries import Written
from agentqd.control.reasons import SeenWaiting, waiting_for
from agentqd.control.room import Room
from agentqd.core.lifecycle import ACTIVE_STATES
from agentqd.core.resolve import Resolved, resolve
from agentqd.core.routing import COMPLETIONS, REJECTED
from agentqd.core.task import TaskRequest
from agentqd.core.units import encode_unit, format_time
from agentqd.core.waking import total_deadline_us
from agentqd.storage.tasks import AttemptRow, TaskRow

US: Final = 1_000_000


def task_summary(
    room: Room, task: TaskRow, written: Written, seen: SeenWaiting, pid: int | None
) -> dict[str, Any]:
    """A task as lists show it. `reason` of a waiting task: what stands in its row, else why it waits."""
    waiting = waiting_for(room, task, written, seen)
    live = room.parts.supervision.live.get(task.id) if task.state in ACTIVE_STATES else None
    running = live.running if live is not None and live.task.attempt == task.attempt else None
    return {
        "id": task.id,
        "task": task.name,
        "queue": task.queue,
        "runner": task.runner,
        "state": task.state.value,
        "result": task.result,
        "reason": task.reason or (waiting["reason"] if waiting is not None else None),
        "detail": task.detail,
        "run": task.run,
        "priority": task.priority,
        "labels": written.labels or [],
        "submitted_at": task.submitted_at or format_time(task.accepted_at),
        "accepted_at": format_time(task.accepted_at),
        "started_at": format_time(running.started_at if running is not None else task.started_at),
        "finished_at": format_time(task.finished_at),
        "waiting_for": waiting,
        "source": msgspec.json.decode(task.source),
        "folder": f"{room.box.folders.tasks}/{task.id}",
        "attempt": task.attempt,
        "pid": running.pid if running is not None else pid,
    }


def attempt_view(room: Room, task: TaskRow, request: TaskRequest, attempt: AttemptRow) -> dict[str, Any]:
    """One attempt; of one that runs, also what only the daemon's memory and the files know."""
    live = room.parts.supervision.live.get(task.id)
    running = live.running if live is not None and live.task.attempt == attempt.attempt else None
    started = attempt.started_at or (running.started_at if running is not None else None)
    evidence = msgspec.json.decode(attempt.evidence) if attempt.evidence else {}
    until = attempt.ended_at or room.box.clock.now_us()
    is_running = attempt.ended_at is None and task.attempt == attempt.attempt and task.state in ACTIVE_STATES
    deadline = deadline_us(room, task, request, started) if is_running else None
    return {
        "attempt": attempt.attempt,
        "run": attempt.run,
        "pid": attempt.pid or (running.pid if running is not None else None),
        "started_at": format_time(started),
        "ended_at": format_time(attempt.ended_at),
        "exit_code": attempt.exit_code,
        "signal": attempt.signal,
        "result": attempt.result,
        "reason": attempt.reason,
        "folder": room.box.folders.attempt(task.id, attempt.attempt),
        "duration_s": round(max(0, until - started) / US, 3) if started is not None else None,
        "stdout_bytes": evidence.get("stdout_bytes"),
        "stderr_bytes": evidence.get("stderr_bytes"),
        "deadline_at": format_time(deadline),
        "left_behind": evidence.get("left_behind", []),
        "evidence": evidence,
    }


def deadline_us(room: Room, task: TaskRow, request: TaskRequest, started_us: int | None) -> int | None:
    """When a running attempt is ended at the latest, by the newest settings."""
    resolved = resolve(request, task.queue, task.runner, room.box.settings)
    total = total_deadline_us(resolved, task.run_at)
    run = None if started_us is None else started_us + int(resolved.run_timeout_s * US)
    return min((at for at in (run, total) if at is not None), default=None)


def declared_view(request: TaskRequest) -> dict[str, Any]:
    """What the task itself says of its order and its places, as it was written; no prompt, no env."""
    return {
        "writes_to": request.writes_to or [],
        "after": request.after_list(),
        "after_policy": request.after_policy,
        "not_before": request.not_before,
        "expires_at": request.expires_at,
    }


def settings_view(resolved: Resolved) -> dict[str, Any]:
    """What holds for a task now: its own word, else the config's."""
    view: dict[str, Any] = msgspec.to_builtins(resolved, enc_hook=encode_unit)
    number = resolved.warning_signal
    view["warning_signal"] = None if number is None else signal.Signals(number).name
    return view


ROW_COLUMNS: Final = (
    "o.entry_seq, o.sink, o.state, o.attempts, o.created_at, o.due_at, o.delivered_at, o.last_error,"
    " e.delivery_id, e.type, e.kind, e.key, e.bytes, t.id, t.name, e.at"
)
ROW_TABLES: Final = "outbox o JOIN entries e ON e.seq = o.entry_seq LEFT JOIN tasks t ON t.seq = e.task_seq"


class OutboxRow(msgspec.Struct, frozen=True):
    """One row with what is shown of its entry and task."""

    entry_seq: int
    sink: str
    state: str
    attempts: int
    created_at: int
    due_at: int | None
    delivered_at: int | None
    last_error: str | None
    delivery_id: str
    type: str
    kind: str
    key: str
    bytes: int
    task_id: str | None
    name: str | None
    at: int  # when the entry was made

    @classmethod
    def fetch(cls, connection: sqlite3.Connection, where: str, values: tuple[Any, ...]) -> list[OutboxRow]:
        sql = f"SELECT {ROW_COLUMNS} FROM {ROW_TABLES} {where}"  # noqa: S608 - fixed clauses
        return [cls(*row) for row in connection.execute(sql, values)]


def shown_state(room: Room, entry_seq: int, sink: str, state: str) -> str:
    """`delivering` is known in memory only: a row that is in flight."""
    runner = room.parts.delivery.runners.get(sink)
    in_flight = runner is not None and entry_seq in runner.in_flight
    return "delivering" if in_flight and state in {"pending", "retryable"} else state


def in_config(room: Room, sink: str) -> bool:
    return sink in {COMPLETIONS, REJECTED} or sink in room.box.settings.sinks


def outbox_view(room: Room, row: OutboxRow) -> dict[str, Any]:
    return {
        "delivery_id": row.delivery_id,
        "type": row.type,
        "task_id": row.task_id,
        "name": row.name,
        "key": row.key,
        "sink": row.sink,
        "sink_in_config": in_config(room, row.sink),
        "entry_at": format_time(row.at),
        "state": shown_state(room, row.entry_seq, row.sink, row.state),
        "attempts": row.attempts,
        "created_at": format_time(row.created_at),
        "next_try_at": None if row.state == "held" else format_time(row.due_at),
        "delivered_at": format_time(row.delivered_at),
        "last_error": row.last_error,
        "bytes": row.bytes,
    }
