"""A foreign program takes the entry: the envelope on stdin, ids in the environment; its exit code is the answer.

0: delivered. 100: rejected for good (qmail-command). Anything else (75 too), a signal, the time limit, a program that
cannot be started: later, with the first line of its output as the reason. A program that has done its work and then
exits with another code, or dies, is run again with the same id: it must dedupe by AGENTQ_DELIVERY_ID.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Final

from agentqd.core.errors import ConfigError, SupervisorUnavailable
from agentqd.sinks.base import Context, Deferred, Delivered, Delivery, ExecResult, Found, Outcome, Rejected
from agentqd.sinks.reason import bounded, joined

TIMEOUT_S: Final = 60.0
CONCURRENCY: Final = 5
EXIT_REJECTED: Final = 100
_ENDING_S: Final = 15.0  # the supervisor's part: term, grace, kill, tell
_INHERITED: Final = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR")
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class CommandSink:
    batch_max = 1

    def __init__(self, context: Context, environ: Mapping[str, str] | None = None) -> None:
        settings = context.settings
        if not settings.command:
            raise ConfigError(f"the sink {context.name} is of type command and needs a command")
        self._argv: Final = tuple(settings.command)
        self._exec = context.exec
        self._command_timeout_s = float(settings.timeout or TIMEOUT_S)
        self.timeout_s = (
            self._command_timeout_s + _ENDING_S
        )  # so that the true end is heard, not only that it is late
        self.concurrency = settings.concurrency or CONCURRENCY
        inherited = os.environ if environ is None else environ
        self._base_env = {"PATH": _PATH} | {name: inherited[name] for name in _INHERITED if name in inherited}

    async def open(self, last_position: int) -> list[Found]:  # noqa: ARG002  (it keeps no positions)
        return []

    async def deliver(self, batch: Sequence[Delivery]) -> Sequence[Outcome]:
        return [await self._deliver(delivery) for delivery in batch]

    async def close(self) -> None:
        """Nothing is kept open between deliveries."""

    async def _deliver(self, delivery: Delivery) -> Outcome:
        try:
            entry = delivery.payload.decode()
        except UnicodeDecodeError:
            return Rejected("the payload is not UTF-8")
        try:
            ended = await self._exec(
                self._argv, self._env(delivery), timeout_s=self._command_timeout_s, stdin=entry
            )
        except SupervisorUnavailable as problem:
            return Deferred(bounded(f"no supervisor: {problem.message}"))
        return outcome_of(ended)

    def _env(self, delivery: Delivery) -> dict[str, str]:
        return self._base_env | {
            "AGENTQ_DELIVERY_ID": _clean(delivery.delivery_id),
            "AGENTQ_TYPE": _clean(delivery.type),
            "AGENTQ_TASK_ID": _clean(delivery.task_id or ""),
            "AGENTQ_KEY": _clean(delivery.key),
            "AGENTQ_ATTEMPT": str(delivery.attempts + 1),  # of this delivery, from 1
        }


def outcome_of(ended: ExecResult) -> Outcome:
    """What a command's end means. Whatever is not plainly 0 or 100 is "later"."""
    if ended.error is not None:
        return Deferred(joined("cannot start", ended.error))
    if ended.timed_out:
        return Deferred(joined("timed out", ended.output))
    if ended.signal is not None:
        return Deferred(joined(f"killed by {_signal_name(ended.signal)}", ended.output))
    if ended.exit_code == 0:
        return Delivered()
    if ended.exit_code == EXIT_REJECTED:
        return Rejected(joined(f"exit {EXIT_REJECTED}", ended.output))
    if ended.exit_code is None:
        return Deferred(joined("ended in an unknown way", ended.output))
    return Deferred(joined(f"exit {ended.exit_code}", ended.output))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _clean(value: str) -> str:
    """What an environment can hold: no NUL, and UTF-8 (a file name may be neither)."""
    return value.replace("\0", "").encode("utf-8", "replace").decode()
