"""`GET /v1/tasks`: newest first, without ever walking all tasks in one go.

How the rows are found:
1. What the kept sums say is not there is not looked for; what they say is all there is ends the search.
2. Active and ready tasks come from their own indexes, however many others are newer.
3. Anything else is found by walking windows of sequence numbers from the newest down, each a read of its own, so that a
   rare match among a million rows costs time but holds up nobody.
"""

from __future__ import annotations

import sqlite3
from typing import Any, Final

import msgspec
from aiohttp import web

from agentqd.control import queries
from agentqd.control.queries import Written, task_row, written
from agentqd.control.queues import check_queue
from agentqd.control.reasons import Looker, SeenWaiting
from agentqd.control.room import Room
from agentqd.control.route import Call, Param, Route, answer, comma_list
from agentqd.control.views import task_summary
from agentqd.core.lifecycle import ACTIVE_STATES, Result, State
from agentqd.core.limits import LIST_ROWS_DEFAULT, LIST_ROWS_MAX
from agentqd.storage.tasks import TaskRow

SEQ_MAX: Final = 2**62
STATES: Final = tuple(state.value for state in State if state is not State.NEW)
RESULTS: Final = tuple(result.value for result in Result)
WINDOW: Final = 10_000
WINDOW_WITH_LABELS: Final = 2_000  # each row's whole text is read there
_SUMMARIES_A_READ: Final = 200
_INDEXED: Final = frozenset({State.QUEUED.value, *(state.value for state in ACTIVE_STATES)})


class Wanted(msgspec.Struct, frozen=True):
    """The filters; empty: anything."""

    states: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    queues: tuple[str, ...] = ()
    runner: str | None = None
    name: str | None = None
    label: str | None = None

    @property
    def counted(self) -> bool:
        """Can the kept sums say exactly how many match?"""
        return self.runner is None and self.name is None and self.label is None

    def how_many(self, counts: list[tuple[str, str, str, int]]) -> int:
        """How many can match at most."""
        return sum(
            n
            for queue, state, result, n in counts
            if (not self.queues or queue in self.queues)
            and (not self.states or state in self.states)
            and (not self.results or result in self.results)
        )

    def clauses(self) -> tuple[str, list[Any]]:
        """All but the label, as SQL."""
        parts = [""]
        values: list[Any] = []
        for column, items in (("state", self.states), ("result", self.results), ("queue", self.queues)):
            if items:
                parts.append(f"{column} IN ({','.join('?' * len(items))})")
                values += items
        for column, value in (("runner", self.runner), ("name", self.name)):
            if value is not None:
                parts.append(f"{column} = ?")
                values.append(value)
        return " AND ".join(parts), values

    def takes(self, task: TaskRow) -> bool:
        return (
            (not self.states or task.state.value in self.states)
            and (not self.results or task.result in self.results)
            and (not self.queues or task.queue in self.queues)
            and self.runner in (None, task.runner)
            and self.name in (None, task.name)
        )


def window_sql(wanted: Wanted) -> tuple[str, list[Any]]:
    """One window: (statement, the filters' values). Its own values come first: before, from, and last the limit."""
    clauses, values = wanted.clauses()
    what = f"{queries.TASK_COLUMNS}, spec" if wanted.label is not None else queries.TASK_COLUMNS
    return f"SELECT {what} FROM tasks WHERE seq < ? AND seq >= ?{clauses} ORDER BY seq DESC LIMIT ?", values  # noqa: S608 - fixed clauses


async def find_tasks(room: Room, wanted: Wanted, before: int, limit: int) -> list[TaskRow]:
    """The newest `limit` that match and are older than `before`."""
    counts = (await room.box.journal.read(queries.counts)).tasks
    most = wanted.how_many(counts)
    if most == 0:
        return []
    if wanted.states and _INDEXED.issuperset(wanted.states) and wanted.label is None:
        found = await room.box.journal.read(lambda c: _from_indexes(c, wanted, counts, before, limit))
        if found is not None:
            return found
    return await _walk(room, wanted, before, limit, most if wanted.counted and before == SEQ_MAX else None)


def _from_indexes(
    connection: sqlite3.Connection,
    wanted: Wanted,
    counts: list[tuple[str, str, str, int]],
    before: int,
    limit: int,
) -> list[TaskRow] | None:
    """None: too many to be looked at this way."""
    found: list[TaskRow] = []
    if any(state.value in wanted.states for state in ACTIVE_STATES):
        active = queries.active(connection, before, queries.ACTIVE_SEEN_MAX + 1)
        if len(active) > queries.ACTIVE_SEEN_MAX:
            return None
        found += [task for task in active if wanted.takes(task)]
    if State.QUEUED.value in wanted.states and not wanted.results:
        if wanted.runner is not None or wanted.name is not None:
            return None
        queues = {queue for queue, state, _, _ in counts if state == State.QUEUED.value}
        ready = queries.newest_ready(connection, sorted(queues & set(wanted.queues or queues)), before, limit)
        if ready is None:
            return None
        found += ready
    return sorted(found, key=lambda task: -task.seq)[:limit]


