"""Tasks and attempts in the journal. Every change of a task's state goes through `insert_task` or `move_task`.

SQL is named at the top; functions take a Transaction (writing) or a Connection (reading).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from agentqd.core.lifecycle import Event, Result, State, next_state
from agentqd.storage.transaction import Transaction

_COLUMNS: Final = (
    "seq, id, name, queue, runner, priority, state, result, reason, detail, run, attempt, run_attempts, submitted_at,"
    " accepted_at, run_at, started_at, finished_at, wake_at, content, source"
)
_SELECT: Final = f"SELECT {_COLUMNS} FROM tasks"  # noqa: S608 - fixed names
_BY_SEQ: Final = f"{_SELECT} WHERE seq = ?"
_BY_ID: Final = f"{_SELECT} WHERE id = ?"
_INSERT: Final = (
    "INSERT INTO tasks (seq, id, name, queue, runner, priority, state, result, reason, detail, run, attempt, run_attempts,"
    " submitted_at, accepted_at, run_at, started_at, finished_at, wake_at, content, source, spec, prompt)"
    " VALUES (?,?,?,?,?,?,?,?,?,?,1,0,0,?,?,?,NULL,?,?,?,?,?,?)"
)
_SPEC: Final = "SELECT spec, prompt FROM tasks WHERE seq = ?"
_HEAD: Final = f"{_SELECT} WHERE queue = ? AND state = 'queued' ORDER BY priority DESC, seq LIMIT ?"
_READY_RUNNERS: Final = (
    "SELECT runner FROM tasks WHERE queue = ? AND state = 'queued' AND runner > ? ORDER BY runner LIMIT 1"
)
_HEAD_OF: Final = (
    f"{_SELECT} WHERE queue = ? AND runner = ? AND state = 'queued' ORDER BY priority DESC, seq LIMIT ?"
)
_ACTIVE: Final = f"{_SELECT} WHERE state IN ('running', 'stopping')"
_ACTIVE_COUNTS: Final = (
    "SELECT queue, count(*) FROM tasks WHERE state IN ('running', 'stopping') GROUP BY queue"
)
_DUE: Final = f"{_SELECT} WHERE wake_at IS NOT NULL AND wake_at <= ? ORDER BY wake_at LIMIT ?"
_NEXT_WAKE: Final = "SELECT min(wake_at) FROM tasks WHERE wake_at IS NOT NULL"
_INSERT_ATTEMPT: Final = "INSERT INTO attempts (task_seq, attempt, run, epoch, instance, boot_id, claimed_at) VALUES (?,?,?,?,?,?,?)"
_ATTEMPT: Final = "SELECT * FROM attempts WHERE task_seq = ? AND attempt = ?"
_ATTEMPTS: Final = "SELECT * FROM attempts WHERE task_seq = ? ORDER BY attempt"


class TaskRow(msgspec.Struct, frozen=True):
    """One row of `tasks` without its big columns (spec, prompt)."""

    seq: int
    id: str
    name: str
    queue: str
    runner: str
    priority: int
    state: State
    result: str | None
    reason: str | None
    detail: str | None
    run: int
    attempt: int
    run_attempts: int
    submitted_at: str | None
    accepted_at: int
    run_at: int
    started_at: int | None
    finished_at: int | None
    wake_at: int | None
    content: bytes
    source: str


class NewTask(msgspec.Struct):
    """What admission has decided about one task."""

    id: str
    name: str
    queue: str
    runner: str
    priority: int
    event: Event  # ACCEPTED, ACCEPTED_FOR_LATER, ACCEPTED_BLOCKED or REFUSED
    reason: str | None
    submitted_at: str | None
    wake_at: int | None
    content: bytes
    source: str
    spec: bytes
    prompt: bytes | None = None
    detail: str | None = None


class AttemptRow(msgspec.Struct, frozen=True):
    task_seq: int
    attempt: int
    run: int
    epoch: int
    instance: str
    boot_id: str
    claimed_at: int
    pid: int | None
    pid_start: int | None
    started_at: int | None
    ended_at: int | None
    intent: str | None
    exit_code: int | None
    signal: int | None
    result: str | None
    reason: str | None
    evidence: str | None


class StaleState(AssertionError):
    """A guarded transition found another state than it expected: a bug, or a second writer. Nothing was changed."""


def _row(row: tuple[Any, ...]) -> TaskRow:
    values: list[Any] = list(row)
    values[6] = State(values[6])
    return TaskRow(*values)


def find(source: Transaction | sqlite3.Connection, task_id: str) -> TaskRow | None:
    row = source.execute(_BY_ID, (task_id,)).fetchone()
    return _row(row) if row else None


def get(source: Transaction | sqlite3.Connection, seq: int) -> TaskRow:
    """Raises AssertionError if there is none."""
    row = source.execute(_BY_SEQ, (seq,)).fetchone()
    assert row is not None, f"no task with seq {seq}"
    return _row(row)


def find_many(source: Transaction | sqlite3.Connection, ids: Sequence[str]) -> dict[str, TaskRow]:
    """The tasks among `ids` that exist, by id."""
    found: dict[str, TaskRow] = {}
    for start in range(0, len(ids), 500):
        part = ids[start : start + 500]
        marks = ",".join("?" * len(part))
        for row in source.execute(f"{_SELECT} WHERE id IN ({marks})", part):
            found[row[1]] = _row(row)
    return found


def known_seqs(source: Transaction | sqlite3.Connection, seqs: Iterable[int]) -> set[int]:
    """Those of a task that exists."""
    known = source.execute(
        "SELECT seq FROM tasks WHERE seq IN (SELECT value FROM json_each(?))", (str(list(seqs)),)
    )
    return {seq for (seq,) in known}


def spec_of(source: Transaction | sqlite3.Connection, seq: int) -> tuple[bytes, bytes | None]:
    """The task as written, and a prompt_ref's content."""
    row = source.execute(_SPEC, (seq,)).fetchone()
    assert row is not None, f"no task with seq {seq}"
    return bytes(row[0]), None if row[1] is None else bytes(row[1])


