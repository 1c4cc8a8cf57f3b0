"""Task folders made in advance, while nothing else is to be done: STATE/.ready/XXXX/attempt-1/{outbox/,work/,prompt,.started,
stdout,stderr}.

Making a folder takes eight new inodes between a line and its worker; taking a ready one takes a rename. It stays all or nothing: the prompt is written before the rename that makes the whole folder appear in its place.
What a crash leaves here was never run; it is removed at the next start.
"""

from __future__ import annotations

import contextlib
import os

from agentqd.supervisor.context import Context
from agentqd.supervisor.folder import AttemptFolder, fill, write_prompt
from agentqd.supervisor.limits import READY_FOLDERS, READY_PAUSE_S
from agentqd.system.fsops import open_folder_at, remove_tree_at

_FIRST = "attempt-1"


class ReadyFolders:
    """A small stock, refilled one at a time when no attempt was started for a moment."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._stock: list[tuple[str, AttemptFolder]] = []
        self._pending = False
        self._fd = -1

    def open(self) -> None:
        """Clear what an earlier instance left, and begin. Without a stock (a full disk) every folder is made when needed."""
        with contextlib.suppress(OSError):
            os.makedirs(f"{self._context.state_folder}/.ready", 0o700, exist_ok=True)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(f"{self._context.state_folder}/.ready", flags)
            for name in os.listdir(self._fd):
                remove_tree_at(name, self._fd)
            self.refill_soon()

    def take(self, task: str, prompt: str | None) -> AttemptFolder | None:
        """The folder of attempt 1 of a task that has none yet, whole and in its place; None: make it by hand."""
        if not self._stock:
            return None
        name, folder = self._stock.pop()
        self.refill_soon()
        try:
            write_prompt(folder, prompt)
            os.rename(name, task, src_dir_fd=self._fd, dst_dir_fd=self._context.tasks_fd)
        except (OSError, ValueError):
            folder.close()
            with contextlib.suppress(OSError):
                remove_tree_at(name, self._fd)
            return None
        return folder

    def refill_soon(self) -> None:
        if not self._pending and self._fd >= 0:
            self._pending = True
            self._context.after(READY_PAUSE_S, self._refill)

    def _refill(self) -> None:
        self._pending = False
        name = os.urandom(6).hex()
        try:
            os.mkdir(name, 0o700, dir_fd=self._fd)
            outer = open_folder_at(name, self._fd)
            try:
                folder = fill(outer, _FIRST, with_prompt=True)
            finally:
                os.close(outer)
        except OSError:
            with contextlib.suppress(OSError):
                remove_tree_at(name, self._fd)
            return
        self._stock.append((name, folder))
        if len(self._stock) < READY_FOLDERS:
            self.refill_soon()
