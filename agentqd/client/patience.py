"""How long a client outlasts an absent daemon (a restart, an upgrade) before it says so."""

from __future__ import annotations

import time
from collections.abc import Callable

from agentqd.client.errors import BadAnswer
from agentqd.core.errors import Unreachable

WAIT_FIRST_S = 0.05
WAIT_MAX_S = 1.0


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
        self._wait_s = min(self._wait_s * 2, WAIT_MAX_S)


def may_come_back(error: Unreachable) -> bool:
    """Whether waiting can help: not where something else than agentqd answers."""
    return not isinstance(error, BadAnswer)
