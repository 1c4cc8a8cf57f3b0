"""Watch the work, not the processes: ready tasks that nobody starts, results that nobody gets, loops that stand still, disks that fill,
secrets that lie open."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from typing import Final

from agentqd.core.resolve import resolve
from agentqd.core.task import read_task
from agentqd.core.units import format_duration
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.loops.notices import SecretWatch
from agentqd.loops.supervision import Supervision
from agentqd.storage import tasks as store
from agentqd.storage.transaction import Transaction

US: Final = 1_000_000
_EVERY_S: Final = 5.0
_OVERDUE_ROWS: Final = 200


def stalled(box: Box) -> list[str]:
    """Loops that have not turned for too long."""
    now, most = box.clock.monotonic_s(), float(box.settings.alerts.stalled_loop)
    return [name for name, at in box.beats.items() if now - at > most]


class Liveness:
    def __init__(self, box: Box, supervision: Supervision) -> None:
        self.box = box
        self._supervision = supervision
        self._secrets = SecretWatch(box)
        self._reserve = f"{box.folders.state}/.reserve"

    async def run(self) -> None:
        """Until cancelled. Raises JournalError."""
        while True:
            self.box.beat("liveness")
            await self._check_disk()
            await self._check_queues()
            await self._check_deliveries()
            await self._check_loops()
            await self._secrets.look()
            await asyncio.sleep(_EVERY_S)

    def stalled(self) -> list[str]:
        return stalled(self.box)

    def _bucket(self) -> int:
        """Alerts that stay true are repeated, once in `alerts.repeat_every`."""
        return int(self.box.clock.now_us() / US / max(1.0, float(self.box.settings.alerts.repeat_every)))

    async def _check_disk(self) -> None:
        limits = self.box.settings.limits
        status = os.statvfs(self.box.folders.state)
        free = status.f_bavail * status.f_frsize
        low = free < int(limits.disk_free_min)
        if low and not self.box.disk_low:
            self.box.disk_low = True
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._reserve)  # so that delivery can still commit
            message = (
                f"only {free // 2**20} MiB are free in {self.box.folders.state} (limits.disk_free_min is"
                f" {int(limits.disk_free_min) // 2**20} MiB): intake has stopped; delivery goes on; free some space"
            )
            await self.box.journal.commit(
                lambda tx: alert(tx, self.box, "disk_low", message, key=str(self._bucket()), free_bytes=free)
            )
        elif not low:
            if self.box.disk_low:
                self.box.disk_low = False
                self.box.log.info("disk_recovered", free_bytes=free)
            if free > int(limits.disk_free_min) + 2 * int(limits.reserve_bytes):
                self._make_reserve(int(limits.reserve_bytes))

    def _make_reserve(self, size: int) -> None:
        if size == 0 or os.path.exists(self._reserve):
            return
        try:
            descriptor = os.open(
                self._reserve, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
            try:
                os.posix_fallocate(descriptor, 0, size)
            finally:
                os.close(descriptor)
        except OSError as error:
            self.box.log.warning("reserve_failed", error=str(error))

    async def _check_queues(self) -> None:
        """A ready task that is too old while slots are free: something is stuck."""
        allowed_us = int(self.box.settings.alerts.oldest_queued * US)
        old = self.box.clock.now_us() - allowed_us
        scheduler = self._supervision.scheduler
        if len(self._supervision.live) >= self.box.max_workers or self.box.draining:
            return

        def query(connection: sqlite3.Connection) -> list[tuple[str, str, int]]:
            found = []
            busy = store.active_counts(connection)
            for queue in {"default", *self.box.settings.queues}:
                if scheduler.is_paused(queue) or busy.get(queue, 0) >= self.box.concurrency(queue):
                    continue
                heads = store.heads(connection, queue, 1)
                if heads and heads[0].run_at < old and (heads[0].wake_at is None or heads[0].wake_at < old):
                    found.append((queue, heads[0].id, heads[0].run_at))
            return found

        for queue, task_id, since in await self.box.journal.read(query):
            waited = format_duration((self.box.clock.now_us() - since) / US)
            message = f"task {task_id} in queue {queue} has been ready for {waited} while slots are free"
            if not self._supervision.link.connected:
                message += ": no supervisor is connected"

            def unit(tx: Transaction, message: str = message, task_id: str = task_id) -> None:
                task = store.find(tx, task_id)
                alert(tx, self.box, "oldest_queued", message, task=task, key=str(self._bucket()))

            await self.box.journal.commit(unit)

    async def _check_deliveries(self) -> None:
        """Results that are past their task's `deliver_within`."""

        def query(connection: sqlite3.Connection) -> list[tuple[int, str, str, str, int]]:
            return connection.execute(
                "SELECT e.task_seq, e.delivery_id, o.sink, o.state, o.created_at FROM outbox o"
                " JOIN entries e ON e.seq = o.entry_seq"
                " WHERE o.state IN ('pending','delivering','retryable') AND e.task_seq IS NOT NULL AND e.kind != 'alert'"
                " ORDER BY o.created_at LIMIT ?",
                (_OVERDUE_ROWS,),
            ).fetchall()

        rows = await self.box.journal.read(query)
        if rows:  # rare: something is open right now
            await self.box.journal.commit(lambda tx: self._tell_overdue(tx, rows))

    def _tell_overdue(self, tx: Transaction, rows: list[tuple[int, str, str, str, int]]) -> None:
        for seq, entry_id, sink, state, since in rows:
            task = store.get(tx, seq)
            request = read_task(store.spec_of(tx, seq)[0])
            within = resolve(request, task.queue, task.runner, self.box.settings).deliver_within_s
            if within is None or tx.now_us < since + int(within * US):
                continue
            message = f"{entry_id} of task {task.id} ({task.name}) is not delivered to {sink} within {format_duration(within)}: {state}"
            alert(
                tx,
                self.box,
                "undelivered",
                message,
                task=task,
                key=f"{entry_id}:{sink}",
                group=sink,
                sink=sink,
                delivery_id=entry_id,
            )

    async def _check_loops(self) -> None:
        for name in self.stalled():
            message = f"the loop {name} has not turned for more than {format_duration(float(self.box.settings.alerts.stalled_loop))}"
            key = f"{name}:{self._bucket()}"
            await self.box.journal.commit(
                lambda tx, message=message, key=key, name=name: alert(
                    tx, self.box, "stalled_loop", message, key=key, loop=name
                )  # type: ignore[misc]
            )
