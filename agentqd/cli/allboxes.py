"""`--box all`: one verb on every box of the config. A box that does not answer hides none of the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from agentqd.cli.output import Output
from agentqd.cli.verb import Call
from agentqd.client.box import Where
from agentqd.client.boxes import load_boxes
from agentqd.client.errors import NoSuchBox
from agentqd.client.keeperplace import config_file
from agentqd.client.kept import Kept
from agentqd.core.errors import AgentqError

ENDLESS = ("follow", "watch")


class _Collected(Output):
    """JSON kept for the object by name (`json`), or given the box's name (`json_line`)."""

    def __init__(self, box: str, *, as_json: bool) -> None:
        super().__init__(as_json=as_json)
        self._box = box
        self.value: Any = None

    def json(self, value: Any) -> None:
        self.value = value

    def json_line(self, value: Any, *, newline: bool = True) -> None:
        super().json_line({"box": self._box, **value}, newline=newline)


def run_on_all(
    invoke: Callable[[click.Context], Any], ctx: click.Context, *, as_json: bool, as_lines: bool
) -> int:
    """Text under a heading for each box, JSON as an object by name or lines that name it; the worst exit code."""
    for option in ENDLESS:
        if ctx.params.get(option):
            raise click.UsageError(
                f"--box all does not go with --{option}: it would never come to the second box"
            )
    path = config_file(os.environ)
    names = list(load_boxes(path))
    if not names:
        raise NoSuchBox(f"{path} names no box; add one: agentqctl box add NAME ssh://USER@HOST")
    for name in names:  # all of them connect at the same time
        Kept(name, os.environ, os.getuid()).warm()
    found: dict[str, Any] = {}
    worst = 0
    for name in names:
        out = _Collected(name, as_json=as_json)
        if not as_json and (not as_lines or out.is_terminal):
            out.heading(f"== {name} ==")
        ctx.params["call"] = Call(Where(box=name), as_json=as_json, out=out)
        try:
            code = invoke(ctx)
        except AgentqError as error:
            code = error.exit_code
            if as_json and as_lines:
                out.json_line(error.as_json())
            else:
                out.flush()
                out.error(error)
        out.flush()
        worst = max(worst, code or 0)
        found[name] = out.value
    if as_json and not as_lines:
        Output(as_json=True).json(found)
    return worst
