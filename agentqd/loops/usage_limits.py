"""A runner's usage limit: whoever meets it waits with no attempt used, and so do all other tasks of that runner.

One agent's limit is that of the account behind the runner: a second task of it would only meet it, too. Units.
"""

from __future__ import annotations

from typing import Final

from agentqd.core.units import format_time
from agentqd.core.usage_limit import Limit, fallback_s
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.storage import runner_limits
from agentqd.storage.runner_limits import RunnerLimit
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction

USAGE_LIMIT: Final = "usage_limit"
US: Final = 1_000_000


def met(tx: Transaction, box: Box, task: TaskRow, limit: Limit) -> int:
    """Close the runner; returns when its tasks may try again (microseconds). Alerts once for each time in a row.

    A time that an agent said is kept against a guess; of two that agents said the later word counts.
    """
    before = runner_limits.find(tx, task.runner)
    closed = before is not None and before.until is not None and before.until > tx.now_us
    strikes = (0 if before is None else before.strikes) + (0 if closed else 1)
    since = tx.now_us if before is None else before.since
    if limit.until_us is not None:
        until, known = limit.until_us, True
    elif before is not None and before.until is not None and closed:
        until, known = before.until, before.known
    else:
        until, known = tx.now_us + int(fallback_s(strikes) * US), False
    runner_limits.put(tx, RunnerLimit(task.runner, since, until, known, strikes, task.id))
    said = format_time(until)
    how = "" if known else " (it does not say when it works again)"
    text = (
        f"the usage limit of runner {task.runner} is reached, its tasks wait until {said}{how}: {limit.text}"
    )
    alert(
        tx,
        box,
        USAGE_LIMIT,
        text,
        key=f"{task.runner}:{since}",
        runner=task.runner,
        until=said,
        task_id=task.id,
    )
    if not closed:
        tx.event(None, "runner_limited", runner=task.runner, until=said, known=known, met_by=task.id)
    return until


def lift(tx: Transaction, runner: str, by: str) -> bool:
    """The runner may start again at once. False: it could before."""
    if not runner_limits.open_now(tx, runner):
        return False
    tx.event(None, "runner_limit_lifted", runner=runner, by=by)
    return True
