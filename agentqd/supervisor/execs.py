"""Foreign commands for the daemon (checks, command sinks): own session, own time limit, output's tail, nothing kept.

Invariants:
1. `ExecEnded` is told once, when the command's whole tree is gone, and only to the connection that asked.
2. A command whose asker is gone is ended: nobody will hear its answer, and the next daemon asks again.
"""

from __future__ import annotations

import os
from typing import Final

from agentqd.core.limits import EXEC_OUTPUT_BYTES_MAX
from agentqd.supervisor.child import Child, Ended, Hooks, Program, launch
from agentqd.supervisor.context import Context
from agentqd.supervisor.limits import (
    EXEC_CAPTURE_BYTES_MAX,
    EXEC_GRACE_S,
    EXECS_MAX,
    OUTPUT_POLL_MIN_S,
)
from agentqd.supervisor.output import OutputCap
from agentqd.supervisor.spawn import SpawnError
from agentqd.supervisor.tree import MARK_EXEC, MARK_STATE
from agentqd.supervisor.wire import Exec, ExecEnded
from agentqd.system.fsops import write_all

_CAPTURE_FLAGS: Final = os.O_TMPFILE | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC


class Execs:
    """The commands that run now."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._running: dict[str, _Command] = {}

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def start(self, request: Exec) -> None:
        """A ref that runs already is left alone: its end will be told."""
        earlier = self._running.get(request.ref)
        if earlier is not None:
            if earlier.abandoned:
                error = "an earlier command with this ref is still being ended"
                self._context.tell(ExecEnded(request.ref, error=error))
            return
        if len(self._running) >= EXECS_MAX:
            self._context.tell(ExecEnded(request.ref, error=f"{EXECS_MAX} foreign commands run already"))
            return
        try:
            self._running[request.ref] = _Command(self._context, request, self)
        except SpawnError as problem:
            self._context.tell(ExecEnded(request.ref, error=str(problem)))
        except (OSError, ValueError) as problem:
            self._context.tell(ExecEnded(request.ref, error=f"cannot start: {problem}"))

    def cancel(self, ref: str) -> None:
        command = self._running.get(ref)
        if command is not None:
            command.child.end()

    def abandon_all(self) -> None:
        """Their asker is gone."""
        for command in list(self._running.values()):
            command.abandoned = True
            command.child.end()

    def kill_all(self) -> None:
        for command in list(self._running.values()):
            command.child.kill_now()

    def children_changed(self) -> None:
        for command in list(self._running.values()):
            command.child.children_changed()

    def over(self, ref: str) -> None:
        del self._running[ref]


class _Command:
    def __init__(self, context: Context, request: Exec, owner: Execs) -> None:
        self._context = context
        self._owner = owner
        self._ref = request.ref
        self._tail_bytes = min(max(request.output_bytes_max, 0), EXEC_OUTPUT_BYTES_MAX)
        self._timed_out = False
        self.abandoned = False
        env = {**request.env, MARK_STATE: context.state_id, MARK_EXEC: request.ref}
        hooks = Hooks(lambda: EXEC_GRACE_S, lambda: None, self._gone, self._stuck)
        self._capture_fd = _open_capture(context.state_folder)
        try:
            stdin_fd = _open_stdin(request)
            cwd = request.cwd or "/"
            program = Program(request.argv, env, cwd, stdin_fd, self._capture_fd, self._capture_fd)
            self.child: Child = launch(context, ("", request.ref), program, hooks)
        except BaseException:
            os.close(self._capture_fd)
            raise
        self._cap = OutputCap(self._capture_fd, EXEC_CAPTURE_BYTES_MAX, lambda: None)
        self._pace_s = OUTPUT_POLL_MIN_S
        self._output_timer = context.after(self._pace_s, self._look_at_output)
        self._limit_timer = context.after(max(request.timeout_s, 0.0), self._time_is_up)

    def _time_is_up(self) -> None:
        if not self.child.main_has_ended:
            self._timed_out = True
            self.child.end()

    def _look_at_output(self) -> None:
        self._pace_s = self._cap.next_look_s(self._cap.look(), self._pace_s)
        self._output_timer = self._context.after(self._pace_s, self._look_at_output)

    def _stuck(self, pids: list[int]) -> None:
        self._context.log("error", "command_tree_will_not_die", ref=self._ref, pids=pids[:50])

    def _gone(self, ended: Ended) -> None:
        self._output_timer.cancel()
        self._limit_timer.cancel()
        size = os.fstat(self._capture_fd).st_size
        tail = os.pread(self._capture_fd, self._tail_bytes, max(size - self._tail_bytes, 0))
        os.close(self._capture_fd)
        self._owner.over(self._ref)
        if not self.abandoned:
            self._context.tell(
                ExecEnded(
                    ref=self._ref,
                    exit_code=ended.exit_code,
                    signal=ended.signal,
                    timed_out=self._timed_out,
                    output=tail.decode(errors="replace"),
                )
            )


def _open_capture(folder: str) -> int:
    try:
        return os.open(folder, _CAPTURE_FLAGS, 0o600)
    except OSError:  # no O_TMPFILE there, or no space: memory will do, the cap holds there too
        return os.memfd_create("agentqd-exec", os.MFD_CLOEXEC)


def _open_stdin(request: Exec) -> int:
    if request.stdin is None:
        # O_NONBLOCK: opening a FIFO must not hold up the loop; for regular files it means nothing.
        return os.open(request.stdin_path or "/dev/null", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    fd = os.memfd_create("agentqd-stdin", os.MFD_CLOEXEC)
    try:
        write_all(fd, request.stdin.encode(errors="surrogatepass"))
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd
