"""Write claims of processes outside of any task, in the journal beside the tasks' own (`intents`).

Their place among the tasks: a claim is younger than every task with a seq up to its `after_seq`, and older than all others.
Whoever waits, waits for older claims only; so tasks and outside claims together cannot wait in a circle.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

import msgspec

from agentqd.core.intents import overlap
from agentqd.core.settings import Conflict as Policy
from agentqd.storage.intents import Conflict
from agentqd.storage.transaction import Transaction

Source = Transaction | sqlite3.Connection
_COLUMNS: Final = "seq, id, name, uid, user, pid, pid_start, boot_id, policy, after_seq, asked_at, held_at"
_ALL: Final = f"SELECT {_COLUMNS} FROM outside_claims ORDER BY seq"  # noqa: S608 - fixed names
_BY_ID: Final = f"SELECT {_COLUMNS} FROM outside_claims WHERE id = ?"  # noqa: S608 - fixed names
_PATHS: Final = (
    "SELECT c.seq, c.id, c.name, c.after_seq, c.held_at, p.path FROM outside_claims c"
    " JOIN outside_paths p ON p.claim_seq = c.seq ORDER BY c.seq, p.path"
)
_INSERT: Final = (
    "INSERT INTO outside_claims (id, name, uid, user, pid, pid_start, boot_id, policy, after_seq, asked_at, held_at)"
    " VALUES (?,?,?,?,?,?,?,?,?,?,?)"
)


class Holder(msgspec.Struct, frozen=True):
    """The process that a claim is tied to."""

    uid: int
    user: str
    pid: int
    pid_start: int
    boot_id: str


class OutsideClaim(msgspec.Struct, frozen=True):
    seq: int
    id: str
    name: str
    holder: Holder
    policy: Policy
    after_seq: int
    asked_at: int
    held_at: int | None

    @property
    def held(self) -> bool:
        return self.held_at is not None


def is_outside(conflict: Conflict) -> bool:
    """Is it an outside claim, not a task, that stands in the way?"""
    return conflict.task_seq < 0


def all_claims(source: Source) -> list[OutsideClaim]:
    """Oldest first."""
    return [_claim(row) for row in source.execute(_ALL).fetchall()]


def find(source: Source, claim_id: str) -> OutsideClaim | None:
    row = source.execute(_BY_ID, (claim_id,)).fetchone()
    return None if row is None else _claim(row)


def paths_of(source: Source, seq: int) -> list[tuple[str, str]]:
    """(resolved, as given)."""
    sql = "SELECT path, given FROM outside_paths WHERE claim_seq = ? ORDER BY path"
    return [(path, given) for path, given in source.execute(sql, (seq,))]


def count(source: Source, uid: int) -> tuple[int, int]:
    """(all, this user's)."""
    total, own = source.execute(
        "SELECT count(*), count(uid = ? OR NULL) FROM outside_claims", (uid,)
    ).fetchone()
    return int(total), int(own)


def add(
    tx: Transaction,
    claim_id: str,
    name: str,
    holder: Holder,
    policy: Policy,
    paths: list[tuple[str, str]],
    *,
    held: bool,
) -> OutsideClaim:
    """All of its paths at once; younger than every task that there is."""
    at = tx.now_us if held else None
    values = (claim_id, name, holder.uid, holder.user, holder.pid, holder.pid_start, holder.boot_id)
    seq = tx.execute(_INSERT, (*values, policy, tx.numbers.task, tx.now_us, at)).lastrowid
    assert seq is not None
    tx.executemany(
        "INSERT OR IGNORE INTO outside_paths VALUES (?,?,?)", [(seq, path, given) for path, given in paths]
    )
    return OutsideClaim(seq, claim_id, name, holder, policy, tx.numbers.task, tx.now_us, at)


def set_held(tx: Transaction, seq: int) -> None:
    tx.execute("UPDATE outside_claims SET held_at = ? WHERE seq = ?", (tx.now_us, seq))


def remove(tx: Transaction, seq: int) -> bool:
    """False: it was gone already."""
    tx.execute("DELETE FROM outside_paths WHERE claim_seq = ?", (seq,))
    return tx.execute("DELETE FROM outside_claims WHERE seq = ?", (seq,)).rowcount > 0


def conflicts_for_task(
    source: Source, paths: Sequence[str], task_seq: int | None = None, *, or_held: bool = False
) -> list[Conflict]:
    """Outside claims that stand in the way of a task's `paths`: all of them, or those older than the task with this seq.

    `or_held`: and younger ones that are held.
    """
    return [
        _conflict(path, row)
        for row in source.execute(_PATHS).fetchall()
        if task_seq is None or row[3] < task_seq or (or_held and row[4] is not None)
        for path in paths
        if overlap(path, row[5])
    ]


def conflicts_for_claim(source: Source, paths: Sequence[str], before: int | None = None) -> list[Conflict]:
    """Other outside claims in the way of one: all, or those older than the one with the seq `before`."""
    return [
        _conflict(path, row)
        for row in source.execute(_PATHS).fetchall()
        if before is None or row[0] < before
        for path in paths
        if overlap(path, row[5])
    ]


def _conflict(path: str, row: tuple[int, str, str, int, int | None, str]) -> Conflict:
    return Conflict(path=path, task_seq=-row[0], task_id=row[1], task=row[2], other_path=row[5])


def _claim(row: tuple[int, str, str, int, str, int, int, str, Policy, int, int, int | None]) -> OutsideClaim:
    return OutsideClaim(row[0], row[1], row[2], Holder(*row[3:8]), row[8], row[9], row[10], row[11])
