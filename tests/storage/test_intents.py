"""The registry's table: what an older journal holds is carried over, and what a look finds."""

from __future__ import annotations

import importlib.resources
import sqlite3
from pathlib import Path

import pytest

from agentqd.core.intents import overlap
from agentqd.storage import intents
from agentqd.storage.connection import connect, migrate
from agentqd.storage.journal import Journal
from agentqd.storage.transaction import Transaction
from agentqd.system.clock import ManualClock

_TASK = (
    "INSERT INTO tasks (seq, id, name, queue, runner, priority, state, reason, run, attempt, run_attempts, accepted_at, run_at,"
    " content, source, spec) VALUES (?, ?, 'n', 'q', 'r', 0, ?, ?, 1, 0, 0, 0, 0, '', '{}', '')"
)


def add(connection: sqlite3.Connection, seq: int, state: str = "queued", reason: str | None = None) -> None:
    connection.execute(_TASK, (seq, f"t{seq}", state, reason))


def test_claims_of_an_older_journal_stand_in_the_order_of_their_tasks_and_are_found(tmp_path: Path) -> None:
    connection = connect(str(tmp_path / "journal.db"))
    folder = importlib.resources.files("agentqd.storage") / "migrations"
    connection.executescript((folder / "0001_initial.sql").read_text())
    connection.execute("PRAGMA user_version = 1")
    paths = {1: "/w/a", 2: "/w/*.md", 3: "/w", 4: "/v/a[x]"}
    for seq, path in paths.items():
        add(connection, seq, *(("blocked", "write_conflict") if seq == 3 else ("queued", None)))
        connection.execute("INSERT INTO intents VALUES (?, ?, ?, 'queue', 0, NULL)", (seq, path, path))
    migrate(connection, "journal.db")
    found = intents.conflicts_of(connection, ["/w/x.md", "/v/ax"])
    assert [(each.task_id, each.other_path) for each in found] == [("t2", "/w/*.md"), ("t3", "/w"), ("t4", "/v/a[x]")]  # fmt: skip
    third = intents.claim_of(connection, 3)
    assert third is not None
    before = intents.newest_before(connection, third)
    assert before is not None
    assert before.task_id == "t2"
    assert connection.execute("SELECT seq FROM tasks WHERE wake_at = 0").fetchall() == [(3,)]
    connection.close()


PATHS = [
    "/",
    "/a",
    "/a/b",
    "/a/b/c",
    "/ab",
    "/a.b",
    "/a/*",
    "/a/*/c",
    "/**/c",
    "/a/[bx]",
    "/é/x",
    "/a0",
    "/a-",
    "/b",
]


async def test_the_index_finds_what_a_walk_over_all_claims_finds(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "journal.db"), ManualClock().now_us)
    await journal.open()

    def unit(tx: Transaction) -> None:
        for seq, path in enumerate(PATHS, 1):
            add(tx.connection, seq)
            intents.claim(tx, seq, [(path, path)], "queue")
        for path in PATHS:
            expected = [other for other in PATHS if overlap(path, other)]
            assert [each.other_path for each in intents.conflicts_of(tx, [path])] == expected
            assert intents.holders(tx, [path]) == {PATHS.index(other) + 1 for other in expected}
            for place in range(1, len(PATHS) + 2):
                before = intents.newest_before(tx, intents.Claim(place, "queue", (path,)))
                older = [other for other in expected if PATHS.index(other) + 1 < place]
                assert (before.other_path if before else None) == (older[-1] if older else None)

    await journal.commit(unit)
    await journal.close()


async def test_a_task_has_one_place_for_all_its_paths_and_lets_go_of_all_at_once(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "journal.db"), ManualClock().now_us)
    await journal.open()

    def unit(tx: Transaction) -> None:
        for seq in (1, 2, 3):
            add(tx.connection, seq)
            intents.claim(tx, seq, [(f"/{seq}", "a"), ("/all", "b")], "queue")
        places = tx.execute("SELECT task_seq, place FROM intents ORDER BY 1").fetchall()
        assert places == [(1, 1), (1, 1), (2, 2), (2, 2), (3, 3), (3, 3)]
        intents.wait_for(tx, 2, 1)
        intents.wait_for(tx, 3, 2)
        assert intents.release(tx, 2) == 2
        assert (intents.take_waiters(tx, 1), intents.take_waiters(tx, 2), intents.take_waiters(tx, 2)) == ([], [3], [])  # fmt: skip
        intents.claim(tx, 1, [("/again", "c")], "queue")
        assert tx.one("SELECT place FROM intents WHERE path = '/again'") == (4,)

    await journal.commit(unit)
    await journal.close()


@pytest.mark.parametrize("limit", [1, 3])
async def test_the_first_in_line_are_told(tmp_path: Path, limit: int) -> None:
    journal = Journal(str(tmp_path / "journal.db"), ManualClock().now_us)
    await journal.open()

    def unit(tx: Transaction) -> None:
        for seq in range(1, 9):
            add(tx.connection, seq)
            intents.claim(tx, seq, [("/a", "a")], "queue")
        told = intents.conflicts_of(tx, ["/a", "/a/b"], frozenset({1}), limit)
        assert [each.task_seq for each in told] == [2, 2, 3][:limit]

    await journal.commit(unit)
    await journal.close()
