"""`agentqctl flush`: sends what waits in the spool."""

from __future__ import annotations

import os
from typing import Any

from agentqd.cli.spooled import tell_report
from agentqd.cli.verb import Call, verb
from agentqd.client.box import Where, find_box
from agentqd.client.flush import Report, flush_spool
from agentqd.client.keeperplace import spool_root
from agentqd.client.spool import Spool
from agentqd.client.spoolfolder import spooled_boxes
from agentqd.core.errors import AgentqError


@verb("flush")
def command(call: Call) -> int:
    """Send what waits here, in order: for --box NAME, otherwise for every box that something waits for.

    Exits 0 if nothing is left; 69 if a box cannot be reached, 75 or 65 if one has refused something, 1 if a file of the
    spool was damaged. What another agentqctl is sending just now is left to it.
    """
    names = [call.where.box] if call.where.box else spooled_boxes(spool_root(os.environ))
    told: list[dict[str, Any]] = []
    exit_code = 0
    for name in names:
        spool = Spool(spool_root(os.environ), name)
        if not call.where.box and spool.is_empty():
            continue
        try:
            box = find_box(Where(box=name), os.environ, os.getuid(), call.out.note)
            report = flush_spool(box, spool)
        except AgentqError as error:  # this box is not known any more, say: the others are not to suffer
            report = Report(stopped=error)
        told.append(_told(spool, report))
        exit_code = exit_code or report.exit_code
        if not call.as_json:
            _say(call, spool, report)
    if call.as_json:
        call.out.json(told)
    elif not told and call.out.is_terminal:
        call.out.note("nothing waits")
    return exit_code


def _told(spool: Spool, report: Report) -> dict[str, Any]:
    return {
        "box": spool.box,
        "sent": [
            {
                "id": head.id,
                "kind": head.kind,
                "where": answer.get("where", "accepted"),
                "state": answer.get("state"),
            }
            for head, answer in report.sent
        ],
        "refused": [{"id": head.id, "kind": head.kind, **error.as_json()} for head, error in report.refused],
        "damaged": [item._asdict() for item in report.damaged],
        "left": len(spool.entries()),
        "stopped": None if report.stopped is None else report.stopped.as_json(),
        "busy": report.busy or report.attended,
    }


def _say(call: Call, spool: Spool, report: Report) -> None:
    for head, answer in report.sent:
        what = answer.get("result") or answer.get("state") or answer.get("where")
        call.out.line(f"{head.id}  {'cancel: ' if head.kind == 'cancel' else ''}{what}")
    call.out.flush()
    tell_report(call, spool, report)
    left = len(spool.entries())
    if report.stopped is not None:
        call.out.note(f"agentqctl: {left} left for {spool.box}: {report.stopped.message}")
    elif report.busy or report.attended:
        call.out.note(f"{left} left for {spool.box}: another agentqctl is sending")
    elif left:
        call.out.note(f"{left} left for {spool.box}: cancellations that wait for its daemon")
