"""What all loops share: the journal, the newest settings, folders, identity, clock and log."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from agentqd.core.folders import Folders
from agentqd.core.limits import LOOP_TURN_S, LOOP_WORK_S
from agentqd.core.settings import Settings, slots_default
from agentqd.storage.journal import Journal
from agentqd.system.clock import Clock

T = TypeVar("T")


class Log(Protocol):
    """structlog's bound logger, as far as the loops use it: an event name and fields."""

    def debug(self, event: str, **fields: Any) -> Any: ...
    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...
    def error(self, event: str, **fields: Any) -> Any: ...


class Signal:
    """A level-triggered wake-up that several waiters may share: `set` wakes all who wait now, or the next who does."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self, timeout_s: float | None) -> bool:
        """True if it was set; False if the time passed. Clears it."""
        if not self._event.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._event.wait()
        was_set = self._event.is_set()
        self._event.clear()
        return was_set


class Box:
    """One daemon's shared state. Settings are replaced whole by the reload loop; readers take them anew at each turn."""

    def __init__(
        self,
        folders: Folders,
        journal: Journal,
        settings: Settings,
        state_id: str,
        name: str,
        clock: Clock,
        log: Log,
    ) -> None:
        self.folders = folders
        self.journal = journal
        self.settings = settings
        self.state_id = state_id
        self.name = name
        self.clock = clock
        self.log = log
        self.draining = False  # by a person's word, which the journal keeps
        self.draining_since_us: int | None = None
        self.disk_low = False
        self.stirred = 0
        self.beats: dict[str, float] = {}
        self.on_settings: list[Callable[[], None]] = []
        self.on_task_change: list[Callable[[str], None]] = []

    @property
    def max_workers(self) -> int:
        return self.settings.max_workers or slots_default()

    @property
    def rescan_s(self) -> float:
        """How long a loop waits for inotify before it looks itself."""
        return min(LOOP_TURN_S, float(self.settings.limits.rescan_every))

    def concurrency(self, queue: str) -> int:
        options = self.settings.queues.get(queue)
        return (options.concurrency if options else None) or slots_default()

    def drain(self, since_us: int | None) -> None:
        """Accept and start nothing more, or (None) do so again."""
        self.draining, self.draining_since_us = since_us is not None, since_us

    def stir(self) -> None:
        """Something has come that somebody waits for (a line, a worker's end, a request): sinks with a backlog give way."""
        self.stirred += 1

    @property
    def stirs(self) -> int:
        """How often so far; whatever waits for a commit counts too."""
        return self.stirred + self.journal.asked

    def beat(self, loop: str) -> None:
        """A loop has done a turn of its work: feeds the watchdog and the stalled-loop alert."""
        self.beats[loop] = self.clock.monotonic_s()

    async def working(self, loop: str, work: asyncio.Future[T]) -> T:
        """What a thread does for a loop, awaited: the loop counts as turning, for ten minutes of it."""
        for _ in range(int(LOOP_WORK_S / LOOP_TURN_S)):
            self.beat(loop)
            done, _ = await asyncio.wait([work], timeout=LOOP_TURN_S)
            if done:
                break
        return await work

    def apply(self, settings: Settings) -> None:
        self.settings = settings
        for action in self.on_settings:
            action()

    def task_changed(self, task_id: str) -> None:
        for action in self.on_task_change:
            action(task_id)
