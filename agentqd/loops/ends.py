"""Ends of attempts: evidence collected and made durable, judged, recorded in one transaction, and only then forgotten.

Invariants:
1. `Forget` is sent only after the end is durable. 2. An end is recorded once: `finish_attempt` is guarded by the state it expects.
3. What a worker left is durable before its end is recorded (crash-states 18, 19).
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections import deque
from typing import Any, Final

import msgspec

from agentqd.core.config_rules import effective_runner
from agentqd.core.errors import JournalError
from agentqd.core.lifecycle import ACTIVE_STATES
from agentqd.core.limits import LOOP_TURN_S
from agentqd.core.resolve import resolve
from agentqd.core.task import read_task
from agentqd.core.usage_limit import Limit, find_limit
from agentqd.core.verdict import RESULT_GRACE
from agentqd.loops import dropfolder, evidence, undeclared
from agentqd.loops.box import Signal
from agentqd.loops.execs import Execs
from agentqd.loops.finishing import AttemptEnd, finish_attempt
from agentqd.loops.live import Live, Workers
from agentqd.storage import blobs
from agentqd.storage import tasks as store
from agentqd.storage.paths import expand_workdir
from agentqd.storage.transaction import Transaction
from agentqd.supervisor import wire
from agentqd.system.failpoints import failpoint

_FSYNC_TRIES: Final = 3
_BATCH_MAX: Final = 256


class Ends:
    """`put` takes an end; `finisher` is the loop that records them."""

    def __init__(self, workers: Workers, execs: Execs) -> None:
        self.box = workers.box
        self.live = workers.live
        self.execs = execs
        self._workers = workers
        self._ends: deque[wire.Exited | AttemptEnd] = deque()
        self._came = Signal()

    def put(self, end: wire.Exited | AttemptEnd) -> None:
        """As the supervisor told it, or as reconcile found it."""
        self._ends.append(end)
        self._came.set()

    async def finisher(self) -> None:
        """Take ends as they come; those that arrive together share file work and commit."""
        async with asyncio.TaskGroup() as slow:
            while True:
                self.box.beat("finisher")
                if not self._ends:
                    await self._came.wait(LOOP_TURN_S)
                    continue
                batch = [self._ends.popleft() for _ in range(min(len(self._ends), _BATCH_MAX))]
                quick = [item for item in batch if not self._is_slow(item)]
                for item in batch:
                    if self._is_slow(item):
                        slow.create_task(self._finish_slowly(item))
                if quick:
                    await self._finish(quick)

    def _is_slow(self, item: wire.Exited | AttemptEnd) -> bool:
        """Ends that need a foreign command, or hash large files, do not hold up the others."""
        if isinstance(item, AttemptEnd):
            return False
        live = self.live.get(item.task)
        if live is None:
            return False
        expect = live.request.expect
        return self._checks_writes(live) or (
            expect is not None and (expect.check is not None or bool(expect.files))
        )

    def _checks_writes(self, live: Live) -> bool:
        runner = self.box.settings.runners.get(live.task.runner)
        return runner is not None and runner.check_writes

    async def _finish_slowly(self, item: wire.Exited | AttemptEnd) -> None:
        await self._finish([item])

    async def _finish(self, batch: list[wire.Exited | AttemptEnd]) -> None:
        loop = asyncio.get_running_loop()
        ends = []
        for item in batch:
            live = self._live_of(item) or await self._from_journal(item)
            if live is not None:
                live.ended = True
                ends.append((live, item))
        failpoint("end_received")
        if all(self._left_nothing(item) for _, item in ends):
            collected = [self._nothing_left(live, item) for live, item in ends]
        else:
            work = loop.run_in_executor(self._workers.threads, self._collect, ends)
            collected = await self.box.working("finisher", work)
        ready = [await self._with_undeclared(await self._with_check(end)) for end in collected]
        failpoint("evidence_durable")

        self._record_ends(ready)

    def _record_ends(self, ends: list[AttemptEnd]) -> None:
        def unit(tx: Transaction) -> None:
            for end in ends:
                finish_attempt(tx, self.box, end)
                if any(item.copies for item in end.handed):
                    self._let_go_of_spare(tx, end)

        future = self.box.journal.submit(unit)
        future.add_done_callback(lambda done: self._finished(done, ends))

    def _let_go_of_spare(self, tx: Transaction, end: AttemptEnd) -> None:
        task = store.find(tx, end.task_id)
        spare = dropfolder.unnamed(tx, 0 if task is None else task.seq, end.handed)
        tx.later(lambda: self._workers.let_go(spare))

    def _left_nothing(self, item: wire.Exited | AttemptEnd) -> bool:
        """No output and empty folders, and nothing expected: nothing to read or fsync, no thread to be asked for it."""
        if isinstance(item, AttemptEnd):
            return item.lost_reason is None
        if item.pid is None:
            return True
        if item.stdout_bytes or item.stderr_bytes or self._is_slow(item):
            return False
        folder = self.box.folders.attempt(item.task, item.attempt)
        try:
            return not (os.listdir(f"{folder}/outbox") or os.listdir(f"{folder}/work"))
        except OSError:
            return False

    @staticmethod
    def _nothing_left(live: Live, item: wire.Exited | AttemptEnd) -> AttemptEnd:
        if isinstance(item, AttemptEnd):
            return item
        keys = frozenset(live.keys)
        return AttemptEnd(item.task, item.attempt, live.request, item, seen=evidence.NOTHING, keys=keys)

    def _live_of(self, item: wire.Exited | AttemptEnd) -> Live | None:
        task_id, attempt = _of(item)
        live = self.live.get(task_id)
        return live if live is not None and live.task.attempt == attempt else None

    async def _from_journal(self, item: wire.Exited | AttemptEnd) -> Live | None:
        """An end of an attempt that is not in memory (told before reconcile came to it). None: long recorded, forget it."""
        task_id, attempt = _of(item)

        def query(connection: sqlite3.Connection) -> Live | None:
            task = store.find(connection, task_id)
            if task is None or task.attempt != attempt or task.state not in ACTIVE_STATES:
                return None
            return Live(task, read_task(store.spec_of(connection, task.seq)[0]))

        live = await self.box.journal.read(query)
        if live is None:
            self._workers.forget(task_id, attempt)
        return live

    def _collect(self, ends: list[tuple[Live, wire.Exited | AttemptEnd]]) -> list[AttemptEnd]:
        """On the evidence thread: read, hash and fsync what the attempts left behind."""
        collected = []
        for live, item in ends:
            end = (
                item
                if isinstance(item, AttemptEnd)
                else AttemptEnd(item.task, item.attempt, live.request, item)
            )
            if (
                end.lost_reason is not None
            ):  # nobody saw it end; what it has left says when it began and what it wrote
                found = evidence.look_around(self.box.folders.attempt(end.task_id, end.attempt))
                end = msgspec.structs.replace(end, found=found)
            spawned = end.exited is not None and end.exited.pid is not None
            collected.append(self._look(live, end) if spawned or end.found is not None else end)
        return collected

    def _look(self, live: Live, end: AttemptEnd) -> AttemptEnd:
        exited, found = end.exited, end.exited or end.found
        assert found is not None
        folder = self.box.folders.attempt(end.task_id, end.attempt)
        by_itself = exited is not None and exited.signal is None and exited.intent is None
        how: dropfolder.How = "exited" if by_itself else "killed"
        workdir = self._workdir(live)
        asked = evidence.Asked(folder, workdir, end.request.expect, found.stdout_bytes, found.stderr_bytes)
        for left in range(_FSYNC_TRIES - 1, -1, -1):
            try:
                most = int(self.box.settings.limits.entry_bytes_max)
                scan = dropfolder.scan(f"{folder}/outbox", self._workers.blobs, live.taken, how, most)
                try:
                    seen = evidence.collect(asked)
                except OSError:
                    blobs.remove(path for item in scan.handed for path in item.copies)
                    raise
            except OSError as error:
                if left == 0:
                    reason = ("io_error", f"what the worker left could not be made durable: {error}")
                    return msgspec.structs.replace(end, failed_reason=reason)
            else:
                seen = msgspec.structs.replace(seen, problems=[*seen.problems, *scan.problems])
                return msgspec.structs.replace(
                    end,
                    seen=seen,
                    handed=scan.handed,
                    keys=frozenset(live.keys),
                    limit=self._limit(live, exited, folder),
                )
        raise AssertionError("unreachable")

    def _limit(self, live: Live, exited: wire.Exited | None, folder: str) -> Limit | None:
        """Did it fail because its runner's usage limit is reached? Never asked of what we ended, or of what succeeded."""
        if exited is None:
            return None
        runner = effective_runner(self.box.settings, live.task.runner)
        if runner is None or not runner.limit_signs or exited.intent is not None or exited.signal is not None:
            return None
        stdout, stderr = evidence.last_words(folder, exited.stdout_bytes, exited.stderr_bytes)
        now = self.box.clock.now_us()
        return find_limit(
            runner.limit_signs, runner.result, stdout, stderr, now, exited_zero=exited.exit_code == 0
        )

    def _workdir(self, live: Live) -> str | None:
        """Where it worked, if the task or the config named a place; None: in its own work folder."""
        return expand_workdir(
            resolve(live.request, live.task.queue, live.task.runner, self.box.settings).workdir
        )

    async def _with_check(self, end: AttemptEnd) -> AttemptEnd:
        """Run the task's own check, through the supervisor, where the rest of the evidence leaves room for success."""
        check = end.request.expect.check if end.request.expect is not None else None
        exited = end.exited
        if check is None or exited is None:
            return end
        if exited.intent != RESULT_GRACE and (exited.intent is not None or exited.exit_code != 0):
            return end
        folder = self.box.folders.attempt(end.task_id, end.attempt)
        live = self.live.get(end.task_id)
        cwd = (None if live is None else self._workdir(live)) or f"{folder}/work"
        passed, detail = await self.execs.check(self.box, end, check, folder, cwd)
        return msgspec.structs.replace(end, check_passed=passed, check_detail=detail)

    async def _with_undeclared(self, end: AttemptEnd) -> AttemptEnd:
        """What the attempt changed below its workdir without having declared it, where the runner asks for that."""
        live = self.live.get(end.task_id)
        if live is None or end.exited is None or end.exited.pid is None or not self._checks_writes(live):
            return end
        workdir = self._workdir(live)
        if workdir is None:
            return end
        folders = self.box.folders
        asked = undeclared.Asked(
            workdir,
            folders.attempt(end.task_id, end.attempt),
            end.request.writes_to or [],
            (folders.state, folders.runtime),
        )
        found = await asyncio.to_thread(undeclared.look, asked)
        return msgspec.structs.replace(end, undeclared=found)

    def _finished(self, done: asyncio.Future[Any], ends: list[AttemptEnd]) -> None:
        self._workers.unit_done(done)
        error = None if done.cancelled() else done.exception()
        if done.cancelled() or isinstance(error, JournalError):
            return
        if error is not None:
            self._record_apart(ends, error)
            return
        failpoint("end_recorded")
        for end in ends:
            live = self.live.get(end.task_id)
            if live is not None and live.task.attempt == end.attempt:
                del self.live[end.task_id]
                if live.note is not None:
                    live.note.cancel()
                elif live.running is not None:
                    self._workers.inotify.remove(end.task_id)
            if end.exited is None or end.exited.instance:
                self._workers.forget(end.task_id, end.attempt)

    def _record_apart(self, ends: list[AttemptEnd], error: BaseException) -> None:
        """An end that breaks this program costs itself only: the others are recorded without it, it ends as failed."""
        if len(ends) > 1:
            for end in ends:
                self._record_ends([end])
        elif ends[0].failed_reason is None:
            self._workers.let_go([path for item in ends[0].handed for path in item.copies])
            reason = ("internal_error", f"agentqd failed on this end: {error!r}; please report it"[:400])
            self._record_ends([msgspec.structs.replace(ends[0], seen=None, handed=[], failed_reason=reason)])


def _of(item: wire.Exited | AttemptEnd) -> tuple[str, int]:
    return (item.task_id, item.attempt) if isinstance(item, AttemptEnd) else (item.task, item.attempt)
