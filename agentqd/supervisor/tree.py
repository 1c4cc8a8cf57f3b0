"""Which processes belong to which attempt (or foreign command): the one place that answers this. Cgroups go here later.

Invariants:
1. A main process is reaped only by its owner's code, and last: its zombie pins the pid, which is also its session and
   group id, so that these numbers cannot come to mean anything else while we still look for the rest of the tree.
2. The supervisor is a subreaper: every living descendant of a worker hangs, by parent links, either below the worker's
   main process or below one of the supervisor's own other children ("orphans"). When the main process is dead and no
   orphan is the worker's, its tree is gone. In the normal case that costs one read of one small file.
3. An orphan is attributed, in this order, by: an earlier attribution; the session or group of a main process; the marker
   in its environment; a session or identity seen in the tree before; being possible for one living owner only (those
   that started before it). Attributed once, attributed for good, except for the last, which is asked anew each time.
4. An orphan that two living owners could have made is left alone until one of them is gone; one that no living owner
   could have made is a stray and may be ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable

from agentqd.supervisor.limits import TREE_PROCESSES_MAX
from agentqd.supervisor.procfs import (
    Process,
    all_pids,
    children_of,
    environment_of,
    read_process,
    signal_process,
)

MARK_STATE = "AGENTQ_STATE_ID"
MARK_TASK = "AGENTQ_TASK_ID"
MARK_ATTEMPT = "AGENTQ_ATTEMPT"
MARK_EXEC = "AGENTQ_EXEC_REF"

Key = tuple[str, str]  # (task, attempt) of a worker; ("", ref) of a foreign command


class Owner:
    """One spawned main process, and what was learned about its tree."""

    __slots__ = ("ended", "key", "pid", "seen", "sessions", "start")

    def __init__(self, key: Key, pid: int, start: int) -> None:
        self.key = key
        self.pid = pid
        self.start = start
        self.ended = False  # the main process is a zombie
        self.seen: set[tuple[int, int]] = set()
        self.sessions: set[int] = {pid}


class Trees:
    """Every tree below this supervisor."""

    def __init__(self, state_id: str) -> None:
        self._own_pid = os.getpid()
        self._state_id = state_id.encode()
        self._owners: dict[int, Owner] = {}
        self._by_key: dict[Key, Owner] = {}
        self._attributed: dict[tuple[int, int], Owner] = {}
        self.unclear: dict[tuple[int, int], Process] = {}  # claimable by more than one owner; for the log
        self._children_fd = _open_children(self._own_pid)
        # As process 1 of a container we inherit orphans that no worker made: nothing is concluded by elimination.
        self._may_eliminate = self._own_pid != 1
        self._foreign = set(self._own_children())  # children from before our exec, if any; never touched

    def add(self, owner: Owner) -> None:
        assert owner.pid not in self._owners
        self._owners[owner.pid] = owner
        self._by_key[owner.key] = owner

    def remove(self, owner: Owner) -> None:
        """The tree is gone and its main process was reaped."""
        del self._owners[owner.pid]
        del self._by_key[owner.key]

    def orphans(self) -> list[int]:
        """The pids of our living children that are no main process. Dead ones are reaped on the way, each by its pid."""
        children = self._own_children()
        if len(children) <= len(self._owners):
            return []  # every owner's main process is a child until it is reaped, so these are all of them
        living = [pid for pid in children if pid not in self._owners and not self._reap(pid)]
        return [pid for pid in living if pid not in self._foreign]

    def members(self, owner: Owner) -> list[Process]:
        """Every living process of this tree; without the main process once that has ended."""
        orphans = self.orphans()
        if owner.ended and not orphans:
            return []
        roots = [] if owner.ended else [owner.pid]
        for pid in orphans:
            process = read_process(pid)
            if process is not None and self._owner_of(process)[0] is owner:
                roots.append(pid)
        found = _with_descendants(roots)
        owner.seen.update(process.identity for process in found)
        owner.sessions.update({process.pid for process in found if process.pid == process.session})
        return found

    def strays(self) -> list[Process]:
        """Orphans that no living owner can have made."""
        strays = []
        for pid in self.orphans():
            process = read_process(pid)
            if process is not None and self._owner_of(process) == (None, False):
                strays.append(process)
        return strays

    def forget_gone(self) -> None:
        """Drop what is remembered of processes that are no longer our children."""
        if self._attributed or self.unclear:
            alive = set(self._own_children())
            self._attributed = {who: owner for who, owner in self._attributed.items() if who[0] in alive}
            self.unclear = {who: process for who, process in self.unclear.items() if who[0] in alive}

    def signal(self, owner: Owner, number: int, members: Iterable[Process]) -> None:
        """One signal to every process: the main's group in one atomic go, then each one outside it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(owner.pid, number)  # safe: the unreaped main process pins the number
        for process in members:
            if process.group != owner.pid:
                signal_process(process, number)

    def kill(self, owner: Owner, rounds_max: int) -> list[Process]:
        """SIGKILL until no new process turns up (or `rounds_max` passes); returns what was there in the last pass."""
        killed: set[tuple[int, int]] = set()
        members: list[Process] = []
        for _ in range(rounds_max):
            members = self.members(owner)
            fresh = [process for process in members if process.identity not in killed]
            if not fresh:
                break
            self.signal(owner, signal.SIGKILL, members)
            killed.update(process.identity for process in fresh)
        return members

    def _owner_of(self, process: Process) -> tuple[Owner | None, bool]:
        """(its owner, whether a living owner could have made it at all)."""
        owner = self._attributed.get(process.identity)
        if owner is not None and self._owners.get(owner.pid) is owner:
            return owner, True
        owner = self._owners.get(process.session) or self._owners.get(process.group)
        if owner is None:
            key = self._marked_key(process.pid)
            if key is not None and key not in self._by_key:
                return None, False
            owner = self._by_key[key] if key is not None else self._owner_by_history(process)
        if owner is None:
            return self._owner_by_elimination(process)
        self._attributed[process.identity] = owner
        return owner, True

    def _owner_by_history(self, process: Process) -> Owner | None:
        for owner in self._owners.values():
            if process.identity in owner.seen or process.session in owner.sessions:
                return owner
        return None

    def _owner_by_elimination(self, process: Process) -> tuple[Owner | None, bool]:
        """Not remembered: whoever is the only possible one today may not have been yesterday."""
        possible = [owner for owner in self._owners.values() if owner.start <= process.start]
        if len(possible) == 1 and self._may_eliminate:
            return possible[0], True
        if possible:
            self.unclear[process.identity] = process
        return None, bool(possible) or not self._may_eliminate

    def _reap(self, pid: int) -> bool:
        """Reap exactly this child if it is dead. True if it is gone."""
        try:
            gone = os.waitpid(pid, os.WNOHANG)[0] == pid
        except ChildProcessError:
            gone = True
        if gone:
            self._foreign.discard(pid)
        return gone

    def _marked_key(self, pid: int) -> Key | None:
        environment = environment_of(pid)
        return None if environment is None else marked_key(environment, self._state_id)

    def _own_children(self) -> list[int]:
        if self._children_fd is not None:
            return [int(pid) for pid in _read_whole(self._children_fd).split()]
        found = (read_process(pid) for pid in all_pids())  # a kernel without CONFIG_PROC_CHILDREN
        return [process.pid for process in found if process is not None and process.parent == self._own_pid]


