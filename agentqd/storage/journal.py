"""The journal: SQLite, one connection that writes and checkpoints, on one thread; group commit.

Invariants:
1. `commit(unit)` returns only after the unit's transaction is durable (WAL, synchronous=FULL).
2. Units that arrive while a commit is under way share the next one; each has a savepoint of its own, so that one
   unit's refusal undoes nothing of another.
3. After any database error the outcome is unknown: everyone who waits gets JournalError, the journal takes nothing
   more, and its owner opens a new one and reconciles. A failed COMMIT is never retried.
4. Every transaction checks the daemon's epoch: a daemon that has been superseded can write nothing.
5. Reads use a second connection that can neither write nor checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar, cast

from agentqd.core import limits
from agentqd.core.errors import JournalError
from agentqd.storage.connection import connect, connect_reader, migrate, warm_log
from agentqd.storage.transaction import Numbers, Transaction

T = TypeVar("T")
Unit = Callable[[Transaction], Any]

_CHECKPOINT_IDLE_S: Final = 0.25
_CHECKPOINT_IDLE_CHANGES: Final = 500
_CHECKPOINT_FRAMES: Final = 1800  # the log then starts over within what warm_log has made it grow to
_WAL_TRUNCATE_BYTES: Final = 64 * limits.MIB
LAZY_S: Final = 0.004


def _nothing(tx: Transaction) -> None:
    """Only wakes the journal's thread."""


_ONLY_LAZY: Final[tuple[Unit, asyncio.Future[Any]]] = (_nothing, cast("asyncio.Future[Any]", None))


