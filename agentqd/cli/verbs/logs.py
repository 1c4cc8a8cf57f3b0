"""`agentqctl logs`: a worker's output, byte for byte."""

from __future__ import annotations

import click

from agentqd.cli.ends import log_reader
from agentqd.cli.verb import Call, TaskId, verb
from agentqd.core.errors import AgentqError, Unreachable


@verb("logs", as_json=False)
@click.argument("task_id", metavar="ID", type=TaskId())
@click.option("-f", "--follow", is_flag=True, help="Go on until the task has ended, over all its attempts.")
@click.option("--stderr", is_flag=True, help="Its stderr; otherwise its stdout.")
@click.option(
    "--attempt", type=click.IntRange(min=1), help="That attempt; otherwise the last (-f: from the first)."
)
def command(call: Call, task_id: str, follow: bool, stderr: bool, attempt: int | None) -> int:
    """What a worker wrote, unchanged."""
    reader = log_reader(call, task_id, "stderr" if stderr else "stdout")
    if follow and call.spool is not None and call.spool.find(task_id) is not None:
        from agentqd.cli.spooled import until_sent

        until_sent(call, call.spool, task_id, None)
    try:
        if follow:
            reader.follow(attempt)
        else:
            reader.read_once(attempt)
    except AgentqError as error:
        if call.spool is None:
            raise
        from agentqd.cli.spooled import view_or_raise

        view = view_or_raise(call, task_id, error)
        where = (
            f"still spooled here: {error.message}" if view["state"] is None else f"refused: {view['detail']}"
        )
        raise Unreachable(f"{task_id} has written nothing; {where}", where="spool") from None
    return 0
