"""What is old enough goes: finished tasks with their folders, delivered rows, the prefix of the event chain. Bounded steps.

Invariants:
1. Nothing goes that is active, undelivered, held, dead (a person drops those) or, before `retention.unpulled`, unpulled.
2. The event chain loses a prefix only; a checkpoint (seq, hash) says from where `audit verify` starts.
3. A file in blobs/ goes only if no entry names it, nor ever can: after the commit that took its entry away; or if it lay there at
   the start, before anything was handed over. (That one a day later: a person may put an older journal back.)
4. Numbers (seq) are never used again: their highest values are kept in meta.
5. A task's folder has lost its name when its id is free again (`storage.setaside`): the id's next task finds nothing of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from typing import Final

import msgspec

from agentqd.core.limits import BLOB_LEFT_OVER_KEPT_S, CONFLICTS_KEPT_MAX
from agentqd.core.resolve import resolve
from agentqd.core.task import read_task
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.storage import blobs, outbox, setaside
from agentqd.storage import tasks as store
from agentqd.storage.transaction import Transaction

US: Final = 1_000_000
_EVERY_S: Final = 60.0
_STEP: Final = 200
_EVENTS_STEP: Final = 5000


class _NotSetAside(Exception):
    """That folders were moved cannot be made durable: their tasks stay, and are tried again a minute later."""


class _Removed(msgspec.Struct):
    """By one unit: what goes from the disk once it is durable."""

    count: int = 0
    folders: list[str] = []
    copies: list[str] = []


class Retention:
    def __init__(self, box: Box) -> None:
        self.box = box
        self._found: list[str] = []  # names in blobs/; from the first look on: those that no entry has
        self._aside: list[str] = []  # folders of tasks that the journal no longer knows

    async def look(self) -> None:
        """Before anything is handed over or begun: what lies in blobs/ now and is named by no entry never will be; what was set
        aside and not forgotten goes back. Raises JournalError."""
        await self._look_aside()
        found = await asyncio.to_thread(blobs.names_of, self._blobs)
        named = await self.box.journal.read(outbox.all_blobs) if found else set()
        self._found = [name for name in found if name not in named]

    async def run(self) -> None:
        """Until cancelled. Raises JournalError."""
        while True:
            await self._remove_left_over()
            aside, self._aside = self._aside, []
            await self._work(setaside.remove, aside)
            for _ in range(int(_EVERY_S)):
                self.box.beat("retention")
                await asyncio.sleep(1.0)
            while await self._step():
                self.box.beat("retention")
                await asyncio.sleep(0.05)

    async def _look_aside(self) -> None:
        try:
            left = await asyncio.to_thread(setaside.left_over, self._aside_folder)
            kept = (
                await self.box.journal.read(lambda c: store.known_seqs(c, left.values())) if left else set()
            )
            back = [path for path, seq in left.items() if seq in kept]
            await asyncio.to_thread(setaside.put_back, self.box.folders.tasks, back)
            self._aside = [path for path, seq in left.items() if seq not in kept]
        except OSError as problem:  # it is found again at the next start, and must not hinder this one
            self.box.log.error("task_folders_set_aside", folder=self._aside_folder, error=str(problem))

    async def _work(self, remove: Callable[[list[str]], None], paths: list[str]) -> None:
        """In a thread: a folder may hold a million files."""
        loop = asyncio.get_running_loop()
        await self.box.working("retention", loop.run_in_executor(None, remove, paths))

    @property
    def _aside_folder(self) -> str:
        return f"{self.box.folders.state}/.removed"

    @property
    def _blobs(self) -> str:
        return f"{self.box.folders.state}/blobs"

    async def _remove_left_over(self) -> None:
        """Copies that a crash, or a commit of unknown outcome, has left without an entry."""
        if not self._found:
            return
        old_s = self.box.clock.now_us() / US - BLOB_LEFT_OVER_KEPT_S
        copies, self._found = await asyncio.to_thread(blobs.remove_left_over, self._blobs, self._found, old_s)
        if copies:
            self.box.log.info("blobs_left_over_removed", count=copies)

    async def _step(self) -> bool:
        """One bounded piece of work; True if there is more."""
        seqs = await self.box.journal.read(self._old_tasks)
        removed = _Removed()
        if seqs:
            try:
                removed = await self.box.journal.commit(lambda tx: self._remove_tasks(tx, seqs))
            except _NotSetAside as problem:
                self.box.log.error("retention_failed", error=str(problem))
                return False
            await self._work(setaside.remove, removed.folders)
            await self._work(blobs.remove, removed.copies)
        more = await self.box.journal.commit(
            lambda tx: _EVENTS_STEP in (self._remove_events(tx), self._remove_conflicts(tx))
        )
        return (len(seqs) == _STEP and removed.count > 0) or more

    def _old_tasks(self, connection: sqlite3.Connection) -> list[int]:
        retention, now = self.box.settings.retention, self.box.clock.now_us()
        oldest = connection.execute("SELECT min(acknowledged) FROM consumers").fetchone()[0]
        rows = connection.execute(
            "SELECT t.seq, t.finished_at FROM tasks t WHERE t.state = 'finished' AND t.finished_at < ?"
            " AND NOT EXISTS (SELECT 1 FROM entries e JOIN outbox o ON o.entry_seq = e.seq"
            "   WHERE e.task_seq = t.seq AND o.state NOT IN ('delivered', 'dropped'))"
            " AND NOT EXISTS (SELECT 1 FROM dependencies d JOIN tasks w ON w.seq = d.task_seq"
            "   WHERE d.on_seq = t.seq AND w.state != 'finished')"
            " ORDER BY t.finished_at LIMIT ?",
            (now - int(retention.tasks * US), _STEP),
        ).fetchall()
        rows = [(seq, at) for seq, at in rows if not self._dedup_holds(connection, seq, at, now)]
        if oldest is None:
            return [seq for seq, _ in rows]
        unpulled_limit = now - int(retention.unpulled * US)
        return [seq for seq, at in rows if at < unpulled_limit or not self._unpulled(connection, seq, oldest)]

    def _dedup_holds(self, connection: sqlite3.Connection, seq: int, finished_at: int, now: int) -> bool:
        """A task answers replays of its id for its dedup_ttl, however short `retention.tasks` is."""
        task = store.get(connection, seq)
        request = read_task(store.spec_of(connection, seq)[0])
        return now < finished_at + int(
            resolve(request, task.queue, task.runner, self.box.settings).dedup_ttl_s * US
        )

    @staticmethod
    def _unpulled(connection: sqlite3.Connection, seq: int, oldest: int) -> bool:
        row = connection.execute(
            "SELECT 1 FROM entries e JOIN outbox o ON o.entry_seq = e.seq"
            " WHERE e.task_seq = ? AND o.sink = 'completions' AND o.position > ? LIMIT 1",
            (seq, oldest),
        ).fetchone()
        return row is not None

    def _remove_tasks(self, tx: Transaction, seqs: list[int]) -> _Removed:
        """A unit. An I/O error of a folder is not one of the journal: nothing is removed then. Raises _NotSetAside."""
        removed = _Removed()
        try:
            self._forget_tasks(tx, seqs, removed)
            if removed.folders:
                setaside.make_durable(self.box.folders.tasks, self._aside_folder)
        except BaseException as error:
            with contextlib.suppress(OSError):  # else the next start does it
                setaside.put_back(self.box.folders.tasks, removed.folders)
            if isinstance(error, OSError):
                raise _NotSetAside(f"{self._aside_folder}: {error}") from error
            raise
        return removed

    def _forget_tasks(self, tx: Transaction, seqs: list[int], removed: _Removed) -> None:
        oldest = tx.one("SELECT min(acknowledged) FROM consumers")[0]
        unpulled = 0
        self._keep_numbers(tx)
        for seq in seqs:
            row = tx.one(
                "SELECT id, queue, state, result FROM tasks WHERE seq = ? AND state = 'finished'", (seq,)
            )
            if row is None:
                continue
            try:
                folder = setaside.set_aside(self.box.folders.tasks, self._aside_folder, seq, row[0])
            except OSError as problem:
                self.box.log.error("task_folder_stuck", task=row[0], error=str(problem))
                continue
            removed.folders += [] if folder is None else [folder]
            if oldest is not None and self._unpulled(tx.connection, seq, oldest):
                unpulled += 1
            copies = outbox.blobs_of_task(tx, seq)
            for sink, state, n in tx.execute(
                "SELECT o.sink, o.state, count(*) FROM outbox o JOIN entries e ON e.seq = o.entry_seq"
                " WHERE e.task_seq = ? GROUP BY o.sink, o.state",
                (seq,),
            ).fetchall():
                tx.count_outbox(sink, state, -n)
            for table in ("outbox", "tries", "attachments"):
                tx.execute(
                    f"DELETE FROM {table} WHERE entry_seq IN (SELECT seq FROM entries WHERE task_seq = ?)",  # noqa: S608 - fixed names
                    (seq,),
                )
            for table in ("entries", "attempts", "intents", "dependencies"):
                tx.execute(f"DELETE FROM {table} WHERE task_seq = ?", (seq,))  # noqa: S608 - fixed names
            tx.execute("DELETE FROM ids WHERE newest = ?", (row[0],))
            tx.execute("DELETE FROM tasks WHERE seq = ?", (seq,))
            tx.count_task(row[1], row[2], row[3], -1)
            # a copy belongs to one entry; those from before schema 7 may belong to several
            others = "SELECT 1 FROM entries WHERE blob = ?1 UNION ALL SELECT 1 FROM attachments WHERE blob = ?1 LIMIT 1"
            removed.copies += [path for path in copies if tx.one(others, (path,)) is None]
            removed.count += 1
        if unpulled:
            message = f"{unpulled} results that a consumer has not pulled are past retention.unpulled and were removed"
            alert(tx, self.box, "unpulled_removed", message, key=str(tx.now_us))
        if removed.count:
            tx.event(None, "tasks_removed", count=removed.count)

    @staticmethod
    def _keep_numbers(tx: Transaction) -> None:
        for key, value in (
            ("task_seq", tx.numbers.task),
            ("entry_seq", tx.numbers.entry),
            ("event_seq", tx.numbers.event),
        ):
            tx.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
        for sink, position in tx.execute(
            "SELECT sink, max(position) FROM outbox WHERE position IS NOT NULL GROUP BY sink"
        ).fetchall():
            tx.execute(
                "INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = max(value, excluded.value)",
                (f"position:{sink}", position),
            )

    def _remove_conflicts(self, tx: Transaction) -> int:
        """Conflicts seen: as long as events, and the newest CONFLICTS_KEPT_MAX (a program may ask again every second)."""
        limit = tx.now_us - int(self.box.settings.retention.events * US)
        newest = tx.one("SELECT coalesce(max(seq), 0) FROM conflicts")[0]
        sql = "DELETE FROM conflicts WHERE seq IN (SELECT seq FROM conflicts ORDER BY seq LIMIT ?) AND (at < ? OR seq <= ?)"
        return int(tx.execute(sql, (_EVENTS_STEP, limit, newest - CONFLICTS_KEPT_MAX)).rowcount)

    def _remove_events(self, tx: Transaction) -> int:
        """Cut a prefix off the chain, and remember where it now begins."""
        limit = tx.now_us - int(self.box.settings.retention.events * US)
        row = tx.one("SELECT seq FROM events ORDER BY seq LIMIT 1")
        if row is None:
            return 0
        last = tx.one(
            "SELECT seq, hash FROM (SELECT seq, at, hash FROM events ORDER BY seq LIMIT ?) WHERE at < ? ORDER BY seq DESC LIMIT 1",
            (_EVENTS_STEP, limit),
        )
        if last is None:
            return 0
        tx.execute("INSERT OR REPLACE INTO meta VALUES ('chain_checkpoint_seq', ?)", (last[0],))
        tx.execute("INSERT OR REPLACE INTO meta VALUES ('chain_checkpoint_hash', ?)", (last[1],))
        removed = tx.execute("DELETE FROM events WHERE seq <= ?", (last[0],)).rowcount
        return int(removed)
