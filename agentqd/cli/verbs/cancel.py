"""`agentqctl cancel`: ends tasks, waiting or running."""

from __future__ import annotations

import click

from agentqd.cli.actions import act_on_tasks
from agentqd.cli.verb import Call, TaskId, verb


@verb("cancel")
@click.argument("ids", nargs=-1, required=True, metavar="ID...", type=TaskId())
def command(call: Call, ids: tuple[str, ...]) -> int:
    """End tasks. A running worker gets SIGTERM, its grace, then SIGKILL; its result is `cancelled`."""
    return act_on_tasks(call, ids, "cancel")
