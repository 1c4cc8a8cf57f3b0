"""Rules of the config between sinks, and between sinks and what leads to them. Pure.

1. No two file sinks write one file: each finds its own lines by where they stand.
2. No file sink writes to a file of the daemon's own, or into its folders (`in_state`, where the state folder is known).
3. An email sink without `to` is for entries that address themselves; alerts, which never do, may not lead there.
4. A route leads somewhere, and none of its match can fit nothing.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Iterator
from typing import Final

from agentqd.core.config_problem import Problem
from agentqd.core.settings import Match, Settings

_OWN: Final = re.compile(
    r"queue$|tasks$|prompts$|blobs$|completions[.-]|journal\.db|state_id|.*\.lock$|reserve|\."
)


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
        below = path.removeprefix(folder.rstrip("/") + "/").split("/")[0] if path != folder else folder
        if path == folder or (below != path and _OWN.match(below)):
            yield Problem(
                ("sinks", name, "path"),
                f"{sink.path!r} is agentqd's own: {below} of the state folder {state}; choose another path",
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
    for name in settings.alerts.deliver_to:
        if name in nobody:
            yield Problem(
                ("alerts", "deliver_to"),
                f"leads to the email sink {name}, which has no `to`, and alerts name nobody: each would be a dead letter;"
                f" give sinks.{name} a `to`",
            )
