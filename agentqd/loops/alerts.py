"""Alerts: outbox entries of type `agentq.alert.*`, events in the chain, and a line in the log. One mechanism for all."""

from __future__ import annotations

from typing import Any

from agentqd.core.envelope import delivery_id, seal
from agentqd.core.routing import Subject, alert_sinks
from agentqd.core.units import format_time
from agentqd.loops.box import Box
from agentqd.storage import outbox
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction


def alert(
    tx: Transaction,
    box: Box,
    kind: str,
    message: str,
    *,
    task: TaskRow | None = None,
    key: str = "",
    not_to: str | None = None,
    **fields: Any,
) -> bool:
    """Say it once for (kind, task and run, key): in the outbox, the chain and the log. False if it was said before."""
    entry_id = delivery_id(
        box.state_id, task.id if task else "", task.run if task else 0, "alert", f"{kind}:{key}"
    )
    if outbox.entry_exists(tx, entry_id) is not None:
        return False
    type_ = f"agentq.alert.{kind}"
    data: dict[str, Any] = {
        "alert": kind,
        "message": message,
        "at": format_time(tx.now_us),
        "task_id": task.id if task else None,
        "name": task.name if task else None,
        **fields,
    }
    subject = Subject(type_, task.queue if task else "", task.runner if task else "")
    outbox.add_entry(
        tx,
        outbox.NewEntry(
            delivery_id=entry_id,
            task_seq=task.seq if task else None,
            run=task.run if task else 0,
            attempt=task.attempt if task else 0,
            kind="alert",
            key=f"{kind}:{key}",
            type=type_,
            payload=seal(entry_id, type_, box.name, task.id if task else None, tx.now_us, data),
            task_id=task.id if task else None,
            sinks=[name for name in alert_sinks(box.settings, subject) if name != not_to],
        ),
    )
    tx.event(task.id if task else None, "alert", alert=kind, message=message, delivery_id=entry_id)
    task_id = task.id if task else None
    tx.later(lambda: _say(box, kind, message, task_id))
    return True


def _say(box: Box, kind: str, message: str, task_id: str | None) -> None:
    if task_id is None:
        box.log.warning("alert", alert=kind, message=message)
    else:
        box.log.warning("alert", alert=kind, message=message, task=task_id)
