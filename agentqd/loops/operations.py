"""What a person (or a program, over the control socket) asks of tasks, queues and outbox rows. Units, guarded by the tables."""

from __future__ import annotations

from typing import Final

from agentqd.core.errors import IllegalTransition, NoSuchTask
from agentqd.core.lifecycle import ACTIVE_STATES, TABLE, Event, Result, State
from agentqd.core.resolve import resolve
from agentqd.core.settings import Conflict
from agentqd.core.verdict import CANCELLED
from agentqd.core.waking import next_wake_us, wake_times
from agentqd.loops.box import Box
from agentqd.loops.claiming import claim_again
from agentqd.loops.finishing import finish_waiting, look_again, settle
from agentqd.loops.reclaiming import reclaim
from agentqd.loops.supervision import Supervision
from agentqd.loops.unblocking import request_of, what_blocks
from agentqd.loops.usage_limits import USAGE_LIMIT, lift
from agentqd.storage import intents
from agentqd.storage import tasks as store
from agentqd.storage.paths import resolve_intents
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction


def must_find(tx: Transaction, task_id: str) -> TaskRow:
    """Raises NoSuchTask."""
    task = store.find(tx, task_id)
    if task is None:
        raise NoSuchTask(f"there is no task {task_id}", id=task_id)
    return task


def cancel(tx: Transaction, box: Box, supervision: Supervision, task_id: str) -> TaskRow:
    """End a task: at once if it waits, through its worker if it runs. Raises NoSuchTask, IllegalTransition (finished)."""
    task = must_find(tx, task_id)
    if task.state is State.FINISHED:
        raise IllegalTransition(
            f"task {task_id} has already finished ({task.result}); nothing was changed",
            state=task.state.value,
            result=task.result,
        )
    if task.state in ACTIVE_STATES:
        return supervision.end_running(tx, task, CANCELLED)
    return finish_waiting(tx, box, task, Event.CANCELLED, Result.CANCELLED, CANCELLED)


def hold(tx: Transaction, task_id: str) -> TaskRow:
    """Keep a waiting task from starting. Raises NoSuchTask, IllegalTransition."""
    task = must_find(tx, task_id)
    if Event.HOLD_REQUESTED not in TABLE[task.state]:
        raise _cannot(task)
    return store.move_task(tx, task, Event.HOLD_REQUESTED, reason="held", detail=None)


def release(tx: Transaction, box: Box, task_id: str) -> TaskRow:
    """Undo a hold; a start time that lies ahead, or what else blocks it, still counts. Of a task that backs off, or waits for a
    usage limit: end that wait. Raises NoSuchTask, IllegalTransition."""
    task = must_find(tx, task_id)
    if task.state in {State.RETRYABLE, State.QUEUED}:
        return _now(tx, box, task)
    if task.state is not State.HELD:
        raise _cannot(task)
    request = request_of(tx, task)
    times = wake_times(request, resolve(request, task.queue, task.runner, box.settings), task.run_at)
    later = any(at > tx.now_us for at, what in times if what == "start_time")
    event = Event.RELEASED_FOR_LATER if later else Event.RELEASED
    moved = store.move_task(tx, task, event, reason=None, wake_at=next_wake_us(times, tx.now_us))
    if request.prompt_ref is not None and store.spec_of(tx, task.seq)[1] is None:
        return store.move_task(tx, moved, Event.BLOCKED, reason="prompt_missing", wake_at=tx.now_us)
    moved = reclaim(tx, box, moved)
    if moved.state not in {State.QUEUED, State.SCHEDULED}:
        return moved
    reason, detail = what_blocks(tx, moved, request)
    if reason is None:
        return moved
    moved = settle(tx, box, store.move_task(tx, moved, Event.BLOCKED, reason=reason, detail=detail))
    look_again(
        tx, box, intents.take_waiters(tx, moved.seq)
    )  # one whose claim had lapsed waits for none that is blocked
    return store.get(tx, moved.seq)


