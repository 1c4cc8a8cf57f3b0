"""Which sinks an outbox entry goes to: the task's word > the routes > the defaults; `completions` always has results and entries."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Final

import msgspec

from agentqd.core.settings import Match, Settings

COMPLETIONS: Final = "completions"
REJECTED: Final = "rejected"  # built in: queue/rejected.jsonl; never named by a person


class Subject(msgspec.Struct, frozen=True):
    """What a route can match."""

    type: str
    queue: str = ""
    runner: str = ""
    result: str = ""
    labels: tuple[str, ...] = ()


def known_sink(settings: Settings, name: str) -> bool:
    return name == COMPLETIONS or name in settings.sinks


def sinks_for(
    settings: Settings, subject: Subject, task_says: Iterable[str] | None, defaults: Iterable[str]
) -> list[str]:
    """The names, `completions` first, each once. `task_says` is the task's own deliver_to (None: it says nothing)."""
    chosen = list(task_says) if task_says is not None else _routed(settings, subject) or list(defaults)
    return list(dict.fromkeys([COMPLETIONS, *chosen]))


def alert_sinks(settings: Settings, subject: Subject) -> list[str]:
    """Alerts go where `alerts.deliver_to` says and where a route that names their type leads."""
    routed = [
        sink
        for route in settings.routes
        if route.match.type and _matches(route.match, subject)
        for sink in route.deliver_to
    ]
    return list(dict.fromkeys([*settings.alerts.deliver_to, *routed]))


def _routed(settings: Settings, subject: Subject) -> list[str]:
    return [sink for route in settings.routes if _matches(route.match, subject) for sink in route.deliver_to]


def _matches(match: Match, subject: Subject) -> bool:
    return (
        _one(match.type, (subject.type,))
        and _one(match.queue, (subject.queue,))
        and _one(match.runner, (subject.runner,))
        and _one(match.result, (subject.result,))
        and _one(match.label, subject.labels)
    )


def _one(wanted: str | list[str] | None, have: tuple[str, ...]) -> bool:
    if wanted is None:
        return True
    patterns = [wanted] if isinstance(wanted, str) else wanted
    return any(fnmatchcase(item, pattern) for item in have for pattern in patterns)
