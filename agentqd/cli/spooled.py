"""How the spool shows in the verbs: what a flush tells, and tasks that no box knows yet."""

from __future__ import annotations

import time
from typing import Any

from agentqd.cli.outcome import in_the_way
from agentqd.cli.verb import Call
from agentqd.client.errors import BoxUnreachable
from agentqd.client.flush import Report, flush_spool, may_pass
from agentqd.client.patience import WAIT_FIRST_S
from agentqd.client.spool import Spool
from agentqd.client.spooling import spooled_view
from agentqd.client.tasks import wait_for
from agentqd.core.errors import AgentqError, Unreachable

LOOK_MAX_S = 5.0
UNREAD_MAX_S = 60.0  # a line in the queue file is read in milliseconds; a daemon that starts takes seconds


def send_spooled(call: Call, spool: Spool) -> None:
    """Flushes the spool and tells of it. Raises BoxUnreachable."""
    report = flush_spool(call.bare_box, spool)
    tell_report(call, spool, report)
    if isinstance(report.stopped, BoxUnreachable):
        raise report.stopped


def tell_report(call: Call, spool: Spool, report: Report) -> None:
    """What a person must know of a flush: what was refused, what was no entry. On a terminal, what was sent too."""
    for item in report.damaged:
        call.out.note(f"agentqctl: the spool for {spool.box}: {item.name}: {item.why}; moved to {item.kept}")
    for refused in report.refused:
        head, error = refused
        what = f"{head.id} ({head.name})" if head.name else f"the cancellation of {head.id}"
        call.out.note(f"agentqctl: {spool.box} has refused {what}: {error.message}")
        for line in in_the_way(error.fields.get("conflicts")):
            call.out.note(f"  {line}")
    if report.sent and call.out.is_terminal:
        call.out.note(f"{len(report.sent)} from the spool went to {spool.box}")


def view_or_raise(call: Call, task_id: str, error: AgentqError) -> dict[str, Any]:
    """A task of which only the spool knows. Raises `error` where that knows nothing either."""
    if call.spool is None or not (isinstance(error, Unreachable) or error.code == "no_such_task"):
        raise error
    view = spooled_view(call.spool, task_id)
    if view is None:
        raise error
    return {**view, "message": error.message} if view["state"] is None else view


def say_view(call: Call, view: dict[str, Any]) -> None:
    """A page for it."""
    out = call.out
    out.heading(f"{view['id']}  {view['task']}")
    if view["state"] is None:
        out.line(f"spooled here since {view['spooled_at']}, not yet sent to {view['box']}")
        out.lines(str(view.get("message") or ""))
    else:
        out.line(f"refused ({view['reason']}) by {view['box']}, spooled here at {view['spooled_at']}")
        out.lines(str(view["detail"] or ""))
        for line in in_the_way(view.get("conflicts")):
            out.lines(line, indent="  ", hang="    ")


def wait_for_end(
    call: Call, task_id: str, *, timeout_s: float | None = None, may_be_unread: bool = False
) -> dict[str, Any]:
    """The end of a task, also of one that is still spooled, or that the box refuses from there. As tasks.wait_for."""
    until = None if timeout_s is None else time.monotonic() + timeout_s
    if call.spool is None:
        return wait_for(call.box, task_id, timeout_s=timeout_s, may_be_unread=may_be_unread)
    was_spooled = until_sent(call, call.spool, task_id, until)
    if was_spooled is None:
        return {
            "id": task_id,
            "state": None,
            "result": None,
            "reason": None,
            "detail": None,
            "conflicts": [],
            "exit_code": None,
            "finished": False,
        }
    unread_until = time.monotonic() + (UNREAD_MAX_S if was_spooled or may_be_unread else 0.0)
    wait_s = WAIT_FIRST_S
    while True:
        left_s = None if until is None else max(0.0, until - time.monotonic())
        try:
            return wait_for(call.box, task_id, timeout_s=left_s)
        except AgentqError as error:
            if error.code != "no_such_task":
                raise
            view = spooled_view(call.spool, task_id)
            if view is not None and view["state"] is not None:
                return _end_of(view)
            if time.monotonic() >= unread_until:
                raise
        time.sleep(wait_s if left_s is None else min(wait_s, left_s))
        wait_s = min(wait_s * 2, 1.0)


def _end_of(view: dict[str, Any]) -> dict[str, Any]:
    """Of a task that its box has refused."""
    names = ("id", "state", "result", "reason", "detail", "conflicts")
    return {**{name: view[name] for name in names}, "exit_code": None, "finished": True}


def until_sent(call: Call, spool: Spool, task_id: str, until: float | None) -> bool | None:
    """Flushes until this task's submission waits here no more. False: it did not wait here. None: `until` came first."""
    if spool.find(task_id) is None:
        return False
    call.out.note(f"{task_id}: spooled here, not yet sent to {spool.box}")
    wait_s = WAIT_FIRST_S
    while True:
        report = flush_spool(call.bare_box, spool)
        tell_report(call, spool, report)
        if spool.find(task_id) is None:
            return True
        stopped = report.stopped
        if stopped is not None and not may_pass(stopped):
            raise stopped  # a key that is not accepted: waiting mends nothing
        now = time.monotonic()
        if until is not None and now >= until:
            return None
        time.sleep(wait_s if until is None else min(wait_s, until - now))
        wait_s = min(wait_s * 2, LOOK_MAX_S)
