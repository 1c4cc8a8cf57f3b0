"""`agentqctl status`: what needs attention first, then what runs, waits and is on its way."""

from __future__ import annotations

import time

import click

from agentqd.cli.statuspage import draw_status
from agentqd.cli.verb import Call, verb
from agentqd.core.errors import AgentqError


@verb("status", all_boxes="object")
@click.option("--watch", is_flag=True, help="Again and again, until interrupted.")
@click.option(
    "--every", type=click.FloatRange(min=0.1), default=2.0, metavar="SECONDS", help="How often (2)."
)
def command(call: Call, watch: bool, every: float) -> int:
    """What needs attention, what runs, what waits, what is on its way."""
    if not watch:
        _show(call)
        return 0
    while True:
        call.out.clear()
        try:
            _show(call)
        except AgentqError as error:
            call.out.error(error)  # a restart of the daemon does not end the watching
        call.out.flush()
        time.sleep(every)


def _show(call: Call) -> None:
    status = call.box.connection.get("status")
    if call.as_json:
        call.out.json(status)
    else:
        draw_status(call.out, status)
