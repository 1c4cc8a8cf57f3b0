"""`agentqctl release`: lets held tasks go on."""

from __future__ import annotations

import click

from agentqd.cli.actions import act_on_tasks
from agentqd.cli.verb import Call, TaskId, verb


@verb("release")
@click.argument("ids", nargs=-1, required=True, metavar="ID...", type=TaskId())
def command(call: Call, ids: tuple[str, ...]) -> int:
    """Let held tasks go on."""
    return act_on_tasks(call, ids, "release")
