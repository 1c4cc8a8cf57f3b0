"""One journal transaction, as a unit sees it.

Invariants:
1. A unit writes through `execute`, and says what happened through `event`; both become durable together or not at all.
2. What a unit wants done in the world it hands to `after_commit`; it runs on the loop's thread once the commit is durable.
3. Events get their seq and hash in the order in which they were said; the chain covers every byte of an event.
4. Sums (`count_task`, `count_outbox`) move in the same transaction as what they count.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import msgspec

_encode = msgspec.json.Encoder().encode

_INSERT_EVENT: Final = "INSERT INTO events (seq, at, task, event, data, hash) VALUES (?, ?, ?, ?, ?, ?)"
# Many in one statement: a statement for each would hand the interpreter's lock to and fro for each.
_INSERT_EVENTS: Final = (
    "INSERT INTO events (seq, at, task, event, data, hash) SELECT ?1 + key, ?2, json_extract(value, '$[0]'),"
    " json_extract(value, '$[1]'), json_extract(value, '$[2]'), substr(?3, 1 + 32 * key, 32) FROM json_each(?4)"
)
_ADD_TASK_COUNT: Final = (
    "INSERT INTO task_counts (queue, state, result, n) VALUES (?, ?, ?, ?)"
    " ON CONFLICT DO UPDATE SET n = n + excluded.n"
)
_ADD_OUTBOX_COUNT: Final = (
    "INSERT INTO outbox_counts (sink, state, n) VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n"
)
_ACTIVE_COUNTS: Final = (
    "SELECT queue, count(*) FROM tasks WHERE state IN ('running', 'stopping') GROUP BY queue"
)
_ACTIVE_STATES: Final = frozenset({"running", "stopping"})
_GENESIS: Final = bytes(32)
_MANY_EVENTS: Final = 4
_PARKED: Final = frozenset({"held", "dropped"})


def event_hash(previous: bytes, seq: int, at: int, task: str | None, event: str, data: str) -> bytes:
    """The link of the chain. Lengths are part of what is hashed, so that no two events read alike."""
    text = f"{seq}\x00{at}\x00{task or ''}\x00{event}\x00{data}"
    return hashlib.sha256(previous + text.encode("utf-8", "surrogatepass")).digest()


class Numbers:
    """The next seq of each numbered table, the head of the event chain, and how many tasks of each queue are running or
    stopping: moved by commits only."""

    __slots__ = ("active", "entry", "event", "head", "task")

    def __init__(self, task: int, entry: int, event: int, head: bytes, active: dict[str, int]) -> None:
        self.task, self.entry, self.event, self.head, self.active = task, entry, event, head, active

    def copy(self) -> Numbers:
        return Numbers(self.task, self.entry, self.event, self.head, self.active.copy())

    @classmethod
    def load(cls, connection: sqlite3.Connection) -> Numbers:
        kept = dict(
            connection.execute(
                "SELECT key, value FROM meta WHERE key IN ('task_seq','entry_seq','event_seq','chain_checkpoint_seq')"
            )
        )

        def newest(table: str, key: str) -> int:
            row = connection.execute(f"SELECT max(seq) FROM {table}").fetchone()  # noqa: S608 - a fixed name
            return max(int(row[0] or 0), int(kept.get(key, 0)))

        row = connection.execute("SELECT hash FROM events ORDER BY seq DESC LIMIT 1").fetchone()
        checkpoint = connection.execute(
            "SELECT value FROM meta WHERE key = 'chain_checkpoint_hash'"
        ).fetchone()
        head = bytes(row[0]) if row else bytes(checkpoint[0]) if checkpoint else _GENESIS
        event = max(newest("events", "event_seq"), int(kept.get("chain_checkpoint_seq", 0)))
        active = {queue: int(n) for queue, n in connection.execute(_ACTIVE_COUNTS)}
        return cls(newest("tasks", "task_seq"), newest("entries", "entry_seq"), event, head, active)


class Transaction:
    """Handed to every unit. Not to be kept beyond the unit."""

    __slots__ = (
        "_after",
        "_events",
        "_later",
        "_outbox_counts",
        "_task_counts",
        "connection",
        "earliest_wake",
        "execute",
        "fresh_rows",
        "now_us",
        "numbers",
        "preparations",
    )

    def __init__(self, connection: sqlite3.Connection, numbers: Numbers, now_us: int) -> None:
        self.connection = connection
        self.execute = connection.execute
        self.now_us = now_us
        self.numbers = numbers
        self._events: list[tuple[str | None, str, str]] = []
        self._task_counts: list[tuple[str, str, str, int]] = []
        self._outbox_counts: list[tuple[str, str, int]] = []
        self._after: list[Callable[[], None]] = []
        self._later: list[Callable[[], None]] = []
        self.preparations: list[Callable[[], None]] = []
        self.earliest_wake: int | None = None  # the earliest wake_at that this transaction has set

        self.fresh_rows: list[
            tuple[str, Any]
        ] = []  # (sink, outbox.DueRow) of new entries: saves their sinks a read

    def will_wake(self, at_us: int | None) -> None:
        """A waiting task is to be looked at again at this time."""
        if at_us is not None and (self.earliest_wake is None or at_us < self.earliest_wake):
            self.earliest_wake = at_us

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        self.connection.executemany(sql, rows)

    def one(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        """The first row as a tuple, or None."""
        return self.execute(sql, parameters).fetchone()

    def next_task_seq(self) -> int:
        self.numbers.task += 1
        return self.numbers.task

    def next_entry_seq(self) -> int:
        self.numbers.entry += 1
        return self.numbers.entry

    def event(self, task: str | None, event: str, **data: Any) -> None:
        """Record what happened. `data` is small, JSON-able, and never holds a prompt, a secret or an environment."""
        self._events.append((task, event, _encode(data).decode() if data else "{}"))

    def event_json(self, task: str | None, event: str, data: str) -> None:
        """The same with data that is JSON already (the hot path of intake)."""
        self._events.append((task, event, data))

    def count_task(self, queue: str, state: str, result: str | None, change: int) -> None:
        self._task_counts.append((queue, state, result or "", change))
        if state in _ACTIVE_STATES:
            active = self.numbers.active
            active[queue] = active.get(queue, 0) + change

    def count_outbox(self, sink: str, state: str, change: int) -> None:
        self._outbox_counts.append((sink, state, change))

    def after_commit(self, action: Callable[[], None]) -> None:
        self._after.append(action)

    def before_durable(self, action: Callable[[], None]) -> None:
        """Done on the loop's thread while the commit is under way: for preparations that a failed commit makes void."""
        self.preparations.append(action)

    def later(self, action: Callable[[], None]) -> None:
        """The same, once everything urgent is done (log lines, wake-ups of waiting clients)."""
        self._later.append(action)

    def queues_made_ready(self) -> set[str]:
        """The queues into which this transaction has put a task that may start."""
        return {queue for queue, state, _, change in self._task_counts if state == "queued" and change > 0}

    def sinks_made_pending(self) -> dict[str, int]:
        """How many rows to send this transaction has given to each sink, new ones (`fresh_rows`) and others."""
        given: dict[str, int] = {}
        for sink, state, change in self._outbox_counts:
            if state == "pending" and change > 0:
                given[sink] = given.get(sink, 0) + change
        return given

    def sinks_parked(self) -> set[str]:
        """The sinks of which this transaction has held or dropped rows."""
        return {sink for sink, state, change in self._outbox_counts if state in _PARKED and change > 0}

    # The journal's side.

    def mark(self) -> tuple[int, int, int, int, int, int, Numbers]:
        return (
            len(self._events),
            len(self._task_counts),
            len(self._outbox_counts),
            len(self._after),
            len(self._later),
            len(self.fresh_rows),
            self.numbers.copy(),
        )

    def return_to(self, mark: tuple[int, int, int, int, int, int, Numbers]) -> None:
        """Forget what a failed unit said (its rows are rolled back to its savepoint)."""
        del self._events[mark[0] :]
        del self._task_counts[mark[1] :]
        del self._outbox_counts[mark[2] :]
        del self._after[mark[3] :]
        del self._later[mark[4] :]
        del self.fresh_rows[mark[5] :]
        self.numbers = mark[6]

    def flush(self) -> tuple[list[Callable[[], None]], list[Callable[[], None]]]:
        """Write events and sums; called once, last before COMMIT. Returns what is to be done after it, at once and later."""
        numbers, at = self.numbers, self.now_us
        head, first = numbers.head, numbers.event + 1
        hashes = []
        for seq, (task, event, data) in enumerate(self._events, first):
            head = event_hash(head, seq, at, task, event, data)
            hashes.append(head)
        numbers.event, numbers.head = numbers.event + len(hashes), head
        if len(hashes) < _MANY_EVENTS:
            rows = zip(self._events, hashes, strict=True)
            each = [(seq, at, *event, link) for seq, (event, link) in enumerate(rows, first)]
            self.connection.executemany(_INSERT_EVENT, each)
        else:
            events = _encode(self._events).decode()
            self.connection.execute(_INSERT_EVENTS, (first, at, b"".join(hashes), events))
        counted: tuple[tuple[str, list[Any]], ...] = (
            (_ADD_TASK_COUNT, self._task_counts),
            (_ADD_OUTBOX_COUNT, self._outbox_counts),
        )
        for sql, changes in counted:
            sums: Counter[Any] = Counter()
            for change in changes:
                sums[change[:-1]] += change[-1]
            moved = [(*key, n) for key, n in sums.items() if n]
            if moved:
                self.connection.executemany(sql, moved)
        return self._after, self._later
