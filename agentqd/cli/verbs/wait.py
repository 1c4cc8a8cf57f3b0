"""`agentqctl wait`: until tasks have ended."""

from __future__ import annotations

import time
from typing import Any

import click

from agentqd.cli.ends import say_end
from agentqd.cli.verb import Call, TaskId, verb
from agentqd.client.tasks import exit_code_of, wait_for
from agentqd.core.units import parse_duration


@verb("wait")
@click.argument("ids", nargs=-1, required=True, metavar="ID...", type=TaskId())
@click.option("--timeout", metavar="TIME", help="Give up after so long (exit 124); the tasks go on.")
def command(call: Call, ids: tuple[str, ...], timeout: str | None) -> int:
    """Wait until all these tasks have ended.

    Exits 0 if all succeeded, else as the first that did not: the worker's own code if it failed with one, 124 timeout,
    125 any other end; at once 66 if one of them is not known, 65 if one was not accepted. Outlasts a restart of the daemon
    (60 s, then 69).
    """
    until = None
    if timeout is not None:
        try:
            until = time.monotonic() + parse_duration(timeout)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--timeout") from None
    if len(ids) > 1:  # a mistyped one is told before the first of them is waited for
        for task_id in dict.fromkeys(ids):
            _look(call, task_id, _left_s(until))
    ends: list[dict[str, Any]] = []
    for task_id in ids:
        ends.append(_wait(call, task_id, _left_s(until)))
        if not call.as_json:
            say_end(call, ends[-1])
            call.out.flush()
    if call.as_json:
        call.out.json(ends[0] if len(ends) == 1 else ends)
    return next((code for code in map(exit_code_of, ends) if code), 0)


def _left_s(until: float | None) -> float | None:
    return None if until is None else max(0.0, until - time.monotonic())


def _look(call: Call, task_id: str, timeout_s: float | None) -> None:
    """Raises AgentqError: there is nothing to wait for."""
    if call.spool is None:
        wait_for(call.box, task_id, timeout_s=timeout_s, only_look=True)
        return
    from agentqd.cli.spooled import look_for

    look_for(call, task_id, timeout_s)


def _wait(call: Call, task_id: str, timeout_s: float | None) -> dict[str, Any]:
    if call.spool is None:
        return wait_for(call.box, task_id, timeout_s=timeout_s)
    from agentqd.cli.spooled import wait_for_end

    return wait_for_end(call, task_id, timeout_s=timeout_s)
