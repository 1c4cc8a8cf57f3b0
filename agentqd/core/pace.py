"""How many sends to one destination may be under way at once. Pure.

Starts at 5; one more for each success, one less for each failure; at least 1, at most what the sink allows (20, or
`concurrency` in the config; file and ssh 1). After a breaker has closed it begins anew at 1. (Source: Postfix.)
"""

from __future__ import annotations

from agentqd.core.limits import CONCURRENCY_START


class Pace:
    """Invariant: 1 <= limit <= most."""

    __slots__ = ("limit", "most")

    def __init__(self, most: int) -> None:
        self.most = max(1, most)
        self.limit = min(CONCURRENCY_START, self.most)

    def succeeded(self) -> None:
        if self.limit < self.most:
            self.limit += 1

    def failed(self) -> None:
        if self.limit > 1:
            self.limit -= 1

    def begin_anew(self) -> None:
        self.limit = 1


class Turns:
    """New and deferred entries in turn: neither waits behind the whole of the other."""

    __slots__ = ("_deferred_next",)

    def __init__(self) -> None:
        self._deferred_next = True

    def deferred_next(self, *, new: bool, deferred: bool) -> bool:
        """Which is taken, if there are `new` and `deferred` ones: True for a deferred one. At least one of them is there."""
        assert new or deferred
        take = deferred if not (new and deferred) else self._deferred_next
        self._deferred_next = not take
        return take