def retry(tx: Transaction, box: Box, task_id: str, on_conflict: Conflict | None = None) -> TaskRow:
    """A new run of a finished task: its attempts start anew, its result gets a new id, delivered keys are not sent again.
    Of a task that backs off, or waits for a usage limit: its next attempt now.

    Of the tasks that it comes after those that have ended have no say any more (a person's word); those that have not, have.
    It claims its places anew, under the policy of today, or under `on_conflict`, which then holds for this run.
    Raises NoSuchTask, IllegalTransition (neither), WriteConflict.
    """
    task = must_find(tx, task_id)
    if task.state is not State.FINISHED:
        return _now(tx, box, task, on_conflict)
    request = request_of(tx, task)
    resolved = resolve(request, task.queue, task.runner, box.settings)
    times = wake_times(request, resolved, tx.now_us)
    moved = store.move_task(
        tx,
        task,
        Event.RETRY_REQUESTED,
        said={"run": task.run + 1, "was": task.result}
        | ({"on_conflict": on_conflict} if on_conflict else {}),
        run=task.run + 1,
        run_attempts=0,
        run_at=tx.now_us,
        finished_at=None,
        reason=None,
        detail=None,
        wake_at=next_wake_us([(at, what) for at, what in times if what != "expires"], tx.now_us),
    )
    tx.execute(_FORGET_ENDED, (task.seq,))
    tx.execute(_HEARD, (task.seq,))
    writes = resolve_intents(request.writes_to or [], resolved.workdir)
    claim_again(tx, box, moved, writes, on_conflict or resolved.on_conflict, said=on_conflict is not None)
    reason, detail = what_blocks(tx, moved, request)
    if reason is not None:
        return store.move_task(tx, moved, Event.BLOCKED, reason=reason, detail=detail)
    return moved


def _now(tx: Transaction, box: Box, task: TaskRow, on_conflict: Conflict | None = None) -> TaskRow:
    """End a wait that only time would end. Raises IllegalTransition, saying what the task does instead."""
    if task.state is State.RETRYABLE:
        if task.reason == USAGE_LIMIT:
            lift(tx, task.runner, "person")
        request = request_of(tx, task)
        times = wake_times(request, resolve(request, task.queue, task.runner, box.settings), task.run_at)
        wake = next_wake_us(times, tx.now_us)
        moved = store.move_task(
            tx,
            task,
            Event.BACKOFF_ENDED,
            said={"by": "person"},
            reason=None,
            detail=None,
            wake_at=wake,
        )
        return reclaim(tx, box, moved, on_conflict)
    if task.state is State.QUEUED and lift(tx, task.runner, "person"):
        return task
    raise _cannot(task)


def _cannot(task: TaskRow) -> IllegalTransition:
    """What the task does now, and what can be done instead of what was asked for."""
    text = f"task {task.id} {_instead(task)}; nothing was changed"
    return IllegalTransition(text, state=task.state.value, reason=task.reason, result=task.result)


def _instead(task: TaskRow) -> str:
    show = f"agentqctl show {task.id} says why it waits"
    waits = "waits for its next attempt" if task.attempt else "has not run yet"
    why = ": ".join(part for part in (task.reason, task.detail) if part)
    return {
        State.SCHEDULED: f"{waits}: its start time lies ahead; {show}",
        State.QUEUED: f"{waits}: nothing of its own holds it back; {show}",
        State.BLOCKED: f"{waits}: it is blocked{f' ({why})' if why else ''}; {show}",
        State.HELD: f"is held; agentqctl release {task.id} lets it go on",
        State.RETRYABLE: f"{waits}; agentqctl retry {task.id} starts it now",
        State.RUNNING: f"is running (attempt {task.attempt}); wait for its end, or agentqctl cancel {task.id}",
        State.STOPPING: f"is being ended (attempt {task.attempt}); agentqctl wait {task.id}, then retry it",
        State.FINISHED: f"has finished ({task.result}); agentqctl retry {task.id} runs it again",
    }[task.state]


_FORGET_ENDED: Final = (
    "DELETE FROM dependencies WHERE task_seq = ?1 AND on_seq IN (SELECT t.seq FROM dependencies d"
    " JOIN tasks t ON t.seq = d.on_seq WHERE d.task_seq = ?1 AND t.state = 'finished')"
)
# Who comes after it and has begun its own run asks for it no more, or the two could wait for each other.
_HEARD: Final = (
    "UPDATE dependencies AS d SET heard_run = (SELECT run FROM tasks WHERE seq = d.task_seq) WHERE on_seq = ? AND EXISTS"
    " (SELECT 1 FROM tasks t JOIN attempts a ON a.task_seq = t.seq AND a.run = t.run WHERE t.seq = d.task_seq AND t.state <> 'finished')"
)
