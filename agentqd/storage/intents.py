"""The write-intent registry in the journal: one interface, so that a fleet may keep it elsewhere one day.

Promises:
1. A task's claim is made whole, under one place at the end of the line, and goes whole in the transaction of its end.
2. What overlaps a path is found through its `head` by index: exact, in the folders above, in the range below. The cost of a
   look grows with what does overlap (and with patterns under the same folder), never with the number of claims.
3. A claim that has lapsed keeps its place in the line, but nothing is found to overlap it (no `head`) until it is made again.
4. The claims of outside processes stand in the same line, under negative seqs (storage/outsideclaims.py).
5. A task that waits is noted with one claim before it, the newest: it needs no look before that one ends.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from agentqd.core.intents import at_or_above, below, head, overlap
from agentqd.core.limits import ANCESTORS_MAX
from agentqd.core.settings import Conflict as Policy
from agentqd.storage.transaction import Transaction

_AT: Final = "SELECT place, task_seq, path FROM intents WHERE head = ? AND place < ? ORDER BY place"
_BELOW: Final = "SELECT place, task_seq, path FROM intents WHERE head > ? AND head < ? AND place < ?"
_NEWEST_AT: Final = f"{_AT} DESC"
_NEWEST_BELOW: Final = f"{_BELOW} ORDER BY place DESC"
_HOLDER: Final = "SELECT id, name FROM tasks WHERE seq = ?"
_OUTSIDE_HOLDER: Final = "SELECT id, name FROM outside_claims WHERE seq = ?"
_OF: Final = "SELECT place, policy, path FROM intents WHERE task_seq = ?"
_INSERT: Final = (
    "INSERT OR IGNORE INTO intents (task_seq, path, given, policy, said, claimed_at, expires_at, place, head)"
    " VALUES (?,?,?,?,?,?,NULL,?,?)"
)
_INSERT_CONFLICT: Final = (
    "INSERT INTO conflicts (at, task_id, name, path, other_id, other_path, policy) VALUES (?,?,?,?,?,?,?)"
)
_ANCESTORS: Final = (
    "WITH RECURSIVE up (seq) AS (SELECT value FROM json_each(?)"
    " UNION SELECT d.on_seq FROM up JOIN dependencies d ON d.task_seq = up.seq)"
    " SELECT seq FROM up LIMIT ?"
)
_NO_END: Final = 2**62

Source = Transaction | sqlite3.Connection


class Conflict(msgspec.Struct, frozen=True):
    """`path` of the newcomer overlaps `other_path`, which the task `task_id` has claimed."""

    path: str
    task_seq: int
    task_id: str
    task: str
    other_path: str

    def who(self) -> str:
        """Who has claimed it, for people."""
        kind = "task" if self.task_seq > 0 else "the outside claim"
        return f"{kind} {self.task_id} ({self.task})"

    def as_json(self) -> dict[str, str]:
        return {"task_id": self.task_id, "task": self.task, "path": self.other_path}


class Claim(msgspec.Struct, frozen=True):
    """What one task holds, or waits for."""

    place: int
    policy: str
    paths: tuple[str, ...]


def conflicts_of(
    source: Source,
    paths: list[str],
    related: set[int] | frozenset[int] = frozenset(),
    limit: int | None = None,
) -> list[Conflict]:
    """Live claims that overlap `paths`, by place in the line; not those of `related` tasks (seqs). At most `limit` of a path's."""
    found: list[tuple[int, Conflict]] = []
    for path in paths:
        left = limit
        for place, seq, claimed in _overlapping(source, path):
            if seq in related:
                continue
            found.append((place, _conflict(source, path, seq, claimed)))
            if left is not None and (left := left - 1) <= 0:
                break
    found.sort(key=lambda each: each[0])
    return [conflict for _, conflict in found][:limit]


def newest_before(source: Source, of: Claim, only: frozenset[int] | None = None) -> Conflict | None:
    """The newest claim before `of` in the line that overlaps it; among the tasks `only` (seqs), if given."""
    newest: tuple[int, str, int, str] | None = None
    for path in of.paths:
        start = head(path)
        looks = [source.execute(_NEWEST_AT, (folder, of.place)) for folder in at_or_above(start)]
        for rows in (*looks, source.execute(_NEWEST_BELOW, (*below(start), of.place))):
            for place, seq, claimed in rows:
                if newest is not None and place <= newest[0]:
                    break
                if overlap(path, claimed) and (only is None or seq in only):
                    newest = place, path, seq, claimed
                    break
    return None if newest is None else _conflict(source, *newest[1:])


def holders(source: Source, paths: Iterable[str], before: int = _NO_END) -> set[int]:
    """The tasks (seqs) of all claims before a place in the line that overlap `paths`."""
    return {seq for path in paths for _, seq, _ in _overlapping(source, path, before)}