async def _walk(room: Room, wanted: Wanted, before: int, limit: int, exactly: int | None) -> list[TaskRow]:
    bounds = "SELECT (SELECT min(seq) FROM tasks), (SELECT max(seq) FROM tasks)"
    least, newest = await room.box.journal.read(lambda c: c.execute(bounds).fetchone())
    if least is None:
        return []
    sql, values = window_sql(wanted)
    size = WINDOW if wanted.label is None else WINDOW_WITH_LABELS
    found: list[TaskRow] = []
    upper = min(before, newest + 1)
    while upper > least and len(found) < limit and (exactly is None or len(found) < exactly):
        lower = max(least, upper - size)
        most = limit - len(found)

        def query(
            connection: sqlite3.Connection, lower: int = lower, upper: int = upper, most: int = most
        ) -> list[TaskRow]:
            if wanted.label is None:
                return [task_row(row) for row in connection.execute(sql, (upper, lower, *values, most))]
            return _labelled(connection, sql, (upper, lower, *values, SEQ_MAX), wanted.label, most)

        found += await room.box.journal.read(query)
        upper = lower
    return found


def _labelled(
    connection: sqlite3.Connection, sql: str, values: tuple[Any, ...], label: str, most: int
) -> list[TaskRow]:
    found: list[TaskRow] = []
    for row in connection.execute(sql, values):
        if label in (msgspec.json.decode(row[-1], type=Written).labels or ()):
            found.append(task_row(row[:-1]))
            if len(found) == most:
                break
    return found


async def summaries(room: Room, tasks: list[TaskRow]) -> list[dict[str, Any]]:
    """As lists show them, read in small steps (what a task says may be large)."""
    shown: list[dict[str, Any]] = []
    for start in range(0, len(tasks), _SUMMARIES_A_READ):
        part = tasks[start : start + _SUMMARIES_A_READ]

        def query(
            connection: sqlite3.Connection, part: list[TaskRow] = part
        ) -> list[tuple[Written, SeenWaiting, int | None]]:
            looker = Looker(room, connection)
            return [
                (written(connection, task.seq), looker.look(task), pid_of(connection, task)) for task in part
            ]

        details = await room.box.journal.read(query)
        shown += [
            task_summary(room, task, text, seen, pid)
            for task, (text, seen, pid) in zip(part, details, strict=True)
        ]
    return shown


def pid_of(connection: sqlite3.Connection, task: TaskRow) -> int | None:
    """The pid of a running task as the journal knows it."""
    if task.state not in ACTIVE_STATES:
        return None
    sql = "SELECT pid FROM attempts WHERE task_seq = ? AND attempt = ?"
    row = connection.execute(sql, (task.seq, task.attempt)).fetchone()
    return None if row is None else row[0]


async def list_tasks(call: Call) -> web.StreamResponse:
    query = call.query
    wanted = Wanted(
        states=comma_list(query["state"], STATES, "state"),
        results=comma_list(query["result"], RESULTS, "result"),
        queues=comma_list(query["queue"], (), "queue"),
        runner=query["runner"],
        name=query["name"],
        label=query["label"],
    )
    for queue in wanted.queues:
        await check_queue(call.room, queue)
    limit = query["limit"]
    found = await find_tasks(call.room, wanted, query["before"], limit + 1)
    page = found[:limit]
    more = len(found) > limit
    return answer({"tasks": await summaries(call.room, page), "next_before": page[-1].seq if more else None})


LIMIT: Final = Param("limit", "at most so many rows", "integer", LIST_ROWS_DEFAULT, 1, LIST_ROWS_MAX)
ROUTES: Final = (
    Route(
        "GET",
        "/v1/tasks",
        "Tasks, newest first.",
        list_tasks,
        query=(
            Param("state", f"comma list of {', '.join(STATES)}"),
            Param("result", f"comma list of {', '.join(RESULTS)}"),
            Param("queue", "comma list of names"),
            Param("runner", "a runner's name"),
            Param("name", "tasks with exactly this name"),
            Param("label", "tasks that have this label"),
            LIMIT,
            Param(
                "before",
                "only older ones than this seq (next_before of the page before)",
                "integer",
                SEQ_MAX,
                0,
                SEQ_MAX,
            ),
        ),
        more_statuses={404: "no_such_queue"},
    ),
)
