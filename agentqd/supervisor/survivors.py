"""Processes of earlier supervisor instances: found once at the start by their marker, ended, reported until gone.

Invariants:
1. A process is a survivor if its environment names our state folder's id and it is no descendant of ours; with it go
   its own descendants and the session that it leads, if it leads one.
2. No attempt of a task starts while a survivor of that task lives.
3. The look is repeated until one look finds nothing: what a survivor forked meanwhile is found too.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from agentqd.supervisor.context import Context
from agentqd.supervisor.limits import STUCK_REPEAT_S, SURVIVOR_GRACE_S, SURVIVOR_POLL_S
from agentqd.supervisor.procfs import Process, all_pids, environment_of, read_process, signal_process
from agentqd.supervisor.tree import Key, marked_key
from agentqd.supervisor.wire import Survivor, SurvivorsGone


class Survivors:
    """`changed` is called whenever some are gone."""

    def __init__(self, context: Context, changed: Callable[[], None]) -> None:
        self._context = context
        self._changed = changed
        self._living: list[tuple[Process, Key]] = []
        self._terminated: set[tuple[int, int]] = set()
        self._kill_at_s = 0.0
        self._complain_at_s = 0.0

    @property
    def any(self) -> bool:
        return bool(self._living)

    def has_task(self, task: str) -> bool:
        return any(key[0] == task for _, key in self._living)

    def listed(self) -> list[Survivor]:
        """For the Welcome. A foreign command's process has the task "" and the attempt 0."""
        return [
            Survivor(task, int(attempt) if task and attempt.isdigit() else 0, process.pid)
            for process, (task, attempt) in self._living
        ]

    def begin(self) -> None:
        """Look for them and start to end them."""
        now_s = self._context.clock.monotonic_s()
        self._kill_at_s = now_s + SURVIVOR_GRACE_S
        self._complain_at_s = now_s + STUCK_REPEAT_S
        self._living = find_survivors(self._context.state_id)
        if self._living:
            pids = [process.pid for process, _ in self._living[:50]]
            self._context.log("warning", "survivors_found", count=len(self._living), pids=pids)
            self._end_them(now_s)

    def _look(self) -> None:
        before = len(self._living)
        self._living = find_survivors(self._context.state_id)
        now_s = self._context.clock.monotonic_s()
        if self._living:
            self._end_them(now_s)
        else:
            self._context.log("info", "survivors_gone")
            self._context.tell(SurvivorsGone())
        if len(self._living) < before:
            self._changed()

    def _end_them(self, now_s: float) -> None:
        for process, _ in self._living:
            if now_s >= self._kill_at_s:
                signal_process(process, signal.SIGKILL)
            elif process.identity not in self._terminated:
                self._terminated.add(process.identity)
                signal_process(process, signal.SIGTERM)
                signal_process(process, signal.SIGCONT)
        if now_s >= self._complain_at_s:
            self._complain_at_s = now_s + STUCK_REPEAT_S
            pids = [process.pid for process, _ in self._living[:50]]
            self._context.log("error", "survivors_will_not_die", pids=pids)
        self._context.after(SURVIVOR_POLL_S, self._look)


def find_survivors(state_id: str) -> list[tuple[Process, Key]]:
    """Every living process of an earlier instance, with the task and attempt it belongs to."""
    own_pid = os.getpid()
    processes = {pid: process for pid in all_pids() if (process := read_process(pid)) is not None}
    keys: dict[int, Key] = {}
    for pid in processes:
        environment = environment_of(pid)
        key = marked_key(environment, state_id.encode()) if environment else None
        if key is not None:
            keys[pid] = key
    if not keys:
        return []
    found = []
    for pid, process in processes.items():
        lineage = _lineage(pid, processes)
        if own_pid in lineage or not _is_alive(process):
            continue
        named = next((keys[ancestor] for ancestor in (*lineage, process.session) if ancestor in keys), None)
        if named is not None:
            found.append((process, named))
    return found


def _lineage(pid: int, processes: dict[int, Process]) -> list[int]:
    """The process itself and its ancestors."""
    line = []
    while pid in processes and pid not in line:
        line.append(pid)
        pid = processes[pid].parent
    return line


def _is_alive(process: Process) -> bool:
    """A zombie is dead, unless only its first thread has ended."""
    if process.state not in "ZX":
        return True
    try:
        return len(os.listdir(f"/proc/{process.pid}/task")) > 1
    except OSError:
        return False
