"""`agentqctl hold`: keeps waiting tasks from starting."""

from __future__ import annotations

import click

from agentqd.cli.actions import act_on_tasks
from agentqd.cli.verb import Call, TaskId, verb


@verb("hold")
@click.argument("ids", nargs=-1, required=True, metavar="ID...", type=TaskId())
def command(call: Call, ids: tuple[str, ...]) -> int:
    """Keep waiting tasks from starting, until `release`."""
    return act_on_tasks(call, ids, "hold")
