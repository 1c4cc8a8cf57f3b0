"""What the control socket reads of the journal. Nothing here walks all tasks or all rows in one go.

Every query is served by an index or by a bounded window of sequence numbers (tests/control/test_query_plans.py holds it).
Functions take the reading connection.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from agentqd.core.lifecycle import State
from agentqd.loops.claiming import WRITE_CONFLICT
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction

ALERTS_SEEN_MAX: Final = 1000
PRIORITIES_SEEN_MAX: Final = 64
OLDEST_SEEN_MAX: Final = 500
ACTIVE_SEEN_MAX: Final = 1000
LIMITED_SEEN_MAX: Final = 1000
DEAD_SEEN_MAX: Final = 1000
DELIVERED_SEEN_MAX: Final = 100_000  # of the newest entries, for one sink at a time

TASK_COLUMNS: Final = (
    "seq, id, name, queue, runner, priority, state, result, reason, detail, run, attempt, run_attempts, submitted_at,"
    " accepted_at, run_at, started_at, finished_at, wake_at, content, source"
)
_TASKS: Final = f"SELECT {TASK_COLUMNS} FROM tasks"  # noqa: S608 - fixed names

RESULT_OF_RUN: Final = (
    "SELECT payload FROM entries WHERE task_seq = ? AND run = ? AND kind = 'result' LIMIT 1"
)
LOST_IN_RUN: Final = "SELECT count(*) FROM attempts WHERE task_seq = ? AND run = ? AND result = 'lost'"
TASK_COUNTS: Final = "SELECT queue, state, result, n FROM task_counts WHERE n <> 0"
OUTBOX_COUNTS: Final = "SELECT sink, state, n FROM outbox_counts WHERE n <> 0"
ACTIVE_BY_QUEUE: Final = (
    "SELECT queue, count(*) FROM tasks WHERE state IN ('running','stopping') GROUP BY queue"
)
ACTIVE: Final = f"{_TASKS} WHERE state IN ('running','stopping') AND seq < ? ORDER BY seq DESC LIMIT ?"
NEXT_PRIORITY: Final = "SELECT priority FROM tasks WHERE state = 'queued' AND queue = ? AND priority > ? ORDER BY priority LIMIT 1"
OLDEST_READY: Final = (
    "SELECT run_at FROM tasks WHERE state = 'queued' AND queue = ? AND priority = ? ORDER BY seq LIMIT 1"
)
NEWEST_READY: Final = (
    f"{_TASKS} WHERE state = 'queued' AND queue = ? AND priority = ? AND seq < ? ORDER BY seq DESC LIMIT ?"
)
AHEAD_BY_PRIORITY: Final = (
    "SELECT count(*) FROM (SELECT 1 FROM tasks WHERE state = 'queued' AND queue = ? AND priority > ? LIMIT ?)"
)
AHEAD_BY_AGE: Final = "SELECT count(*) FROM (SELECT 1 FROM tasks WHERE state = 'queued' AND queue = ? AND priority = ? AND seq < ? LIMIT ?)"
DEPENDS_ON: Final = (
    "SELECT t.id, t.state, t.result FROM dependencies d JOIN tasks t ON t.seq = d.on_seq WHERE d.task_seq = ?"
)
REASONS_BLOCKED: Final = (
    "SELECT queue, reason, count(*) FROM"
    " (SELECT queue, reason FROM tasks WHERE state = 'blocked' AND state IN ('blocked', 'held', 'retryable')"
    " AND queue > ? LIMIT ?) GROUP BY queue, reason"  # the index's own condition: else SQLite does not take it
)
REASONS_HELD: Final = REASONS_BLOCKED.replace("state = 'blocked'", "state = 'held'")
REASONS_RETRYABLE: Final = REASONS_BLOCKED.replace("state = 'blocked'", "state = 'retryable'")
READY_OF_RUNNER: Final = (
    "SELECT count(*) FROM (SELECT 1 FROM tasks WHERE state = 'queued' AND queue = ? AND runner = ? LIMIT ?)"
)
LIMITED_RETRYABLE: Final = (
    "SELECT id FROM (SELECT id, runner FROM tasks WHERE state = 'retryable' AND state IN ('blocked', 'held', 'retryable')"
    " AND queue > '' AND reason = 'usage_limit' LIMIT ?) WHERE runner = ? LIMIT 1"
)
LIMITED_READY: Final = "SELECT id FROM tasks WHERE state = 'queued' AND queue = ? AND runner = ? ORDER BY priority DESC, seq LIMIT 1"
PAUSED: Final = "SELECT queue, at FROM paused_queues"
SPEC: Final = "SELECT spec FROM tasks WHERE seq = ?"
ALERTS: Final = "SELECT type, at, delivery_id, payload FROM entries WHERE kind = 'alert' AND at >= ? ORDER BY at DESC LIMIT ?"
TASK_NOW: Final = "SELECT state, result, attempt FROM tasks WHERE id = ?"
ROW_NOW: Final = "SELECT o.state FROM entries e JOIN outbox o ON o.entry_seq = e.seq WHERE e.delivery_id = ? AND o.sink = ?"
NEWEST_DEAD: Final = (
    "SELECT o.sink, o.last_error, e.kind, e.delivery_id, e.key, t.id FROM outbox o JOIN entries e ON e.seq = o.entry_seq"
    " LEFT JOIN tasks t ON t.seq = e.task_seq"
    " WHERE o.state IN ('held','dead') AND o.state = 'dead' ORDER BY o.entry_seq DESC LIMIT ?"  # the index's own condition
)
DEAD_SINCE: Final = (  # the newest word about each: its last try, or that it was set aside
    "SELECT o.sink, max(o.created_at,"
    " coalesce((SELECT max(t.at) FROM tries t WHERE t.entry_seq = o.entry_seq AND t.sink = o.sink), 0)) FROM outbox o"
    " WHERE o.state IN ('held','dead') AND o.state = 'dead' ORDER BY o.entry_seq DESC LIMIT ?"
)
NEWEST_ENTRY: Final = "SELECT max(seq) FROM entries"
DELIVERED_SINCE: Final = "SELECT 1 FROM outbox WHERE entry_seq > ? AND +sink = ? AND +state = 'delivered' AND delivered_at > ? LIMIT 1"
OLDEST_OPEN: Final = (
    "SELECT min(created_at) FROM (SELECT created_at FROM outbox"
    " WHERE sink = ? AND state IN ('pending','delivering','retryable') AND due_at IS NOT NULL ORDER BY due_at LIMIT ?)"
)
STOP_BEGUN: Final = "SELECT at FROM events WHERE task = ? AND event = 'stop_begun' ORDER BY seq DESC LIMIT 1"
LAST_POSITION: Final = "SELECT max(position) FROM outbox WHERE sink = 'completions' AND position IS NOT NULL"
COMPLETIONS: Final = (
    "SELECT o.position, e.type, e.kind, e.delivery_id, e.payload FROM outbox o JOIN entries e ON e.seq = o.entry_seq"
    " WHERE o.sink = 'completions' AND o.position > ? ORDER BY o.position LIMIT ?"
)
RESULT_OF_ATTEMPT: Final = "SELECT payload FROM entries WHERE task_seq = ? AND kind = 'result' AND attempt = ? ORDER BY seq DESC LIMIT 1"
LARGE_ENTRIES_OF_ATTEMPT: Final = (
    "SELECT delivery_id, payload FROM entries"
    " WHERE task_seq = ? AND attempt = ? AND kind = 'entry' AND blob IS NOT NULL ORDER BY seq LIMIT ?"
)
LARGE_ENTRY: Final = (
    "SELECT delivery_id, payload FROM entries"
    " WHERE delivery_id = ? AND task_seq = ? AND attempt = ? AND kind = 'entry' AND blob IS NOT NULL"
)
CONSUMERS: Final = "SELECT name, acknowledged, updated_at FROM consumers ORDER BY name"
CONSUMER: Final = "SELECT acknowledged FROM consumers WHERE name = ?"
EVENTS: Final = "SELECT seq, at, task, event, data, hash FROM events WHERE seq > ? ORDER BY seq LIMIT ?"
EVENTS_OF: Final = "SELECT seq, at, event, data FROM events WHERE task = ? ORDER BY seq DESC LIMIT ?"
LAST_EVENT: Final = "SELECT seq, at FROM events ORDER BY seq DESC LIMIT 1"
CLAIMS: Final = (
    "SELECT i.task_seq, i.path, i.given, i.policy, i.claimed_at, t.id, t.name, t.state, t.reason FROM intents i"
    " JOIN tasks t ON t.seq = i.task_seq WHERE i.expires_at IS NULL ORDER BY i.path LIMIT ?"
)
CONFLICTS: Final = (
    "SELECT c.path, c.task_id, c.name, c.other_id, t.name, c.policy, count(*), min(c.at), max(c.at)"
    " FROM (SELECT * FROM conflicts ORDER BY seq DESC LIMIT ?) c LEFT JOIN tasks t ON t.id = c.other_id WHERE c.at >= ?"
    " GROUP BY c.path, coalesce(c.task_id, c.name), c.other_id, c.policy ORDER BY max(c.at) DESC"
)
CLAIM_COUNTS: Final = (
    "SELECT (SELECT count(*) FROM (SELECT 1 FROM intents WHERE task_seq > 0 LIMIT ?)),"
    " (SELECT count(*) FROM intents WHERE task_seq < 0),"
    " (SELECT count(*) FROM (SELECT 1 FROM tasks INDEXED BY tasks_write_blocked"
    "  WHERE seq > 0 AND state = 'blocked' AND reason = 'write_conflict' LIMIT ?)),"
    " (SELECT count(*) FROM outside_claims WHERE held_at IS NULL),"
    " (SELECT run_at FROM tasks INDEXED BY tasks_write_blocked"
    "  WHERE seq > 0 AND state = 'blocked' AND reason = 'write_conflict' ORDER BY seq LIMIT 1),"
    " (SELECT min(asked_at) FROM outside_claims WHERE held_at IS NULL)"
)
CONFLICT_COUNTS: Final = "SELECT policy, n FROM conflict_counts ORDER BY policy"
SOURCES: Final = "SELECT name, dev, ino, offset, role FROM sources"


def waits_for_limit(connection: sqlite3.Connection, runner: str, queues: Iterable[str]) -> str | None:
    """The id of a task that waits for the usage limit of a runner: one that met it, else one that is ready in `queues`."""
    row = connection.execute(LIMITED_RETRYABLE, (LIMITED_SEEN_MAX, runner)).fetchone()
    for queue in sorted(queues) if row is None else ():
        row = row or connection.execute(LIMITED_READY, (queue, runner)).fetchone()
    return None if row is None else str(row[0])


class Counts(NamedTuple):
    """The sums that the journal keeps beside its tables."""

    tasks: list[tuple[str, str, str, int]]  # queue, state, result (or ''), n
    outbox: list[tuple[str, str, int]]  # sink, state, n


class AlertRow(NamedTuple):
    type: str
    sink: str | None
    at: int
    delivery_id: str
    data: dict[str, Any]


class AlertSeen(msgspec.Struct, frozen=True):
    """Alerts of one type about one sink (or about none): the newest, and how many."""

    type: str
    sink: str | None
    at: int
    delivery_id: str
    count: int
    data: dict[str, Any]


class SetAside(NamedTuple):
    """A handed-over entry that cannot be sent to anybody: one, however many sinks it was for."""

    delivery_id: str
    key: str
    task_id: str | None
    reason: str


class DeadSeen(NamedTuple):
    """What the newest dead rows say."""

    reasons: dict[str, str | None]  # by sink: why the newest of its rows gave up
    aside: list[SetAside]  # newest first
    aside_rows: dict[str, int]  # by sink: its dead rows that are of these


class Written(msgspec.Struct, frozen=True):
    """What lists show of a task as it was written."""

    labels: list[str] | None = None
    not_before: str | None = None
    prompt_ref: str | None = None


class _Envelope(msgspec.Struct, frozen=True):
    data: dict[str, Any] = {}


_decode_written: Final = msgspec.json.Decoder(Written).decode
_decode_envelope: Final = msgspec.json.Decoder(_Envelope).decode


def task_row(row: Sequence[Any]) -> TaskRow:
    values: list[Any] = list(row)
    values[6] = State(values[6])
    return TaskRow(*values)


def counts(connection: sqlite3.Connection) -> Counts:
    return Counts(connection.execute(TASK_COUNTS).fetchall(), connection.execute(OUTBOX_COUNTS).fetchall())


def active_by_queue(connection: sqlite3.Connection) -> dict[str, int]:
    return dict(connection.execute(ACTIVE_BY_QUEUE).fetchall())


def active(connection: sqlite3.Connection, before: int, limit: int) -> list[TaskRow]:
    return [task_row(row) for row in connection.execute(ACTIVE, (before, limit))]


def priorities(connection: sqlite3.Connection, queue: str) -> list[int]:
    """The priorities that ready tasks of a queue have, lowest first; one index seek each, at most so many."""
    found: list[int] = []
    last = -(2**62)
    while len(found) <= PRIORITIES_SEEN_MAX:
        row = connection.execute(NEXT_PRIORITY, (queue, last)).fetchone()
        if row is None:
            break
        last = row[0]
        found.append(last)
    return found


def oldest_ready(connection: sqlite3.Connection, queue: str) -> int | None:
    """When the oldest ready task of a queue was accepted (by the lowest priorities first, where there are very many)."""
    rows = [
        connection.execute(OLDEST_READY, (queue, priority)).fetchone()
        for priority in priorities(connection, queue)
    ]
    return min((row[0] for row in rows if row is not None), default=None)


def newest_ready(
    connection: sqlite3.Connection, queues: Sequence[str], before: int, limit: int
) -> list[TaskRow] | None:
    """The newest ready tasks of these queues; None where there are too many priorities to look at each."""
    rows: list[TaskRow] = []
    for queue in queues:
        found = priorities(connection, queue)
        if len(found) > PRIORITIES_SEEN_MAX:
            return None
        for priority in found:
            rows += [
                task_row(row) for row in connection.execute(NEWEST_READY, (queue, priority, before, limit))
            ]
    return sorted(rows, key=lambda row: -row.seq)[:limit]


def written(connection: sqlite3.Connection, seq: int) -> Written:
    row = connection.execute(SPEC, (seq,)).fetchone()
    return _decode_written(row[0]) if row is not None else Written()


def alerts_since(connection: sqlite3.Connection, since_us: int) -> list[AlertRow]:
    """The alerts since then, newest first; of very many only the newest."""
    found = []
    for type_, at, entry_id, payload in connection.execute(ALERTS, (since_us, ALERTS_SEEN_MAX)):
        data = _decode_envelope(payload).data if payload is not None else {}
        sink = data.get("sink")
        found.append(AlertRow(type_, sink if isinstance(sink, str) else None, at, entry_id, data))
    return found


def dead_seen(connection: sqlite3.Connection) -> DeadSeen:
    """Why rows are dead; of very many only the newest are looked at."""
    reasons: dict[str, str | None] = {}
    aside: dict[str, SetAside] = {}
    rows: dict[str, int] = {}
    for sink, reason, kind, entry_id, key, task_id in connection.execute(NEWEST_DEAD, (DEAD_SEEN_MAX,)):
        if kind == "broken":
            aside.setdefault(entry_id, SetAside(entry_id, key, task_id, reason or ""))
            rows[sink] = rows.get(sink, 0) + 1
        else:
            reasons.setdefault(sink, reason)
    return DeadSeen(reasons, list(aside.values()), rows)


def revived(connection: sqlite3.Connection) -> set[str]:
    """The sinks with dead rows to which something was delivered since the newest of those died. Of very many entries only the
    newest are looked at: a sink that is not among them is not known to work."""
    died: dict[str, int] = {}
    for sink, at in connection.execute(DEAD_SINCE, (DEAD_SEEN_MAX,)):
        died[sink] = max(at, died.get(sink, 0))
    floor = (connection.execute(NEWEST_ENTRY).fetchone()[0] or 0) - DELIVERED_SEEN_MAX
    return {
        sink
        for sink, at in died.items()
        if connection.execute(DELIVERED_SINCE, (floor, sink, at)).fetchone() is not None
    }


def oldest_open(connection: sqlite3.Connection, sink: str) -> int | None:
    """Since when the longest waiting row of a sink waits; of very many, among those that are due first."""
    row = connection.execute(OLDEST_OPEN, (sink, OLDEST_SEEN_MAX)).fetchone()
    return None if row is None or row[0] is None else int(row[0])


def last_position(connection: sqlite3.Connection) -> int:
    """The highest seq that was ever given in the completion queue."""
    row = connection.execute(LAST_POSITION).fetchone()
    kept = connection.execute("SELECT value FROM meta WHERE key = 'position:completions'").fetchone()
    return max(int(row[0] or 0), int(kept[0]) if kept else 0)


def acknowledged(connection: sqlite3.Connection, consumer: str) -> int:
    row = connection.execute(CONSUMER, (consumer,)).fetchone()
    return 0 if row is None else int(row[0])


def conflicts_met(source: sqlite3.Connection | Transaction, task: TaskRow) -> list[dict[str, str]]:
    """Whose claims a refused task has met, as its result tells them."""
    if task.state is not State.FINISHED or task.reason != WRITE_CONFLICT:
        return []
    row = source.execute(RESULT_OF_RUN, (task.seq, task.run)).fetchone()
    found: list[dict[str, str]] = (
        [] if row is None else msgspec.json.decode(row[0])["data"].get("conflicts", [])
    )
    return found
