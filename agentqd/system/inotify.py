"""inotify for an asyncio loop: hints that something may have changed, never the truth about it.

Invariants:
1. A hint may be lost, doubled or late; `OVERFLOW` says that some were lost. Callers rescan slowly whatever comes.
2. A watch stands on an inode, not on a path: after a folder was deleted or moved its hint has `gone`, and the caller
   adds the path again under the same label.
3. Nothing here blocks, and one burst costs bounded memory: hints are merged by label and name, and too many different
   ones are an overflow.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
from enum import Enum
from typing import Final, Protocol

import inotify_simple
import msgspec
from inotify_simple import flags

from agentqd.core.errors import AgentqError

FOLDER_MASK: Final = int(
    flags.CLOSE_WRITE | flags.MODIFY | flags.MOVED_TO | flags.MOVED_FROM | flags.CREATE | flags.DELETE
    | flags.DELETE_SELF | flags.MOVE_SELF
)  # fmt: skip
_GONE: Final = int(flags.DELETE_SELF | flags.MOVE_SELF | flags.UNMOUNT | flags.IGNORED)
_PENDING_MAX: Final = 16_384  # as many as the kernel keeps by default (fs.inotify.max_queued_events)
_SYSCTLS: Final = {
    errno.EMFILE: "fs.inotify.max_user_instances",
    errno.ENOSPC: "fs.inotify.max_user_watches",
    errno.ENFILE: "fs.file-max",
}


class Hint(msgspec.Struct, frozen=True):
    """Something happened to `name` ("" for the folder itself) below the watch `label`. `mask`: all IN_ bits seen."""

    label: str
    name: str
    mask: int

    @property
    def gone(self) -> bool:
        """The watched folder was deleted, moved or unmounted: add it again."""
        return self.name == "" and bool(self.mask & _GONE)


class Overflow(Enum):
    """The kernel's queue was full (or inotify went away): anything may have changed."""

    OVERFLOW = "overflow"


OVERFLOW: Final = Overflow.OVERFLOW
Hints = frozenset[Hint]


class InotifyUnavailable(AgentqError):
    """No inotify, or no further watch. `sysctl` names the limit that was reached, where one was."""

    code = "inotify_unavailable"


class Watcher(Protocol):
    """What loops ask for hints: `Inotify`, or `NoInotify` where there is none."""

    def add(self, path: str, mask: int, label: str) -> None: ...
    def remove(self, label: str) -> None: ...
    async def wait(self, timeout_s: float | None) -> Hints | Overflow: ...
    def close(self) -> None: ...


class NoInotify:
    """No hints at all: every `wait` lasts as long as it may, and the slow rescan does the work."""

    def add(self, path: str, mask: int, label: str) -> None:
        """Accepted and of no effect."""

    def remove(self, label: str) -> None:
        """Of no effect."""

    async def wait(self, timeout_s: float | None) -> Hints | Overflow:
        await asyncio.sleep(3600.0 if timeout_s is None else timeout_s)
        return frozenset()

    def close(self) -> None:
        """Nothing to close."""


