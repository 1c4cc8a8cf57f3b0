"""Rules of the config between sinks, and between sinks and what leads to them. Pure.

1. No two file sinks write one file: each finds its own lines by where they stand.
2. No file sink writes into the daemon's state folder (`in_state`, where the folder is known): its files are agentqd's own.
3. An email sink without `to` is for entries that address themselves; nothing that says no address may lead there.
4. A route leads somewhere, and none of its match can fit nothing.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Final

from agentqd.core.config_problem import Problem
from agentqd.core.lifecycle import Result
from agentqd.core.settings import Defaults, Match, Settings

Key = tuple[str | int, ...]
_NOT_ENTRIES: Final = (*(f"agentq.task.{each.value}" for each in Result), "agentq.alert.any")


def check_places(settings: Settings) -> Iterator[Problem]:
    """What is wrong between the sinks, and with what leads to them."""
    yield from _one_file_twice(settings)
    yield from _nobody_to_mail(settings)
    for n, route in enumerate(settings.routes):
        if not route.deliver_to:
            yield Problem(
                ("routes", n, "deliver_to"),
                "names no sink: the defaults would hold as if the route were not there; name one"
                " ([completions]: nowhere else)",
            )
        for field in Match.__struct_fields__:
            if getattr(route.match, field) == []:
                yield Problem(
                    ("routes", n, "match", field),
                    "is an empty list, which nothing fits: the route would never match; leave it out to match any",
                )


def in_state(
    settings: Settings, state: str, real: Callable[[str], str] = os.path.normpath
) -> Iterator[Problem]:
    """File sinks whose path lies in the state folder. `real` says what a path is without links."""
    folder = real(state)
    for name, sink in settings.sinks.items():
        if sink.type != "file" or sink.path is None:
            continue
        path = real(sink.path)
        if path == folder or path.startswith(folder.rstrip("/") + "/"):
            yield Problem(
                ("sinks", name, "path"),
                f"{sink.path!r} lies in the state folder {state}, whose files are agentqd's own; choose a path outside of it",
            )


def _one_file_twice(settings: Settings) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for name, sink in settings.sinks.items():
        if sink.type != "file" or sink.path is None:
            continue
        path = os.path.normpath(sink.path)
        if path in first:
            yield Problem(
                ("sinks", name, "path"),
                f"{sink.path!r} is the path of the sink {first[path]}, too; each file sink needs a file of its own",
            )
        first.setdefault(path, name)


def _nobody_to_mail(settings: Settings) -> Iterator[Problem]:
    nobody = {name for name, sink in settings.sinks.items() if sink.type == "email" and not sink.to}
    if not nobody:
        return
    leads: list[tuple[Key, list[str], str]] = [
        (("alerts", "deliver_to"), settings.alerts.deliver_to, "alerts name"),
        *(
            ((*key, "deliver_to"), defaults.deliver_to or [], "results name")
            for key, defaults in _all_defaults(settings)
        ),
        *(
            (("routes", n, "deliver_to"), route.deliver_to, "results and alerts name")
            for n, route in enumerate(settings.routes)
            if _takes_more_than_entries(route.match)
        ),
    ]
    for key, names, what in leads:
        for name in names:
            if name in nobody:
                only = "" if key[0] != "routes" else ", or let the route match only type: agentq.task.entry"
                yield Problem(
                    key,
                    f"leads to the email sink {name}, which has no `to`, and {what} nobody: each would be a dead letter;"
                    f" give sinks.{name} a `to`{only}",
                )


def _all_defaults(settings: Settings) -> Iterator[tuple[Key, Defaults]]:
    yield ("defaults",), settings.defaults
    for name, queue in settings.queues.items():
        yield ("queues", name, "defaults"), queue.defaults
    for name, runner in settings.runners.items():
        yield ("runners", name, "defaults"), runner.defaults


def _takes_more_than_entries(match: Match) -> bool:
    if match.type is None:
        return True
    patterns = [match.type] if isinstance(match.type, str) else match.type
    return any(
        pattern.startswith("agentq.alert.") or any(fnmatchcase(each, pattern) for each in _NOT_ENTRIES)
        for pattern in patterns
    )
