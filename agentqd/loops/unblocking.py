"""What blocks a task besides time: tasks it comes after, and places that others have claimed to write.

Both are settled in the transaction in which a task ends. A dependency must exist when the task that names it is accepted,
and a claim yields only to older ones: neither can go round in a circle, so nothing here can deadlock.
"""

from __future__ import annotations

from agentqd.core.lifecycle import Event, Result, State
from agentqd.core.resolve import resolve
from agentqd.core.task import TaskRequest, read_task
from agentqd.core.waking import next_wake_us, wake_times
from agentqd.loops.box import Box
from agentqd.loops.claimorder import in_the_way
from agentqd.storage import intents
from agentqd.storage import tasks as store
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction

DEPENDENCY = "dependency"
WRITE_CONFLICT = "write_conflict"


def unblock(
    tx: Transaction, box: Box, task: TaskRow, request: TaskRequest, said: dict[str, object] | None = None
) -> TaskRow:
    """Nothing is in its way any more but, perhaps, its start time."""
    times = wake_times(request, resolve(request, task.queue, task.runner, box.settings), task.run_at)
    later = any(at > tx.now_us for at, what in times if what == "start_time")
    event = Event.UNBLOCKED_FOR_LATER if later else Event.UNBLOCKED
    return store.move_task(tx, task, event, said=said, reason=None, wake_at=next_wake_us(times, tx.now_us))


def what_blocks(tx: Transaction, task: TaskRow, request: TaskRequest) -> tuple[str | None, str | None]:
    """(reason, detail) that a task is to be blocked for, (`dependency_failed`, ...) if it can never run, or (None, None)."""
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
    paths = intents.paths_of(tx, task.seq)
    if paths and _queues(tx, task):
        older = in_the_way(tx, task, request, paths)
        if older:
            return (
                WRITE_CONFLICT,
                f"waits for {older[0].task_id} ({older[0].task}), which writes {older[0].other_path}",
            )
    return None, None


def _queues(tx: Transaction, task: TaskRow) -> bool:
    """`refuse` too: nothing older stood in its way when it was accepted, but a lapsed claim may have been made again since."""
    row = tx.one("SELECT 1 FROM intents WHERE task_seq = ? AND policy != 'warn' LIMIT 1", (task.seq,))
    return row is not None


def candidates_after(tx: Transaction, ended: TaskRow) -> list[TaskRow]:
    """Blocked tasks that the end of `ended` may free: those that come after it, and those that wait for a place to write."""
    released = intents.release(tx, ended.seq)
    seqs = {row[0] for row in tx.execute("SELECT task_seq FROM dependencies WHERE on_seq = ?", (ended.seq,))}
    if released:
        seqs |= {
            row[0]
            for row in tx.execute(
                "SELECT DISTINCT i.task_seq FROM intents i JOIN tasks t ON t.seq = i.task_seq"
                " WHERE t.state = 'blocked' AND t.reason = 'write_conflict'"
            )
        }
    rows = [store.get(tx, seq) for seq in sorted(seqs)]
    return [row for row in rows if row.state is State.BLOCKED and row.reason in {DEPENDENCY, WRITE_CONFLICT}]


def waiting_for_a_place(tx: Transaction) -> list[int]:
    """The seqs of tasks that are blocked by somebody's claim, oldest first."""
    sql = "SELECT seq FROM tasks WHERE state = 'blocked' AND reason = 'write_conflict' ORDER BY seq"
    return [row[0] for row in tx.execute(sql).fetchall()]


def request_of(tx: Transaction, task: TaskRow) -> TaskRequest:
    return read_task(store.spec_of(tx, task.seq)[0])