def _overlapping(source: Source, path: str, before: int = _NO_END) -> Iterator[tuple[int, int, str]]:
    """(place, task_seq, claimed path), in order within each folder."""
    start = head(path)
    for folder in at_or_above(start):
        for row in source.execute(_AT, (folder, before)):
            if overlap(path, row[2]):
                yield row
    for row in source.execute(_BELOW, (*below(start), before)):
        if overlap(path, row[2]):
            yield row


def _conflict(source: Source, path: str, seq: int, claimed: str) -> Conflict:
    row = source.execute(_HOLDER if seq > 0 else _OUTSIDE_HOLDER, (abs(seq),)).fetchone()
    assert row is not None, f"a claim on {claimed} of no task ({seq})"
    return Conflict(path, seq, row[0], row[1], claimed)


def claim(
    tx: Transaction, task_seq: int, paths: list[tuple[str, str]], policy: str, *, said: bool = False
) -> None:
    """All of a task's paths at once, at the end of the line. `paths`: (resolved, as given)."""
    if paths:
        place = 1 + int(tx.one("SELECT coalesce(max(place), 0) FROM intents")[0])
        tx.executemany(
            _INSERT,
            [(task_seq, path, given, policy, said, tx.now_us, place, head(path)) for path, given in paths],
        )


def claim_of(source: Source, task_seq: int) -> Claim | None:
    rows = source.execute(_OF, (task_seq,)).fetchall()
    return Claim(rows[0][0], rows[0][1], tuple(row[2] for row in rows)) if rows else None


def release(tx: Transaction, task_seq: int) -> int:
    """Let go of everything that a task has claimed; how many paths that were."""
    tx.execute("DELETE FROM claim_waits WHERE task_seq = ?", (task_seq,))
    return tx.execute("DELETE FROM intents WHERE task_seq = ?", (task_seq,)).rowcount


def lapse(tx: Transaction, task_seq: int) -> None:
    """The claim counts no more; its place in the line is kept for when it is made again."""
    tx.execute("UPDATE intents SET head = '', expires_at = ? WHERE task_seq = ?", (tx.now_us, task_seq))


def has_lapsed(source: Source, task_seq: int) -> bool:
    sql = "SELECT 1 FROM intents WHERE task_seq = ? AND expires_at IS NOT NULL LIMIT 1"
    return source.execute(sql, (task_seq,)).fetchone() is not None


def said_policy(source: Source, task_seq: int) -> Policy | None:
    """What a person said at the retry that made this claim (`said`): it holds for as long as the claim does."""
    sql = "SELECT policy FROM intents WHERE task_seq = ? AND said LIMIT 1"
    row = source.execute(sql, (task_seq,)).fetchone()
    return None if row is None else row[0]


def make_again(tx: Transaction, task_seq: int, policy: str, *, said: bool = False) -> None:
    """A lapsed claim counts again, in its old place, under this policy."""
    rows = tx.execute("SELECT path FROM intents WHERE task_seq = ?", (task_seq,)).fetchall()
    tx.executemany(
        "UPDATE intents SET head = ?, expires_at = NULL, claimed_at = ?, policy = ?, said = ? WHERE task_seq = ? AND path = ?",
        [(head(path), tx.now_us, policy, said, task_seq, path) for (path,) in rows],
    )


def wait_for(tx: Transaction, task_seq: int, on_seq: int) -> None:
    """Look at `task_seq` again when the claim of `on_seq` ends."""
    tx.execute("INSERT OR REPLACE INTO claim_waits (task_seq, on_seq) VALUES (?, ?)", (task_seq, on_seq))


def take_waiters(tx: Transaction, on_seq: int) -> list[int]:
    """Those to be looked at because the claim of `on_seq` has ended. Whoever goes on waiting is noted anew."""
    rows = tx.execute("SELECT task_seq FROM claim_waits WHERE on_seq = ?", (on_seq,)).fetchall()
    tx.execute("DELETE FROM claim_waits WHERE on_seq = ?", (on_seq,))
    return [row[0] for row in rows]


def ancestors(source: Source, on_seqs: Iterable[int]) -> frozenset[int]:
    """`on_seqs` and all that those come after, directly or through others (the nearest ANCESTORS_MAX)."""
    wanted = msgspec.json.encode(list(on_seqs)).decode()
    return (
        frozenset()
        if wanted == "[]"
        else frozenset(row[0] for row in source.execute(_ANCESTORS, (wanted, ANCESTORS_MAX)))
    )


def record_conflicts(
    tx: Transaction, task_id: str | None, name: str, conflicts: list[Conflict], policy: str
) -> None:
    rows = [
        (tx.now_us, task_id, name, each.path, each.task_id, each.other_path, policy) for each in conflicts
    ]
    tx.executemany(_INSERT_CONFLICT, rows)
