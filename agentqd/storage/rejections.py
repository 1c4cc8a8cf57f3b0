"""Under which id what was rejected came: a lookup by the id, however many rejections there are.

What was told of a rejection is an entry of no task (`loops.rejection` writes it); here is only the way to it. A task of the same id,
accepted before or after, comes first: ask here where there is none. The way goes with that task.
"""

from __future__ import annotations

import sqlite3
from typing import Any, Final

import msgspec

from agentqd.core.envelope import data_of
from agentqd.storage.transaction import Transaction

TOLD: Final = (
    "SELECT e.payload FROM rejected_ids r JOIN entries e ON e.seq = r.entry_seq WHERE r.id = ?"  # both by key
)


def remember(tx: Transaction, task_id: str, entry_seq: int) -> None:
    """The newest one counts."""
    tx.execute("INSERT OR REPLACE INTO rejected_ids (id, entry_seq) VALUES (?, ?)", (task_id, entry_seq))


def forget(tx: Transaction, task_id: str) -> None:
    tx.execute("DELETE FROM rejected_ids WHERE id = ?", (task_id,))


def find(source: Transaction | sqlite3.Connection, task_id: str) -> dict[str, Any] | None:
    """What was told of the newest rejection of this id: `reason`, `message`, `completed_at`, `submitted_at`, ..."""
    row = source.execute(TOLD, (task_id,)).fetchone()
    if row is None:
        return None
    data: dict[str, Any] = msgspec.json.decode(data_of(bytes(row[0])))
    return data
