"""How long a client outlasts an absent daemon (a restart, an upgrade) before it says so."""

from __future__ import annotations

import time
from collections.abc import Callable

from agentqd.client.errors import BadAnswer
from agentqd.core.errors import AgentqError, Unreachable

WAIT_FIRST_S = 0.05
WAIT_MAX_S = 1.0
LONG_AFTER_S = 60.0  # who is patient for longer than this asks less often from here on
LONG_WAIT_MAX_S = 10.0


class Patience:
    """Bears failures in a row for `limit_s`, waiting longer each time; one success and it starts anew."""

    def __init__(
        self,
        limit_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._sleep = sleep
        self._since: float | None = None
        self._wait_s = WAIT_FIRST_S

    def succeeded(self) -> None:
        self._since = None
        self._wait_s = WAIT_FIRST_S

    def bear(self, error: Exception, until: float | None = None) -> None:
        """Waits a little, at most until `until` (of the clock). Raises `error` again once the limit has passed."""
        now = self._clock()
        if self._since is None:
            self._since = now
        if now - self._since >= self._limit_s:
            raise error
        wait_s = self._wait_s if until is None else max(0.0, min(self._wait_s, until - now))
        self._sleep(wait_s)
        most_s = WAIT_MAX_S if now - self._since < LONG_AFTER_S else LONG_WAIT_MAX_S
        self._wait_s = min(self._wait_s * 2, most_s)


def may_come_back(error: AgentqError) -> bool:
    """Whether waiting can help: not where something else than agentqd answers, nor where the daemon has said no."""
    if error.code == "journal_failed":  # the daemon stops, opens it again and reconciles
        return True
    if error.code == "forwarding_forbidden":  # a person has to edit the box's sshd_config first
        return False
    return isinstance(error, Unreachable) and not isinstance(error, BadAnswer)
