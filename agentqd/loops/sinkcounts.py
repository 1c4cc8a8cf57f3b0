"""How many tries of one sink succeeded and failed lately: in memory, since its runner began."""

from __future__ import annotations

from typing import Any

from agentqd.core.tally import Tally
from agentqd.core.units import format_time


class SinkCounts:
    """Times of tries are monotonic seconds."""

    def __init__(self, began_us: int) -> None:
        self.delivered, self.failed = Tally(), Tally()
        self._began_us = began_us

    def told(self, now_s: float) -> dict[str, Any]:
        """As `sink list` shows them."""
        return {
            "delivered_last": self.delivered.sums(now_s),
            "failed_last": self.failed.sums(now_s),
            "counted_since": format_time(self._began_us),
        }
