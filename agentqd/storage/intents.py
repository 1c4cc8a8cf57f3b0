"""The write-intent registry in the journal: one interface, so that a fleet may keep it elsewhere one day."""

from __future__ import annotations

import sqlite3
from typing import Final

import msgspec

from agentqd.core.intents import overlap
from agentqd.storage.transaction import Transaction

_CLAIMS: Final = "SELECT i.task_seq, i.path, t.id, t.name FROM intents i JOIN tasks t ON t.seq = i.task_seq ORDER BY i.task_seq"
_INSERT: Final = "INSERT OR IGNORE INTO intents (task_seq, path, given, policy, claimed_at, expires_at) VALUES (?,?,?,?,?,NULL)"
_INSERT_CONFLICT: Final = (
    "INSERT INTO conflicts (at, task_id, name, path, other_id, other_path, policy) VALUES (?,?,?,?,?,?,?)"
)


class Conflict(msgspec.Struct, frozen=True):
    """`path` of the newcomer overlaps `other_path`, which the task `task_id` has claimed."""

    path: str
    task_seq: int
    task_id: str
    task: str
    other_path: str

    def as_json(self) -> dict[str, str]:
        return {"task_id": self.task_id, "task": self.task, "path": self.other_path}


def conflicts_of(
    source: Transaction | sqlite3.Connection,
    paths: list[str],
    related: set[str],
    before_seq: int | None = None,
) -> list[Conflict]:
    """Claims that overlap `paths`, oldest first; not those of `related` tasks, nor of tasks from `before_seq` on."""
    found = []
    for seq, claimed, task_id, name in source.execute(_CLAIMS):
        if (before_seq is not None and seq >= before_seq) or task_id in related:
            continue
        found += [Conflict(path, seq, task_id, name, claimed) for path in paths if overlap(path, claimed)]
    return found


def claim(tx: Transaction, task_seq: int, paths: list[tuple[str, str]], policy: str) -> None:
    """All of a task's paths at once. `paths`: (resolved, as given)."""
    tx.executemany(_INSERT, [(task_seq, path, given, policy, tx.now_us) for path, given in paths])


def paths_of(source: Transaction | sqlite3.Connection, task_seq: int) -> list[str]:
    return [row[0] for row in source.execute("SELECT path FROM intents WHERE task_seq = ?", (task_seq,))]


def release(tx: Transaction, task_seq: int) -> int:
    """Let go of everything that a task has claimed; how many paths that were."""
    return tx.execute("DELETE FROM intents WHERE task_seq = ?", (task_seq,)).rowcount


def record_conflicts(
    tx: Transaction, task_id: str | None, name: str, conflicts: list[Conflict], policy: str
) -> None:
    rows = [
        (tx.now_us, task_id, name, each.path, each.task_id, each.other_path, policy) for each in conflicts
    ]
    tx.executemany(_INSERT_CONFLICT, rows)