class Journal:
    """Opened by `open`, closed by `close`; between them `commit` and `read` from the loop's thread."""

    def __init__(self, path: str, now_us: Callable[[], int]) -> None:
        self.path = path
        self.epoch = 0
        self.before_commit: Callable[[Transaction], None] | None = (
            None  # scheduling: claims ride on every commit
        )
        self.failed: asyncio.Future[None]  # raises JournalError when the journal is no more
        self.asked = 0  # units that somebody waits for, handed over so far
        self.commits = 0
        self.units = 0
        self._now_us = now_us
        self._inbox: queue.SimpleQueue[tuple[Unit, asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._lazy: deque[tuple[Unit, asyncio.Future[Any]]] = (
            deque()
        )  # ride on the next commit, or make one soon
        self._lazy_timer: asyncio.TimerHandle | None = None
        self._reads: queue.SimpleQueue[tuple[Callable[[sqlite3.Connection], Any], asyncio.Future[Any]] | None]
        self._reads = queue.SimpleQueue()
        self._error: JournalError | None = None
        self._threads: list[threading.Thread] = []
        self._changes_at_checkpoint = 0
        self._index = -1
        self._committed_s = 0.0

    async def open(self) -> None:
        """Open, migrate, take the next epoch. Raises StateFolderError, SchemaTooNew or JournalError."""
        self._loop = asyncio.get_running_loop()
        self.failed = self._loop.create_future()
        self.failed.add_done_callback(lambda future: future.cancelled() or future.exception())
        try:
            await asyncio.to_thread(self._open)
        except BaseException:
            self._close_connections()
            raise
        for target, name in ((self._write_loop, "journal"), (self._read_loop, "journal-reads")):
            thread = threading.Thread(target=target, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _open(self) -> None:
        try:
            os.close(
                os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            )  # -wal and -shm take its mode
            self._connection = connect(self.path)
            migrate(self._connection, self.path)
            self._connection.execute("BEGIN IMMEDIATE")
            row = self._connection.execute("SELECT value FROM meta WHERE key='epoch'").fetchone()
            self.epoch = (int(row[0]) if row else 0) + 1
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES ('epoch', ?)", (self.epoch,))
            self._connection.execute("COMMIT")
            warm_log(self._connection)
            self._numbers = Numbers.load(self._connection)
            self._reader = connect_reader(self.path)
        except (sqlite3.Error, OSError) as error:
            raise JournalError(f"{self.path}: cannot be opened: {error}", path=self.path) from error

    async def close(self) -> None:
        """Commit what was asked for before, then close. Safe after a failure."""
        self._inbox.put(None)
        self._reads.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self._threads.clear()
        if self._index >= 0:
            os.close(self._index)
            self._index = -1
        self._close_connections()

    def _close_connections(self) -> None:
        for connection in (getattr(self, "_reader", None), getattr(self, "_connection", None)):
            if connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    connection.close()

    def submit(self, unit: Callable[[Transaction], T]) -> asyncio.Future[T]:
        """Hand over a unit; the future is done when it is durable (or refused, or the journal failed)."""
        self.asked += 1
        future: asyncio.Future[T] = self._loop.create_future()
        if self._error is not None:
            future.set_exception(self._error)
        else:
            self._inbox.put((unit, future))
        return future

    def submit_lazily(self, unit: Callable[[Transaction], T], within_s: float = LAZY_S) -> asyncio.Future[T]:
        """The same for what nobody waits for: it shares the next commit that is made anyway, or one within that time."""
        future: asyncio.Future[T] = self._loop.create_future()
        if self._error is not None:
            future.set_exception(self._error)
            return future
        self._lazy.append((unit, future))
        at_s = self._loop.time() + within_s
        if self._lazy_timer is None or at_s < self._lazy_timer.when():
            if self._lazy_timer is not None:
                self._lazy_timer.cancel()
            self._lazy_timer = self._loop.call_at(at_s, self._flush_lazy)
        return future

    def _flush_lazy(self) -> None:
        self._lazy_timer = None
        if self._lazy:
            self._inbox.put(_ONLY_LAZY)

    async def commit(self, unit: Callable[[Transaction], T]) -> T:
        """Run `unit` in a transaction and return its value once it is durable.

        Raises what the unit raised (its changes are undone), or JournalError: outcome unknown.
        """
        return await self.submit(unit)

    async def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Run a read-only query on the reading connection. Raises JournalError."""
        future: asyncio.Future[T] = self._loop.create_future()
        if self._error is not None:
            raise self._error
        self._reads.put((query, future))
        return await future

    # The writing thread.

    def _write_loop(self) -> None:
        closing = False
        while not closing:
            batch, closing = self._take()
            if batch:
                self._commit_batch(batch)
            elif (
                not closing
                and self._inbox.empty()
                and time.monotonic() - self._committed_s >= _CHECKPOINT_IDLE_S
            ):
                self._checkpoint_when_idle()

    def _take(self) -> tuple[list[tuple[Unit, asyncio.Future[Any]]], bool]:
        """Everything that waits, at most one batch; waits for the first."""
        batch: list[tuple[Unit, asyncio.Future[Any]]] = []
        try:
            item = self._inbox.get(timeout=self._idle_timeout())
            while True:
                if item is None:
                    return self._with_lazy(batch), True
                if item is not _ONLY_LAZY:
                    batch.append(item)
                if len(batch) >= limits.JOURNAL_BATCH_UNITS_MAX:
                    return self._with_lazy(batch), False
                item = self._inbox.get_nowait()
        except queue.Empty:
            return self._with_lazy(batch), False

    def _with_lazy(
        self, batch: list[tuple[Unit, asyncio.Future[Any]]]
    ) -> list[tuple[Unit, asyncio.Future[Any]]]:
        """The lazy units that wait come first: they are older."""
        lazy: list[tuple[Unit, asyncio.Future[Any]]] = []
        while self._lazy and len(lazy) < limits.JOURNAL_BATCH_UNITS_MAX:
            lazy.append(self._lazy.popleft())
        return lazy + batch

    def _idle_timeout(self) -> float | None:
        changed = self._connection.total_changes - self._changes_at_checkpoint
        return _CHECKPOINT_IDLE_S if changed >= _CHECKPOINT_IDLE_CHANGES and self._error is None else None

    def _commit_batch(self, batch: list[tuple[Unit, asyncio.Future[Any]]]) -> None:
        outcomes: list[tuple[asyncio.Future[Any], Any, BaseException | None]] = []
        after: list[Callable[[], None]] = []
        later: list[Callable[[], None]] = []
        if self._error is not None:
            self._post([(future, None, self._error) for _, future in batch])
            return
        try:
            transaction = self._begin()
            for unit, future in batch:
                outcomes.append((future, *self._run_unit(transaction, unit)))
            if self.before_commit is not None:
                self.before_commit(transaction)
            after, later = transaction.flush()
            if transaction.preparations:
                self._loop.call_soon_threadsafe(self._act, transaction.preparations)
            self._connection.execute("COMMIT")
            self._numbers = transaction.numbers
        except (sqlite3.Error, JournalError, MemoryError, OSError) as error:
            self._fail(error)
            self._post([(future, None, self._error) for _, future in batch])
            return
        except BaseException as error:  # a bug in a hook: nothing was committed, the daemon must not go on
            self._fail(error)
            self._post([(future, None, self._error) for _, future in batch])
            raise
        self._committed_s = time.monotonic()
        self.commits += 1
        self.units += len(batch)
        self._post(outcomes, after, later)
        self._checkpoint_when_long()

    def _begin(self) -> Transaction:
        self._connection.execute("BEGIN IMMEDIATE")
        row = self._connection.execute("SELECT value FROM meta WHERE key='epoch'").fetchone()
        if row is None or row[0] != self.epoch:
            raise JournalError(f"another agentqd has taken over this state folder (epoch {row and row[0]})")
        return Transaction(self._connection, self._numbers.copy(), self._now_us())

    def _run_unit(self, transaction: Transaction, unit: Unit) -> tuple[Any, BaseException | None]:
        mark = transaction.mark()
        self._connection.execute("SAVEPOINT unit")
        try:
            value = unit(transaction)
        except sqlite3.IntegrityError as error:  # a bug in the unit; the connection is sound
            refused: BaseException = error
        except (sqlite3.Error, MemoryError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - it goes to whoever awaits the unit
            refused = error
        else:
            self._connection.execute("RELEASE unit")
            return value, None
        self._connection.execute("ROLLBACK TO unit")
        self._connection.execute("RELEASE unit")
        transaction.return_to(mark)
        return None, refused

    def _post(
        self,
        outcomes: list[tuple[asyncio.Future[Any], Any, BaseException | None]],
        after: Sequence[Callable[[], None]] = (),
        later: Sequence[Callable[[], None]] = (),
    ) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits
            self._loop.call_soon_threadsafe(self._deliver, outcomes, after, later)

    def _deliver(
        self,
        outcomes: list[tuple[asyncio.Future[Any], Any, BaseException | None]],
        after: Sequence[Callable[[], None]],
        later: Sequence[Callable[[], None]],
    ) -> None:
        """On the loop's thread: first what the commit wants done (in order), then whoever waited, then what has time."""
        self._act(after)
        for future, value, error_ in outcomes:
            if future.done():
                continue
            if error_ is None:
                future.set_result(value)
            else:
                future.set_exception(error_)
        self._act(later)

    def _act(self, actions: Sequence[Callable[[], None]]) -> None:
        try:
            for action in actions:
                action()
        except Exception as error:  # noqa: BLE001 - a bug: what was recorded was not acted on; a restart finds it
            _fail_future(self.failed, error)

    def _fail(self, error: BaseException) -> None:
        """Outcome unknown: nothing more is taken, whoever owns the journal is told."""
        self._error = JournalError(
            f"{self.path}: {type(error).__name__}: {error}; nothing of this transaction is acknowledged",
            path=self.path,
        )
        self._error.__cause__ = error
        with contextlib.suppress(sqlite3.Error):
            self._connection.rollback()
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_fail_future, self.failed, self._error)

    def _log_frames(self) -> int:
        """Frames now in the log: mxFrame, at byte 16 of the wal-index (sqlite.org/walformat.html)."""
        if self._index < 0:
            self._index = os.open(self.path + "-shm", os.O_RDONLY | os.O_CLOEXEC)
        return int.from_bytes(os.pread(self._index, 4, 16), sys.byteorder)

    def _checkpoint_when_long(self) -> None:
        try:
            frames = self._log_frames()
        except OSError as error:  # no descriptor left, say: this thread must not die with units waiting
            self._fail(error)
            return
        if frames > _CHECKPOINT_FRAMES:
            self._checkpoint()

    def _checkpoint_when_idle(self) -> None:
        if self._error is None:
            self._checkpoint()

    def _checkpoint(self) -> None:
        """Move the log into the database. A failure here loses nothing, but is an I/O error like any other."""
        try:
            size = os.stat(self.path + "-wal").st_size
            mode = "TRUNCATE" if size > _WAL_TRUNCATE_BYTES else "PASSIVE"
            self._connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
            self._changes_at_checkpoint = self._connection.total_changes
        except (sqlite3.Error, OSError) as error:
            self._fail(error)

    # The reading thread.

    def _read_loop(self) -> None:
        while (item := self._reads.get()) is not None:
            query, future = item
            value: Any = None
            failure: BaseException | None = None
            try:
                value = query(self._reader)
            except sqlite3.Error as error:
                failure = JournalError(f"{self.path}: reading failed: {error}")
            except Exception as error:  # noqa: BLE001 - it goes to whoever awaits the read
                failure = error
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deliver, [(future, value, failure)], (), ())


def _fail_future(future: asyncio.Future[None], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
