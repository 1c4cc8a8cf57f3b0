"""Whether another attempt follows, when, and from when on none does. Units, part of the transaction in which an attempt ends."""

from __future__ import annotations

from typing import Final

from agentqd.core.lifecycle import Event, Result
from agentqd.core.resolve import Resolved, resolve
from agentqd.core.retry import LOST_REQUEUES_MAX, RETRIED_RESULTS, wait_s
from agentqd.core.task import TaskRequest
from agentqd.core.usage_limit import Limit
from agentqd.core.verdict import CANCELLED, Verdict
from agentqd.core.waking import last_start_us, wake_times
from agentqd.loops.box import Box
from agentqd.loops.usage_limits import met
from agentqd.storage import runner_limits
from agentqd.storage.tasks import AttemptRow, TaskRow
from agentqd.storage.transaction import Transaction

US: Final = 1_000_000
# After these its runner's limit is not reached.
_TELLS: Final = frozenset({Result.SUCCESS, Result.FAILED, Result.NO_WORK})


def what_next(
    tx: Transaction,
    box: Box,
    task: TaskRow,
    attempt: AttemptRow,
    asked: tuple[TaskRequest, Limit | None],
    verdict: Verdict,
    resolved: Resolved,
) -> tuple[Event, int | None]:
    """The event that follows the end of an attempt, and when to look again: at the next one's time, or (held) when none may start
    any more. `asked`: the task, and the limit that it met."""
    request, limit = asked
    limited = met(tx, box, task, limit) if limit is not None else None
    if limited is None and verdict.result in _TELLS:
        runner_limits.works_again(tx, task.runner)
    if attempt.intent == CANCELLED:
        return Event.FINISHED, None
    times = wake_times(request, resolved, task.run_at)
    last = last_start_us(times, expires=task.run_at == task.accepted_at)
    if limited is not None:
        may = last is None or limited < last
        return (Event.ATTEMPT_ENDED, limited) if may else (Event.FINISHED, None)
    if verdict.result is Result.LOST:
        if resolved.on_lost == "hold":
            return Event.ATTEMPT_HELD, last
        lost = tx.one(
            "SELECT count(*) FROM attempts WHERE task_seq=? AND run=? AND result='lost'", (task.seq, task.run)
        )[0]
        again = resolved.on_lost == "requeue" and lost < LOST_REQUEUES_MAX
    else:
        again = verdict.result in RETRIED_RESULTS and task.run_attempts < resolved.max_attempts
    if not again:
        return Event.FINISHED, None
    wake = tx.now_us + int(wait_s(resolved.backoff, task.run_attempts) * US)
    if last is not None and wake >= last:
        return Event.FINISHED, None
    return Event.ATTEMPT_ENDED, wake


def too_late(tx: Transaction, box: Box, task: TaskRow, request: TaskRequest) -> tuple[Event, Verdict] | None:
    """What is freed by the very turn in which its own time is over does not start any more."""
    times = wake_times(request, resolve(request, task.queue, task.runner, box.settings), task.run_at)
    over = {what for at, what in times if at <= tx.now_us}
    if "expires" in over and task.run_at == task.accepted_at:
        return Event.EXPIRED, Verdict(Result.EXPIRED, "expires_at")
    if "total_timeout" in over:
        return Event.FINISHED, Verdict(Result.TIMEOUT, "total_timeout")
    return None
