"""What a person (or a program, over the control socket) asks of tasks, queues and outbox rows. Units, guarded by the tables."""

from __future__ import annotations

from agentqd.core.errors import IllegalTransition, NoSuchTask, WriteConflict
from agentqd.core.lifecycle import ACTIVE_STATES, Event, Result, State
from agentqd.core.resolve import resolve
from agentqd.core.verdict import CANCELLED
from agentqd.core.waking import next_wake_us, wake_times
from agentqd.loops.box import Box
from agentqd.loops.finishing import finish_waiting, settle
from agentqd.loops.supervision import Supervision
from agentqd.loops.unblocking import request_of, what_blocks
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
    return store.move_task(tx, must_find(tx, task_id), Event.HOLD_REQUESTED, reason="held")


def release(tx: Transaction, box: Box, task_id: str) -> TaskRow:
    """Undo a hold; a start time that lies ahead, or what else blocks it, still counts. Raises NoSuchTask, IllegalTransition."""
    task = must_find(tx, task_id)
    request = request_of(tx, task)
    times = wake_times(request, resolve(request, task.queue, task.runner, box.settings), task.run_at)
    later = any(at > tx.now_us for at, what in times if what == "start_time")
    event = Event.RELEASED_FOR_LATER if later else Event.RELEASED
    moved = store.move_task(tx, task, event, reason=None, wake_at=next_wake_us(times, tx.now_us))
    if request.prompt_ref is not None and store.spec_of(tx, task.seq)[1] is None:
        return store.move_task(tx, moved, Event.BLOCKED, reason="prompt_missing", wake_at=tx.now_us)
    reason, detail = what_blocks(tx, moved, request)
    if reason is None:
        return moved
    return settle(tx, box, store.move_task(tx, moved, Event.BLOCKED, reason=reason, detail=detail))


def retry(tx: Transaction, box: Box, task_id: str) -> TaskRow:
    """A new run of a finished task: its attempts start anew, its result gets a new id, delivered keys are not sent again.

    Raises NoSuchTask, IllegalTransition (not finished), WriteConflict (its places are claimed by another task now).
    """
    task = must_find(tx, task_id)
    request = request_of(tx, task)
    resolved = resolve(request, task.queue, task.runner, box.settings)
    times = wake_times(request, resolved, tx.now_us)
    moved = store.move_task(
        tx,
        task,
        Event.RETRY_REQUESTED,
        said={"run": task.run + 1, "was": task.result},
        run=task.run + 1,
        run_attempts=0,
        run_at=tx.now_us,
        finished_at=None,
        reason=None,
        detail=None,
        wake_at=next_wake_us([(at, what) for at, what in times if what != "expires"], tx.now_us),
    )
    if not request.writes_to:
        return moved
    paths = resolve_intents(request.writes_to, resolved.workdir)
    conflicts = intents.conflicts_of(tx, [path for path, _ in paths], set(request.after_list()))
    if conflicts and resolved.on_conflict != "warn":
        first = conflicts[0]
        raise WriteConflict(
            f"task {first.task_id} ({first.task}) has claimed {first.other_path} meanwhile; nothing was changed",
            conflicts=[each.as_json() for each in conflicts],
        )
    intents.claim(tx, task.seq, paths, resolved.on_conflict)
    return moved
