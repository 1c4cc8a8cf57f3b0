"""`agentqctl pause`: one queue."""

from __future__ import annotations

import click

from agentqd.cli.actions import act_on_queue
from agentqd.cli.verb import Call, verb


@verb("pause")
@click.argument("queue", metavar="QUEUE")
def command(call: Call, queue: str) -> int:
    """Start nothing more from a queue; what runs goes on. Kept over a restart."""
    return act_on_queue(call, queue, "pause")
