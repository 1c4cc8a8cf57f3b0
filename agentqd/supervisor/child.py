"""One spawned process with its tree: started, watched by a pidfd, ended, reaped last.

Invariants:
1. Once `launch` has returned a Child, `gone` is called exactly once, after `main_ended`, when the whole tree is gone.
2. The main process is reaped here, by its pid, and nowhere else; never by a wait for any child.
"""

from __future__ import annotations

import os
import selectors
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agentqd.supervisor.context import Context
from agentqd.supervisor.ending import TreeEnd, has_ended
from agentqd.supervisor.procfs import read_process
from agentqd.supervisor.spawn import SpawnError, spawn
from agentqd.supervisor.tree import Key, Owner
from agentqd.supervisor.wire import LeftBehind


@dataclass(frozen=True, slots=True)
class Program:
    """What to start. The descriptors stay the caller's, except `stdin_fd`, which `launch` always closes."""

    argv: list[str]
    env: Mapping[str, str]
    cwd: str | int
    stdin_fd: int
    stdout_fd: int
    stderr_fd: int


@dataclass(frozen=True, slots=True)
class Ended:
    """How the main process ended, and what the tree used."""

    exit_code: int | None
    signal: int | None
    user_cpu_s: float
    system_cpu_s: float
    max_rss_bytes: int


@dataclass(frozen=True, slots=True)
class Hooks:
    """Whom to tell. `grace_s` is asked when the tree is first to be ended."""

    grace_s: Callable[[], float]
    main_ended: Callable[[], None]
    gone: Callable[[Ended], None]
    stuck: Callable[[list[int]], None]


class Child:
    """A running (or ending) process and its tree."""

    def __init__(self, context: Context, owner: Owner, pidfd: int, hooks: Hooks) -> None:
        self._context = context
        self._owner = owner
        self._pidfd = pidfd
        self._hooks = hooks
        self._tree_end = TreeEnd(context, owner, hooks.grace_s, self._gone, hooks.stuck)
        self.pid = owner.pid
        self.start = owner.start

    @property
    def main_has_ended(self) -> bool:
        """True from the instant the main process is dead, even before we were told."""
        return self._owner.ended or has_ended(self.pid)

    @property
    def left_behind(self) -> list[LeftBehind]:
        return self._tree_end.left_behind

    def end(self) -> None:
        """SIGTERM, the grace, SIGKILL to the whole tree."""
        self._tree_end.begin()

    def kill_now(self) -> None:
        self._tree_end.kill_now()

    def children_changed(self) -> None:
        self._tree_end.children_changed()

    def signal_main(self, number: int) -> None:
        os.kill(self.pid, number)  # our unreaped child: the pid is its own

    def pidfd_readable(self) -> None:
        """The main process is a zombie."""
        self._context.selector.unregister(self._pidfd)
        os.close(self._pidfd)
        self._hooks.main_ended()
        self._tree_end.main_ended()

    def _gone(self) -> None:
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        assert pid == self.pid
        self._context.trees.remove(self._owner)
        code = os.waitstatus_to_exitcode(status)
        self._hooks.gone(
            Ended(
                exit_code=code if code >= 0 else None,
                signal=-code if code < 0 else None,
                user_cpu_s=usage.ru_utime,
                system_cpu_s=usage.ru_stime,
                max_rss_bytes=usage.ru_maxrss * 1024,
            )
        )


def launch(context: Context, key: Key, program: Program, hooks: Hooks) -> Child:
    """Start it. Raises SpawnError; then nothing of it is left."""
    try:
        pid = spawn(
            program.argv, program.env, program.cwd, program.stdin_fd, program.stdout_fd, program.stderr_fd
        )
    finally:
        # The order matters: this frees a descriptor, so that the two opened next are to be had even at the limit.
        os.close(program.stdin_fd)
    process = read_process(pid)
    pidfd = -1
    try:
        pidfd = os.pidfd_open(pid)
        child = Child(context, Owner(key, pid, process.start if process else 0), pidfd, hooks)
        context.selector.register(pidfd, selectors.EVENT_READ, child.pidfd_readable)
    except OSError as problem:
        _undo(pid, pidfd)
        raise SpawnError(f"started {program.argv[0]!r}, cannot watch it: {problem.strerror}") from problem
    context.trees.add(child._owner)  # noqa: SLF001 - made here
    return child


def _undo(pid: int, pidfd: int) -> None:
    """A process that cannot be watched must not live; what it has started is found as strays."""
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if pidfd >= 0:
        os.close(pidfd)
