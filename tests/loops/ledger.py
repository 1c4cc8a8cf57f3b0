"""The journal without its threads and disk: real schema, transactions, units and hooks, in memory; thousands of histories a minute."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from typing import Any, Self, TypeVar

from agentqd.control.queues import _set_draining
from agentqd.core.errors import IllegalTransition
from agentqd.core.folders import Folders
from agentqd.core.lifecycle import Event
from agentqd.core.settings import Settings
from agentqd.core.task import read_task
from agentqd.core.usage_limit import Limit
from agentqd.core.verdict import CANCELLED
from agentqd.loops.admission import Accepted, admit
from agentqd.loops.box import Box
from agentqd.loops.evidence import NOTHING
from agentqd.loops.finishing import AttemptEnd, finish_attempt
from agentqd.loops.preparing import prepare
from agentqd.loops.scheduling import Claim, Scheduler, Target
from agentqd.loops.waking import Waker
from agentqd.storage import draining
from agentqd.storage import tasks as store
from agentqd.storage.connection import migrate
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Numbers, Transaction
from agentqd.supervisor.wire import Exited
from agentqd.system.clock import ManualClock

from .harness import FILE, Logged

T = TypeVar("T")
US = 1_000_000


class _Journal:
    epoch = 1


class Ledger:
    """One box, closed by `with`. `begin` makes it new again."""

    def __init__(self) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=512)
        migrate(self.connection, ":memory:")
        self._tables = [
            row[0] for row in self.connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def begin(self, settings: Settings) -> None:
        for table in self._tables:
            self.connection.execute(f"DELETE FROM {table}")
        self.clock = ManualClock()
        folders = Folders("/nowhere/state", "/nowhere/run")
        self.box = Box(folders, _Journal(), settings, "s" * 32, "box", self.clock, Logged())  # type: ignore[arg-type]
        self.claims: list[Claim] = []
        self.places = 0
        self.restart()

    def restart(self) -> None:
        """The daemon's memory is gone; what is paused, and whether it drains, is read again."""
        self.box.drain(draining.since_us(self.connection))
        self.numbers = Numbers.load(self.connection)
        self.scheduler = Scheduler(self.box, self.claims.extend)
        rows = self.connection.execute("SELECT queue FROM paused_queues")
        self.scheduler.paused = frozenset(row[0] for row in rows)
        self.waker = Waker(self.box)

    def connect(self, *, on: bool) -> None:
        self.scheduler.target = Target("inst", "boot") if on else None

    def commit(self, unit: Callable[[Transaction], T]) -> T:
        """As Journal._commit_batch does it, for one unit. Raises what the unit raised, nothing changed but what rides on it."""
        self.connection.execute("BEGIN IMMEDIATE")
        tx = Transaction(self.connection, self.numbers.copy(), self.clock.now_us())
        mark = tx.mark()
        self.connection.execute("SAVEPOINT unit")
        refused: Exception | None = None
        try:
            value = unit(tx)
        except IllegalTransition as error:
            refused = error
            self.connection.execute("ROLLBACK TO unit")
            tx.return_to(mark)
        self.connection.execute("RELEASE unit")
        self.scheduler.claim(tx)
        after, later = tx.flush()
        self.connection.execute("COMMIT")
        self.numbers = tx.numbers
        for action in (*after, *later):
            action()
        if refused is not None:
            raise refused
        return value

    def turn(self) -> None:
        self.commit(lambda _: None)

    def wake(self) -> None:
        self.commit(lambda tx: self.waker._wake_due(tx, {}))

    def admit(self, tasks: list[dict[str, Any]]) -> None:
        candidates = []
        for fields in tasks:
            self.places += 1
            raw = json.dumps({"task": "t", "prompt": "x", **fields}).encode()
            candidates.append(prepare(raw, FILE, b"%d" % self.places, self.box))
        outcomes = self.commit(lambda tx: admit(tx, self.box, candidates))
        assert all(isinstance(each, Accepted) for each in outcomes), outcomes

    def end(self, task_id: str, how: str, limit_us: int | None = None) -> None:
        """Its newest attempt ends: success, failed, lost or limit."""
        now = self.clock.now_us()

        def unit(tx: Transaction) -> None:
            task = store.find(tx, task_id)
            assert task is not None
            request = read_task(store.spec_of(tx, task.seq)[0])
            code = 0 if how == "success" else 1
            intent = store.attempt_of(tx, task.seq, task.attempt).intent
            exited = Exited(task_id, task.attempt, "inst", "boot", exit_code=code, intent=intent, pid=42,
                            started_at=now, ended_at=now, stdout_bytes=1)  # fmt: skip
            limit = Limit("usage limit", limit_us) if how == "limit" and intent is None else None
            lost = "supervisor_lost" if how == "lost" else None
            end = AttemptEnd(task_id, task.attempt, request, None if lost else exited, NOTHING, lost_reason=lost, limit=limit)  # fmt: skip
            assert finish_attempt(tx, self.box, end) is not None

        self.commit(unit)

    def stop(self, task_id: str) -> None:
        """A running task is cancelled: its worker is being ended."""

        def unit(tx: Transaction) -> None:
            task = store.find(tx, task_id)
            assert task is not None
            store.move_task(tx, task, Event.STOP_BEGUN, reason=CANCELLED)
            store.update_attempt(tx, task.seq, task.attempt, intent=CANCELLED)

        self.commit(unit)

    def pause(self, queue: str, *, on: bool) -> None:
        def unit(tx: Transaction) -> None:
            sql = "INSERT OR IGNORE INTO paused_queues VALUES (?, 0)" if on else "DELETE FROM paused_queues WHERE queue = ?"  # fmt: skip
            tx.execute(sql, (queue,))
            self.scheduler.paused = self.scheduler.paused | {queue} if on else self.scheduler.paused - {queue}

        self.commit(unit)

    def drain(self, *, on: bool) -> None:
        self.commit(lambda tx: _set_draining(tx, self.box, on=on))

    def tasks(self) -> dict[str, TaskRow]:
        rows = self.connection.execute("SELECT seq FROM tasks ORDER BY seq").fetchall()
        return {task.id: task for task in (store.get(self.connection, seq) for (seq,) in rows)}

    def states(self) -> dict[str, str]:
        return dict(self.connection.execute("SELECT id, state FROM tasks"))
