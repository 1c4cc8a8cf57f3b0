"""The times at which a waiting task must be looked at again, worked out from what it says and what is resolved for it."""

from __future__ import annotations

from typing import Literal

from agentqd.core.resolve import Resolved
from agentqd.core.task import TaskRequest
from agentqd.core.units import parse_time_us

What = Literal["start_time", "expires", "total_timeout", "queue_timeout"]
US = 1_000_000


def wake_times(task: TaskRequest, resolved: Resolved, run_at_us: int) -> list[tuple[int, What]]:
    """(microseconds, what falls due then) for a task whose run was accepted at `run_at_us`; unordered."""
    times: list[tuple[int, What]] = []
    if task.not_before:
        times.append((parse_time_us(task.not_before), "start_time"))
    if task.expires_at:
        times.append((parse_time_us(task.expires_at), "expires"))
    if resolved.total_timeout_s is not None:
        times.append((run_at_us + int(resolved.total_timeout_s * US), "total_timeout"))
    if resolved.queue_timeout_s is not None:
        times.append((max(run_at_us, _start(task)) + int(resolved.queue_timeout_s * US), "queue_timeout"))
    return times


def next_wake_us(times: list[tuple[int, What]], now_us: int) -> int | None:
    """The next of them that lies ahead, or None."""
    ahead = [at for at, _ in times if at > now_us]
    return min(ahead) if ahead else None


def last_start_us(times: list[tuple[int, What]], *, expires: bool) -> int | None:
    """From then on no attempt starts any more."""
    return min(
        (at for at, what in times if what == "total_timeout" or (what == "expires" and expires)), default=None
    )


def total_deadline_us(resolved: Resolved, run_at_us: int) -> int | None:
    return None if resolved.total_timeout_s is None else run_at_us + int(resolved.total_timeout_s * US)


def _start(task: TaskRequest) -> int:
    return parse_time_us(task.not_before) if task.not_before else 0
