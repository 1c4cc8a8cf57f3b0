"""The log lines of an end: one of each attempt that another follows, one canonical line of a task."""

from __future__ import annotations

from typing import Any, Final

from agentqd.core.units import format_time
from agentqd.core.verdict import Verdict
from agentqd.loops.box import Box
from agentqd.storage.tasks import TaskRow

US: Final = 1_000_000


def log_end(box: Box, task: TaskRow, data: dict[str, Any]) -> None:
    """The one canonical line of a task."""
    say = box.log.info if task.result in {"success", "cancelled"} else box.log.warning
    say(
        "task_finished",
        task=task.id,
        name=task.name,
        queue=task.queue,
        runner=task.runner,
        result=task.result,
        reason=task.reason,
        attempt=task.attempt,
        run=task.run,
        exit_code=data["exit_code"],
        signal=data["signal"],
        duration_s=data["duration_s"],
        waited_s=round(max(0, (task.started_at or task.run_at) - task.run_at) / US, 3),
    )
    box.task_changed(task.id)


def log_attempt(box: Box, task: TaskRow, verdict: Verdict, wake: int | None) -> None:
    box.log.warning(
        "attempt_ended",
        task=task.id,
        attempt=task.attempt,
        result=verdict.result.value,
        reason=verdict.reason,
        state=task.state.value,
        next_at=format_time(wake),
    )
    box.task_changed(task.id)
