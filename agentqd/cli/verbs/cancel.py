"""`agentqctl cancel`: ends tasks, waiting or running."""

from __future__ import annotations

from typing import Any

import click

from agentqd.cli.actions import act_on_tasks, for_each
from agentqd.cli.verb import Call, TaskId, verb


@verb("cancel")
@click.argument("ids", nargs=-1, required=True, metavar="ID...", type=TaskId())
def command(call: Call, ids: tuple[str, ...]) -> int:
    """End tasks. A running worker gets SIGTERM, its grace, then SIGKILL; its result is `cancelled`.

    For a box that cannot be reached, the cancellation is kept here and sent by the next contact; a task that is itself
    still spooled here is not sent at all.
    """
    spool = call.spool
    if spool is None:
        return act_on_tasks(call, ids, "cancel")
    from agentqd.client.spooling import cancel_spooled

    def act(task_id: str) -> dict[str, Any]:
        answer = cancel_spooled(call.bare_box, call.box, spool, task_id)
        if answer.get("where") == "spool" and not call.as_json:
            if answer["result"] == "cancelled":
                call.out.note(f"{task_id}: it was still spooled here, and will not be sent to {spool.box}")
            else:
                call.out.note(
                    f"{spool.box} is not reached ({answer['message']}): spooled here, and sent by the next contact"
                )
        return answer

    return for_each(call, ids, act)
