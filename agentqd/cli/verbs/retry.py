"""`agentqctl retry`: a new run of finished tasks."""

from __future__ import annotations

import click

from agentqd.cli.actions import act_on_tasks
from agentqd.cli.verb import Call, TaskId, verb


@verb("retry")
@click.argument("ids", nargs=-1, required=True, metavar="ID...", type=TaskId())
@click.option(
    "--on-conflict",
    metavar="refuse|queue|warn",
    type=click.Choice(["refuse", "queue", "warn"]),
    help="For this run, when what it writes overlaps what others claim: queue waits for their end.",
)
def command(call: Call, ids: tuple[str, ...], on_conflict: str | None) -> int:
    """Run finished tasks again: a new run with a new result; nothing delivered is sent again. One that backs off
    tries again now; for one that waits for a usage limit its runner is open again, and that runner's tasks start in their order."""
    return act_on_tasks(call, ids, "retry", {"on_conflict": on_conflict} if on_conflict else None)
