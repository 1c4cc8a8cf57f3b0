"""The outbox in the journal: entries (what is to be delivered, stored once) and rows (an entry on its way to one sink).

A row's state moves through core.outbox's table only, guarded by the state it is expected in.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Final

import msgspec

from agentqd.core.envelope import Kind
from agentqd.core.limits import ORDER_WINDOW, SIZE_MAX
from agentqd.core.outbox import RowEvent, RowState, next_row_state
from agentqd.storage.transaction import Transaction

_INSERT_ENTRY: Final = (
    "INSERT INTO entries (seq, delivery_id, task_seq, run, attempt, kind, key, type, at, bytes, sha256, payload, blob)"
    " VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)"
)
_INSERT_ROW: Final = "INSERT INTO outbox (entry_seq, sink, state, attempts, created_at, due_at, last_error) VALUES (?,?,?,0,?,?,?)"
_ROW: Final = "SELECT entry_seq, sink, state, attempts, created_at, due_at, delivered_at, position, last_error FROM outbox"
# Keys first (the index alone answers), then rows one by one: what is skipped is never loaded, and bytes can be bounded.
_DUE_KEYS: Final = (
    "SELECT entry_seq FROM outbox WHERE sink = ? AND state IN ('pending','delivering','retryable') AND due_at <= ?"
    " ORDER BY due_at, entry_seq"
)
_DUE_ROWS: Final = (  # json_each keeps its order, and the cross join the order of the tables
    "SELECT o.entry_seq, o.sink, o.state, o.attempts, o.created_at, e.delivery_id, e.type, e.kind, e.key, t.id,"
    " e.payload, e.blob, e.sha256, o.due_at, o.progress"
    " FROM json_each(?) j CROSS JOIN outbox o ON o.entry_seq = j.value AND o.sink = ?"
    " CROSS JOIN entries e ON e.seq = o.entry_seq LEFT JOIN tasks t ON t.seq = e.task_seq"
)
# By the primary key (the unary plus keeps other indexes out): the order of entries, a window at a time.
_ORDERED_KEYS: Final = (
    "SELECT entry_seq, due_at FROM outbox"
    " WHERE entry_seq >= ? AND entry_seq < ? AND +sink = ? AND +state IN ('pending','delivering','retryable') ORDER BY entry_seq LIMIT ?"
)
_FIRST_OPEN: Final = (
    "SELECT min(entry_seq) FROM outbox WHERE sink = ? AND state IN ('pending','delivering','retryable')"
)
_NEXT_DUE: Final = "SELECT min(due_at) FROM outbox WHERE sink = ? AND state IN ('pending','delivering','retryable') AND due_at > ?"
_OPEN_SINKS: Final = "SELECT DISTINCT sink FROM outbox WHERE state IN ('pending','delivering','retryable')"
# All marks of a commit in one statement: a statement for each would hand the interpreter's lock to and fro for each.
_MARK_COLUMNS: Final = ("seq", "sink", "was", "state", "attempts", "due", "delivered", "position", "error")
_WITH_MARKS: Final = (
    "WITH marks AS MATERIALIZED (SELECT "  # noqa: S608 - fixed names
    + ", ".join(f"json_extract(value, '$[{n}]') AS {name}" for n, name in enumerate(_MARK_COLUMNS))
    + " FROM json_each(?))"
)
_MOVED_MEANWHILE: Final = (
    _WITH_MARKS  # noqa: S608
    + " SELECT seq, sink FROM marks m WHERE NOT EXISTS (SELECT 1 FROM outbox o WHERE o.entry_seq = m.seq AND o.sink = m.sink AND o.state = m.was)"
)
_MARK: Final = (
    _WITH_MARKS  # noqa: S608
    + " UPDATE outbox SET state = m.state, attempts = m.attempts, due_at = m.due, delivered_at = m.delivered,"
    " position = m.position, last_error = m.error,"
    " progress = CASE WHEN m.state = 'delivered' THEN NULL ELSE progress END FROM marks m"
    " WHERE outbox.entry_seq = m.seq AND outbox.sink = m.sink AND outbox.state = m.was"
)
_KEEP_PROGRESS: Final = "UPDATE outbox SET progress = ? WHERE entry_seq = ? AND sink = ?"
_INSERT_TRY: Final = (
    "INSERT INTO tries (entry_seq, sink, n, at, outcome, reason)"
    " SELECT ?1, ?2, coalesce(max(n), 0) + 1, ?3, ?4, ?5 FROM tries WHERE entry_seq = ?1 AND sink = ?2"
)
_BLOBS_OF_TASK: Final = (
    "SELECT blob FROM entries WHERE task_seq = ?1 AND blob IS NOT NULL"
    " UNION SELECT a.blob FROM attachments a JOIN entries e ON e.seq = a.entry_seq WHERE e.task_seq = ?1"
)
_LAST_POSITION: Final = "SELECT max(position) FROM outbox WHERE sink = ? AND position IS NOT NULL"


class NewEntry(msgspec.Struct):
    """An entry to be written, with the sinks it goes to (none: kept and shown only)."""

    delivery_id: str
    task_seq: int | None
    run: int
    attempt: int
    kind: Kind
    key: str
    type: str
    payload: bytes
    sinks: Sequence[str]
    task_id: str | None = None
    blob: str | None = None
    attachments: Sequence[str] = ()  # further files in blobs/, kept as long as the entry
    dead_reason: str | None = None  # set aside at once: rows are `dead` with this reason
    dead_sinks: Mapping[str, str] = {}  # likewise, only the rows to these of `sinks`: why
    due_at: int | None = None


class DueRow(msgspec.Struct, frozen=True):
    entry_seq: int
    sink: str
    state: RowState
    attempts: int
    created_at: int
    delivery_id: str
    type: str
    kind: str
    key: str
    task_id: str | None
    payload: bytes
    blob: str | None
    sha256: bytes
    due_at: int
    progress: bytes | None = None  # what the sink wants to know again


class Mark(msgspec.Struct, frozen=True):
    """What became of one send."""

    entry_seq: int
    sink: str
    was: RowState  # the state in the journal
    event: RowEvent
    attempts: int  # after it
    due_at: int | None = None
    position: int | None = None
    error: str | None = None
    progress: bytes | None = None  # None: as it was; a delivered row forgets it


def entry_exists(source: Transaction | sqlite3.Connection, delivery_id: str) -> tuple[int, bytes] | None:
    """(seq, sha256 of the payload) of an entry already written, or None."""
    row = source.execute("SELECT seq, sha256 FROM entries WHERE delivery_id = ?", (delivery_id,)).fetchone()
    return None if row is None else (int(row[0]), bytes(row[1]))


def add_entry(tx: Transaction, entry: NewEntry) -> int:
    """Write an entry and its rows; returns its seq. The delivery id must be new."""
    seq = tx.next_entry_seq()
    digest = hashlib.sha256(entry.payload).digest()
    tx.execute(
        _INSERT_ENTRY,
        (seq, entry.delivery_id, entry.task_seq, entry.run, entry.attempt, entry.kind, entry.key, entry.type, tx.now_us,
         len(entry.payload), digest, entry.payload, entry.blob),
    )  # fmt: skip
    for path in dict.fromkeys(entry.attachments):
        tx.execute("INSERT INTO attachments (entry_seq, blob) VALUES (?, ?)", (seq, path))
    due_at = entry.due_at or tx.now_us
    for sink in entry.sinks:
        why = entry.dead_reason or entry.dead_sinks.get(sink)
        state = RowState.PENDING if why is None else RowState.DEAD
        tx.execute(_INSERT_ROW, (seq, sink, state.value, tx.now_us, due_at if why is None else None, why))
        tx.count_outbox(sink, state.value, 1)
        if why is None:
            tx.fresh_rows.append((sink, _fresh(tx, entry, seq, sink, digest, due_at)))
    return seq


def _fresh(tx: Transaction, entry: NewEntry, seq: int, sink: str, digest: bytes, due_at: int) -> DueRow:
    return DueRow(seq, sink, RowState.PENDING, 0, tx.now_us, entry.delivery_id, entry.type, entry.kind, entry.key, entry.task_id,
                  entry.payload, entry.blob, digest, due_at)  # fmt: skip


def blobs_of_task(source: sqlite3.Connection | Transaction, task_seq: int) -> list[str]:
    """The files in blobs/ that its entries name."""
    return [path for (path,) in source.execute(_BLOBS_OF_TASK, (task_seq,))]


def all_blobs(source: sqlite3.Connection) -> set[str]:
    """The names in blobs/ that any entry has, wherever the state folder was when it was taken (two indexes answer)."""
    sql = "SELECT blob FROM entries WHERE blob IS NOT NULL UNION SELECT blob FROM attachments"
    return {os.path.basename(path) for (path,) in source.execute(sql)}


def add_row(tx: Transaction, entry_seq: int, sink: str) -> None:
    """One more sink for an entry that exists."""
    tx.execute(_INSERT_ROW, (entry_seq, sink, RowState.PENDING.value, tx.now_us, tx.now_us, None))
    tx.count_outbox(sink, RowState.PENDING.value, 1)


def due(
    source: sqlite3.Connection | Transaction,
    sink: str,
    now_us: int,
    limit: int,
    skip: Collection[int] = (),
    bytes_max: int = SIZE_MAX,
) -> list[DueRow]:
    """Rows whose time has come, the longest due first; with their payloads, at least one and then at most `bytes_max` of them."""
    cursor = source.execute(_DUE_KEYS, (sink, now_us))
    seqs = list(islice((seq for (seq,) in cursor if seq not in skip), limit))
    cursor.close()
    return _load(source, sink, seqs, bytes_max)


def next_in_order(
    source: sqlite3.Connection | Transaction,
    sink: str,
    now_us: int,
    limit: int,
    floor: int,
    skip: Collection[int],
    bytes_max: int,
) -> tuple[list[DueRow], int, int | None]:
    """For a sink that keeps order: the open rows that may go next, the new floor, and when the first that may not is due.

    No row below `floor` is open. A row that waits for its retry ends what may go.
    """
    keys = source.execute(_ORDERED_KEYS, (floor, floor + ORDER_WINDOW, sink, limit + len(skip))).fetchall()
    if not keys:
        first = source.execute(_FIRST_OPEN, (sink,)).fetchone()[0]
        if first is None:
            return [], floor, None
        keys = source.execute(
            _ORDERED_KEYS, (first, first + ORDER_WINDOW, sink, limit + len(skip))
        ).fetchall()
    seqs: list[int] = []
    later: int | None = None
    for seq, due_at in keys:
        if seq in skip:
            continue
        if due_at is not None and due_at > now_us:
            later = due_at
            break
        seqs.append(seq)
    return _load(source, sink, seqs[:limit], bytes_max), keys[0][0] if keys else floor, later


def _load(
    source: sqlite3.Connection | Transaction, sink: str, seqs: Sequence[int], bytes_max: int
) -> list[DueRow]:
    """In the order of `seqs`, which the index has given: each row is read once, at least one, and then at most `bytes_max` of payload."""
    rows: list[DueRow] = []
    size = 0
    cursor = source.execute(_DUE_ROWS, (str(list(seqs)), sink))
    for r in cursor:  # a row at a time: what would be too much is never read
        size += len(r[10])
        if rows and size > bytes_max:
            break
        rows.append(DueRow(r[0], r[1], RowState(r[2]), *r[3:]))
    cursor.close()
    return rows


def next_due(source: sqlite3.Connection | Transaction, sink: str, after_us: int) -> int | None:
    row = source.execute(_NEXT_DUE, (sink, after_us)).fetchone()
    return None if row is None or row[0] is None else int(row[0])


def open_sinks(source: sqlite3.Connection | Transaction) -> set[str]:
    return {row[0] for row in source.execute(_OPEN_SINKS)}


def mark(tx: Transaction, marks: Iterable[Mark]) -> list[Mark]:
    """Record outcomes. A row that has moved meanwhile (a person dropped it) is left as it is and not returned."""
    items = list(marks)
    rows = []
    for item in items:
        state = next_row_state(RowState.DELIVERING, item.event)
        delivered_at = tx.now_us if state is RowState.DELIVERED else None
        rows.append((item.entry_seq, item.sink, item.was.value, state.value, item.attempts, item.due_at, delivered_at,
                     item.position, item.error))  # fmt: skip
    encoded = (msgspec.json.encode(rows).decode(),)
    gone = set(
        tx.execute(_MOVED_MEANWHILE, encoded)
    )  # not RETURNING: a row of an answer costs a turn at the lock
    tx.execute(_MARK, encoded)
    done = []
    for item, row in zip(items, rows, strict=True):
        if (item.entry_seq, item.sink) not in gone:
            tx.count_outbox(item.sink, row[2], -1)
            tx.count_outbox(item.sink, row[3], 1)
            done.append(item)
            if item.progress is not None and row[3] != RowState.DELIVERED.value:
                tx.execute(_KEEP_PROGRESS, (item.progress, item.entry_seq, item.sink))
    return done


def record_try(
    tx: Transaction, entry_seq: int, sink: str, outcome: str, reason: str | None, at_us: int | None = None
) -> None:
    """One more, after all before it: those from before a person's `retry` stay."""
    tx.execute(_INSERT_TRY, (entry_seq, sink, at_us or tx.now_us, outcome, reason))


