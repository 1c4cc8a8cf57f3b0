"""One daemon's shared state on a real journal and a clock that stands still; workers end when a test says so."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

from agentqd.core.envelope import data_of
from agentqd.core.folders import Folders
from agentqd.core.settings import Settings
from agentqd.core.task import read_task
from agentqd.core.usage_limit import Limit
from agentqd.loops.admission import Accepted, Outcome, admit
from agentqd.loops.box import Box
from agentqd.loops.dropfolder import Handed
from agentqd.loops.evidence import Seen
from agentqd.loops.finishing import AttemptEnd, Finished, finish_attempt
from agentqd.loops.preparing import prepare
from agentqd.loops.scheduling import Claim, Scheduler, Target
from agentqd.storage import tasks as store
from agentqd.storage.journal import Journal
from agentqd.storage.outbox import Mark, mark
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction
from agentqd.supervisor.wire import Exited
from agentqd.system.clock import ManualClock

T = TypeVar("T")
FILE = {"kind": "file", "file": "tasks.jsonl", "offset": 0, "length": 1}
SOCKET = {"kind": "socket"}


class Logged:
    """A log that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def _say(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    debug = info = warning = error = _say


class Bench:
    """Opened with `async with`. `connect()` gives the scheduler a supervisor; before, nothing is claimed."""

    def __init__(self, root: Path, settings: Settings | None = None) -> None:
        for name in ("state/tasks", "state/prompts", "run"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self.folders = Folders(str(root / "state"), str(root / "run"))
        self.clock = ManualClock()
        self.log = Logged()
        self.settings = settings or Settings()
        self.claims: list[Claim] = []
        self.places = 0

    async def __aenter__(self) -> Self:
        self.journal = Journal(self.folders.journal, self.clock.now_us)
        await self.journal.open()
        self.box = Box(self.folders, self.journal, self.settings, "s" * 32, "testbox", self.clock, self.log)
        self.scheduler = Scheduler(self.box, self.claims.extend)
        self.hooks: list[Callable[[Transaction], None]] = [self.scheduler.claim]

        def before_commit(tx: Transaction) -> None:
            for hook in self.hooks:
                hook(tx)

        self.journal.before_commit = before_commit
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.journal.close()

    async def connect(self) -> None:
        self.scheduler.target = Target("inst", "boot")
        await self.turn()

    async def turn(self) -> None:
        """A commit with nothing in it but what rides on it."""
        await self.journal.commit(lambda tx: None)

    # In.

    async def admit(self, *tasks: dict[str, Any], door: dict[str, Any] | None = None) -> list[Outcome]:
        """All in one transaction, as lines of one read."""
        candidates = []
        for fields in tasks:
            self.places += 1
            raw = json.dumps({"task": "demo", "prompt": "true", **fields}).encode()
            candidates.append(prepare(raw, door or FILE, b"%d" % self.places, self.box))
        return await self.journal.commit(lambda tx: admit(tx, self.box, candidates))

    async def add(self, **fields: Any) -> str:
        (outcome,) = await self.admit(fields)
        assert isinstance(outcome, Accepted), outcome
        return outcome.task_id

    # Out.

    async def end(self, task_id: str, exit_code: int | None = 0, *, seen: Seen | None = None, handed: list[Handed] | None = None,
                  lost: str | None = None, limit: Limit | None = None, **exited: Any) -> Finished | None:  # fmt: skip
        """The newest attempt is over; with something on stdout, if nothing else is said."""
        now = self.clock.now_us()

        def unit(tx: Transaction) -> Finished | None:
            task = store.find(tx, task_id)
            assert task is not None
            request = read_task(store.spec_of(tx, task.seq)[0])
            facts = {"pid": 42, "started_at": now - 1_000_000, "ended_at": now, "stdout_bytes": 1, **exited}
            how = (
                None if lost else Exited(task_id, task.attempt, "inst", "boot", exit_code=exit_code, **facts)
            )
            end = AttemptEnd(task_id, task.attempt, request, how, seen or Seen("", 0, (), [], False, []), handed or [], lost_reason=lost, limit=limit)  # fmt: skip
            return finish_attempt(tx, self.box, end)

        return await self.journal.commit(unit)

    async def do(self, unit: Callable[[Transaction], T]) -> T:
        return await self.journal.commit(unit)

    # To look.

    async def task(self, task_id: str) -> TaskRow:
        found = await self.journal.read(lambda c: store.find(c, task_id))
        assert found is not None, f"no task {task_id}"
        return found

    async def states(self, *task_ids: str) -> list[str]:
        return [(await self.task(task_id)).state.value for task_id in task_ids]

    async def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        return await self.journal.read(lambda c: c.execute(sql, values).fetchall())

    async def entries(self, kind: str) -> list[dict[str, Any]]:
        """The data objects, in order."""
        found = await self.rows("SELECT payload FROM entries WHERE kind = ? ORDER BY seq", kind)
        return [json.loads(data_of(payload)) for (payload,) in found]

    async def results(self, task_id: str) -> list[dict[str, Any]]:
        return [data for data in await self.entries("result") if data["task_id"] == task_id]

    async def alerts(self, kind: str) -> list[dict[str, Any]]:
        return [data for data in await self.entries("alert") if data["alert"] == kind]

    async def events(self, task_id: str) -> list[str]:
        return [row[0] for row in await self.rows("SELECT event FROM events WHERE task = ? ORDER BY seq", task_id)]  # fmt: skip

    async def deliver_all(self) -> None:
        """Every open row of `completions` is acknowledged."""

        def unit(tx: Transaction) -> None:
            from agentqd.core.outbox import RowEvent, RowState

            last = tx.one("SELECT coalesce(max(position), 0) FROM outbox")[0]
            open_ = tx.execute("SELECT entry_seq, sink, state FROM outbox WHERE state IN ('pending','retryable')").fetchall()  # fmt: skip
            for n, (seq, sink, state) in enumerate(open_, 1):
                mark(tx, [Mark(seq, sink, RowState(state), RowEvent.ACKNOWLEDGED, 1, None, last + n)])

        await self.do(unit)

    async def counts_are_true(self) -> None:
        """The kept sums are those of a walk over all rows: in one snapshot, as a commit may be under way."""

        def both(c: sqlite3.Connection) -> list[tuple[Counter[tuple[Any, ...]], Counter[tuple[Any, ...]]]]:
            found = []
            c.execute("BEGIN")
            try:
                for table, group, rows in (
                    ("task_counts", "queue, state, result", "SELECT queue, state, coalesce(result, ''), count(*) FROM tasks GROUP BY 1, 2, 3"),
                    ("outbox_counts", "sink, state", "SELECT sink, state, count(*) FROM outbox GROUP BY 1, 2"),
                ):  # fmt: skip
                    kept, walked = c.execute(f"SELECT {group}, n FROM {table} WHERE n <> 0"), c.execute(rows)
                    found.append(tuple(Counter({row[:-1]: row[-1] for row in each}) for each in (kept, walked)))  # fmt: skip
            finally:
                c.execute("COMMIT")
            return found  # type: ignore[return-value]

        for kept, walked in await self.journal.read(both):
            assert kept == walked

    async def until(self, condition: Callable[[], Any], within_s: float = 10.0) -> None:
        async with asyncio.timeout(within_s):
            while not condition():
                await asyncio.sleep(0.002)