class Inotify:
    """One inotify instance with watches by label. Raises InotifyUnavailable if the kernel gives none."""

    def __init__(self) -> None:
        if inotify_simple._libc is None:  # noqa: SLF001 - its own way runs ldconfig and gcc: tens of milliseconds
            inotify_simple._libc = ctypes.CDLL(None, use_errno=True)  # noqa: SLF001
        self._labels: dict[int, str] = {}
        self._watches: dict[str, int] = {}
        self._pending: dict[tuple[str, str], int] = {}
        self._lost = False
        self._waiter: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = (
            None  # the one that reads for us, from the first wait on
        )
        try:
            self._inotify: inotify_simple.INotify | None = inotify_simple.INotify(nonblocking=True)
        except OSError as problem:
            raise _unavailable("inotify_init", problem) from problem

    @property
    def available(self) -> bool:
        """False once inotify was taken away; `wait` then gives no hints."""
        return self._inotify is not None

    def add(self, path: str, mask: int, label: str) -> None:
        """Watch `path` under `label`; an older watch of that label is replaced.

        Raises InotifyUnavailable (the limit is named), or OSError if there is no such path.
        """
        if self._inotify is None:
            return
        try:
            watch = self._inotify.add_watch(path, mask)
        except OSError as problem:
            if problem.errno in _SYSCTLS or problem.errno == errno.EBADF:
                raise _unavailable(f"inotify_add_watch {path}", problem) from problem
            raise OSError(problem.errno, problem.strerror, path) from problem
        old = self._watches.get(label)
        if old is not None and old != watch:
            self._forget(old)
        self._watches[label] = watch
        self._labels[watch] = label

    def remove(self, label: str) -> None:
        """Watch no longer. Unknown labels are no error (the folder may have gone before)."""
        watch = self._watches.get(label)
        if watch is not None:
            self._forget(watch)

    async def wait(self, timeout_s: float | None) -> Hints | Overflow:
        """What happened since the last call; empty after `timeout_s` without anything. One waiter at a time."""
        assert self._waiter is None, "two loops wait for the same inotify"
        if self._loop is None and self._inotify is not None:
            self._begin(asyncio.get_running_loop())
        if not (self._pending or self._lost):
            if self._inotify is None:
                return await NoInotify().wait(timeout_s)
            await self._wait_for_any(timeout_s)
        return self._take()

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read from now on, whenever there is something."""
        assert self._inotify is not None
        self._read()
        if self._inotify is not None:
            loop.add_reader(self._inotify.fileno(), self._read)
            self._loop = loop

    async def _wait_for_any(self, timeout_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None if timeout_s is None else loop.call_later(timeout_s, _wake, self._waiter)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _take(self) -> Hints | Overflow:
        if self._lost:
            self._lost = False
            self._pending.clear()
            return OVERFLOW
        taken, self._pending = self._pending, {}
        return frozenset(Hint(label, name, mask) for (label, name), mask in taken.items())

    def close(self) -> None:
        """Give everything back. May be called twice."""
        if self._inotify is not None:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(self._inotify.fileno())
            with contextlib.suppress(OSError):
                self._inotify.close()
        self._inotify = None
        self._labels.clear()
        self._watches.clear()

    def _forget(self, watch: int) -> None:
        label = self._labels.pop(watch, None)
        if label is not None and self._watches.get(label) == watch:
            del self._watches[label]
        if self._inotify is not None:
            with contextlib.suppress(OSError):  # the kernel has dropped it already
                self._inotify.rm_watch(watch)

    def _read(self) -> None:
        """What the kernel has for us, kept until the next `wait`; whoever waits is woken."""
        if self._inotify is None:
            return
        try:
            events = self._inotify.read(timeout=0)
        except BlockingIOError:
            return
        except (OSError, ValueError):  # the descriptor was taken from us: from now on only rescans
            self.close()
            self._lost = True
            events = []
        for event in events:
            if event.mask & flags.Q_OVERFLOW:
                self._lost = True
                continue
            label = self._labels.get(event.wd)
            if label is None:
                continue
            if event.mask & flags.IGNORED:
                self._forget(event.wd)
            key = (label, event.name)
            self._pending[key] = self._pending.get(key, 0) | event.mask
        if len(self._pending) > _PENDING_MAX:
            self._lost = True
            self._pending.clear()
        if self._waiter is not None and (self._pending or self._lost):
            _wake(self._waiter)


def _wake(readable: asyncio.Future[None]) -> None:
    if not readable.done():
        readable.set_result(None)


def _unavailable(what: str, problem: OSError) -> InotifyUnavailable:
    sysctl = _SYSCTLS.get(problem.errno or 0)
    hint = f"; raise the sysctl {sysctl}" if sysctl else ""
    if problem.errno == errno.EMFILE:
        hint += " (or the limit of open files, ulimit -n)"
    reason = os.strerror(problem.errno or 0)
    return InotifyUnavailable(
        f"{what}: {reason}{hint}; until then the slow rescan does the work", sysctl=sysctl
    )
