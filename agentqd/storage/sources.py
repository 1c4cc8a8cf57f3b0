"""The positions of the queue file's sources in the journal; moved only together with the tasks read up to them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Final

from agentqd.storage.queuefile import Position
from agentqd.storage.transaction import Transaction

_SELECT: Final = (
    "SELECT source, name, dev, ino, btime_ns, offset, digest, role, since FROM sources ORDER BY source"
)
_UPSERT: Final = (
    "INSERT OR REPLACE INTO sources (source, name, dev, ino, btime_ns, offset, digest, role, since)"
    " VALUES (?,?,?,?,?,?,?,?,?)"
)


def load(source: sqlite3.Connection | Transaction) -> list[Position]:
    return [Position(*row) for row in source.execute(_SELECT)]


def save(tx: Transaction, positions: Iterable[Position], dropped: Iterable[int]) -> None:
    for p in positions:
        row = (
            p.source,
            p.name,
            _signed(p.dev),
            _signed(p.ino),
            p.btime_ns,
            p.offset,
            p.digest,
            p.role,
            p.since_us,
        )
        tx.execute(_UPSERT, row)
    for number in dropped:
        tx.execute("DELETE FROM sources WHERE source = ?", (number,))


def _signed(number: int) -> int:
    """SQLite's integers are signed; an inode of 2^63 or more (some FUSE file systems) must not break intake."""
    assert number < 2**63, f"inode or device number {number} does not fit the journal"
    return number
