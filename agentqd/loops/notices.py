"""What a plug has noticed besides its outcomes (a file replaced, a host key changed) becomes an alert."""

from __future__ import annotations

from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.sinks.base import Sink
from agentqd.storage.transaction import Transaction


def tell_notices(box: Box, name: str, plug: Sink) -> None:
    """Take the plug's `notices`, if it has any."""
    notices: list[str] | None = getattr(plug, "notices", None)
    if not notices:
        return
    told, notices[:] = list(notices), []
    at, kind = box.clock.now_us(), getattr(plug, "notice_kind", "sink_file")

    def unit(tx: Transaction) -> None:
        for n, text in enumerate(told):
            alert(tx, box, kind, f"{name}: {text}", key=f"{name}:{at}:{n}", group=name, sink=name)

    box.journal.submit(unit)
