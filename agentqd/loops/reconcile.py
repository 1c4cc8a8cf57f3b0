"""What the journal says is running against what the supervisor knows: at every Welcome, the same code after any crash.

The cases, for each running task (crash-states: "A claim without a worker"):
same instance    knows it running → adopted; ended → its end is taken; does not know it, so has not begun with it → `Run` is sent
                 again, or, if it was cancelled, the claim is withdrawn
other instance   exit.json → the true end; no `started` in this boot → the claim is withdrawn; else `lost`, once no survivor is left
"""

from __future__ import annotations

import os
import sqlite3

from agentqd.core.task import TaskRequest, read_task
from agentqd.core.verdict import CANCELLED
from agentqd.loops.box import Box
from agentqd.loops.finishing import AttemptEnd, withdraw_claim
from agentqd.loops.live import Live
from agentqd.loops.scheduling import Claim
from agentqd.loops.supervision import Supervision
from agentqd.storage import tasks as store
from agentqd.storage.tasks import AttemptRow, TaskRow
from agentqd.supervisor import wire
from agentqd.supervisor.exitfile import read_exit

Row = tuple[TaskRow, AttemptRow, TaskRequest, bytes, bytes | None]


async def reconciler(box: Box, supervision: Supervision) -> None:
    """The loop: one Welcome after another."""
    while True:
        welcome = await supervision.welcomes.get()
        if not supervision.welcomes.empty():
            continue  # an older connection's; the newer one says more
        await reconcile(box, supervision, welcome)
        supervision.open_for_claims(welcome)


async def reconcile(box: Box, supervision: Supervision, welcome: wire.Welcome) -> None:
    rows = await box.journal.read(_active)
    running = {(item.task, item.attempt): item for item in welcome.running}
    exited = {(item.task, item.attempt): item for item in welcome.exited}
    lost: list[Row] = []
    counts = {"adopted": 0, "ended": 0, "sent_again": 0, "withdrawn": 0, "lost": 0}
    for row in rows:
        task, attempt, request, _, _ = row
        key = (task.id, task.attempt)
        if key in running:
            _adopt(supervision, task, attempt, request, running[key])
            counts["adopted"] += 1
        elif key in exited:
            _end(supervision, task, request, exited[key])
            counts["ended"] += 1
        elif attempt.instance == welcome.instance:
            counts[await _begin(box, supervision, row)] += 1
        elif (ended := _from_disk(box, task)) is not None:
            _end(supervision, task, request, ended)
            counts["ended"] += 1
        elif attempt.boot_id == welcome.boot_id and _never_started(box, task):
            await _withdraw(box, supervision, task)
            counts["withdrawn"] += 1
        else:
            lost.append(row)
    known = {(row[0].id, row[0].attempt) for row in rows}
    for key, report in exited.items():
        if key not in known:
            supervision.link.send(wire.Forget(report.task, report.attempt))
    for key in running.keys() - known:
        box.log.error("unknown_worker", task=key[0], attempt=key[1], pid=running[key].pid)
    if lost:
        await _lose(box, supervision, welcome, lost)
        counts["lost"] = len(lost)
    if any(counts.values()):
        box.log.info("reconciled", supervisor_instance=welcome.instance, **counts)


def _active(connection: sqlite3.Connection) -> list[Row]:
    rows = []
    for task in store.active(connection):
        spec, prompt = store.spec_of(connection, task.seq)
        rows.append(
            (task, store.attempt_of(connection, task.seq, task.attempt), read_task(spec), spec, prompt)
        )
    return rows


def _adopt(
    supervision: Supervision, task: TaskRow, attempt: AttemptRow, request: TaskRequest, report: wire.Running
) -> None:
    if task.id not in supervision.live:
        supervision.live[task.id] = Live(task, request)
    supervision.on_running(report)
    if attempt.intent == CANCELLED and report.intent is None:
        supervision.send_end(task.id, task.attempt, CANCELLED)
    supervision.refresh_clocks(task.id)


async def _begin(box: Box, supervision: Supervision, row: Row) -> str:
    """This supervisor has not begun with it: what is done, as `counts` calls it."""
    task, attempt, _, spec, prompt = row
    if attempt.intent == CANCELLED:
        await _withdraw(box, supervision, task)
        return "withdrawn"
    supervision.launch(Claim(task, spec, prompt))
    if attempt.intent is not None:
        supervision.send_end(task.id, task.attempt, attempt.intent)
    return "sent_again"


async def _withdraw(box: Box, supervision: Supervision, task: TaskRow) -> None:
    await box.journal.commit(lambda tx: withdraw_claim(tx, box, task))
    supervision.live.pop(task.id, None)


def _end(supervision: Supervision, task: TaskRow, request: TaskRequest, ended: wire.Exited) -> None:
    live = supervision.live.setdefault(task.id, Live(task, request))
    if live.ended:
        return
    supervision.ended(ended)


def _from_disk(box: Box, task: TaskRow) -> wire.Exited | None:
    """The exit.json of an earlier instance."""
    try:
        folder = os.open(
            box.folders.attempt(task.id, task.attempt), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        )
    except OSError:
        return None
    try:
        ended = read_exit(folder)
    finally:
        os.close(folder)
    mine = ended is not None and ended.task == task.id and ended.attempt == task.attempt
    return ended if mine else None


def _never_started(box: Box, task: TaskRow) -> bool:
    return not os.path.lexists(f"{box.folders.attempt(task.id, task.attempt)}/started")


async def _lose(box: Box, supervision: Supervision, welcome: wire.Welcome, lost: list[Row]) -> None:
    """No second start while a process of the first is alive: survivors go first."""
    if not supervision.survivors_gone.is_set():
        box.log.warning(
            "survivors", count=len(welcome.survivors), pids=[item.pid for item in welcome.survivors][:20]
        )
        await supervision.survivors_gone.wait()
    for task, attempt, request, _, _ in lost:
        live = supervision.live.setdefault(task.id, Live(task, request))
        if live.ended:
            continue
        reason = "supervisor_lost" if attempt.boot_id == welcome.boot_id else "box_rebooted"
        supervision.end_lost(AttemptEnd(task.id, task.attempt, request, lost_reason=reason))
