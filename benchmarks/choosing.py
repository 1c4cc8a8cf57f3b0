"""Choosing the next of very many waiting tasks, and freeing one of very many blocked ones, beside a journal with few.

The daemon's own scheduler on its own journal, on disk, in this process: what is timed rides on real commits. A tenth of the
waiting tasks is blocked, one half by a dependency each, the other by a write conflict each.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from agentqd.core.folders import Folders
from agentqd.core.settings import Queue, Settings
from agentqd.core.task import read_task
from agentqd.loops.box import Box
from agentqd.loops.evidence import NOTHING
from agentqd.loops.finishing import AttemptEnd, finish_attempt
from agentqd.loops.scheduling import Claim, Scheduler, Target
from agentqd.storage import tasks as store
from agentqd.storage.journal import Journal
from agentqd.storage.transaction import Transaction
from agentqd.supervisor.wire import Exited
from agentqd.system.clock import SystemClock
from benchmarks.measure import Row, interleaved, percentile, summary

FEW: Final = 1000
BLOCKS: Final = 10
# What the ends of a phase free, and the priority by which those that end in it go first.
_PHASES: Final = {"plain": 30, "dependency": 20, "write_conflict": 10}

_INSERT: Final = (
    "WITH RECURSIVE n(i) AS (SELECT ? UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?)"
    " INSERT INTO tasks (seq, id, name, queue, runner, priority, state, reason, run, attempt, run_attempts, accepted_at, run_at,"
    " content, source, spec) SELECT i, 't' || i, 't', 'default', 'shell', {priority}, '{state}', {reason}, 1, 0, 0, 1, 1, x'',"
    ' \'{{"kind":"socket"}}\', CAST({spec} AS BLOB) FROM n'
)
_PLAIN: Final = '\'{"task":"t","prompt":"true"}\''
_AFTER: Final = '\'{{"task":"t","prompt":"true","after":"t\' || (i - {back}) || \'"}}\''


class _Log:
    def say(self, event: str, **fields: Any) -> None:
        """Nothing is shown: lines are not what is measured."""

    debug = info = warning = error = say


class Side:
    """One journal with `waiting` tasks; `end_one` ends the running one and has the next chosen in the same commit."""

    def __init__(self, folder: Path, waiting: int, samples: int) -> None:
        (folder / "state").mkdir(parents=True)
        folders = Folders(str(folder / "state"), str(folder / "run"))
        self.clock = SystemClock()
        self.journal = Journal(folders.journal, self.clock.now_us)
        settings = Settings(max_workers=1, queues={"default": Queue(concurrency=1)})
        self.box = Box(folders, self.journal, settings, "s" * 32, "bench", self.clock, _Log())
        self.claims: list[Claim] = []
        self.scheduler = Scheduler(self.box, self.claims.extend)
        self.waiting, self.samples = waiting, samples
        self.chose_s = self.ended_s = 0.0

    async def __aenter__(self) -> Self:
        await self.journal.open()
        await self.journal.commit(self._fill)
        await self.journal.close()  # what it knows of numbers and counts is read anew
        self.journal = self.box.journal = Journal(self.box.folders.journal, self.clock.now_us)
        await self.journal.open()
        self.scheduler.target = Target("inst", "boot")
        self.journal.before_commit = self._choose
        await self.journal.commit(lambda _: None)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.journal.close()

    def _fill(self, tx: Transaction) -> None:
        """First the holders (of the phases, and those of lower priority), then those that each of them blocks."""
        blocked = max(self.samples + 2, self.waiting // 20)
        at = 1
        for kind, priority in _PHASES.items():
            phase = self.samples + 2
            first, holders = at, phase if kind == "plain" else blocked
            at = self._insert(tx, at, phase, f"{priority}", "queued", "NULL", _PLAIN)
            at = self._insert(tx, at, holders - phase, "0", "queued", "NULL", _PLAIN)
            if kind == "plain":
                continue
            spec = _AFTER.format(back=holders) if kind == "dependency" else _PLAIN
            at = self._insert(tx, at, holders, "0", "blocked", f"'{kind}'", spec)
            if kind == "dependency":
                tx.execute(
                    "INSERT INTO dependencies (task_seq, on_seq) SELECT seq, seq - ? FROM tasks WHERE seq >= ?",
                    (holders, first + holders),
                )
            else:
                sql = (
                    "INSERT INTO intents (task_seq, path, given, policy, claimed_at, expires_at, place, head)"
                    " SELECT seq, '/srv/' || (seq - ?1), 'x', 'queue', 1, NULL, seq, '/srv/' || (seq - ?1)"
                    " FROM tasks WHERE seq >= ?2 AND seq < ?3"
                )
                tx.execute(sql, (0, first, first + holders))
                tx.execute(sql, (holders, first + holders, at))
                waits = (
                    "INSERT INTO claim_waits (task_seq, on_seq) SELECT seq, seq - ? FROM tasks WHERE seq >= ?"
                )
                tx.execute(waits, (holders, first + holders))
        self._insert(tx, at, self.waiting - at + 1, "i % 3 - 1", "queued", "NULL", _PLAIN)
        tx.execute(
            "INSERT INTO task_counts SELECT queue, state, '', count(*) FROM tasks GROUP BY queue, state"
        )

    @staticmethod
    def _insert(
        tx: Transaction, at: int, count: int, priority: str, state: str, reason: str, spec: str
    ) -> int:
        if count > 0:
            tx.execute(
                _INSERT.format(priority=priority, state=state, reason=reason, spec=spec), (at, at + count)
            )
        return at + max(0, count)

    def _choose(self, tx: Transaction) -> None:
        began = time.perf_counter()
        self.scheduler.claim(tx)
        self.chose_s = time.perf_counter() - began

    async def end_one(self) -> None:
        task = self.claims[-1].task

        def unit(tx: Transaction) -> None:
            began = time.perf_counter()
            now = tx.now_us
            exited = Exited(
                task.id,
                task.attempt,
                "inst",
                "boot",
                exit_code=0,
                pid=1,
                started_at=now,
                ended_at=now,
                stdout_bytes=1,
            )
            request = read_task(store.spec_of(tx, task.seq)[0])
            assert (
                finish_attempt(tx, self.box, AttemptEnd(task.id, task.attempt, request, exited, NOTHING))
                is not None
            )
            self.ended_s = time.perf_counter() - began

        await self.journal.commit(unit)

    async def samples_of(self, kind: str, count: int) -> list[float]:
        """Seconds of the choice (`plain`), or of an end that frees one task blocked in this way."""
        taken = []
        for _ in range(count):
            before = await self._blocked()
            await self.end_one()
            taken.append(self.chose_s if kind == "plain" else self.ended_s)
            freed = before - await self._blocked()
            assert freed == (0 if kind == "plain" else 1), f"an end of the phase {kind} freed {freed}"
        return taken

    async def _blocked(self) -> int:
        sql = "SELECT n FROM task_counts WHERE state = 'blocked'"
        return int((await self.journal.read(lambda c: c.execute(sql).fetchone()))[0])


def measure(folder: Path, waiting: int, samples: int) -> list[Row]:
    with _loop() as loop:
        few, many = Side(folder / "few", FEW, samples), Side(folder / "many", waiting, samples)
        loop.run_until_complete(few.__aenter__())
        loop.run_until_complete(many.__aenter__())
        rows = []
        for kind in _PHASES:
            sides = [
                lambda count, side=side, kind=kind: loop.run_until_complete(side.samples_of(kind, count))
                for side in (few, many)
            ]
            low, high = interleaved(BLOCKS, samples, *sides)
            for side in (
                few,
                many,
            ):  # the last of this phase, which is not timed: the next phase's first is chosen
                loop.run_until_complete(side.end_one())
                loop.run_until_complete(side.end_one())
            rows.append(_row(kind, waiting, low, high))
        for side in (few, many):
            loop.run_until_complete(side.__aexit__(None, None, None))
    return rows


def _row(kind: str, waiting: int, low: list[float], high: list[float]) -> Row:
    what = {
        "plain": f"choosing the next of {waiting:,} waiting, {waiting // 10:,} of them blocked, p50",
        "dependency": f"an end that frees one of {waiting // 20:,} that wait for another, p50",
        "write_conflict": f"an end that frees one of {waiting // 20:,} in a write conflict, p50",
    }[kind]
    detail = {"floor_us": summary(low, 1e6), "ours_us": summary(high, 1e6)}
    note = f"floor: of {FEW:,}"
    return Row(
        what, percentile(low, 0.5) * 1e6, percentile(high, 0.5) * 1e6, "us", 1.5, note=note, detail=detail
    )


@contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    try:
        yield loop
    finally:
        loop.close()
