"""What `completions`, `rejected` and `file` share as sinks: an AppendLog behind one thread of its own.

`notices` fills with what happened to the file (replaced, vanished, torn); the daemon takes from it and tells people.
A cancelled `deliver` leaves its batch to the thread, which either never begins it or ends it and remembers what it
wrote: the same deliveries, sent again, are not written twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from agentqd.core.limits import COMPLETIONS_BATCH_MAX
from agentqd.sinks.appendlog import AppendLog
from agentqd.sinks.base import Context, Delivery, Found, Outcome
from agentqd.sinks.lines import Lines
from agentqd.sinks.worker import Worker

TIMEOUT_S: Final = 60.0  # a write to a local disk; a slow one takes 50 ms


class AppendSink:
    """One of them. See base.Sink for what the methods promise."""

    batch_max = COMPLETIONS_BATCH_MAX
    concurrency = 1

    def __init__(self, context: Context, path: str, lines: Lines, *, rotate_bytes: int | None = None) -> None:
        self.timeout_s = float(context.settings.timeout or TIMEOUT_S)
        self.notices: list[str] = []
        self._log = AppendLog(path, lines, mode=context.file_mode, rotate_bytes=rotate_bytes)
        self._worker = Worker(f"sink-{context.name}")

    async def open(self, last_position: int) -> list[Found]:
        self._worker.start()
        try:
            return await self._worker.run(lambda: self._log.open(last_position))
        finally:
            self.notices += self._log.take_notices()

    async def deliver(self, batch: Sequence[Delivery]) -> Sequence[Outcome]:
        outcomes: list[Outcome] = []
        try:
            await self._worker.run(lambda: outcomes.extend(self._log.append(batch)))
        except asyncio.CancelledError:
            # Runs after the append, if that has begun; if it never begins, there is nothing to remember.
            self._worker.post(lambda: self._log.remember(batch, outcomes))
            raise
        finally:
            self.notices += self._log.take_notices()
        return outcomes

    async def close(self) -> None:
        self._worker.post(self._log.close)
        await self._worker.stop()
