"""What every route of the control socket may use of the daemon, and how a route waits for something to happen."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from agentqd.loops.box import Box

if TYPE_CHECKING:  # only named here: what they stand on is loaded by the daemon, not by the routes
    from agentqd.control.route import Route
    from agentqd.loops.delivery import DeliveryLoop
    from agentqd.loops.intake import Intake
    from agentqd.loops.outside import OutsideClaims
    from agentqd.loops.reload import Reload
    from agentqd.loops.supervision import Supervision

COMMIT_LOOK_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Parts:
    """The running daemon's loops, as far as the control socket shows or moves them."""

    supervision: Supervision
    delivery: DeliveryLoop
    intake: Intake
    reload: Reload
    started_monotonic_s: float
    version: str
    outside: OutsideClaims


class TaskWatch:
    """Wakes those who wait for one task: `box.task_changed` is called after each commit that matters to it."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self._waiters: dict[str, set[asyncio.Event]] = {}
        box.on_task_change.append(self._changed)

    def close(self) -> None:
        with contextlib.suppress(ValueError):
            self._box.on_task_change.remove(self._changed)

    def _changed(self, task_id: str) -> None:
        for event in self._waiters.get(task_id, ()):
            event.set()

    @contextlib.contextmanager
    def of(self, task_id: str) -> Iterator[asyncio.Event]:
        """An event that is set when the task changes. Registered before the first look at the journal, nothing is missed."""
        event = asyncio.Event()
        waiters = self._waiters.setdefault(task_id, set())
        waiters.add(event)
        try:
            yield event
        finally:
            waiters.discard(event)
            if not waiters:
                self._waiters.pop(task_id, None)


class Room:
    """One server's shared state."""

    def __init__(self, box: Box, parts: Parts, routes: tuple[Route, ...]) -> None:
        self.box = box
        self.parts = parts
        self.routes = routes
        self.watch = TaskWatch(box)
        self.closing = asyncio.Event()
        self.one_at_a_time: dict[str, asyncio.Lock] = {}  # submits to queues that have a limit

    @property
    def paused(self) -> frozenset[str]:
        """Queues that start nothing: by a person's word or by the config's."""
        by_config = {name for name, queue in self.box.settings.queues.items() if queue.paused}
        return self.parts.supervision.scheduler.paused | by_config

    @property
    def config_path(self) -> str | None:
        """The config file that is applied; None while the defaults serve without one."""
        return self.parts.reload.path if self.parts.reload.sha256 else None

    def deadline(self, wait_s: float) -> float:
        return self.box.clock.monotonic_s() + wait_s

    def left_s(self, deadline: float) -> float:
        """Seconds until `deadline`; none once the server closes, so that long polls answer at once."""
        return 0.0 if self.closing.is_set() else max(0.0, deadline - self.box.clock.monotonic_s())

    async def wait_for(self, event: asyncio.Event, most_s: float) -> bool:
        """Until the event is set (True), the time is over, or the server closes. Clears the event."""
        waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(self.closing.wait())]
        try:
            await asyncio.wait(waits, timeout=most_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        was_set = event.is_set()
        event.clear()
        return was_set

    async def commit_after(self, commits: int, most_s: float) -> int:
        """Wait for a commit beyond `commits` (a number that the journal counts; cheap to look at). Returns the count now."""
        deadline = self.deadline(most_s)
        while self.box.journal.commits == commits and (left_s := self.left_s(deadline)) > 0:  # noqa: ASYNC110 - a counter, no event
            await asyncio.sleep(min(COMMIT_LOOK_S, left_s))
        return self.box.journal.commits
