"""How a task's end is waited for and told; shared by `submit --wait`, `submit --follow`, `wait` and `logs -f`."""

from __future__ import annotations

from typing import Any

from agentqd.cli.outcome import in_the_way, outcome
from agentqd.cli.verb import Call
from agentqd.client.logs import LogReader
from agentqd.client.patience import Patience, may_come_back
from agentqd.client.tasks import exit_code_of, unread_patience, wait_for
from agentqd.core.errors import AgentqError


def say_end(call: Call, end: dict[str, Any]) -> None:
    """One line: id, result or state, reason."""
    parts = [str(end.get("id")), outcome(end)]
    if not end.get("finished"):
        parts.append("not finished in time")
    call.out.line("  ".join(parts))
    if why := why_refused(end):
        call.out.lines(why, indent="  ", hang="  ")
    for line in in_the_way(end.get("conflicts")):
        call.out.lines(line, indent="  ", hang="    ")


def why_refused(end: dict[str, Any]) -> str:
    """Of a refused task: what stood in its way."""
    return str(end.get("detail") or "") if end.get("result") == "refused" else ""


def log_reader(call: Call, task_id: str, stream: str) -> LogReader:
    def write(data: bytes) -> None:
        call.out.raw(data)
        call.out.flush()

    return LogReader(call.box, task_id, stream, write=write, note=call.out.note)


def follow_to_the_end(call: Call, task_id: str, *, may_be_unread: bool) -> int:
    """The worker's stdout as it comes, then the exit code of its end."""
    if may_be_unread:
        _until_known(call, task_id)
    log_reader(call, task_id, "stdout").follow(None)
    end = wait_for(call.box, task_id)
    call.out.note("  ".join(filter(None, (task_id, outcome(end), why_refused(end)))))
    return exit_code_of(end)


def _until_known(call: Call, task_id: str) -> None:
    """A line in the queue file becomes a task when the daemon has read it."""
    patience, unread = Patience(call.box.reconnect_s), unread_patience(call.box)
    while True:
        try:
            call.box.connection.get("tasks", task_id)
        except AgentqError as error:
            if error.code == "no_such_task":
                patience.succeeded()
                unread.bear(error)
            elif may_come_back(error):
                unread.succeeded()
                patience.bear(error)
            else:
                raise
        else:
            return
