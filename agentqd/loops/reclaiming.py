"""A write claim that has lapsed: released, alerted about, and made again before its task starts again. Journal units.

What may be found after a crash at any instant, each in one transaction:
1. The claim is there (it has not lapsed, or its task lives): nothing to do.
2. The claim is gone, its task has not ended and has no process: it claims again, under its own policy, in the very
   transaction that would make it ready (`claim_again`). So no task of ours runs without the claim that it declared.
"""

from __future__ import annotations

import msgspec

from agentqd.core.errors import InvalidTask
from agentqd.core.lifecycle import Event, Result, State
from agentqd.core.limits import CONFLICTS_TOLD_MAX, WAITERS_NAMED_MAX
from agentqd.core.resolve import resolve
from agentqd.core.task import TaskRequest
from agentqd.core.units import format_duration, format_time
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.loops.claimorder import in_the_way, named, waiters
from agentqd.loops.finishing import finish_waiting, release_claim
from agentqd.loops.unblocking import WRITE_CONFLICT, request_of
from agentqd.storage import intents
from agentqd.storage import tasks as store
from agentqd.storage.paths import resolve_intents
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction

_SHOWN_PATHS = 20


class Lapse(msgspec.Struct, frozen=True):
    """A claim whose task has shown no sign of life for its TTL."""

    task: TaskRow
    ttl_s: float
    last_sign_us: int


def tell_lapsed(tx: Transaction, box: Box, lapse: Lapse) -> bool:
    """The worker lives and is silent: its claim stays, and that is said once for each silence."""
    task = lapse.task
    paths = intents.paths_of(tx, task.seq)
    if not paths or not _as_seen(tx, task):
        return False
    waiting = waiters(tx, paths, task.seq)[:WAITERS_NAMED_MAX]
    behind = f"; {len(waiting)} wait for it: {', '.join(waiting[:5])}" if waiting else ""
    message = (
        f"task {task.id} ({task.name}) runs, but has shown no sign of life for its intent_ttl of"
        f" {format_duration(lapse.ttl_s)}; it keeps its claim on {', '.join(paths[:3])}{behind}"
    )
    return alert(
        tx,
        box,
        "claim_expired",
        message,
        task=task,
        key=f"{task.attempt}:{lapse.last_sign_us}",
        paths=paths[:_SHOWN_PATHS],
        waiting=waiting,
        last_sign_at=format_time(lapse.last_sign_us),
        ttl_s=lapse.ttl_s,
    )


def release_lapsed(tx: Transaction, box: Box, lapse: Lapse) -> bool:
    """No process of the task lives: its claim is let go, and those that waited for it are unblocked with it.

    A task that is ready to start would claim again at once: it only lets others go first, if there are any.
    """
    task = lapse.task
    paths = intents.paths_of(tx, task.seq)
    if not paths or not _as_seen(tx, task):
        return False
    ready = task.state is State.QUEUED
    if ready and not waiters(tx, paths, task.seq):
        return False
    tx.event(
        task.id,
        "claim_released",
        reason="intent_ttl",
        ttl_s=lapse.ttl_s,
        last_sign_at=format_time(lapse.last_sign_us),
        paths=paths[:_SHOWN_PATHS],
        count=len(paths),
    )
    tx.later(
        lambda: box.log.warning(
            "claim_released", task=task.id, name=task.name, paths=len(paths), reason="intent_ttl"
        )
    )
    release_claim(tx, box, task)
    if ready:
        claim_again(tx, box, store.get(tx, task.seq))
    return True


def _as_seen(tx: Transaction, task: TaskRow) -> bool:
    """Nothing has happened to the task since it was looked at."""
    now = store.get(tx, task.seq)
    return (now.state, now.run, now.attempt) == (task.state, task.run, task.attempt)


def claim_again(tx: Transaction, box: Box, task: TaskRow) -> TaskRow:
    """Part of the unit that has just made a task ready (or scheduled): if its claim has lapsed, it claims anew.

    `queue`: it waits, blocked. `refuse`: it ends, refused. `warn`: it goes on, and that is alerted.
    """
    if task.run_attempts == 0:
        return task
    request = request_of(tx, task)
    if not request.writes_to or intents.paths_of(tx, task.seq):
        return task
    resolved = resolve(request, task.queue, task.runner, box.settings)
    try:
        paths = resolve_intents(request.writes_to, resolved.workdir)
    except InvalidTask as error:  # the config gave it a workdir, and does so no more
        return finish_waiting(tx, box, task, Event.REFUSED, Result.REFUSED, error.code, error.message)
    policy = resolved.on_conflict
    conflicts = in_the_way(tx, task, request, [path for path, _ in paths])[:CONFLICTS_TOLD_MAX]
    if conflicts:
        intents.record_conflicts(tx, task.id, task.name, conflicts, policy)
        tx.event(task.id, "write_conflict", policy=policy, others=[each.task_id for each in conflicts][:20])
    if conflicts and policy == "refuse":
        text = (
            f"its claim had lapsed, and {named(conflicts[0])} has claimed {conflicts[0].other_path} meanwhile"
        )
        return finish_waiting(tx, box, task, Event.REFUSED, Result.REFUSED, WRITE_CONFLICT, text)
    intents.claim(tx, task.seq, paths, policy)
    tx.event(task.id, "claimed_again", policy=policy, waits=bool(conflicts) and policy == "queue")
    if conflicts and policy == "queue":
        return _wait(
            tx,
            task,
            f"waits for {conflicts[0].task_id} ({conflicts[0].task}), which writes {conflicts[0].other_path}",
        )
    if conflicts:
        _warn(tx, box, task, request, conflicts)
    return task


def _wait(tx: Transaction, task: TaskRow, detail: str) -> TaskRow:
    return store.move_task(tx, task, Event.BLOCKED, reason=WRITE_CONFLICT, detail=detail)


def _warn(
    tx: Transaction, box: Box, task: TaskRow, request: TaskRequest, conflicts: list[intents.Conflict]
) -> None:
    first = conflicts[0]
    alert(
        tx,
        box,
        "write_conflict",
        f"{request.task} claims {first.path} again, which {named(first)} has claimed as {first.other_path}",
        task=task,
        key=f"again:{task.attempt}",
        policy="warn",
        conflicts=[each.as_json() for each in conflicts],
    )
