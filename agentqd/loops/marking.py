"""What became of a batch, as the journal keeps it: marks, tries, events, dead letters. Units of the journal, and pure choices."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

from agentqd.core.limits import SINK_ERROR_CHARS_MAX
from agentqd.core.outbox import RowEvent, RowState
from agentqd.core.retry import Schedule, next_try_s
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.sinks.base import Deferred, Delivered, Disabled, Found, Outcome, Rejected
from agentqd.storage import outbox
from agentqd.storage.outbox import DueRow, Mark
from agentqd.storage.transaction import Transaction

US: Final = 1_000_000
DISABLED: Final = "the sink is disabled: "  # begins the reason of every row that is held because of it


def mark_for(row: DueRow, outcome: Outcome, schedule: Schedule, draw: float, now_us: int) -> Mark:
    """The row's mark. A deferred row whose next try would lie beyond its lifetime is dead."""
    attempts = row.attempts + 1
    if isinstance(outcome, Delivered):
        return Mark(
            row.entry_seq, row.sink, row.state, RowEvent.ACKNOWLEDGED, attempts, None, outcome.position
        )
    made = functools.partial(Mark, row.entry_seq, row.sink, row.state)
    reason = outcome.reason[:SINK_ERROR_CHARS_MAX]
    if isinstance(outcome, Disabled):
        return made(RowEvent.HELD, attempts, None, None, f"{DISABLED}{reason}"[:SINK_ERROR_CHARS_MAX])
    if isinstance(outcome, Rejected):
        return made(RowEvent.REJECTED, attempts, None, None, reason, outcome.progress)
    assert isinstance(outcome, Deferred)
    age_s = max(0.0, (now_us - row.created_at) / US)
    wait_s = next_try_s(schedule, attempts, draw, outcome.retry_after_s, busy=outcome.busy, age_s=age_s)
    due_at = now_us + int(wait_s * US)
    lifetime = schedule.lifetime_s
    if lifetime is not None and due_at > row.created_at + int(lifetime * US):
        return made(RowEvent.GAVE_UP, attempts, None, None, reason, outcome.progress)
    return made(RowEvent.DEFERRED, attempts, due_at, None, reason, outcome.progress)


def record(
    tx: Transaction, box: Box, batch: Sequence[DueRow], outcomes: Sequence[Outcome], marks: Sequence[Mark]
) -> None:
    """A unit: the marks, and what is told of them."""
    done = {mark.entry_seq for mark in outbox.mark(tx, marks)}
    for row, outcome, mark in zip(batch, outcomes, marks, strict=True):
        if row.entry_seq not in done:
            continue
        if isinstance(outcome, Delivered):
            tx.event(
                row.task_id,
                "delivered",
                sink=row.sink,
                delivery_id=row.delivery_id,
                position=outcome.position,
            )
            if row.attempts or outcome.detail is not None:
                outbox.record_try(tx, row.entry_seq, row.sink, "delivered", outcome.detail)
            continue
        outbox.record_try(tx, row.entry_seq, row.sink, mark.event.value, mark.error)
        if mark.event is RowEvent.DEFERRED:
            if row.attempts == 0:
                tx.event(
                    row.task_id,
                    "delivery_deferred",
                    sink=row.sink,
                    delivery_id=row.delivery_id,
                    reason=mark.error,
                )
        elif mark.event is RowEvent.HELD:
            tx.event(
                row.task_id, "outbox_held", sink=row.sink, delivery_id=row.delivery_id, reason=mark.error
            )
        else:
            _bury(tx, box, row, mark)


def _bury(tx: Transaction, box: Box, row: DueRow, mark: Mark) -> None:
    """A dead letter: kept until a person drops it, told over the other sinks. One that is itself news of a dead letter is
    only kept, shown and logged: two dead sinks would tell each other of each other for ever."""
    tx.event(row.task_id, "delivery_dead", sink=row.sink, delivery_id=row.delivery_id, reason=mark.error)
    message = f"{row.delivery_id} ({row.type}) was not delivered to {row.sink} and is now a dead letter: {mark.error}"
    alert(tx, box, "dead_letter", message, key=f"{row.delivery_id}:{row.sink}:{mark.attempts}", not_to=row.sink,
          group=row.sink, only_kept=row.type == "agentq.alert.dead_letter", sink=row.sink, delivery_id=row.delivery_id, about_task=row.task_id)  # fmt: skip


def mark_found(tx: Transaction, sink: str, found: Sequence[Found]) -> None:
    """A unit: lines that were appended before the last daemon died, and not yet marked."""
    for item in found:
        known = outbox.entry_exists(tx, item.delivery_id)
        if known is None:
            continue
        row = tx.one("SELECT state, attempts FROM outbox WHERE entry_seq = ? AND sink = ?", (known[0], sink))
        if row is None or row[0] not in {"pending", "retryable"}:
            continue
        mark = Mark(known[0], sink, RowState(row[0]), RowEvent.ACKNOWLEDGED, row[1] + 1, None, item.position)
        outbox.mark(tx, [mark])
        tx.event(None, "delivery_found", sink=sink, delivery_id=item.delivery_id, position=item.position)
