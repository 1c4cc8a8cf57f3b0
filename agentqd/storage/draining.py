"""A person's word that this box drains: kept in the journal, so that only a person ends it, and no crash, restart or upgrade."""

from __future__ import annotations

import sqlite3
from typing import Final

from agentqd.storage.transaction import Transaction

Source = Transaction | sqlite3.Connection
_KEY: Final = "draining"


def since_us(source: Source) -> int | None:
    """Since when it drains; None: it does not."""
    row = source.execute("SELECT value FROM meta WHERE key = ?", (_KEY,)).fetchone()
    return None if row is None else int(row[0])


def begin(tx: Transaction) -> int:
    """Since when; the first word counts, another one changes nothing."""
    since = since_us(tx)
    if since is None:
        since = tx.now_us
        tx.execute("INSERT INTO meta VALUES (?, ?)", (_KEY, since))
        tx.event(None, "draining_begun")
    return since


def end(tx: Transaction) -> None:
    if since_us(tx) is not None:
        tx.execute("DELETE FROM meta WHERE key = ?", (_KEY,))
        tx.event(None, "draining_ended")
