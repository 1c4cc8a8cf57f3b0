"""Write claims of processes outside of any task. Their paths stand in the line of all claims (`intents`), under negative seqs."""

from __future__ import annotations

import sqlite3
from typing import Final

import msgspec

from agentqd.core.settings import Conflict as Policy
from agentqd.storage import intents
from agentqd.storage.transaction import Transaction

Source = Transaction | sqlite3.Connection
_COLUMNS: Final = "seq, id, name, uid, user, pid, pid_start, boot_id, policy, asked_at, held_at"
_ALL: Final = f"SELECT {_COLUMNS} FROM outside_claims ORDER BY seq"  # noqa: S608 - fixed names
_BY_ID: Final = f"SELECT {_COLUMNS} FROM outside_claims WHERE id = ?"  # noqa: S608 - fixed names
_BY_SEQ: Final = f"SELECT {_COLUMNS} FROM outside_claims WHERE seq = ?"  # noqa: S608 - fixed names
_INSERT: Final = (
    "INSERT INTO outside_claims (id, name, uid, user, pid, pid_start, boot_id, policy, asked_at, held_at)"
    " VALUES (?,?,?,?,?,?,?,?,?,?)"
)


class Holder(msgspec.Struct, frozen=True):
    """The process that a claim is tied to."""

    uid: int
    user: str
    pid: int
    pid_start: int
    boot_id: str


class OutsideClaim(msgspec.Struct, frozen=True):
    seq: int
    id: str
    name: str
    holder: Holder
    policy: Policy
    asked_at: int
    held_at: int | None

    @property
    def held(self) -> bool:
        return self.held_at is not None

    @property
    def in_line(self) -> int:
        """Its seq among the claims of tasks."""
        return -self.seq


def all_claims(source: Source) -> list[OutsideClaim]:
    """Oldest first."""
    return [_claim(row) for row in source.execute(_ALL).fetchall()]


def find(source: Source, claim_id: str) -> OutsideClaim | None:
    row = source.execute(_BY_ID, (claim_id,)).fetchone()
    return None if row is None else _claim(row)


def get(source: Source, seq: int) -> OutsideClaim | None:
    row = source.execute(_BY_SEQ, (seq,)).fetchone()
    return None if row is None else _claim(row)


def paths_of(source: Source, claim: OutsideClaim) -> list[tuple[str, str]]:
    """(resolved, as given)."""
    sql = "SELECT path, given FROM intents WHERE task_seq = ? ORDER BY path"
    return [(path, given) for path, given in source.execute(sql, (claim.in_line,))]


def count(source: Source, uid: int) -> tuple[int, int]:
    """(all, this user's)."""
    sql = "SELECT count(*), count(CASE WHEN uid = ? THEN 1 END) FROM outside_claims"
    total, own = source.execute(sql, (uid,)).fetchone()
    return int(total), int(own)


def add(
    tx: Transaction,
    claim_id: str,
    name: str,
    holder: Holder,
    policy: Policy,
    paths: list[tuple[str, str]],
    *,
    held: bool,
) -> OutsideClaim:
    """All of its paths at once, at the end of the line."""
    at = tx.now_us if held else None
    values = (claim_id, name, holder.uid, holder.user, holder.pid, holder.pid_start, holder.boot_id)
    seq = tx.execute(_INSERT, (*values, policy, tx.now_us, at)).lastrowid
    assert seq is not None
    claim = OutsideClaim(seq, claim_id, name, holder, policy, tx.now_us, at)
    intents.claim(tx, claim.in_line, paths, policy)
    return claim


def before(source: Source, claim: OutsideClaim) -> intents.Conflict | None:
    """The newest claim that it has to wait for."""
    mine = intents.claim_of(source, claim.in_line)
    return None if mine is None else intents.newest_before(source, mine)


def set_held(tx: Transaction, seq: int) -> None:
    tx.execute("UPDATE outside_claims SET held_at = ? WHERE seq = ?", (tx.now_us, seq))


def remove(tx: Transaction, claim: OutsideClaim) -> bool:
    """False: it was gone already."""
    intents.release(tx, claim.in_line)
    return tx.execute("DELETE FROM outside_claims WHERE seq = ?", (claim.seq,)).rowcount > 0


def _claim(row: tuple[int, str, str, int, str, int, int, str, Policy, int, int | None]) -> OutsideClaim:
    return OutsideClaim(row[0], row[1], row[2], Holder(*row[3:8]), row[8], row[9], row[10])
