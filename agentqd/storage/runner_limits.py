"""Runners whose usage limit is reached, in the journal: kept over a restart, few rows, read with every choice."""

from __future__ import annotations

import sqlite3
from typing import Final

import msgspec

from agentqd.storage.transaction import Transaction

_ALL: Final = "SELECT runner, since, until, known, strikes, task_id FROM runner_limits"
_CLOSED: Final = "SELECT runner FROM runner_limits WHERE until > ?"
_PUT: Final = "INSERT OR REPLACE INTO runner_limits (runner, since, until, known, strikes, task_id) VALUES (?,?,?,?,?,?)"
_NEXT: Final = "SELECT min(until) FROM runner_limits WHERE until IS NOT NULL"
_WAITING: Final = (
    "UPDATE tasks SET wake_at = ?1"
    " WHERE state = 'retryable' AND reason = 'usage_limit' AND runner = ?2 AND wake_at > ?1"
)


class RunnerLimit(msgspec.Struct, frozen=True):
    """`until`: closed until then; None: it is over, and the next attempt of the runner will tell whether it is for good."""

    runner: str
    since: int
    until: int | None
    known: bool
    strikes: int
    task_id: str


def find(source: Transaction | sqlite3.Connection, runner: str) -> RunnerLimit | None:
    row = source.execute(f"{_ALL} WHERE runner = ?", (runner,)).fetchone()
    return None if row is None else _limit(row)


def closed(source: Transaction | sqlite3.Connection, now_us: int) -> frozenset[str]:
    """The runners that start nothing now."""
    return frozenset(row[0] for row in source.execute(_CLOSED, (now_us,)))


def all_closed(source: Transaction | sqlite3.Connection, now_us: int) -> dict[str, RunnerLimit]:
    """The same with all that is known, for people."""
    rows = source.execute(f"{_ALL} WHERE until > ?", (now_us,)).fetchall()
    return {row[0]: _limit(row) for row in rows}


def put(tx: Transaction, limit: RunnerLimit) -> None:
    tx.execute(
        _PUT,
        (limit.runner, limit.since, limit.until, int(limit.known), limit.strikes, limit.task_id),
    )
    tx.will_wake(limit.until)


def works_again(tx: Transaction, runner: str) -> None:
    """An attempt ended without meeting the limit: the next one that does is the first in a row."""
    tx.execute("DELETE FROM runner_limits WHERE runner = ? AND until IS NULL", (runner,))


def open_due(tx: Transaction) -> list[str]:
    """The runners whose time has come; they may start again."""
    runners = [
        row[0] for row in tx.execute("SELECT runner FROM runner_limits WHERE until <= ?", (tx.now_us,))
    ]
    tx.execute("UPDATE runner_limits SET until = NULL WHERE until <= ?", (tx.now_us,))
    return runners


def open_now(tx: Transaction, runner: str) -> bool:
    """A person's word: its tasks that wait for the limit may try at once. False: it was not closed."""
    done = tx.execute(
        "UPDATE runner_limits SET until = NULL WHERE runner = ? AND until IS NOT NULL", (runner,)
    )
    if tx.execute(_WAITING, (tx.now_us, runner)).rowcount:
        tx.will_wake(tx.now_us)
    return done.rowcount > 0


def next_wake(source: Transaction | sqlite3.Connection) -> int | None:
    row = source.execute(_NEXT).fetchone()
    return None if row is None or row[0] is None else int(row[0])


def _limit(row: tuple[str, int, int | None, int, int, str]) -> RunnerLimit:
    return RunnerLimit(row[0], row[1], row[2], bool(row[3]), row[4], row[5])
