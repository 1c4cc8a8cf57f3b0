"""What a task gets in the end: the task's own word, else its queue's, else its runner's, else `defaults`, else the built-in.

A value that the task gives beats config edits; a value from the config follows them. So nothing resolved is stored:
it is worked out again from the written task and the newest settings whenever it is needed.
"""

from __future__ import annotations

import signal
from typing import Any, Final

import msgspec

from agentqd.core.errors import InvalidTask
from agentqd.core.settings import BUILT_IN, Conflict, Defaults, OnLost, Queue, Runner, Settings
from agentqd.core.task import TaskRequest
from agentqd.core.units import Backoff

ALWAYS_RUNNERS: Final = ("shell", "command")
_NO_QUEUE: Final = Queue()
_NO_RUNNER: Final = Runner()


class Placement(msgspec.Struct, frozen=True):
    """Where a task goes; fixed when it is accepted."""

    queue: str
    runner: str
    priority: int


class Resolved(msgspec.Struct, frozen=True):
    """Seconds, signals as numbers; None: that clock is off."""

    run_timeout_s: float
    total_timeout_s: float | None
    queue_timeout_s: float | None
    first_output_timeout_s: float | None
    silence_timeout_s: float | None
    kill_grace_s: float
    warning_signal: int | None
    result_grace_s: float
    max_attempts: int
    backoff: Backoff
    on_lost: OnLost
    on_conflict: Conflict
    intent_ttl_s: float | None
    deliver_to: tuple[str, ...]  # the config's word only: where neither the task nor a route says
    deliver_within_s: float | None
    dedup_ttl_s: float
    allow_no_work: bool
    workdir: str | None


def placement(task: TaskRequest, settings: Settings) -> Placement:
    """Raises InvalidTask (`unknown_queue`, `unknown_runner`) naming what there is."""
    defaults = settings.defaults
    queue_name = task.queue or defaults.queue or "default"
    queue = settings.queues.get(queue_name, _NO_QUEUE)
    if queue is _NO_QUEUE and queue_name != "default":
        raise _unknown("queue", queue_name, {"default", *settings.queues})
    runner = task.runner or queue.defaults.runner
    if runner is None:
        runner = "command" if task.command is not None else defaults.runner or "shell"
    if runner not in settings.runners and runner not in ALWAYS_RUNNERS:
        raise _unknown("runner", runner, {*ALWAYS_RUNNERS, *settings.runners})
    priority = task.priority
    if priority is None:
        layers = (queue.defaults, settings.runners.get(runner, _NO_RUNNER).defaults, defaults)
        priority = next((layer.priority for layer in layers if layer.priority is not None), 0)
    return Placement(queue_name, runner, priority)


def _unknown(kind: str, name: str, known: set[str]) -> InvalidTask:
    return InvalidTask(
        f"{kind}: there is no {kind} {name[:64]!r}; there is {', '.join(sorted(known))}",
        code=f"unknown_{kind}",
        field=kind,
    )


def resolve(task: TaskRequest, queue_name: str, runner_name: str, settings: Settings) -> Resolved:
    """Never raises: a queue or runner taken from the config since then counts as having no options."""
    queue = settings.queues.get(queue_name, _NO_QUEUE)
    runner = settings.runners.get(runner_name, _NO_RUNNER)
    layers: tuple[Defaults, ...] = (queue.defaults, runner.defaults, settings.defaults, BUILT_IN)

    def pick(name: str) -> Any:
        own = getattr(task, name, None)
        if own is not None:
            return own
        for layer in layers:
            value = getattr(layer, name)
            if value is not None:
                return value
        return None

    def seconds(name: str) -> Any:
        value = pick(name)
        return None if value is None else float(value)

    allow = task.expect.allow_no_work if task.expect is not None else None
    warning = pick("warning_signal")
    return Resolved(
        run_timeout_s=float(task.timeout)
        if task.run_timeout is None and task.timeout is not None
        else seconds("run_timeout"),
        total_timeout_s=seconds("total_timeout"),
        queue_timeout_s=seconds("queue_timeout"),
        first_output_timeout_s=seconds("first_output_timeout"),
        silence_timeout_s=seconds("silence_timeout"),
        kill_grace_s=seconds("kill_grace"),
        warning_signal=getattr(signal, warning, None) if isinstance(warning, str) else None,
        result_grace_s=seconds("result_grace"),
        max_attempts=pick("max_attempts"),
        backoff=pick("backoff"),
        on_lost=pick("on_lost"),
        on_conflict=task.on_conflict
        or queue.on_conflict
        or pick("on_conflict")
        or settings.writes.on_conflict,
        intent_ttl_s=(settings.writes.ttl if (ttl := seconds("intent_ttl")) is None else ttl) or None,
        deliver_to=tuple(next(layer.deliver_to for layer in layers if layer.deliver_to is not None)),
        deliver_within_s=seconds("deliver_within"),
        dedup_ttl_s=seconds("dedup_ttl"),
        allow_no_work=pick("allow_no_work") if allow is None else allow,
        workdir=pick("workdir"),
    )
