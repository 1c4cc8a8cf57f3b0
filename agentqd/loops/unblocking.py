"""What blocks a task besides time: tasks it comes after, and places that others have claimed to write.

Both are settled in the transaction in which a task ends. A dependency must exist when the task that names it is accepted,
and a claim waits only for those before it in the line; the few that could close a circle (an ended task that is run again)
are looked at when they come: nothing here can deadlock (docs/intents.md).
"""

from __future__ import annotations

from typing import Final

from agentqd.core.lifecycle import Event, Result, State
from agentqd.core.limits import FREED_AT_ONCE
from agentqd.core.resolve import resolve
from agentqd.core.task import TaskRequest, read_task
from agentqd.core.waking import next_wake_us, wake_times
from agentqd.loops.box import Box
from agentqd.loops.claiming import WRITE_CONFLICT, in_line, waits_text
from agentqd.loops.claimorder import grant_those, late_holder
from agentqd.storage import intents
from agentqd.storage import tasks as store
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction

DEPENDENCY = "dependency"
# One that waits for a place is looked at too: what it comes after may have been run again, and have failed this time.
_BLOCKED: Final = "t.state = 'blocked' AND t.reason IN ('dependency', 'write_conflict')"
_DEPENDENTS: Final = (
    f"SELECT d.task_seq FROM dependencies d JOIN tasks t ON t.seq = d.task_seq WHERE d.on_seq = ? AND {_BLOCKED}"  # noqa: S608 - fixed names
    " ORDER BY d.task_seq LIMIT ?"
)
_PUT_OFF: Final = (
    "UPDATE tasks AS t SET wake_at = ? WHERE t.seq IN (SELECT task_seq FROM dependencies WHERE on_seq = ? AND task_seq > ?)"  # noqa: S608 - fixed names
    f" AND {_BLOCKED}"
)


def unblock(
    tx: Transaction, box: Box, task: TaskRow, request: TaskRequest, said: dict[str, object] | None = None
) -> TaskRow:
    """Nothing is in its way any more but, perhaps, its start time."""
    times = wake_times(request, resolve(request, task.queue, task.runner, box.settings), task.run_at)
    later = any(at > tx.now_us for at, what in times if what == "start_time")
    event = Event.UNBLOCKED_FOR_LATER if later else Event.UNBLOCKED
    return store.move_task(
        tx, task, event, said=said, reason=None, detail=None, wake_at=next_wake_us(times, tx.now_us)
    )


def what_blocks(tx: Transaction, task: TaskRow, request: TaskRequest) -> tuple[str | None, str | None]:
    """(reason, detail) that a task is to be blocked for, (`dependency_failed`, ...) if it can never run, or (None, None).

    What waits for a place is noted with the claim before it, so that its end finds it (`candidates_after`).
    """
    rows = tx.execute(
        "SELECT t.id, t.state, t.result FROM dependencies d JOIN tasks t ON t.seq = d.on_seq"
        " WHERE d.task_seq = ? AND d.heard_run IS NOT ?",
        (task.seq, task.run),
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
    before = in_line(tx, task) or late_holder(tx, task)
    if before is not None:
        intents.wait_for(tx, task.seq, before.task_seq)
        return WRITE_CONFLICT, waits_text(before)
    return None, None


def candidates_after(tx: Transaction, box: Box, ended: TaskRow) -> list[TaskRow]:
    """Blocked tasks that the end of `ended` may free: those that come after it, and those that wait for a place to write.

    Outside claims that waited for it are seen to here.
    """
    intents.release(tx, ended.seq)
    seqs = set(_dependents(tx, ended))
    seqs |= set(intents.take_waiters(tx, ended.seq))
    grant_those(tx, box, seqs)
    rows = [store.get(tx, seq) for seq in sorted(seqs) if seq > 0]
    return [row for row in rows if row.state is State.BLOCKED and row.reason in {DEPENDENCY, WRITE_CONFLICT}]


def _dependents(tx: Transaction, ended: TaskRow) -> list[int]:
    """The blocked tasks that come after `ended`, oldest first; of very many those beyond FREED_AT_ONCE are looked at in the
    next transactions (loops/waking.py), so that no commit waits long for this one."""
    rows = tx.execute(_DEPENDENTS, (ended.seq, FREED_AT_ONCE)).fetchall()
    if len(rows) == FREED_AT_ONCE:
        tx.execute(_PUT_OFF, (tx.now_us, ended.seq, rows[-1][0]))
        tx.will_wake(tx.now_us)
    return [row[0] for row in rows]


def request_of(tx: Transaction, task: TaskRow) -> TaskRequest:
    return read_task(store.spec_of(tx, task.seq)[0])
