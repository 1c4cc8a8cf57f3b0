"""Delivery: works from the outbox alone, no worker and no timeout can kill it. One runner a sink; none delays another.

Invariants:
1. A row is sent until its receiver's word is in the journal; sent again, it has the same id and the same bytes.
2. What a runner holds in memory (rows in flight) is a hint: lost in a crash, the rows are simply due again.
3. A plug that raises, hangs or answers nonsense is `Deferred`; it stops neither the loop nor another sink.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import random
import sqlite3
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from agentqd.core.errors import ConfigError, JournalError
from agentqd.core.limits import SINK_ERROR_CHARS_MAX
from agentqd.core.outbox import RowEvent, RowState
from agentqd.core.retry import Schedule, next_try_s
from agentqd.core.routing import COMPLETIONS, REJECTED
from agentqd.core.settings import Sink as SinkSettings
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box, Signal
from agentqd.sinks.base import Context, Deferred, Delivered, Delivery, Exec, Found, Outcome, Rejected, Sink
from agentqd.sinks.registry import make_sink, schedule_for
from agentqd.storage import outbox
from agentqd.storage.outbox import DueRow, Mark
from agentqd.storage.transaction import Transaction
from agentqd.system.failpoints import failpoint

US: Final = 1_000_000
_IDLE_MAX_S: Final = 30.0
_GATHER_S: Final = 0.02
_FRESH_MAX: Final = 2000  # rows kept in memory a sink; beyond them they are read back from the journal
_OPEN_RETRY_S: Final = (0.2, 1.0, 5.0, 15.0)
_BUILT_IN: Final = {COMPLETIONS: SinkSettings(type=COMPLETIONS), REJECTED: SinkSettings(type=REJECTED)}


class SinkRunner:
    """One sink's loop: take what is due, send it, record what became of it."""

    def __init__(
        self, box: Box, name: str, settings: SinkSettings, exec_: Exec, draw: Callable[[], float]
    ) -> None:
        self.box = box
        self.name = name
        self.settings = settings
        self.schedule: Schedule = schedule_for(
            name, settings if name not in _BUILT_IN else None, settings.type
        )
        self.kick = Signal()
        self.in_flight: set[int] = set()
        self.last_error: str | None = None
        self._draw = draw
        context = Context(name, settings, box.folders.state, exec_, box.clock.now_us)
        self._sink: Sink = make_sink(context, int(box.settings.limits.completions_bytes_max))
        self._slots = asyncio.Semaphore(max(1, self._sink.concurrency))
        self._fresh: deque[DueRow] = deque()
        self._look = True
        self._look_at: int | None = None  # a deferred row falls due
        self._sent_s = 0.0
        self._covered = 0  # entries up to this seq were seen by a read of the journal

    async def run(self) -> None:
        """Until cancelled. Raises JournalError."""
        await self._open()
        try:
            async with asyncio.TaskGroup() as sends:
                while True:
                    self.box.beat(f"sink:{self.name}")
                    await self._slots.acquire()
                    batch = await self._next_batch()
                    if batch:
                        self.in_flight |= {row.entry_seq for row in batch}
                        sends.create_task(self._send(batch))
                        continue
                    self._slots.release()
                    await self.kick.wait(self._idle_s())
        finally:
            await self._sink.close()

    # What is to be sent: new rows come with the commit that made them; the journal is read at the start, when a deferred row
    # falls due, when a person asks, and when more came than is kept here.

    def offer(self, rows: list[DueRow], *, look: bool) -> None:
        """After a commit: new rows, and whether there are others to be looked for in the journal."""
        if len(self._fresh) + len(rows) > _FRESH_MAX:
            self._fresh.clear()
            look = True
        if look:
            self._look = True
        else:
            self._fresh.extend(rows)
        self.kick.set()

    async def _next_batch(self) -> list[DueRow]:
        if self._look or (self._look_at is not None and self._look_at <= self.box.clock.now_us()):
            batch = await self._from_journal()
            if batch:
                return batch
        batch = []
        if self._fresh and self._sink.batch_max > 1:
            await self._gather()
        while self._fresh and len(batch) < self._sink.batch_max:
            row = self._fresh.popleft()
            if row.entry_seq > self._covered and row.entry_seq not in self.in_flight:
                batch.append(row)
        return batch

    async def _gather(self) -> None:
        """Under load an append sink takes what comes in 20 ms together: its fdatasync costs the whole box, the journal too."""
        now = self.box.clock.monotonic_s()
        wait_s = self._sent_s + _GATHER_S - now
        if wait_s > 0 and len(self._fresh) < self._sink.batch_max:
            await asyncio.sleep(wait_s)
        self._sent_s = self.box.clock.monotonic_s()

    async def _from_journal(self) -> list[DueRow]:
        """Due rows that are not in flight. Fewer than asked for: all that was committed before this read is covered by it."""
        self._look, self._look_at = False, None
        now = self.box.clock.now_us()
        limit = self._sink.batch_max + len(self.in_flight)

        def query(connection: sqlite3.Connection) -> tuple[list[DueRow], int, int | None]:
            newest = outbox.newest_entry(connection)  # first: what is committed after it comes as a fresh row
            rows = outbox.due(connection, self.name, now, limit)
            return rows, newest, outbox.next_due(connection, self.name, now)

        before = frozenset(
            self.in_flight
        )  # the read may see them as they were before their marks became durable
        rows, newest, later = await self.box.journal.read(query)
        waiting = [row for row in rows if row.entry_seq not in before and row.entry_seq not in self.in_flight]
        if len(rows) >= limit or len(waiting) > self._sink.batch_max:
            self._look = True
            self._fresh.clear()
        else:
            self._covered = max(self._covered, newest, *(row.entry_seq for row in rows))
        if later is not None:  # a send that was deferred meanwhile has set its own
            self._look_at = later if self._look_at is None else min(later, self._look_at)
        return waiting[: self._sink.batch_max]

    def _idle_s(self) -> float:
        if self._look_at is None:
            return _IDLE_MAX_S
        return min(_IDLE_MAX_S, max(0.001, (self._look_at - self.box.clock.now_us()) / US))

    async def _open(self) -> None:
        """Open the plug; an append sink first reads back what its file already holds."""
        failures = 0
        while True:
            position = await self.box.journal.read(lambda c: outbox.last_position(c, self.name))
            try:
                found = await self._sink.open(position)
            except OSError as error:
                self.last_error = str(error)
                self.box.log.error("sink_open_failed", sink=self.name, error=str(error))
                await asyncio.sleep(_OPEN_RETRY_S[min(failures, len(_OPEN_RETRY_S) - 1)])
                failures += 1
                continue
            if found:
                await self.box.journal.commit(functools.partial(self._mark_found, found=found))
            return

    def _mark_found(self, tx: Transaction, *, found: Sequence[Found]) -> None:
        """Lines that were appended before the last daemon died, and not yet marked."""
        for item in found:
            known = outbox.entry_exists(tx, item.delivery_id)
            if known is None:
                continue
            row = tx.one(
                "SELECT state, attempts FROM outbox WHERE entry_seq = ? AND sink = ?", (known[0], self.name)
            )
            if row is None or row[0] not in {"pending", "retryable"}:
                continue
            mark = Mark(
                known[0], self.name, RowState(row[0]), RowEvent.ACKNOWLEDGED, row[1] + 1, None, item.position
            )
            outbox.mark(tx, [mark])
            tx.event(
                None, "delivery_found", sink=self.name, delivery_id=item.delivery_id, position=item.position
            )

    async def _send(self, batch: list[DueRow]) -> None:
        failpoint("send_begun")
        try:
            outcomes = await self._deliver(batch)
        finally:
            self._slots.release()
        self._tell_notices()
        now = self.box.clock.now_us()
        marks = [self._mark(row, outcome, now) for row, outcome in zip(batch, outcomes, strict=True)]
        failpoint("receiver_answered")
        future = self.box.journal.submit_lazily(lambda tx: self._record(tx, batch, outcomes, marks))
        future.add_done_callback(lambda done: self._marked(done, batch, marks))

    def _marked(self, done: asyncio.Future[None], batch: list[DueRow], marks: list[Mark]) -> None:
        self.in_flight -= {row.entry_seq for row in batch}
        due = [mark.due_at for mark in marks if mark.due_at is not None]
        if due:
            self._look_at = min([*due, *([] if self._look_at is None else [self._look_at])])
        error = None if done.cancelled() else done.exception()
        if error is not None and not isinstance(error, JournalError):
            self.box.log.error("unit_failed", sink=self.name, error=repr(error))
            self._look = True
        if due or self._look:
            self.kick.set()

    async def _deliver(self, batch: list[DueRow]) -> Sequence[Outcome]:
        """The plug's answer, made safe: one outcome for each, whatever it did."""
        deliveries = [
            Delivery(
                row.delivery_id, row.entry_seq, row.type, row.kind, row.key, row.task_id, row.payload, row.created_at, row.attempts, row.blob
            )
            for row in batch
        ]  # fmt: skip
        damaged = [row for row in batch if hashlib.sha256(row.payload).digest() != row.sha256]
        if damaged:
            return [self._check(row) for row in batch]
        try:
            async with asyncio.timeout(self._sink.timeout_s):
                outcomes = await self._sink.deliver(deliveries)
        except TimeoutError:
            return [Deferred(f"no answer within {self._sink.timeout_s:g} s")] * len(batch)
        except Exception as error:  # noqa: BLE001 - code we do not own meets us here
            self.box.log.error(
                "sink_failed", sink=self.name, error=repr(error), traceback=traceback.format_exc()
            )
            return [Deferred(f"the sink failed: {error!r}"[:SINK_ERROR_CHARS_MAX])] * len(batch)
        sound = isinstance(outcomes, list | tuple) and all(isinstance(each, Outcome) for each in outcomes)
        if not sound or len(outcomes) != len(batch):
            said = f"{len(outcomes)} of {len(batch)} deliveries" if sound else "with what is no outcome"
            return [Deferred(f"the sink answered {said}")] * len(batch)
        return outcomes

    def _check(self, row: DueRow) -> Outcome:
        if hashlib.sha256(row.payload).digest() != row.sha256:
            return Rejected(
                "the stored payload does not match its sha256: it was damaged on disk and is not sent"
            )
        return Deferred("waits for a batch without a damaged payload", retry_after_s=0.1)

    def _mark(self, row: DueRow, outcome: Outcome, now: int) -> Mark:
        attempts = row.attempts + 1
        if isinstance(outcome, Delivered):
            self.last_error = None
            return Mark(
                row.entry_seq, self.name, row.state, RowEvent.ACKNOWLEDGED, attempts, None, outcome.position
            )
        reason = outcome.reason[:SINK_ERROR_CHARS_MAX]
        self.last_error = reason
        if isinstance(outcome, Rejected):
            return Mark(row.entry_seq, self.name, row.state, RowEvent.REJECTED, attempts, None, None, reason)
        wait_s = next_try_s(self.schedule, attempts, self._draw(), outcome.retry_after_s)
        due_at = now + int(wait_s * US)
        lifetime = self.schedule.lifetime_s
        if lifetime is not None and due_at > row.created_at + int(lifetime * US):
            return Mark(row.entry_seq, self.name, row.state, RowEvent.GAVE_UP, attempts, None, None, reason)
        return Mark(row.entry_seq, self.name, row.state, RowEvent.DEFERRED, attempts, due_at, None, reason)

    def _record(
        self, tx: Transaction, batch: list[DueRow], outcomes: Sequence[Outcome], marks: list[Mark]
    ) -> None:
        done = {mark.entry_seq for mark in outbox.mark(tx, marks)}
        for row, outcome, mark in zip(batch, outcomes, marks, strict=True):
            if row.entry_seq not in done:
                continue
            if isinstance(outcome, Delivered):
                tx.event(
                    row.task_id,
                    "delivered",
                    sink=self.name,
                    delivery_id=row.delivery_id,
                    position=outcome.position,
                )
                if row.attempts:
                    outbox.record_try(
                        tx, row.entry_seq, self.name, mark.attempts, "delivered", outcome.detail
                    )
                continue
            outbox.record_try(tx, row.entry_seq, self.name, mark.attempts, mark.event.value, mark.error)
            if mark.event is RowEvent.DEFERRED:
                if row.attempts == 0:
                    tx.event(
                        row.task_id,
                        "delivery_deferred",
                        sink=self.name,
                        delivery_id=row.delivery_id,
                        reason=mark.error,
                    )
                continue
            self._bury(tx, row, mark)

    def _bury(self, tx: Transaction, row: DueRow, mark: Mark) -> None:
        """A dead letter: kept until a person drops it, told over the other sinks."""
        tx.event(row.task_id, "delivery_dead", sink=self.name, delivery_id=row.delivery_id, reason=mark.error)
        message = f"{row.delivery_id} ({row.type}) was not delivered to {self.name} and is now a dead letter: {mark.error}"
        alert(tx, self.box, "dead_letter", message, key=f"{row.delivery_id}:{self.name}:{mark.attempts}", not_to=self.name,
              sink=self.name, delivery_id=row.delivery_id, about_task=row.task_id)  # fmt: skip

    def _tell_notices(self) -> None:
        """What an append sink noticed about its file (replaced, vanished, torn) becomes an alert."""
        notices: list[str] | None = getattr(self._sink, "notices", None)
        if not notices:
            return
        told, notices[:] = list(notices), []
        at = self.box.clock.now_us()

        def unit(tx: Transaction) -> None:
            for n, text in enumerate(told):
                alert(
                    tx,
                    self.box,
                    "sink_file",
                    f"{self.name}: {text}",
                    key=f"{self.name}:{at}:{n}",
                    sink=self.name,
                )

        self.box.journal.submit(unit)


