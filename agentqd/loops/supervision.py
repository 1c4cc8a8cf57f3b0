"""The workers, as the daemon knows them: started from claims, watched through the supervisor's reports, ended in one transaction.

Invariants:
1. Nothing starts for a claim that is not durable: a `Run` sent before the commit is held until `Go`; `Forget` only after the end is durable.
2. The journal says which tasks are running; what is kept here in memory can be lost at any instant (reconcile.py).
3. An end is recorded once: `finish_attempt` is guarded by the state it expects.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import msgspec

from agentqd.core.errors import JournalError, SupervisorUnavailable
from agentqd.core.lifecycle import ACTIVE_STATES, Event, State
from agentqd.core.resolve import resolve
from agentqd.core.task import TaskRequest, read_task
from agentqd.core.units import format_time
from agentqd.core.verdict import RESULT_GRACE
from agentqd.loops import dropfolder, evidence
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.loops.dropfolder import RESULT_KEY, Identity, Scan
from agentqd.loops.execs import Execs
from agentqd.loops.finishing import AttemptEnd, finish_attempt, withdraw_claim
from agentqd.loops.launch import LaunchError, build_run, clocks
from agentqd.loops.link import Link
from agentqd.loops.scheduling import Claim, Scheduler, Target
from agentqd.storage import tasks as store
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction
from agentqd.supervisor import wire
from agentqd.system.failpoints import failpoint
from agentqd.system.inotify import InotifyUnavailable, Overflow, Watcher

_NOTE_AFTER_S: Final = (
    0.02  # a worker that lives so long gets its pid into the journal and a watch on its drop folder
)
_FSYNC_TRIES: Final = 3
_BATCH_MAX: Final = 256
_WATCH_MASK: Final = 0x00000008 | 0x00000080 | 0x01000000  # IN_CLOSE_WRITE, IN_MOVED_TO, IN_ONLYDIR


class Live:
    """One attempt that is running as far as the journal knows."""

    __slots__ = ("ended", "keys", "note", "request", "running", "scanning", "taken", "task")

    def __init__(self, task: TaskRow, request: TaskRequest) -> None:
        self.task = task
        self.request = request
        self.running: wire.Running | None = None
        self.taken: dict[str, Identity] = {}
        self.keys: set[str] = set()
        self.note: asyncio.TimerHandle | None = None
        self.scanning = asyncio.Lock()
        self.ended = False


class Supervision:
    """Wires claims, reports and drop folders; `finisher` and `watcher` are its loops."""

    def __init__(self, box: Box, inotify: Watcher, *, may_start_supervisor: bool) -> None:
        self.box = box
        self.inotify = inotify
        self.live: dict[str, Live] = {}
        self._prepared: dict[str, tuple[int, TaskRequest]] = {}
        self.scheduler = Scheduler(box, self.on_claims, self.prepare)
        self.link = Link(box, self.on_welcome, self._on_report, self._on_lost, may_start=may_start_supervisor)
        self.execs = Execs(self.link)
        self.welcomes: asyncio.Queue[wire.Welcome] = asyncio.Queue()
        self.survivors_gone = asyncio.Event()
        self._ends: asyncio.Queue[wire.Exited | AttemptEnd] = asyncio.Queue()
        self._handovers: asyncio.Queue[Live] = asyncio.Queue()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="evidence")
        box.on_settings.append(self._new_settings)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    # Claims.

    def on_claims(self, claims: list[Claim]) -> None:
        for claim in claims:
            self.launch(claim)

    def prepare(self, claims: list[Claim]) -> None:
        """While their commit is under way: let the supervisor make the folders ready."""
        for claim in claims:
            task = claim.task
            request = read_task(claim.spec)
            try:
                run = build_run(self.box, task, request, claim.prompt)
                self.link.send(msgspec.structs.replace(run, hold=True))
            except (SupervisorUnavailable, LaunchError):
                continue  # told when the claim is durable
            self._prepared[task.id] = (task.attempt, request)

    def launch(self, claim: Claim) -> None:
        """Send a durable claim to the supervisor. Without one, the next Welcome finds it in the journal."""
        task = claim.task
        attempt, request = self._prepared.pop(task.id, (0, None))
        if request is not None and attempt == task.attempt and self.link.connected:
            failpoint("claimed")
            self.live[task.id] = Live(task, request)
            self.link.send(wire.Go(task.id, task.attempt))
            self.box.task_changed(task.id)
            return
        live = Live(task, read_task(claim.spec))
        self.live[task.id] = live
        failpoint("claimed")
        try:
            self.link.send(build_run(self.box, task, live.request, claim.prompt))
        except SupervisorUnavailable:
            return
        except LaunchError as error:
            now = self.box.clock.now_us()
            ended = wire.Exited(task.id, task.attempt, "", "", error=str(error), ended_at=now)
            self._ends.put_nowait(AttemptEnd(task.id, task.attempt, live.request, ended))
        self.box.task_changed(task.id)

    # Reports.

    def on_welcome(self, welcome: wire.Welcome) -> None:
        self.survivors_gone.clear()
        if not welcome.survivors:
            self.survivors_gone.set()
        self.welcomes.put_nowait(welcome)

    def open_for_claims(self, welcome: wire.Welcome) -> None:
        """What was running before is sorted out: new claims are made for this supervisor."""
        if self.link.welcome is welcome:
            self.scheduler.target = Target(welcome.instance, welcome.boot_id)
            self.scheduler.wake()

    def _claim_again(self) -> None:
        if self.link.welcome is not None and self.welcomes.empty():
            self.open_for_claims(self.link.welcome)

    def _on_lost(self) -> None:
        self._prepared.clear()
        self.scheduler.target = None
        self.execs.connection_lost()

    def _on_report(self, report: wire.Report) -> None:
        if isinstance(report, wire.Running):
            self.on_running(report)
        elif isinstance(report, wire.Exited):
            self._on_exited(report)
        elif isinstance(report, wire.ExecEnded):
            self.execs.ended(report)
        elif isinstance(report, wire.Ending):
            self._submit(lambda tx: self._record_ending(tx, report.task, report.attempt, report.intent))
        elif isinstance(report, wire.Stuck):
            self._submit(lambda tx: self._record_stuck(tx, report))
        elif isinstance(report, wire.SurvivorsGone):
            self.survivors_gone.set()

    def _on_exited(self, report: wire.Exited) -> None:
        """An end; two of them say that this supervisor never ran the attempt."""
        live = self.live.get(report.task)
        error = report.error if report.pid is None else None
        if live is None or live.task.attempt != report.attempt or error is None:
            self._ends.put_nowait(report)
        elif error.startswith(wire.NOT_STARTED):
            self.scheduler.target = None  # for a moment: it would only be handed back again
            asyncio.get_running_loop().call_later(1.0, self._claim_again)
            del self.live[report.task]
            self._submit(lambda tx: withdraw_claim(tx, self.box, live.task))
        elif error.startswith(wire.OTHER_INSTANCE):
            self._ends.put_nowait(
                AttemptEnd(report.task, report.attempt, live.request, lost_reason="supervisor_lost")
            )
        else:
            self._ends.put_nowait(report)

    def on_running(self, report: wire.Running) -> None:
        live = self.live.get(report.task)
        if live is None or live.task.attempt != report.attempt:
            return
        live.running = report
        loop = asyncio.get_running_loop()
        live.note = loop.call_later(_NOTE_AFTER_S, self._note_start, live, report)

    def _note_start(self, live: Live, report: wire.Running) -> None:
        """It lives on: its pid into the journal (nobody waits for that commit), a watch on its drop folder."""
        live.note = None
        folder = self.box.folders.attempt(report.task, report.attempt)
        try:
            self.inotify.add(f"{folder}/outbox", _WATCH_MASK, report.task)
        except (OSError, InotifyUnavailable) as error:
            self.box.log.warning("watch_failed", task=report.task, error=str(error))
        self._submit(lambda tx: self._record_start(tx, report))
        self._rescan_soon(live)
        self.box.task_changed(report.task)

    def _rescan_soon(self, live: Live) -> None:
        self._handovers.put_nowait(live)

    def _submit(self, unit: Any) -> None:
        """A unit that nobody waits for; a failed journal is told elsewhere, a refused unit is a bug and logged."""
        future = self.box.journal.submit_lazily(unit)
        future.add_done_callback(self._unit_done)

    def _unit_done(self, future: asyncio.Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, JournalError):
            self.box.log.error("unit_failed", error=repr(error))

    def _record_start(self, tx: Transaction, report: wire.Running) -> None:
        task = store.find(tx, report.task)
        if (
            task is None
            or task.attempt != report.attempt
            or task.state not in {State.RUNNING, State.STOPPING}
        ):
            return
        attempt = store.attempt_of(tx, task.seq, report.attempt)
        if attempt.pid is not None:
            return
        store.update_attempt(
            tx,
            task.seq,
            report.attempt,
            pid=report.pid,
            pid_start=report.pid_start,
            started_at=report.started_at,
        )
        tx.event(
            task.id,
            "worker_started",
            attempt=report.attempt,
            pid=report.pid,
            at=format_time(report.started_at),
        )

    def _record_ending(self, tx: Transaction, task_id: str, attempt: int, intent: str) -> None:
        task = store.find(tx, task_id)
        if task is None or task.attempt != attempt or task.state is not State.RUNNING:
            return
        store.move_task(
            tx, task, Event.STOP_BEGUN, said={"attempt": attempt, "intent": intent}, reason=intent
        )
        tx.later(lambda: self.box.task_changed(task_id))

    def _record_stuck(self, tx: Transaction, report: wire.Stuck) -> None:
        task = store.find(tx, report.task)
        if task is None or task.attempt != report.attempt:
            return
        self._record_ending(tx, report.task, report.attempt, "stuck")
        pids = ", ".join(map(str, report.pids[:10]))
        message = f"processes of task {task.id} ({task.name}) do not die after SIGKILL: {pids}; the task stays stopping until they are gone"
        alert(tx, self.box, "stuck", message, task=task, key=str(report.attempt), pids=report.pids[:50])

    # A person's word.

    def end_running(self, tx: Transaction, task: TaskRow, reason: str) -> TaskRow:
        """Part of a unit: record that a running task is to be ended, and tell the supervisor after the commit."""
        moved = task
        if task.state is State.RUNNING:
            said = {"attempt": task.attempt, "intent": reason}
            moved = store.move_task(tx, task, Event.STOP_BEGUN, said=said, reason=reason)
        store.update_attempt(tx, task.seq, task.attempt, intent=reason)
        tx.after_commit(lambda: self.send_end(task.id, task.attempt, reason))
        return moved

    def send_end(self, task_id: str, attempt: int, reason: str, after_s: float = 0.0) -> None:
        with contextlib.suppress(SupervisorUnavailable):  # the next Welcome sends it again
            self.link.send(wire.End(task_id, attempt, reason, after_s))
        self.box.task_changed(task_id)

    def _new_settings(self) -> None:
        """A config edit applies to the clocks of running tasks too (a value of the task's own beats it)."""
        for task_id in self.live:
            self.refresh_clocks(task_id)
        self.scheduler.wake()

    def refresh_clocks(self, task_id: str) -> None:
        live = self.live[task_id]
        resolved = resolve(live.request, live.task.queue, live.task.runner, self.box.settings)
        now = self.box.clock.now_us()
        with contextlib.suppress(SupervisorUnavailable):
            self.link.send(wire.SetClocks(live.task.id, live.task.attempt, clocks(resolved, live.task, now)))

    # Ends.

    async def finisher(self) -> None:
        """Take ends as they come; those that arrive together share file work and commit."""
        async with asyncio.TaskGroup() as slow:
            while True:
                batch = [await self._ends.get()]
                while not self._ends.empty() and len(batch) < _BATCH_MAX:
                    batch.append(self._ends.get_nowait())
                self.box.beat("finisher")
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
        expect = live.request.expect if live is not None else None
        return expect is not None and (expect.check is not None or bool(expect.files))

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
            collected = await loop.run_in_executor(self._threads, self._collect, ends)
        ready = [await self._with_check(end) for end in collected]
        failpoint("evidence_durable")

        self._record_ends(ready)

    def _record_ends(self, ends: list[AttemptEnd]) -> None:
        def unit(tx: Transaction) -> None:
            for end in ends:
                finish_attempt(tx, self.box, end)

        future = self.box.journal.submit(unit)
        future.add_done_callback(lambda done: self._finished(done, ends))

    def _left_nothing(self, item: wire.Exited | AttemptEnd) -> bool:
        """No output and empty folders, and nothing expected: nothing to read or fsync, no thread to be asked for it."""
        if isinstance(item, AttemptEnd) or item.pid is None:
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
            self._forget(task_id, attempt)
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
            spawned = end.exited is not None and end.exited.pid is not None
            collected.append(self._look(live, end) if spawned else end)
        return collected

    def _look(self, live: Live, end: AttemptEnd) -> AttemptEnd:
        exited = end.exited
        assert exited is not None
        folder = self.box.folders.attempt(end.task_id, end.attempt)
        how: dropfolder.How = "exited" if exited.signal is None and exited.intent is None else "killed"
        workdir = resolve(live.request, live.task.queue, live.task.runner, self.box.settings).workdir
        asked = evidence.Asked(folder, workdir, end.request.expect, exited.stdout_bytes, exited.stderr_bytes)
        for left in range(_FSYNC_TRIES - 1, -1, -1):
            try:
                most = int(self.box.settings.limits.entry_bytes_max)
                scan = dropfolder.scan(f"{folder}/outbox", self.blobs, live.taken, how, most)
                seen = evidence.collect(asked)
            except OSError as error:
                if left == 0:
                    reason = ("io_error", f"what the worker left could not be made durable: {error}")
                    return msgspec.structs.replace(end, failed_reason=reason)
            else:
                seen = msgspec.structs.replace(seen, problems=[*seen.problems, *scan.problems])
                return msgspec.structs.replace(end, seen=seen, handed=scan.handed, keys=frozenset(live.keys))
        raise AssertionError("unreachable")

    @property
    def blobs(self) -> str:
        return f"{self.box.folders.state}/blobs"

    async def _with_check(self, end: AttemptEnd) -> AttemptEnd:
        """Run the task's own check, through the supervisor, where the rest of the evidence leaves room for success."""
        check = end.request.expect.check if end.request.expect is not None else None
        exited = end.exited
        if check is None or exited is None:
            return end
        if exited.intent != RESULT_GRACE and (exited.intent is not None or exited.exit_code != 0):
            return end
        folder = self.box.folders.attempt(end.task_id, end.attempt)
        passed, detail = await self.execs.check(self.box, end, check, folder)
        return msgspec.structs.replace(end, check_passed=passed, check_detail=detail)

    def _finished(self, done: asyncio.Future[Any], ends: list[AttemptEnd]) -> None:
        self._unit_done(done)
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
                    self.inotify.remove(end.task_id)
            if end.exited is None or end.exited.instance:
                self._forget(end.task_id, end.attempt)

    def _record_apart(self, ends: list[AttemptEnd], error: BaseException) -> None:
        """An end that breaks this program costs itself only: the others are recorded without it, it ends as failed."""
        if len(ends) > 1:
            for end in ends:
                self._record_ends([end])
        elif ends[0].failed_reason is None:
            reason = ("internal_error", f"agentqd failed on this end: {error!r}; please report it"[:400])
            self._record_ends([msgspec.structs.replace(ends[0], seen=None, handed=[], failed_reason=reason)])

    def _forget(self, task_id: str, attempt: int) -> None:
        with contextlib.suppress(SupervisorUnavailable):  # told again at the next Welcome
            self.link.send(wire.Forget(task_id, attempt))

    def ended(self, report: wire.Exited) -> None:
        """An end that reconcile has found."""
        self._ends.put_nowait(report)

    def end_lost(self, end: AttemptEnd) -> None:
        """An attempt whose end nobody knows (reconcile)."""
        self._ends.put_nowait(end)

    # Drop folders while workers run.

    async def watcher(self) -> None:
        """inotify hints on the drop folders of running workers, and the slow rescan behind them."""
        while True:
            self.box.beat("handover")
            hints = await self.inotify.wait(float(self.box.settings.limits.rescan_every))
            if isinstance(hints, Overflow) or not hints:
                chosen = [live for live in self.live.values() if live.running is not None]
            else:
                labels = {hint.label for hint in hints}
                chosen = [self.live[label] for label in labels if label in self.live]
            for live in chosen:
                self._rescan_soon(live)

    async def handover(self) -> None:
        """Take what running workers hand over, one drop folder after another."""
        while True:
            live = await self._handovers.get()
            if not live.ended:
                await self._take_handed(live)

    async def _take_handed(self, live: Live) -> None:
        loop = asyncio.get_running_loop()
        folder = f"{self.box.folders.attempt(live.task.id, live.task.attempt)}/outbox"
        most = int(self.box.settings.limits.entry_bytes_max)
        try:
            scan: Scan = await loop.run_in_executor(
                self._threads, dropfolder.scan, folder, self.blobs, dict(live.taken), "alive", most
            )
        except OSError as error:
            self.box.log.error("handover_failed", task=live.task.id, error=str(error))
            return
        if not scan.handed or live.ended:
            return

        def unit(tx: Transaction) -> set[str]:
            task = store.get(tx, live.task.seq)
            if task.state not in {State.RUNNING, State.STOPPING} or task.attempt != live.task.attempt:
                return set()
            return dropfolder.record(tx, self.box, task, live.request, live.task.attempt, scan.handed)

        failpoint("handover_read")
        keys = await self.box.journal.commit(unit)
        live.keys |= keys
        for item in scan.handed:
            live.taken[item.key] = item.identity
        if RESULT_KEY in keys:
            resolved = resolve(live.request, live.task.queue, live.task.runner, self.box.settings)
            self.send_end(live.task.id, live.task.attempt, RESULT_GRACE, resolved.result_grace_s)
        self.box.task_changed(live.task.id)


def _of(item: wire.Exited | AttemptEnd) -> tuple[str, int]:
    return (item.task_id, item.attempt) if isinstance(item, AttemptEnd) else (item.task, item.attempt)
