"""`agentqctl retry`: a new run of finished tasks."""

from __future__ import annotations

import click

from agentqd.cli.actions import act_on_tasks
from agentqd.cli.verb import Call, TaskId, verb


@verb("retry")
@click.argument("ids", nargs=-1, required=True, metavar="ID...", type=TaskId())
def command(call: Call, ids: tuple[str, ...]) -> int:
    """Run finished tasks again: a new run with a new result; nothing delivered is sent again. One that backs off
    tries again now; for one that waits for a usage limit its runner is open again, and that runner's tasks start in their order."""
    return act_on_tasks(call, ids, "retry")