class DeliveryLoop:
    """Starts and ends the runners as the config says; wakes them when a commit gives them rows."""

    def __init__(self, box: Box, exec_: Exec, draw: Callable[[], float] = random.random) -> None:
        self.box = box
        self.runners: dict[str, SinkRunner] = {}
        self._exec = exec_
        self._draw = draw
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed = Signal()
        box.on_settings.append(self._changed.set)

    def before_commit(self, tx: Transaction) -> None:
        """The journal's hook: sinks that get rows with this commit are woken after it."""
        given = tx.sinks_made_pending()
        if given:
            fresh: dict[str, list[DueRow]] = {name: [] for name in given}
            for sink, row in tx.fresh_rows:
                fresh[sink].append(row)
            tx.after_commit(lambda: self._offer(given, fresh))

    def _offer(self, given: dict[str, int], fresh: dict[str, list[DueRow]]) -> None:
        for name, rows in fresh.items():
            runner = self.runners.get(name)
            if runner is not None:
                runner.offer(rows, look=given[name] > len(rows))

    async def run(self) -> None:
        """Until cancelled. Raises JournalError (in a group)."""
        async with asyncio.TaskGroup() as group:
            while True:
                self.box.beat("delivery")
                await self._apply(group)
                await self._changed.wait(_IDLE_MAX_S)

    async def _apply(self, group: asyncio.TaskGroup) -> None:
        wanted = {**self.box.settings.sinks, **_BUILT_IN}
        for name, runner in list(self.runners.items()):
            if wanted.get(name) != runner.settings:
                await self._end(name)
        for name, settings in wanted.items():
            if name in self.runners:
                continue
            try:
                runner = SinkRunner(self.box, name, settings, self._exec, self._draw)
            except ConfigError as error:
                self.box.log.error("sink_unusable", sink=name, error=error.message)
                continue
            self.runners[name] = runner
            self._tasks[name] = group.create_task(runner.run(), name=f"sink:{name}")

    async def _end(self, name: str) -> None:
        """Its rows stay in the outbox, and are shown there; what was in flight is due again."""
        del self.runners[name]
        task = self._tasks.pop(name)
        task.cancel()
        await asyncio.wait([task])
        self.box.beats.pop(f"sink:{name}", None)