def insert_tasks(tx: Transaction, tasks: Iterable[NewTask]) -> list[int]:
    """Insert and say so in the chain; returns their seqs, in order."""
    rows, seqs, now = [], [], tx.now_us
    for task in tasks:
        seq = tx.next_task_seq()
        seqs.append(seq)
        state = next_state(State.NEW, task.event)
        refused = state is State.FINISHED
        result = Result.REFUSED.value if refused else None
        rows.append(
            (seq, task.id, task.name, task.queue, task.runner, task.priority, state.value, result, task.reason, task.detail,
             task.submitted_at, now, now, now if refused else None, task.wake_at, task.content, task.source, task.spec, task.prompt)
        )  # fmt: skip
        tx.count_task(task.queue, state.value, result, 1)
        tx.will_wake(task.wake_at)
        tx.event_json(task.id, task.event.value, task.source)
    tx.executemany(_INSERT, rows)
    return seqs


def move_task(
    tx: Transaction, task: TaskRow, event: Event, /, said: dict[str, Any] | None = None, **columns: Any
) -> TaskRow:
    """Take `event` by the state table, guarded by the state that `task` shows. Returns the new row.

    `columns` are changed with it; `said` goes into the event. Raises IllegalTransition (nothing changed).
    """
    state = next_state(task.state, event)
    if state is not State.FINISHED:
        columns.setdefault("result", None)
    result = columns["result"]
    assert (state is State.FINISHED) == (result is not None), "result exists exactly when finished"
    names = ", ".join(f"{name} = ?" for name in columns)
    done = tx.execute(
        f"UPDATE tasks SET state = ?, {names} WHERE seq = ? AND state = ?",  # noqa: S608 - fixed names
        (state.value, *columns.values(), task.seq, task.state.value),
    )
    if done.rowcount != 1:
        raise StaleState(f"task {task.id} is no longer {task.state.value}: {event.value} changes nothing")
    tx.count_task(task.queue, task.state.value, task.result, -1)
    tx.count_task(task.queue, state.value, result, 1)
    tx.will_wake(columns.get("wake_at"))
    tx.event(task.id, event.value, **(said or {}))
    return msgspec.structs.replace(task, state=state, **{k: v for k, v in columns.items() if k not in _BIG})


_BIG: Final = frozenset({"spec", "prompt"})


def heads(source: Transaction | sqlite3.Connection, queue: str, limit: int) -> list[TaskRow]:
    """The next ready tasks of a queue: highest priority first, then the oldest."""
    return [_row(row) for row in source.execute(_HEAD, (queue, limit))]


def heads_of_open(
    source: Transaction | sqlite3.Connection, queue: str, limit: int, closed: frozenset[str]
) -> list[TaskRow]:
    """The same without the tasks of `closed` runners, however many of those stand before: an index seek a runner."""
    found: list[TaskRow] = []
    runner = ""
    while (row := source.execute(_READY_RUNNERS, (queue, runner)).fetchone()) is not None:
        runner = row[0]
        if runner not in closed:
            found += [_row(head) for head in source.execute(_HEAD_OF, (queue, runner, limit))]
    return sorted(found, key=lambda task: (-task.priority, task.seq))[:limit]


def active_counts(source: Transaction | sqlite3.Connection) -> dict[str, int]:
    return dict(source.execute(_ACTIVE_COUNTS).fetchall())


def active(source: Transaction | sqlite3.Connection) -> list[TaskRow]:
    return [_row(row) for row in source.execute(_ACTIVE)]


def due(source: Transaction, now_us: int, limit: int) -> list[TaskRow]:
    return [_row(row) for row in source.execute(_DUE, (now_us, limit))]


def set_wake(tx: Transaction, seq: int, at_us: int | None) -> None:
    tx.execute("UPDATE tasks SET wake_at = ? WHERE seq = ?", (at_us, seq))
    tx.will_wake(at_us)


def next_wake(source: Transaction | sqlite3.Connection) -> int | None:
    row = source.execute(_NEXT_WAKE).fetchone()
    return None if row is None or row[0] is None else int(row[0])


def insert_attempt(tx: Transaction, task: TaskRow, epoch: int, instance: str, boot_id: str) -> None:
    tx.execute(_INSERT_ATTEMPT, (task.seq, task.attempt, task.run, epoch, instance, boot_id, tx.now_us))


def attempt_of(source: Transaction | sqlite3.Connection, seq: int, attempt: int) -> AttemptRow:
    row = source.execute(_ATTEMPT, (seq, attempt)).fetchone()
    assert row is not None, f"no attempt {attempt} of task {seq}"
    return AttemptRow(*row)


def attempts_of(source: Transaction | sqlite3.Connection, seq: int) -> list[AttemptRow]:
    return [AttemptRow(*row) for row in source.execute(_ATTEMPTS, (seq,))]


def update_attempt(tx: Transaction, seq: int, attempt: int, **columns: Any) -> None:
    names = ", ".join(f"{name} = ?" for name in columns)
    done = tx.execute(
        f"UPDATE attempts SET {names} WHERE task_seq = ? AND attempt = ?",  # noqa: S608 - fixed names
        (*columns.values(), seq, attempt),
    )
    assert done.rowcount == 1, f"no attempt {attempt} of task {seq}"
