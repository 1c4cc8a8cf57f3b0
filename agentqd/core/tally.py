"""How often something happened in the last minutes: counted in steps, bounded, forgotten after an hour. Pure."""

from __future__ import annotations

from collections import deque

from agentqd.core.limits import TALLY_STEP_S

WINDOWS_S = {"1m": 60.0, "5m": 300.0, "1h": 3600.0}
_STEPS_MAX = int(max(WINDOWS_S.values()) / TALLY_STEP_S) + 1


class Tally:
    """Counts by window. The step in which a window begins counts whole: the last minute may be up to ten seconds longer."""

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: deque[list[int]] = deque(maxlen=_STEPS_MAX)  # [step, count]

    def add(self, now_s: float, count: int = 1) -> None:
        step = int(now_s / TALLY_STEP_S)
        if self._steps and self._steps[-1][0] >= step:
            self._steps[-1][1] += count
        else:
            self._steps.append([step, count])

    def sums(self, now_s: float) -> dict[str, int]:
        return {name: self._since(now_s - window_s) for name, window_s in WINDOWS_S.items()}

    def _since(self, since_s: float) -> int:
        return sum(count for step, count in self._steps if (step + 1) * TALLY_STEP_S > since_s)
