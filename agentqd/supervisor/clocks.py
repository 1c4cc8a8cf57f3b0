"""The clocks of one attempt: when is it to be ended, and why. Pure: time and signs of life are handed in.

Invariants:
1. `run_s` counts from the worker's start, `total_s` from the message that carried it, whatever is set when.
2. While `first_output_s` is set and nothing was seen yet, it alone judges quiet; `silence_s` counts from the
   last sign of life, or from the start when there is no first-output clock.
3. The warning is due once in a worker's life.
"""

from __future__ import annotations

from agentqd.supervisor.limits import SILENCE_POLL_MAX_S, SILENCE_POLL_MIN_S
from agentqd.supervisor.wire import Clocks


class AttemptClocks:
    """Judges one running attempt. All times are monotonic seconds."""

    __slots__ = ("_clocks", "_last_sign_s", "_received_s", "_saw_output", "_started_s", "_warned")

    def __init__(self, clocks: Clocks, received_s: float, started_s: float) -> None:
        self._clocks = clocks
        self._received_s = received_s
        self._started_s = started_s
        self._last_sign_s = started_s
        self._saw_output = False
        self._warned = False

    @property
    def kill_grace_s(self) -> float:
        return self._clocks.kill_grace_s

    @property
    def warning_signal(self) -> int | None:
        return self._clocks.warning_signal

    def replace(self, clocks: Clocks, received_s: float) -> None:
        """A config edit in mid-run."""
        self._clocks = clocks
        self._received_s = received_s

    def saw_activity(self, now_s: float) -> None:
        self._last_sign_s = now_s
        self._saw_output = True

    @property
    def needs_polling(self) -> bool:
        return self._quiet_limit() is not None

    def expired(self, now_s: float) -> str | None:
        """The intent of the deadline that has passed first, or None."""
        passed = [(at_s, intent) for at_s, intent in self._limits() if at_s <= now_s]
        return min(passed)[1] if passed else None

    def take_warning(self, now_s: float) -> int | None:
        """The signal to send now, if the warning is due; it is then spent."""
        at_s = self._warning_at()
        if at_s is None or now_s < at_s:
            return None
        self._warned = True
        return self._clocks.warning_signal

    def next_s(self, now_s: float) -> float | None:
        """When to look at this attempt again; None: never by itself."""
        moments = [at_s for at_s, _ in self._limits()]
        warning_at_s = self._warning_at()
        if warning_at_s is not None:
            moments.append(warning_at_s)
        quiet = self._quiet_limit()
        if quiet is not None:
            moments.append(now_s + min(max(quiet[1] / 4, SILENCE_POLL_MIN_S), SILENCE_POLL_MAX_S))
        return min(moments, default=None)

    def _limits(self) -> list[tuple[float, str]]:
        limits = self._wall_limits()
        quiet = self._quiet_limit()
        if quiet is not None:
            base_s, length_s, intent = quiet
            limits.append((base_s + length_s, intent))
        return limits

    def _wall_limits(self) -> list[tuple[float, str]]:
        limits = []
        if self._clocks.run_s is not None:
            limits.append((self._started_s + self._clocks.run_s, "run_timeout"))
        if self._clocks.total_s is not None:
            limits.append((self._received_s + self._clocks.total_s, "total_timeout"))
        return limits

    def _quiet_limit(self) -> tuple[float, float, str] | None:
        """(counted from, how long, intent) of the one clock that judges quiet now."""
        if self._clocks.first_output_s is not None and not self._saw_output:
            return self._started_s, self._clocks.first_output_s, "first_output_timeout"
        if self._clocks.silence_s is not None:
            return self._last_sign_s, self._clocks.silence_s, "silence_timeout"
        return None

    def _warning_at(self) -> float | None:
        if self._warned or self._clocks.warning_signal is None:
            return None
        earliest_s = min((at_s for at_s, _ in self._wall_limits()), default=None)
        return None if earliest_s is None else earliest_s - self._clocks.kill_grace_s
