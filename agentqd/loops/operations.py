"""What a person (or a program, over the control socket) asks of tasks, queues and outbox rows. Units, guarded by the tables."""

from __future__ import annotations

from typing import Any, Final

from agentqd.core.errors import IllegalTransition, NoSuchTask
from agentqd.core.lifecycle import ACTIVE_STATES, Event, Result, State
from agentqd.core.outbox import TABLE, RowEvent, RowState
from agentqd.core.resolve import resolve
from agentqd.core.verdict import CANCELLED
from agentqd.core.waking import next_wake_us, wake_times
from agentqd.loops.box import Box
from agentqd.loops.claiming import claim_again
from agentqd.loops.finishing import finish_waiting, settle
from agentqd.loops.supervision import Supervision
from agentqd.loops.unblocking import request_of, what_blocks
from agentqd.storage import outbox
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

    Of the tasks that it comes after those that have ended have no say any more (a person's word); those that have not, have.
    It claims its places anew, under the policy of today. Raises NoSuchTask, IllegalTransition (not finished), WriteConflict.
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
    tx.execute(_FORGET_ENDED, (task.seq,))
    writes = resolve_intents(request.writes_to or [], resolved.workdir)
    claim_again(tx, box, moved, writes, resolved.on_conflict)
    reason, detail = what_blocks(tx, moved, request)
    if reason is not None:
        return store.move_task(tx, moved, Event.BLOCKED, reason=reason, detail=detail)
    return moved


_FORGET_ENDED: Final = (
    "DELETE FROM dependencies WHERE task_seq = ?1 AND on_seq IN (SELECT t.seq FROM dependencies d"
    " JOIN tasks t ON t.seq = d.on_seq WHERE d.task_seq = ?1 AND t.state = 'finished')"
)


def change_rows(
    tx: Transaction, event: RowEvent, delivery_ids: list[str] | None, state: str | None, sink: str | None
) -> int:
    """A person's word on outbox rows: named ones, or all that are in `state` (None: every state that can take the event)."""
    allowed = [each.value for each in RowState if event in TABLE[each]]
    if event is RowEvent.RETRY_REQUESTED and delivery_ids is None and state is None:
        allowed = [RowState.DEAD.value]  # "retry all" never sends delivered entries again
    states = [each for each in allowed if state is None or each == state]
    if not states:
        return 0
    clauses = [f"o.state IN ({','.join('?' * len(states))})"]
    values: list[Any] = list(states)
    if sink is not None:
        clauses.append("o.sink = ?")
        values.append(sink)
    if delivery_ids is not None:
        clauses.append(f"e.delivery_id IN ({','.join('?' * len(delivery_ids))})")
        values += delivery_ids
    rows = tx.execute(
        f"SELECT o.entry_seq, o.sink, e.delivery_id, t.id FROM outbox o JOIN entries e ON e.seq = o.entry_seq"  # noqa: S608 - fixed clauses
        f" LEFT JOIN tasks t ON t.seq = e.task_seq WHERE {' AND '.join(clauses)}",
        values,
    ).fetchall()
    for entry_seq, name, delivery_id, task_id in rows:
        columns: dict[str, Any] = {"due_at": tx.now_us}
        if event is RowEvent.RETRY_REQUESTED:
            columns |= {"attempts": 0, "created_at": tx.now_us, "delivered_at": None, "position": None}
        elif event is not RowEvent.RELEASED:
            columns = {"due_at": None}
        outbox.change_row(tx, entry_seq, name, event, **columns)
        tx.event(task_id, f"outbox_{event.value}", sink=name, delivery_id=delivery_id)
    return len(rows)
