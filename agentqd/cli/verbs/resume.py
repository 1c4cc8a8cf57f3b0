"""`agentqctl resume`: one queue."""

from __future__ import annotations

import click

from agentqd.cli.actions import act_on_queue
from agentqd.cli.verb import Call, verb


@verb("resume")
@click.argument("queue", metavar="QUEUE")
def command(call: Call, queue: str) -> int:
    """Let a paused queue go on."""
    return act_on_queue(call, queue, "resume")
