"""Foreign commands (checks, command sinks) run through the supervisor, awaited here."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from agentqd.core.errors import SupervisorUnavailable
from agentqd.sinks.base import ExecResult
from agentqd.supervisor import wire

if TYPE_CHECKING:
    from agentqd.loops.box import Box
    from agentqd.loops.finishing import AttemptEnd
    from agentqd.loops.link import Link

CHECK_TIMEOUT_S: Final = 60.0
_ANSWER_MARGIN_S: Final = 15.0
_CHECK_ENV: Final = ("PATH", "HOME", "USER", "LANG", "TMPDIR")


class Execs:
    """Each command has a reference; its end comes back under it."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._waiting: dict[str, asyncio.Future[wire.ExecEnded]] = {}

    async def __call__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        timeout_s: float,
        stdin: str | None = None,
        stdin_path: str | None = None,
        cwd: str | None = None,
    ) -> ExecResult:
        """Raises SupervisorUnavailable if there is none, or it goes away meanwhile."""
        ref = os.urandom(8).hex()
        future: asyncio.Future[wire.ExecEnded] = asyncio.get_running_loop().create_future()
        self._waiting[ref] = future
        try:
            self._link.send(
                wire.Exec(ref, list(argv), dict(env), timeout_s, cwd=cwd, stdin=stdin, stdin_path=stdin_path)
            )
            async with asyncio.timeout(timeout_s + _ANSWER_MARGIN_S):
                ended = await future
        except TimeoutError:
            raise SupervisorUnavailable(
                f"the supervisor has not answered in {timeout_s + _ANSWER_MARGIN_S:g} s"
            ) from None
        except asyncio.CancelledError:
            self._cancel(ref)
            raise
        finally:
            self._waiting.pop(ref, None)
        return ExecResult(ended.exit_code, ended.signal, ended.timed_out, ended.error, ended.output)

    async def check(
        self, box: Box, end: AttemptEnd, argv: list[str], folder: str, cwd: str
    ) -> tuple[bool, str]:
        """A task's `expect.check`, in the worker's own folder `cwd`: (passed, what it said). Waits for a supervisor if there is none."""
        env = {name: os.environ[name] for name in _CHECK_ENV if name in os.environ}
        env |= {"AGENTQ_TASK_ID": end.task_id, "AGENTQ_ATTEMPT": str(end.attempt), "AGENTQ_TASK_DIR": folder}
        while True:
            try:
                result = await self(argv, env, timeout_s=CHECK_TIMEOUT_S, cwd=cwd)
            except SupervisorUnavailable:
                await asyncio.sleep(0.5)
                continue
            if result.error is not None:
                return False, f"the check could not be started: {result.error}"
            if result.timed_out:
                return False, f"the check did not end within {CHECK_TIMEOUT_S:g} s"
            last = result.output.strip().splitlines()[-1:] or [""]
            box.log.debug("check_ended", task=end.task_id, exit_code=result.exit_code)
            return result.exit_code == 0, f"the check ended with {result.exit_code}: {last[0][:200]}"

    def ended(self, report: wire.ExecEnded) -> None:
        future = self._waiting.get(report.ref)
        if future is not None and not future.done():
            future.set_result(report)

    def connection_lost(self) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(SupervisorUnavailable("the supervisor went away"))

    def _cancel(self, ref: str) -> None:
        try:
            self._link.send(wire.ExecCancel(ref))
        except SupervisorUnavailable:
            return
