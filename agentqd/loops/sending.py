"""One batch to one plug, made safe: whatever the plug does, there is one outcome for each delivery."""

from __future__ import annotations

import asyncio
import hashlib
import traceback
from collections.abc import Sequence
from typing import Final

from agentqd.core.limits import SINK_ERROR_CHARS_MAX
from agentqd.loops.box import Log
from agentqd.sinks.base import Deferred, Delivery, Outcome, Rejected, Sink
from agentqd.sinks.content import ContentLost, check_aside
from agentqd.sinks.reason import bounded
from agentqd.storage.outbox import DueRow

DAMAGED: Final = "the stored payload does not match its sha256: it was damaged on disk and is not sent"


async def send(plug: Sink, name: str, batch: Sequence[DueRow], log: Log) -> Sequence[Outcome]:
    """One outcome for each. What is damaged is never sent and stops none of the others."""
    checked = getattr(plug, "checks_content", False)
    verdicts = [await _looked_at(row, content=not checked) for row in batch]
    sound = [row for row, verdict in zip(batch, verdicts, strict=True) if verdict is None]
    answers = iter(await _ask(plug, name, sound, log) if sound else ())
    return [next(answers) if verdict is None else verdict for verdict in verdicts]


async def _looked_at(row: DueRow, *, content: bool) -> Outcome | None:
    """Why it cannot be sent (now), or None."""
    if hashlib.sha256(row.payload).digest() != row.sha256:
        return Rejected(DAMAGED)
    if row.blob is None or not content:
        return None
    try:
        await check_aside(row.blob)
    except ContentLost as lost:
        return Rejected(str(lost))
    except OSError as problem:
        return Deferred(bounded(f"{row.blob}: the stored content cannot be read: {problem.strerror}"))
    return None


async def _ask(plug: Sink, name: str, batch: Sequence[DueRow], log: Log) -> Sequence[Outcome]:
    """The plug's answer; a time-out, an exception or nonsense is `Deferred`."""
    deliveries = [
        Delivery(
            row.delivery_id, row.entry_seq, row.type, row.kind, row.key, row.task_id, row.payload, row.created_at, row.attempts, row.blob
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
    return outcomes
