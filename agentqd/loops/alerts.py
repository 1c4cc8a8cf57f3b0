"""Alerts: outbox entries of type `agentq.alert.*`, events in the chain, and a line in the log. One mechanism for all.

A storm is bounded: of one kind and `group` (a sink whose receiver says no to everything, a worker whose every file is broken, a
writer whose every line is) so many are told one by one in an hour, then one says that there are more. What each was about
stands in the chain anyway.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from agentqd.core.envelope import delivery_id, seal
from agentqd.core.limits import ALERT_GROUP_S, ALERTS_A_GROUP_MAX
from agentqd.core.routing import Subject, alert_sinks
from agentqd.core.task import read_task
from agentqd.core.units import format_time
from agentqd.loops.box import Box
from agentqd.storage import outbox
from agentqd.storage import tasks as store
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction

US: Final = 1_000_000


class _Told(msgspec.Struct):
    """How many of a group were told in which hour."""

    hour: int
    count: int


def alert(
    tx: Transaction,
    box: Box,
    kind: str,
    message: str,
    *,
    task: TaskRow | None = None,
    key: str = "",
    not_to: str | None = None,
    group: str | None = None,
    only_kept: bool = False,
    **fields: Any,
) -> bool:
    """Say it once for (kind, task and run, key): in the outbox, the chain and the log. False if it was said before, or if
    too many of its `group` were. `only_kept`: to no sink, only kept, shown and logged."""
    entry_id = delivery_id(
        box.state_id, task.id if task else "", task.run if task else 0, "alert", f"{kind}:{key}"
    )
    if outbox.entry_exists(tx, entry_id) is not None:
        return False
    if group is not None:
        told, hour = _count(tx, f"{kind}:{group}")
        if told > ALERTS_A_GROUP_MAX + 1:
            return False
        if told == ALERTS_A_GROUP_MAX + 1:
            message = f"more than {ALERTS_A_GROUP_MAX} of these in an hour ({group}): the others are not told one by one; the last: {message}"
            entry_id = delivery_id(box.state_id, "", 0, "alert", f"{kind}:{group}:more:{hour}")
    task_id = task.id if task else None
    type_ = f"agentq.alert.{kind}"
    data: dict[str, Any] = {
        "alert": kind,
        "message": message,
        "at": format_time(tx.now_us),
        "task_id": task_id,
        "name": task.name if task else None,
        **fields,
    }
    sinks = (
        []
        if only_kept
        else [name for name in alert_sinks(box.settings, _subject(tx, box, type_, task)) if name != not_to]
    )
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
            payload=seal(entry_id, type_, box.name, task_id, tx.now_us, data),
            task_id=task_id,
            sinks=sinks,
        ),
    )
    tx.event(task_id, "alert", alert=kind, message=message, delivery_id=entry_id)
    tx.later(lambda: _say(box, kind, message, task_id))
    return True


def _subject(tx: Transaction, box: Box, type_: str, task: TaskRow | None) -> Subject:
    """What routes see of it; the task's labels are read only if a route asks for one."""
    if task is None:
        return Subject(type_)
    labels: tuple[str, ...] = ()
    if any(route.match.type and route.match.label for route in box.settings.routes):
        labels = tuple(read_task(store.spec_of(tx, task.seq)[0]).labels or ())
    return Subject(type_, task.queue, task.runner, "", labels)


def _count(tx: Transaction, group: str) -> tuple[int, int]:
    """One more of this group: how many it makes in this hour, and which hour that is."""
    name, hour = f"alerts:{group}", int(tx.now_us / US / ALERT_GROUP_S)
    row = tx.one("SELECT value FROM meta WHERE key = ?", (name,))
    told = _Told(hour, 0)
    if row is not None and (kept := msgspec.json.decode(row[0], type=_Told)).hour == hour:
        told = kept
    told.count += 1
    if told.count > ALERTS_A_GROUP_MAX + 1:
        return told.count, hour  # it stays at that: a storm costs no write
    tx.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, msgspec.json.encode(told).decode()))
    return told.count, hour


def _say(box: Box, kind: str, message: str, task_id: str | None) -> None:
    if task_id is None:
        box.log.warning("alert", alert=kind, message=message)
    else:
        box.log.warning("alert", alert=kind, message=message, task=task_id)
