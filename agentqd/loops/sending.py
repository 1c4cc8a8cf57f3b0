"""One batch to one plug, made safe: whatever the plug does, there is one outcome for each delivery."""

from __future__ import annotations

import asyncio
import hashlib
import traceback
from collections.abc import Sequence

import msgspec

from agentqd.core.limits import PROGRESS_BYTES_MAX, SINK_ERROR_CHARS_MAX
from agentqd.loops.box import Log
from agentqd.sinks.base import Deferred, Delivery, Outcome, Rejected, Sink
from agentqd.storage.outbox import DueRow


async def send(plug: Sink, name: str, batch: Sequence[DueRow], log: Log) -> Sequence[Outcome]:
    """The plug's answer; a time-out, an exception or nonsense is `Deferred`. A damaged payload is never sent."""
    if any([_damaged(row) for row in batch]):  # noqa: C419 - of one row, mostly: a generator costs more than it saves
        return [_without_damage(row) for row in batch]
    deliveries = [
        Delivery(
            row.delivery_id, row.entry_seq, row.type, row.kind, row.key, row.task_id, row.payload, row.created_at, row.attempts, row.blob,
            row.progress,
        )
        for row in batch
    ]  # fmt: skip
    try:
        async with asyncio.timeout(plug.timeout_s):
            outcomes = await plug.deliver(deliveries)
    except TimeoutError:
        late = Deferred(f"no answer within {plug.timeout_s:g} s", connection=True, busy=True)
        return [late] * len(batch)
    except Exception as error:  # noqa: BLE001 - code we do not own meets us here
        log.error("sink_failed", sink=name, error=repr(error), traceback=traceback.format_exc())
        return [Deferred(f"the sink failed: {error!r}"[:SINK_ERROR_CHARS_MAX])] * len(batch)
    sound = isinstance(outcomes, list | tuple) and all(isinstance(each, Outcome) for each in outcomes)
    if not sound or len(outcomes) != len(batch):
        said = f"{len(outcomes)} of {len(batch)} deliveries" if sound else "with what is no outcome"
        return [Deferred(f"the sink answered {said}")] * len(batch)
    return [_within_bounds(each, name, log) for each in outcomes]


def _within_bounds(outcome: Outcome, name: str, log: Log) -> Outcome:
    """A memory that is too large is not kept: the next try is as after a crash."""
    progress = outcome.progress if isinstance(outcome, Deferred | Rejected) else None
    if progress is None or len(progress) <= PROGRESS_BYTES_MAX:
        return outcome
    log.error("sink_progress_too_large", sink=name, bytes=len(progress))
    return msgspec.structs.replace(outcome, progress=None)


def _damaged(row: DueRow) -> bool:
    return hashlib.sha256(row.payload).digest() != row.sha256


def _without_damage(row: DueRow) -> Outcome:
    if _damaged(row):
        return Rejected(
            "the stored payload does not match its sha256: it was damaged on disk and is not sent"
        )
    return Deferred("waits for a batch without a damaged payload", retry_after_s=0.1)
