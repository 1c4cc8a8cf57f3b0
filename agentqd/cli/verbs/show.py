"""`agentqctl show`: one task, on one timeline from its line to its delivery."""

from __future__ import annotations

import click

from agentqd.cli.taskpage import draw_task
from agentqd.cli.verb import Call, TaskId, verb
from agentqd.core.errors import AgentqError


@verb("show")
@click.argument("task_id", metavar="ID", type=TaskId())
def command(call: Call, task_id: str) -> int:
    """One task from its line to its delivery: what was asked, each attempt, each event, each receiver."""
    try:
        shown = call.box.connection.get("tasks", task_id)
    except AgentqError as error:
        if call.spool is None:
            raise
        from agentqd.cli.spooled import say_view, view_or_raise

        view = view_or_raise(call, task_id, error)
        if call.as_json:
            call.out.json(view)
        else:
            say_view(call, view)
        return 0
    if call.as_json:
        call.out.json(shown)
    else:
        draw_task(call.out, shown)
    return 0
