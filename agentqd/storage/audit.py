"""Checking the event chain: every hash worked out anew from the one before, in steps, while the daemon writes or offline.

What it shows: no event was changed, inserted, moved or removed after the first one kept (retention removes a prefix and
leaves a checkpoint, from which this starts). What it cannot show: that nothing was cut off the end; keep the last
hash somewhere else for that.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from typing import Any, Final
from urllib.parse import quote

import msgspec

from agentqd.core.errors import JournalError, StateFolderError
from agentqd.core.folders import Folders
from agentqd.storage.lock import take_lock
from agentqd.storage.transaction import event_hash

STEP_EVENTS: Final = 5000
_GENESIS: Final = bytes(32)
_STEP: Final = (
    "SELECT seq, at, task, event, data, hash FROM events WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?"
)
_CHECKPOINT: Final = (
    "SELECT key, value FROM meta WHERE key IN ('chain_checkpoint_seq', 'chain_checkpoint_hash')"
)
_LAST: Final = "SELECT max(seq) FROM events"


class Progress(msgspec.Struct):
    """How far the check has come."""

    last: int  # the newest seq when it began; later ones are not looked at
    seq: int = 0  # checked up to here
    head: bytes = _GENESIS
    events: int = 0
    first: int | None = None
    broken_at: int | None = None
    reason: str | None = None
    done: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.broken_at is None,
            "events": self.events,
            "first_seq": self.first,
            "last_seq": self.seq if self.events else None,
            "broken_at": self.broken_at,
            "reason": self.reason,
            "last_hash": self.head.hex() if self.events else None,
        }


def begin(connection: sqlite3.Connection) -> Progress:
    last = connection.execute(_LAST).fetchone()[0] or 0
    seq, head = _checkpoint(connection)
    return Progress(last=max(last, seq), seq=seq, head=head)


def _checkpoint(connection: sqlite3.Connection) -> tuple[int, bytes]:
    kept = dict(connection.execute(_CHECKPOINT).fetchall())
    return int(kept.get("chain_checkpoint_seq", 0)), bytes(kept.get("chain_checkpoint_hash", _GENESIS))


def step(connection: sqlite3.Connection, progress: Progress, most: int = STEP_EVENTS) -> Progress:
    """Check the next events; `done` once there are none left, or the chain is broken."""
    seq, head = _checkpoint(connection)
    if seq > progress.seq:  # retention has removed what was to be checked next
        progress.seq, progress.head = seq, head
        if progress.events == 0:
            progress.first = None
    rows = connection.execute(_STEP, (progress.seq, progress.last, most)).fetchall()
    for row_seq, at, task, event, data, kept in rows:
        if row_seq != progress.seq + 1:
            return _broken(progress, progress.seq + 1, f"event {progress.seq + 1} is missing")
        made = event_hash(progress.head, row_seq, at, task, event, data)
        if made != kept:
            return _broken(
                progress,
                row_seq,
                f"the hash of event {row_seq} does not match what it and the events before it say",
            )
        progress.seq, progress.head = row_seq, made
        progress.first = row_seq if progress.first is None else progress.first
        progress.events += 1
    progress.done = len(rows) < most
    if progress.done and progress.seq < progress.last:
        return _broken(progress, progress.seq + 1, f"event {progress.seq + 1} is missing")
    return progress


def _broken(progress: Progress, at: int, reason: str) -> Progress:
    progress.broken_at, progress.reason, progress.done = at, reason, True
    return progress


def verify_offline(state_dir: str) -> dict[str, Any]:
    """The whole check without a daemon, its lock held meanwhile. Raises StateFolderError (a daemon runs), JournalError."""
    folders = Folders(state_dir.rstrip("/") or "/", "")
    if not os.path.exists(folders.journal):
        raise StateFolderError(f"there is no journal in {folders.state}", path=folders.journal)
    lock = take_lock(folders.daemon_lock, "agentqd")
    try:
        uri = f"file:{quote(os.path.abspath(folders.journal))}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
            progress = begin(connection)
            while not progress.done:
                progress = step(connection, progress)
            return progress.as_json()
    except sqlite3.Error as error:
        raise JournalError(f"{folders.journal}: cannot be read: {error}", path=folders.journal) from error
    finally:
        os.close(lock)
