"""Ending one process tree: politely, then by force, until it is gone.

Invariants:
1. `gone` is called exactly once, when the main process is a zombie and no other process of its tree lives.
2. SIGTERM goes to each process once; a stopped process is continued so that it can act on it.
3. After the grace SIGKILL is repeated to whatever is found, for as long as anything is found.
4. What a finished main process leaves behind gets LEFTOVER_GRACE_S at most, however long its own grace was.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from enum import Enum, auto

from agentqd.core.limits import LEFT_BEHIND_NAMED_MAX
from agentqd.supervisor import limits
from agentqd.supervisor.context import Context
from agentqd.supervisor.deadlines import Timer
from agentqd.supervisor.procfs import Process
from agentqd.supervisor.tree import Owner
from agentqd.supervisor.wire import LeftBehind


class _Phase(Enum):
    ALIVE = auto()  # nobody wants it ended
    LEFTOVER = auto()  # the main process ended by itself, something is still there
    TERM = auto()
    KILL = auto()
    GONE = auto()


class TreeEnd:
    """The life of one tree from its spawn until it is gone."""

    def __init__(
        self,
        context: Context,
        owner: Owner,
        grace_s: Callable[[], float],
        gone: Callable[[], None],
        stuck: Callable[[list[int]], None],
    ) -> None:
        self._context = context
        self._owner = owner
        self._grace_s = grace_s
        self._gone = gone
        self._stuck = stuck
        self._phase = _Phase.ALIVE
        self._kill_at_s = 0.0
        self._stuck_at_s = 0.0
        self._poll_s = limits.END_POLL_MIN_S
        self._timer: Timer | None = None
        self.left_behind: list[LeftBehind] = []

    def begin(self) -> None:
        """SIGTERM now, SIGKILL after the grace. Does nothing if the tree is being ended already."""
        if self._phase is not _Phase.ALIVE:
            return
        self._terminate(self._context.trees.members(self._owner), self._grace_s())

    def kill_now(self) -> None:
        """No (more) grace."""
        if self._phase is not _Phase.GONE:
            self._start_killing()

    def main_ended(self) -> None:
        """The main process is a zombie now. If nothing is left of its tree, `gone` is called at once."""
        self._owner.ended = True
        self._look()

    def children_changed(self) -> None:
        """Some child of the supervisor died: perhaps the last one that we wait for."""
        if self._owner.ended and self._phase is not _Phase.ALIVE:
            self._look()

    def _look(self) -> None:
        if self._phase is _Phase.GONE:
            return
        if self._phase is _Phase.KILL:
            self._kill()
            return
        members = self._context.trees.members(self._owner)
        now_s = self._context.clock.monotonic_s()
        if self._owner.ended and not members:
            self._finish()
        elif self._phase is _Phase.ALIVE:
            self._phase = _Phase.LEFTOVER
            self._kill_at_s = now_s + limits.LEFTOVER_LOOK_AGAIN_S
            self._wake(self._kill_at_s)
        elif self._phase is _Phase.LEFTOVER:
            if now_s < self._kill_at_s:
                return  # some other child died; the timer is set
            self._name(members)
            self._terminate(members, min(self._grace_s(), limits.LEFTOVER_GRACE_S))
        else:
            if self._owner.ended:
                self._kill_at_s = min(self._kill_at_s, now_s + limits.LEFTOVER_GRACE_S)
            if now_s >= self._kill_at_s:
                self._start_killing()
            else:
                self._wake_for_next_look(now_s)

    def _terminate(self, members: list[Process], grace_s: float) -> None:
        self._phase = _Phase.TERM
        self._kill_at_s = self._context.clock.monotonic_s() + grace_s
        if grace_s <= 0:
            self._start_killing()
            return
        self._context.trees.signal(self._owner, signal.SIGTERM, members)
        self._context.trees.signal(self._owner, signal.SIGCONT, members)
        self._wake_for_next_look(self._context.clock.monotonic_s())

    def _start_killing(self) -> None:
        if self._phase is not _Phase.KILL:
            self._phase = _Phase.KILL
            self._poll_s = limits.END_POLL_MIN_S
            self._stuck_at_s = self._context.clock.monotonic_s() + limits.STUCK_AFTER_S
            self._kill()

    def _kill(self) -> None:
        members = self._context.trees.kill(self._owner, limits.KILL_ROUNDS_MAX)
        if self._owner.ended and not members:
            self._finish()
            return
        now_s = self._context.clock.monotonic_s()
        if now_s >= self._stuck_at_s:
            self._stuck_at_s = now_s + limits.STUCK_REPEAT_S
            self._stuck([process.pid for process in members])
        self._wake_for_next_look(now_s)

    def _wake_for_next_look(self, now_s: float) -> None:
        """While the main process lives its pidfd tells us of its end, and only the SIGKILL needs a timer."""
        if self._phase is _Phase.TERM and not self._owner.ended:
            self._wake(self._kill_at_s)
            return
        at_s = now_s + self._poll_s
        self._poll_s = min(self._poll_s * 1.5, limits.END_POLL_MAX_S)
        self._wake(min(at_s, self._kill_at_s) if self._phase is _Phase.TERM else at_s)

    def _wake(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._context.deadlines.at(at_s, self._look)

    def _name(self, members: list[Process]) -> None:
        named = [LeftBehind(process.pid, process.name) for process in members if process.state != "Z"]
        self.left_behind = named[:LEFT_BEHIND_NAMED_MAX]

    def _finish(self) -> None:
        self._phase = _Phase.GONE
        if self._timer is not None:
            self._timer.cancel()
        self._gone()


def has_ended(pid: int) -> bool:
    """Whether this unreaped child is dead. It stays unreaped."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
