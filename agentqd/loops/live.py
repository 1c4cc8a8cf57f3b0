"""The attempts that are running, as far as the journal knows, and what all who deal with them share.

Kept in memory only: lost at any instant, found again by reconcile.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from agentqd.core.errors import JournalError, SupervisorUnavailable
from agentqd.core.task import TaskRequest
from agentqd.loops.box import Box
from agentqd.loops.dropfolder import Identity
from agentqd.loops.link import Link
from agentqd.storage import blobs
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction
from agentqd.supervisor import wire
from agentqd.system.inotify import Watcher


class Live:
    """One attempt that is running as far as the journal knows."""

    __slots__ = ("ended", "ending", "keys", "note", "request", "running", "scanning", "taken", "task")

    def __init__(self, task: TaskRow, request: TaskRequest) -> None:
        self.task = task
        self.request = request
        self.running: wire.Running | None = None
        self.taken: dict[str, Identity] = {}
        self.keys: set[str] = set()
        self.note: asyncio.TimerHandle | None = None
        self.scanning = asyncio.Lock()
        self.ended = False
        self.ending = False  # the supervisor is ending it


class Workers:
    """What claims, ends and handovers share: who runs, the way to the supervisor, threads for file work."""

    def __init__(self, box: Box, inotify: Watcher, link: Link) -> None:
        self.box = box
        self.inotify = inotify
        self.link = link
        self.live: dict[str, Live] = {}
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="evidence")

    @property
    def blobs(self) -> str:
        """Where large entries are kept."""
        return f"{self.box.folders.state}/blobs"

    def let_go(self, paths: Collection[str]) -> None:
        """Remove copies in blobs/ that no entry names and nobody will give to one. The next start finds what is left."""
        if paths:
            with contextlib.suppress(RuntimeError):  # the threads have ended
                self.threads.submit(blobs.remove, paths)

    def submit(self, unit: Callable[[Transaction], Any]) -> None:
        """A unit that nobody waits for; a failed journal is told elsewhere, a refused unit is a bug and logged."""
        self.box.journal.submit_lazily(unit).add_done_callback(self.unit_done)

    def unit_done(self, future: asyncio.Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, JournalError):
            self.box.log.error("unit_failed", error=repr(error))

    def forget(self, task_id: str, attempt: int) -> None:
        """The journal has claimed this end."""
        with contextlib.suppress(SupervisorUnavailable):  # told again at the next Welcome
            self.link.send(wire.Forget(task_id, attempt))

    def send_end(self, task_id: str, attempt: int, reason: str, after_s: float = 0.0) -> None:
        """Ask the supervisor to end an attempt, for `reason`, `after_s` seconds from now."""
        with contextlib.suppress(SupervisorUnavailable):  # the next Welcome sends it again
            self.link.send(wire.End(task_id, attempt, reason, after_s))
        self.box.task_changed(task_id)
