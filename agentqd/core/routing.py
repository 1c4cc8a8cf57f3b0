"""Which sinks an outbox entry goes to: the task's word > the routes > the defaults; `completions` always has results and entries.

Rules of a route:
1. All that its match names must fit; a list fits by any of its items; `*`, `?`, `[...]` as in file names, case counts.
2. What a thing does not have, no pattern fits: `result` never matches an entry or an alert (the end is not known yet, or is
   another thing), `queue` no alert that is about no task, `label` no task without one.
3. A label is one word of the task's `labels`, compared whole: `team=web` is a word like `nightly`; `team=*` fits it.
4. Of several routes that fit all sinks are taken, each once. One without `type` never takes alerts: those go where
   `alerts.deliver_to` says and where a route that names their type leads.

`allow_deliver_to` bounds what a task may choose, never what the config itself says (routes, defaults, alerts).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    result: str = ""  # of a result only
    labels: tuple[str, ...] = ()


class Forbidden(msgspec.Struct, frozen=True):
    """A sink that a task names and may not."""

    sink: str
    by: str  # "the queue agents"
    allowed: tuple[str, ...]  # names and patterns; `completions` is always allowed

    def __str__(self) -> str:
        return f"{self.by} does not allow {self.sink!r}; it allows {', '.join((COMPLETIONS, *self.allowed))}"


def known_sink(settings: Settings, name: str) -> bool:
    return name == COMPLETIONS or name in settings.sinks


def forbidden(settings: Settings, queue: str, runner: str, names: Iterable[str]) -> Iterator[Forbidden]:
    """The sinks among `names` that a task of this queue and runner may not choose, each with the first who forbids it."""
    of_queue, of_runner = settings.queues.get(queue), settings.runners.get(runner)
    bounds = (
        (f"the queue {queue}", of_queue.allow_deliver_to if of_queue is not None else None),
        (f"the runner {runner}", of_runner.allow_deliver_to if of_runner is not None else None),
    )
    for name in dict.fromkeys(names):
        for by, allowed in bounds:
            if allowed is not None and name != COMPLETIONS and not _one(allowed, (name,)):
                yield Forbidden(name, by, tuple(allowed))
                break


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
    return any(fnmatchcase(item, pattern) for item in have if item for pattern in patterns)
