"""What one written task is checked against before the transaction that takes it: rules, names, clocks, its prompt.

Nothing here writes. A candidate holds all that `admission` needs, so that the journal's thread decides and never parses.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, Final

import msgspec

from agentqd.core.errors import InvalidTask
from agentqd.core.lifecycle import Event
from agentqd.core.resolve import Placement, placement, resolve
from agentqd.core.routing import forbidden, known_sink
from agentqd.core.settings import Conflict, Settings
from agentqd.core.task import TaskRequest, content_digest, derived_id, prompt_digest, read_written_task
from agentqd.core.units import parse_time_us
from agentqd.core.waking import next_wake_us, wake_times
from agentqd.loops.box import Box
from agentqd.storage.paths import expand_workdir, resolve_intents
from agentqd.storage.prompts import Missing, read_prompt
from agentqd.storage.tasks import NewTask

PROMPT_LOOK_AGAIN_US: Final = 1_000_000


class Candidate(msgspec.Struct):
    """A checked task on its way in."""

    request: TaskRequest
    new: NewTask
    checks_content: bool  # an explicit id: another content under it is an id_conflict
    missing_prompt: str | None = None
    writes: list[tuple[str, str]] = []  # (resolved, as given)
    on_conflict: Conflict = "refuse"


def prepare(raw: bytes, source: dict[str, Any], place: bytes, box: Box) -> Candidate:
    """Check one written task against the rules and the newest settings. Raises InvalidTask.

    `place` identifies the line in its file (for tasks that bring no id and no submitted_at).
    """
    request = read_written_task(raw)
    settings = box.settings
    where = placement(request, settings)
    _check_names(request, where, settings)
    workdir = expand_workdir(request.workdir)
    if workdir is not None and not os.path.isabs(workdir):
        raise InvalidTask(
            f"workdir: {workdir[:200]!r} is not an absolute path; write /... or ~/... (the daemon's user's home)",
            code="invalid_field",
            field="workdir",
        )
    if request.command is not None and not _allows_command(settings, where.runner):
        raise InvalidTask(
            f"command: the runner {where.runner} does not take one; use the runner command, or set allow_command",
            code="command_not_allowed",
            field="command",
        )
    now = box.clock.now_us()
    prompt, missing = _prompt(request, box)
    event, wake = _first_event(request, where.queue, where.runner, settings, now)
    reason = None
    if missing is not None:
        event, reason, wake = Event.ACCEPTED_BLOCKED, "prompt_missing", now + PROMPT_LOOK_AGAIN_US
    task_id, checks = _identity(request, raw, place)
    content = (
        content_digest(request, prompt_digest(prompt) if prompt is not None else None) if checks else b""
    )
    return Candidate(
        request=request,
        new=NewTask(
            id=task_id,
            name=request.task,
            queue=where.queue,
            runner=where.runner,
            priority=where.priority,
            event=event,
            reason=reason,
            submitted_at=request.submitted_at,
            wake_at=wake,
            content=content,
            source=msgspec.json.encode(source).decode(),
            spec=raw,
            prompt=prompt,
        ),
        checks_content=checks,
        missing_prompt=missing,
        **_writes(request, where, settings),
    )


def _writes(request: TaskRequest, where: Placement, settings: Settings) -> dict[str, Any]:
    if not request.writes_to:
        return {}
    resolved = resolve(request, where.queue, where.runner, settings)
    return {
        "writes": resolve_intents(request.writes_to, resolved.workdir),
        "on_conflict": resolved.on_conflict,
    }


def _identity(request: TaskRequest, raw: bytes, place: bytes) -> tuple[str, bool]:
    if request.id is not None:
        return request.id, True
    if request.submitted_at is not None:
        written = request.submitted_at.encode("utf-8", "surrogatepass")
        reference = (request.prompt_ref or "").encode("utf-8", "surrogatepass")
        return derived_id(b"content", content_digest(request, None), written, reference), False
    return derived_id(b"place", place, hashlib.sha256(raw).digest()), False


def _prompt(request: TaskRequest, box: Box) -> tuple[bytes | None, str | None]:
    """(content, None), (None, the path that is missing) or (None, None)."""
    if request.prompt_ref is None:
        return None, None
    found = read_prompt(request.prompt_ref, prompt_roots(box), box.settings.limits.prompt_bytes_max)
    return (None, found.path) if isinstance(found, Missing) else (found, None)


def prompt_roots(box: Box) -> list[str]:
    return [box.folders.prompts, *box.settings.limits.prompt_roots]


def _first_event(
    request: TaskRequest, queue: str, runner: str, settings: Settings, now: int
) -> tuple[Event, int | None]:
    simple = request.not_before is None and request.expires_at is None
    if (
        simple
        and request.total_timeout is None
        and request.queue_timeout is None
        and not _default_clocks(settings)
    ):
        return Event.ACCEPTED, None
    times = wake_times(request, resolve(request, queue, runner, settings), now)
    wake = next_wake_us(times, now)
    if request.expires_at is not None and parse_time_us(request.expires_at) <= now:
        wake = now  # looked at at once, and ended as expired: a task, not a rejection
        return Event.ACCEPTED_BLOCKED, wake
    if request.not_before is not None and parse_time_us(request.not_before) > now:
        return Event.ACCEPTED_FOR_LATER, wake
    return Event.ACCEPTED, wake


def _default_clocks(settings: Settings) -> bool:
    """Does any layer of the config give waiting tasks a clock?"""
    layers = [settings.defaults, *(queue.defaults for queue in settings.queues.values())]
    layers += [runner.defaults for runner in settings.runners.values()]
    return any(layer.total_timeout is not None or layer.queue_timeout is not None for layer in layers)


def _check_names(request: TaskRequest, where: Placement, settings: Settings) -> None:
    for name in request.own_sinks() or ():
        if not known_sink(settings, name):
            raise InvalidTask(
                f"deliver_to: there is no sink {name[:64]!r}; there is {', '.join(sorted({'completions', *settings.sinks}))}",
                code="unknown_sink",
                field="deliver_to",
            )
    for problem in forbidden(settings, where.queue, where.runner, request.own_sinks() or ()):
        raise InvalidTask(
            f"deliver_to: {problem}",
            code="sink_not_allowed",
            field="deliver_to",
            sink=problem.sink,
            forbidden_by=problem.by,
            allowed=list(problem.allowed),
        )


def _allows_command(settings: Settings, runner: str) -> bool:
    options = settings.runners.get(runner)
    if options is not None and options.allow_command is not None:
        return options.allow_command
    preset = (options.preset if options is not None else None) or runner
    return preset == "command"
