"""Delivery: works from the outbox alone, no worker and no timeout can kill it. One runner a sink; none delays another.

The parts: `sinkrunner` (one sink's loop), `gate` (may it send now), `backlog` (what it sends next), `sending` (one batch, made safe),
`recording` and `marking` (what became of it, in the journal), `parking` (many rows at once), `sinkmemory` (what outlives a
restart), `trying` (a person's test); the decisions are core's: `retry`, `breaker`, `pace`, `bucket`, `giveway`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final

from agentqd.core.errors import ConfigError
from agentqd.core.giveway import GiveWay
from agentqd.core.routing import COMPLETIONS, REJECTED
from agentqd.core.settings import Sink as SinkSettings
from agentqd.loops import sinkmemory
from agentqd.loops.box import Box, Signal
from agentqd.loops.gate import IDLE_MAX_S
from agentqd.loops.sinkmemory import SinkMemory, Word
from agentqd.loops.sinkrunner import SinkRunner
from agentqd.sinks.base import Context, Exec
from agentqd.storage.outbox import DueRow
from agentqd.storage.transaction import Transaction

_BUILT_IN: Final = {COMPLETIONS: SinkSettings(type=COMPLETIONS), REJECTED: SinkSettings(type=REJECTED)}


class DeliveryLoop:
    """Starts and ends the runners as the config says; wakes them when a commit gives them rows."""

    def __init__(self, box: Box, exec_: Exec, draw: Callable[[], float] = random.random) -> None:
        self.box = box
        self.runners: dict[str, SinkRunner] = {}
        self._exec = exec_
        self._draw = draw
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed = Signal()
        self._way = GiveWay()
        box.on_settings.append(self._changed.set)

    def before_commit(self, tx: Transaction) -> None:
        """The journal's hook: sinks that get rows with this commit are woken after it."""
        for name in tx.sinks_parked():
            if (runner := self.runners.get(name)) is not None:
                tx.after_commit(runner.forget)
        given = tx.sinks_made_pending()
        if given:
            fresh: dict[str, list[DueRow]] = {name: [] for name in given}
            for sink, row in tx.fresh_rows:
                fresh[sink].append(row)
            self._enable(tx, [name for name, rows in fresh.items() if given[name] > len(rows)])
            tx.after_commit(lambda: self._offer(given, fresh))

    def _enable(self, tx: Transaction, sent_again: list[str]) -> None:
        """A person who has rows of a sink that its receiver has disabled sent again enables it, and all that is held because of
        that goes on: nobody would release the others. (What a person has disabled, `sink enable` alone does. A `no` that is
        not in the journal yet stands: rows that are released just then were held because of an earlier one.)"""
        for name in sent_again:
            runner = self.runners.get(name)
            if runner is None or not runner.disabled_by_receiver:
                continue
            kept = sinkmemory.load_all(tx, name)
            if kept.memory.disabled is not None and not kept.word.off:
                sinkmemory.save(tx, name, SinkMemory())
                sinkmemory.save_word(tx, name, Word(releasing=True))
                tx.event(None, "sink_enabled", sink=name)
                tx.after_commit(runner.enable)

    def _offer(self, given: dict[str, int], fresh: dict[str, list[DueRow]]) -> None:
        for name, rows in fresh.items():
            runner = self.runners.get(name)
            if runner is not None:
                runner.offer(rows, look=given[name] > len(rows))

    def hears_of(self, names: frozenset[str]) -> None:
        """A peer with one of these names (lower case) has contacted the box: sinks that lead to it are tried at once."""
        for runner in self.runners.values():
            runner.hears_of(names)

    async def run(self) -> None:
        """Until cancelled. Raises JournalError (in a group)."""
        async with asyncio.TaskGroup() as group:
            while True:
                self.box.beat("delivery")
                await self._apply(group)
                await self._changed.wait(IDLE_MAX_S)

    def context_of(self, name: str, settings: SinkSettings) -> Context:
        """What a plug for this sink may use."""
        return Context(name, settings, self.box.folders.state, self._exec, self.box.clock.now_us)

    async def _apply(self, group: asyncio.TaskGroup) -> None:
        wanted = {**self.box.settings.sinks, **_BUILT_IN}
        for name, runner in list(self.runners.items()):
            if wanted.get(name) != runner.settings:
                await self._end(name)
        for name, settings in wanted.items():
            if name in self.runners:
                continue
            try:
                runner = SinkRunner(
                    self.box, name, settings, self._exec, self._draw, self._way, built_in=name in _BUILT_IN
                )
            except ConfigError as error:
                self.box.log.error("sink_unusable", sink=name, error=error.message)
                continue
            self.runners[name] = runner
            self._tasks[name] = group.create_task(runner.run(), name=f"sink:{name}")

    async def _end(self, name: str) -> None:
        """Its rows stay in the outbox, and are shown there; what was in flight is due again."""
        del self.runners[name]
        task = self._tasks.pop(name)
        task.cancel()
        await asyncio.wait([task])
        self._way.forget(name)
        self.box.beats.pop(f"sink:{name}", None)
