"""One batch to one plug, made safe: whatever the plug does, there is one outcome for each delivery."""

from __future__ import annotations

import asyncio
import hashlib
import traceback
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from agentqd.core.limits import PROGRESS_BYTES_MAX, SINK_ERROR_CHARS_MAX
from agentqd.loops.box import Log
from agentqd.sinks.base import Deferred, Delivered, Delivery, Disabled, Outcome, Rejected, Sink
from agentqd.sinks.content import ContentLost, check_aside
from agentqd.sinks.reason import bounded
from agentqd.storage.outbox import DueRow

DAMAGED: Final = "the stored payload does not match its sha256: it was damaged on disk and is not sent"
TURN_ROWS: Final = 200
_OUTCOMES: Final = frozenset({Delivered, Deferred, Rejected, Disabled})
_ALL_DELIVERED: Final = frozenset({Delivered})


class Unfit(Rejected, frozen=True):
    """Rejected by us: the receiver was not asked, and nothing is known of it."""


async def send(plug: Sink, name: str, batch: Sequence[DueRow], log: Log) -> Sequence[Outcome]:
    """One outcome for each. What is damaged is never sent and stops none of the others."""
    looks = not getattr(plug, "checks_content", False)
    unfit: dict[int, Outcome] = {}  # by place in the batch: why it cannot be sent (now)
    for place, row in enumerate(batch):
        if place and place % TURN_ROWS == 0:
            await asyncio.sleep(0)  # a thousand sums are milliseconds, and other sinks wait for this thread
        if hashlib.sha256(row.payload).digest() != row.sha256:
            unfit[place] = Unfit(DAMAGED)
        elif row.blob is not None and looks and (verdict := await _content_problem(row.blob)) is not None:
            unfit[place] = verdict
    if not unfit:
        return await _ask(plug, name, batch, log)
    sound = [row for place, row in enumerate(batch) if place not in unfit]
    answers = iter(await _ask(plug, name, sound, log) if sound else ())
    return [unfit[place] if place in unfit else next(answers) for place in range(len(batch))]


async def _content_problem(path: str) -> Outcome | None:
    try:
        await check_aside(path)
    except ContentLost as lost:
        return Unfit(str(lost))
    except OSError as problem:
        return Deferred(bounded(f"{path}: the stored content cannot be read: {problem.strerror}"))
    return None


async def _ask(plug: Sink, name: str, batch: Sequence[DueRow], log: Log) -> Sequence[Outcome]:
    """The plug's answer; a time-out, an exception or nonsense is `Deferred`."""
    deliveries = [
        Delivery(
            row.delivery_id, row.entry_seq, row.type, row.kind, row.key, row.task_id, row.payload, row.created_at, row.attempts, row.blob,
            row.progress,
        )
        for row in batch
    ]  # fmt: skip
    try:
        if plug.timeout_s is None:
            outcomes = await plug.deliver(deliveries)
        else:
            async with asyncio.timeout(plug.timeout_s):
                outcomes = await plug.deliver(deliveries)
    except TimeoutError:
        after = "" if plug.timeout_s is None else f" within {plug.timeout_s:g} s"
        return [Deferred(f"no answer{after}", connection=True, busy=True)] * len(batch)
    except Exception as error:  # noqa: BLE001 - code we do not own meets us here
        log.error("sink_failed", sink=name, error=repr(error), traceback=traceback.format_exc())
        return [Deferred(f"the sink failed: {error!r}"[:SINK_ERROR_CHARS_MAX])] * len(batch)
    kinds: set[Any] = set(map(type, outcomes)) if isinstance(outcomes, list | tuple) else {None}
    sound = kinds <= _OUTCOMES
    if not sound or len(outcomes) != len(batch):
        said = f"{len(outcomes)} of {len(batch)} deliveries" if sound else "with what is no outcome"
        return [Deferred(f"the sink answered {said}")] * len(batch)
    if kinds == _ALL_DELIVERED:
        return outcomes
    return [_within_bounds(each, name, log) for each in outcomes]


def _within_bounds(outcome: Outcome, name: str, log: Log) -> Outcome:
    """A memory that is too large is not kept: the next try is as after a crash."""
    progress = outcome.progress if isinstance(outcome, Deferred | Rejected) else None
    if progress is None or len(progress) <= PROGRESS_BYTES_MAX:
        return outcome
    log.error("sink_progress_too_large", sink=name, bytes=len(progress))
    return msgspec.structs.replace(outcome, progress=None)
