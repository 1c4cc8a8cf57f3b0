"""`agentqctl drain`: before a maintenance."""

from __future__ import annotations

import click

from agentqd.cli.verb import Call, verb


@verb("drain")
@click.option("--off", is_flag=True, help="End it: accept and start again.")
def command(call: Call, off: bool) -> int:
    """Accept nothing more over the socket and start nothing more; what runs goes on, what is done is delivered.
    It holds until --off: a restart, a crash or an upgrade of the daemon does not end it."""
    answer = call.box.connection.post("drain", body={"on": not off})
    if call.as_json:
        call.out.json(answer)
    else:
        call.out.line(
            "draining ended"
            if off
            else "draining: nothing new starts, after a restart of the daemon neither; end it with: agentqctl drain --off"
        )
    return 0