def marked_key(environment: dict[bytes, bytes], state_id: bytes) -> Key | None:
    """Whose process carries this environment; None if it is not marked with our state folder's id."""
    if environment.get(MARK_STATE.encode()) != state_id:
        return None
    ref = environment.get(MARK_EXEC.encode())
    if ref is not None:
        return "", ref.decode(errors="replace")
    task = environment.get(MARK_TASK.encode(), b"").decode(errors="replace")
    return task, environment.get(MARK_ATTEMPT.encode(), b"").decode(errors="replace")


def _with_descendants(roots: list[int]) -> list[Process]:
    found: dict[int, Process] = {}
    waiting = list(roots)
    while waiting and len(found) < TREE_PROCESSES_MAX:
        pid = waiting.pop()
        if pid in found:
            continue
        process = read_process(pid)
        if process is not None:
            found[pid] = process
            waiting.extend(children_of(pid))
    return list(found.values())


def _read_whole(fd: int) -> bytes:
    content = os.pread(fd, 65536, 0)
    if len(content) < 3072:  # the kernel fills at least most of a page, unless that was all
        return content
    while part := os.pread(fd, 65536, len(content)):
        content += part
    return content


def _open_children(pid: int) -> int | None:
    try:
        return os.open(f"/proc/self/task/{pid}/children", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