def change_row(tx: Transaction, entry_seq: int, sink: str, event: RowEvent, **columns: Any) -> RowState:
    """A person's word on one row (retry, hold, release, drop). Raises IllegalTransition."""
    row = tx.one("SELECT state FROM outbox WHERE entry_seq = ? AND sink = ?", (entry_seq, sink))
    assert row is not None, f"no outbox row {entry_seq} {sink}"
    was = RowState(row[0])
    state = next_row_state(was, event)
    names = "".join(f", {name} = ?" for name in columns)
    tx.execute(
        f"UPDATE outbox SET state = ?{names} WHERE entry_seq = ? AND sink = ? AND state = ?",  # noqa: S608 - fixed names
        (state.value, *columns.values(), entry_seq, sink, was.value),
    )
    tx.count_outbox(sink, was.value, -1)
    tx.count_outbox(sink, state.value, 1)
    return state


def last_position(source: sqlite3.Connection | Transaction, sink: str) -> int:
    """The highest position that the journal knows for an append sink (retention keeps it in meta)."""
    row = source.execute(_LAST_POSITION, (sink,)).fetchone()
    kept = source.execute("SELECT value FROM meta WHERE key = ?", (f"position:{sink}",)).fetchone()
    return max(int(row[0] or 0), int(kept[0]) if kept else 0)
