"""When did a started task last show a sign of life, and does any process of it live? Reads files and /proc; blocking.

Signs are what the supervisor's silence clock takes for one: growth of stdout or stderr, a touch of the heartbeat file, something in
the drop folder. Read as change times of those files, which nobody can set at will, so that a restarted daemon sees the same.
"""

from __future__ import annotations

import os
from typing import Final

from agentqd.supervisor.procfs import Process, all_pids, environment_of, read_process
from agentqd.supervisor.tree import marked_key

_SIGNS: Final = ("stdout", "stderr", "heartbeat", "outbox", "started")


def last_sign_us(folder: str, claimed_us: int, now_us: int) -> int:
    """The newest change in an attempt's folder; at least its claim, and never in the future (a clock that was set back)."""
    newest = claimed_us
    for name in _SIGNS:
        try:
            newest = max(newest, os.stat(f"{folder}/{name}", follow_symlinks=False).st_ctime_ns // 1000)
        except OSError:
            continue
    return min(newest, now_us)


def was_started(folder: str) -> bool:
    """Once the supervisor has begun with an attempt, that attempt is never begun again."""
    return os.path.lexists(f"{folder}/started")


def has_process(state_id: str, task_id: str, attempt: int, leader: tuple[int, int] | None) -> bool:
    """Does a process of this attempt live: one that carries its marker, a descendant of such a one, or one of its session?

    `leader`: (pid, start) of the worker, which leads its session; the session keeps its number while anybody is in it.
    """
    key = (task_id, str(attempt))
    mark = state_id.encode()
    processes = {pid: process for pid in all_pids() if (process := read_process(pid)) is not None}
    marked = set()
    for pid in processes:
        environment = environment_of(pid)
        if environment and marked_key(environment, mark) == key:
            marked.add(pid)
    sessions = set(marked)
    if leader is not None:
        now = processes.get(leader[0])
        if (
            now is None or now.start == leader[1]
        ):  # else the number is another's: nobody is left in that session
            sessions.add(leader[0])
    return any(
        process.state not in "ZX" and (process.session in sessions or _descends(process, marked, processes))
        for process in processes.values()
    )


def _descends(process: Process, marked: set[int], processes: dict[int, Process]) -> bool:
    """Itself or an ancestor is marked."""
    seen: set[int] = set()
    pid = process.pid
    while pid in processes and pid not in seen:
        if pid in marked:
            return True
        seen.add(pid)
        pid = processes[pid].parent
    return False
