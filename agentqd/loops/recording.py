"""What receivers have said, on its way into the journal: all that is answered by the time of a commit, in one unit.

Invariants:
1. What was handed over is recorded, or told as failed, exactly once; a unit takes no more once it is done.
2. A batch that cannot be recorded (a bug) takes no other one with it: after a unit that was refused each goes alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from agentqd.core.bucket import BucketMemory
from agentqd.core.errors import JournalError
from agentqd.loops import sinkmemory
from agentqd.loops.box import Box
from agentqd.loops.marking import record
from agentqd.loops.sinkmemory import SinkMemory
from agentqd.sinks.base import Outcome
from agentqd.storage.outbox import DueRow, Mark
from agentqd.storage.transaction import Transaction


class Answered(NamedTuple):
    """One batch whose receiver's word is known."""

    batch: list[DueRow]
    outcomes: Sequence[Outcome]
    marks: list[Mark]
    changed: SinkMemory | None
    tokens: BucketMemory | None = None  # of a sink with a rate


class Marked(Protocol):
    def __call__(self, rows: list[DueRow], marks: list[Mark], *, failed: bool) -> None: ...


class Recorder:
    """One sink's. `keep` is a unit's part; `marked` is called on the loop's thread for all of a unit, durable or failed."""

    def __init__(
        self,
        box: Box,
        sink: str,
        keep: Callable[[Transaction, SinkMemory], None],
        marked: Marked,
        within_s: Callable[[], float],
    ) -> None:
        """`within_s`: how soon a unit is to be committed, if nothing else is."""
        self._box = box
        self._sink = sink
        self._keep = keep
        self._marked = marked
        self._within_s = within_s
        self._waiting: deque[Answered] = deque()
        self._under_way = False

    def take(self, answered: Answered) -> None:
        self._waiting.append(answered)
        if not self._under_way:
            self.flush()

    def flush(self) -> None:
        """Hand over what waits, also beside a unit that is under way (the runner ends)."""
        if self._waiting:
            self._submit(self._waiting)

    def _submit(self, source: deque[Answered]) -> None:
        self._under_way = True
        taken: list[Answered] = []

        def unit(tx: Transaction) -> None:  # on the journal's thread, while the loop's appends
            while source:
                taken.append(source.popleft())
            record(
                tx,
                self._box,
                [row for each in taken for row in each.batch],
                [outcome for each in taken for outcome in each.outcomes],
                [mark for each in taken for mark in each.marks],
            )
            for each in taken:
                if each.changed is not None:
                    self._keep(tx, each.changed)
            if taken and taken[-1].tokens is not None:
                sinkmemory.save_bucket(tx, self._sink, taken[-1].tokens)

        future = self._box.journal.submit_lazily(unit, self._within_s())
        future.add_done_callback(lambda done: self._done(done, taken, source))

    def _done(self, done: asyncio.Future[None], taken: list[Answered], source: deque[Answered]) -> None:
        self._under_way = False
        error = None if done.cancelled() else done.exception()
        if isinstance(error, JournalError):  # it takes nothing more
            taken += source
            source.clear()
        elif error is not None:
            self._box.log.error("unit_failed", sink=self._sink, error=repr(error))
            if len(taken) > 1:
                for each in taken:
                    self._submit(deque([each]))
                return
        self.flush()
        rows = [row for each in taken for row in each.batch]
        self._marked(rows, [mark for each in taken for mark in each.marks], failed=error is not None)
