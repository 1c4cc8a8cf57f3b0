"""What the parts of the supervisor share. Handed in, so that each part can be tested by itself."""

from __future__ import annotations

import selectors
from collections.abc import Callable
from dataclasses import dataclass, field

from agentqd.supervisor.deadlines import Deadlines, Timer
from agentqd.supervisor.folder import AttemptFolder
from agentqd.supervisor.logs import Log
from agentqd.supervisor.tree import Trees
from agentqd.supervisor.wire import Report
from agentqd.system.clock import Clock


def no_ready_folder(_task: str, _prompt: str | None) -> AttemptFolder | None:
    """Every folder is made when it is needed."""
    return None


@dataclass(slots=True)
class Context:
    clock: Clock
    deadlines: Deadlines
    selector: selectors.BaseSelector
    trees: Trees
    log: Log
    instance: str  # random, new at every start
    boot_id: str
    state_id: str
    state_folder: str
    tasks_fd: int  # STATE/tasks
    tell: Callable[[Report], None]  # to the daemon that is connected, if one is
    take_ready: Callable[[str, str | None], AttemptFolder | None] = no_ready_folder
    said_once: set[str] = field(default_factory=set)

    def after(self, seconds: float, action: Callable[[], None]) -> Timer:
        return self.deadlines.at(self.clock.monotonic_s() + seconds, action)

    def log_once(self, level: str, event: str, **fields: str | int) -> None:
        """A condition that would repeat for ever is logged the first time only."""
        if event not in self.said_once:
            self.said_once.add(event)
            self.log(level, event, **fields)
