"""What blocks a task besides time: tasks it comes after, and places that others have claimed to write.

Both are settled in the transaction in which a task ends. A dependency must exist when the task that names it is accepted,
and a claim waits only for those before it in the line; the few that could close a circle (an ended task that is run again)
are looked at when they come: nothing here can deadlock (docs/intents.md).
"""

from __future__ import annotations

from agentqd.core.lifecycle import Event, Result, State
from agentqd.core.resolve import resolve
from agentqd.core.task import TaskRequest, read_task
from agentqd.core.waking import next_wake_us, wake_times
from agentqd.loops.box import Box
from agentqd.loops.claiming import WRITE_CONFLICT, in_line, waits_text
from agentqd.storage import intents
from agentqd.storage import tasks as store
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction

DEPENDENCY = "dependency"


def unblock(
    tx: Transaction, box: Box, task: TaskRow, request: TaskRequest, said: dict[str, object] | None = None
) -> TaskRow:
    """Nothing is in its way any more but, perhaps, its start time."""
    times = wake_times(request, resolve(request, task.queue, task.runner, box.settings), task.run_at)
    later = any(at > tx.now_us for at, what in times if what == "start_time")
    event = Event.UNBLOCKED_FOR_LATER if later else Event.UNBLOCKED
    return store.move_task(tx, task, event, said=said, reason=None, wake_at=next_wake_us(times, tx.now_us))


def what_blocks(tx: Transaction, task: TaskRow, request: TaskRequest) -> tuple[str | None, str | None]:
    """(reason, detail) that a task is to be blocked for, (`dependency_failed`, ...) if it can never run, or (None, None).

    What waits for a place is noted with the claim before it, so that its end finds it (`candidates_after`).
    """
    rows = tx.execute(
        "SELECT t.id, t.state, t.result FROM dependencies d JOIN tasks t ON t.seq = d.on_seq WHERE d.task_seq = ?",
        (task.seq,),
    ).fetchall()
    policy = request.after_policy or "success"
    open_ = [row[0] for row in rows if row[1] != State.FINISHED.value]
    failed = [row[0] for row in rows if row[1] == State.FINISHED.value and row[2] != Result.SUCCESS.value]
    if policy == "success" and failed:
        return "dependency_failed", f"{failed[0]} did not end with success"
    if open_:
        return DEPENDENCY, f"waits for {', '.join(open_[:5])}"
    if policy == "failure" and rows and not failed:
        return "dependency_failed", "every task that it comes after ended with success"
    before = in_line(tx, task)
    if before is not None:
        intents.wait_for(tx, task.seq, before.task_seq)
        return WRITE_CONFLICT, waits_text(before)
    return None, None


def candidates_after(tx: Transaction, ended: TaskRow) -> list[TaskRow]:
    """Blocked tasks that the end of `ended` may free: those that come after it, and those that wait for a place to write."""
    intents.release(tx, ended.seq)
    seqs = {row[0] for row in tx.execute("SELECT task_seq FROM dependencies WHERE on_seq = ?", (ended.seq,))}
    seqs |= set(intents.take_waiters(tx, ended.seq))
    rows = [store.get(tx, seq) for seq in sorted(seqs)]
    return [row for row in rows if row.state is State.BLOCKED and row.reason in {DEPENDENCY, WRITE_CONFLICT}]


def request_of(tx: Transaction, task: TaskRow) -> TaskRequest:
    return read_task(store.spec_of(tx, task.seq)[0])
