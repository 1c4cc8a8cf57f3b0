"""The workers, as the daemon knows them: started from claims, watched through the supervisor's reports, ended as people ask.

Invariants:
1. Nothing starts for a claim that is not durable: a `Run` sent before the commit is held until `Go`.
2. The journal says which tasks are running; what is kept here in memory can be lost at any instant (reconcile.py).
What ended is `ends.py`'s, what is handed over before it is `handover.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

import msgspec

from agentqd.core.errors import SupervisorUnavailable
from agentqd.core.lifecycle import Event, State
from agentqd.core.resolve import resolve
from agentqd.core.task import TaskRequest, read_task
from agentqd.core.units import format_time
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.loops.ends import Ends
from agentqd.loops.execs import Execs
from agentqd.loops.finishing import AttemptEnd, withdraw_claim
from agentqd.loops.handover import Handover
from agentqd.loops.launch import LaunchError, build_run, clocks
from agentqd.loops.link import Link
from agentqd.loops.live import Live, Workers
from agentqd.loops.scheduling import Claim, Scheduler, Target
from agentqd.storage import tasks as store
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction
from agentqd.supervisor import wire
from agentqd.system.failpoints import failpoint
from agentqd.system.inotify import Watcher

_NOTE_AFTER_S: Final = (
    0.02  # a worker that lives so long gets its pid into the journal and a watch on its drop folder
)


class Supervision:
    """Wires claims and reports; `finisher`, `watcher` and `handover` are its loops."""

    def __init__(self, box: Box, inotify: Watcher, *, may_start_supervisor: bool) -> None:
        self.box = box
        self.link = Link(box, self.on_welcome, self._on_report, self._on_lost, may_start=may_start_supervisor)
        self.execs = Execs(self.link)
        self.scheduler = Scheduler(box, self.on_claims, self.prepare)
        self.welcomes: asyncio.Queue[wire.Welcome] = asyncio.Queue()
        self.survivors_gone = asyncio.Event()
        self._workers = Workers(box, inotify, self.link)
        self.live = self._workers.live
        self._ends = Ends(self._workers, self.execs)
        self._handover = Handover(self._workers)
        self._prepared: dict[str, tuple[int, TaskRequest]] = {}
        self.finisher = self._ends.finisher
        self.watcher = self._handover.watcher
        self.handover = self._handover.handover
        box.on_settings.append(self._new_settings)

    def connected(self) -> bool:
        return self.link.connected

    def close(self) -> None:
        self._workers.threads.shutdown(wait=True, cancel_futures=True)

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
            self._ends.put(AttemptEnd(task.id, task.attempt, live.request, ended))
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
            if report.task in self.live:
                self.live[report.task].ending = True
            self._workers.submit(
                lambda tx: self._record_ending(tx, report.task, report.attempt, report.intent)
            )
        elif isinstance(report, wire.Stuck):
            self._workers.submit(lambda tx: self._record_stuck(tx, report))
        elif isinstance(report, wire.SurvivorsGone):
            self.survivors_gone.set()

    def _on_exited(self, report: wire.Exited) -> None:
        """An end; two of them say that this supervisor never ran the attempt."""
        self.box.stir()
        live = self.live.get(report.task)
        error = report.error if report.pid is None else None
        if live is None or live.task.attempt != report.attempt or error is None:
            self._ends.put(report)
        elif error.startswith(wire.NOT_STARTED):
            if report.intent is None:
                self.scheduler.target = None  # for a moment: it would only be handed back again
                asyncio.get_running_loop().call_later(1.0, self._claim_again)
            del self.live[report.task]
            self._workers.submit(lambda tx: withdraw_claim(tx, self.box, live.task))
        elif error.startswith(wire.OTHER_INSTANCE):
            self._ends.put(
                AttemptEnd(report.task, report.attempt, live.request, lost_reason="supervisor_lost")
            )
        else:
            self._ends.put(report)

    def on_running(self, report: wire.Running) -> None:
        live = self.live.get(report.task)
        if live is None or live.task.attempt != report.attempt:
            return
        live.running = report
        live.ending = report.intent is not None
        loop = asyncio.get_running_loop()
        live.note = loop.call_later(_NOTE_AFTER_S, self._note_start, live, report)

    def _note_start(self, live: Live, report: wire.Running) -> None:
        """It lives on: its pid into the journal (nobody waits for that commit), a watch on its drop folder."""
        live.note = None
        self._workers.submit(lambda tx: self._record_start(tx, report))
        self._handover.watch(live)
        self.box.task_changed(report.task)

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
        self._workers.send_end(task_id, attempt, reason, after_s)

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

    def ended(self, report: wire.Exited) -> None:
        """An end that reconcile has found."""
        self._ends.put(report)

    def end_lost(self, end: AttemptEnd) -> None:
        """An attempt whose end nobody knows (reconcile)."""
        self._ends.put(end)

    # Drop folders while workers run.
