"""With very many tasks waiting, status and lists stay fast: shown by what SQLite says it will do, never by a stopwatch."""

from __future__ import annotations

import re
import sqlite3
from types import SimpleNamespace
from typing import Any, Self

import pytest

from agentqd.control import outbox, outboxchange, queries, tasklist
from agentqd.control.status import look
from agentqd.control.tasklist import SEQ_MAX, Wanted
from agentqd.core.outbox import RowState
from agentqd.loops import rowchanges
from agentqd.loops.rowchanges import Pick
from agentqd.storage import rejections

from .harness import Daemon

BIG = {"tasks", "t", "entries", "e", "outbox", "o", "events", "attempts", "tries"}
QUERIES = {
    name: value
    for name, value in vars(queries).items()
    if name.isupper()
    and not name.startswith("_")
    and isinstance(value, str)
    and value.startswith("SELECT")
    and name not in {"CLAIMS", "CONFLICTS"}
}


def walks(plan: list[str]) -> list[str]:
    """The steps that go over a whole big table or index."""
    found = []
    for step in plan:
        match = re.match(r"(SCAN|SEARCH) (\w+)(.*)", step)
        if match is None or match[2] not in BIG:
            continue
        bounded = "=?" in match[3] or ">?" in match[3] or "<?" in match[3] or match[3] == ""
        if match[1] == "SCAN" or not bounded:
            found.append(step)
    return found


async def plan_of(daemon: Daemon, sql: str) -> list[str]:
    values = (0,) * sql.count("?")
    return await daemon.journal.read(
        lambda c: [row[3] for row in c.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
    )


@pytest.mark.parametrize("name", sorted(QUERIES))
async def test_no_query_of_the_control_room_walks_a_table(daemon: Daemon, name: str) -> None:
    plan = [
        step
        for step in await plan_of(daemon, QUERIES[name])
        if not (name == "LAST_EVENT" and step == "SCAN events")
    ]
    assert not walks(plan), plan


async def test_a_rejection_is_found_by_keys_however_many_there_are(daemon: Daemon) -> None:
    plan = await plan_of(daemon, rejections.TOLD)
    assert plan == [
        "SEARCH r USING PRIMARY KEY (id=?)",
        "SEARCH e USING INTEGER PRIMARY KEY (rowid=?)",
    ]


@pytest.mark.parametrize("sql", [outbox.PARKED_SQL, outbox.OPEN_SQL, outbox.WINDOW_SQL, outbox.OF_TASK_SQL])
async def test_no_query_of_the_outbox_walks_a_table(daemon: Daemon, sql: str) -> None:
    assert not walks(await plan_of(daemon, sql)), await plan_of(daemon, sql)


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(),
        Wanted(states=("held",)),
        Wanted(results=("failed",), queues=("a", "b")),
        Wanted(name="x", runner="y"),
        Wanted(label="z"),
    ],
)
async def test_a_window_of_the_task_list_is_a_range_of_the_primary_key(
    daemon: Daemon, wanted: Wanted
) -> None:
    sql, _ = tasklist.window_sql(wanted)
    plan = await plan_of(daemon, sql)
    assert plan == ["SEARCH tasks USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)"]


async def test_the_plans_test_can_fail(daemon: Daemon) -> None:
    for sql in (
        "SELECT count(*) FROM tasks WHERE name = ?",
        "SELECT max(position) FROM outbox WHERE sink = ?",
        "SELECT * FROM outbox WHERE state = 'dead'",
    ):
        assert walks(await plan_of(daemon, sql)), sql


class Steps:
    """Counts what SQLite's machine does for a function, in units of 100 instructions."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.count = 0
        self.connection = connection

    def __enter__(self) -> Self:
        self.connection.set_progress_handler(self._step, 100)
        return self

    def _step(self) -> int:
        self.count += 1
        return 0

    def __exit__(self, *_: object) -> None:
        self.connection.set_progress_handler(None, 0)


async def test_ten_thousand_waiting_tasks_cost_status_and_list_no_more_steps(daemon: Daemon) -> None:
    async def steps(query: Any) -> int:
        def counted(connection: sqlite3.Connection) -> int:
            with Steps(connection) as seen:
                query(connection)
            return seen.count

        return await daemon.journal.read(counted)

    now = daemon.clock.now_us()
    sql, values = tasklist.window_sql(Wanted())

    async def all_of_them() -> list[int]:
        counts = (await daemon.journal.read(queries.counts)).tasks
        ready = Wanted(states=("queued",))
        return [
            await steps(lambda c: look(c, now)),
            await steps(lambda c: c.execute(sql, (SEQ_MAX, 0, *values, 101)).fetchall()),
            await steps(lambda c: tasklist._from_indexes(c, ready, counts, SEQ_MAX, 101)),
        ]

    await daemon.admit_many(200)
    few = await all_of_them()
    await daemon.admit_many(10_000, queue="default", priority=5)
    many = await all_of_them()
    for before, after in zip(few, many, strict=True):
        assert after <= 2 * before + 5
    status = await daemon.get("/v1/status")
    assert (status["tasks"]["queued"], status["queues"]["default"]["waiting"]) == (10_200, 10_200)
    found = await daemon.get("/v1/tasks", state="queued", limit="3")
    assert [task["priority"] for task in found["tasks"]] == [5, 5, 5]
    assert all(state.value in outboxchange.STATES for state in RowState)


@pytest.mark.parametrize(
    "where", ["o.entry_seq >= ? AND o.entry_seq < ?", "e.delivery_id IN (?, ?)", "o.entry_seq IN (?, ?)"]
)
async def test_a_persons_word_on_rows_walks_no_table(daemon: Daemon, where: str) -> None:
    asked: list[str] = []

    class Source:
        def execute(self, sql: str, values: Any) -> Any:
            asked.append(sql)
            return SimpleNamespace(fetchall=list)

    rowchanges.find(Source(), Pick(("dead", "held"), "s", 1, 2), where, ())  # type: ignore[arg-type]
    plan = await plan_of(daemon, asked[0])
    assert not walks(plan), plan
    assert not [step for step in plan if "outbox_open" in step], (
        plan
    )  # by state alone: all the dead, however many
