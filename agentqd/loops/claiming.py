"""Claims of places to write, as a task comes in or is run again: who is in its way, and what its policy makes of it.

The rules are core/claims.py, the order and why it cannot lock up docs/intents.md; what overlaps is found by storage/intents.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from agentqd.core.claims import Decision, decide, waits_behind
from agentqd.core.errors import WriteConflict
from agentqd.core.limits import CONFLICTS_TOLD_MAX, WAITS_FOLLOWED_MAX
from agentqd.core.settings import Conflict
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.storage import intents
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction

WRITE_CONFLICT = "write_conflict"
Writes = list[tuple[str, str]]  # (resolved, as given)


class Met(msgspec.Struct, frozen=True):
    """What a newcomer finds in its way."""

    decision: Decision
    strangers: list[intents.Conflict]  # the first CONFLICTS_TOLD_MAX
    ahead: frozenset[int]  # the claims (task seqs) that it would wait for, if it is part of a possible circle
    policy: Conflict

    def text(self, name: str) -> str:
        first = self.strangers[0]
        more = f" (and {len(self.strangers) - 1} more)" if len(self.strangers) > 1 else ""
        return (
            f"{name} wants to write {first.path}, which {first.who()} has claimed as {first.other_path}{more}"
        )

    def told(self) -> list[dict[str, str]]:
        return [each.as_json() for each in self.strangers]


def meet(
    tx: Transaction, writes: Writes, policy: Conflict, after: Iterable[int], again: int | None = None
) -> Met:
    """Look at a newcomer that comes `after` those tasks; `again`: the seq that it had before, of a task that is run anew."""
    paths = [path for path, _ in writes]
    related = intents.ancestors(tx, after) if paths else frozenset[int]()
    strangers = intents.conflicts_of(tx, paths, related, CONFLICTS_TOLD_MAX)
    ahead: frozenset[int] = frozenset()
    if again is not None and paths and followed(tx, again):
        ahead = frozenset(
            seq for seq in intents.holders(tx, paths) if waits_behind(policy, related=seq in related)
        )
    return Met(decide(policy, strangers=bool(strangers)), strangers, ahead, policy)


def tell(tx: Transaction, task_id: str, name: str, met: Met) -> None:
    """Into the log of conflicts and the chain, whatever becomes of the newcomer."""
    intents.record_conflicts(tx, task_id, name, met.strangers, met.policy)
    others = list(dict.fromkeys(each.task_id for each in met.strangers))
    tx.event(task_id, WRITE_CONFLICT, policy=met.policy, others=others)


def warn(tx: Transaction, box: Box, task: TaskRow, met: Met) -> None:
    alert(tx, box, WRITE_CONFLICT, met.text(task.name), task=task, policy=met.policy, conflicts=met.told())


def claim_again(
    tx: Transaction, box: Box, task: TaskRow, writes: Writes, policy: Conflict, *, said: bool = False
) -> None:
    """A finished task is run again: its claim is made anew, at the end of the line, under the policy of today, or under that
    which was `said` with the retry.

    Raises WriteConflict: refused, or it would wait for a task that waits for it.
    """
    after = [row[0] for row in tx.execute("SELECT on_seq FROM dependencies WHERE task_seq = ?", (task.seq,))]
    met = meet(tx, writes, policy, after, again=task.seq)
    if met.decision is Decision.REFUSE:
        raise WriteConflict(
            f"write conflict: {met.text(task.name)}; nothing was changed; to wait in line for it:"
            f" agentqctl retry {task.id} --on-conflict queue",
            conflicts=met.told(),
        )
    follower = follower_of(tx, task.seq)
    if follower is not None and leads_back(tx, {*after, *met.ahead}, task.seq):
        raise WriteConflict(
            f"{task.name} would have to wait for a task that itself waits for {task.id}, directly or through others, or would"
            f" if it were tried again: {follower} comes after {task.id} and has not ended;"
            f" nothing was changed; cancel {follower}, or try again when it has ended",
            conflicts=met.told(),
        )
    if met.strangers:
        tell(tx, task.id, task.name, met)
    intents.claim(tx, task.seq, writes, policy, said=said)
    if met.decision is Decision.WARN:
        warn(tx, box, task, met)


def in_line(tx: intents.Source, task: TaskRow) -> intents.Conflict | None:
    """The newest claim that a task has to wait for, if there is one."""
    mine = intents.claim_of(tx, task.seq)
    if mine is None:
        return None
    if waits_behind(mine.policy, related=False):
        return intents.newest_before(tx, mine)
    rows = tx.execute("SELECT on_seq FROM dependencies WHERE task_seq = ?", (task.seq,))
    related = intents.ancestors(tx, [row[0] for row in rows])
    return intents.newest_before(tx, mine, only=related) if related else None


def waits_text(before: intents.Conflict) -> str:
    return f"waits for {before.task_id} ({before.task}), which writes {before.other_path}"


def followed(tx: Transaction, seq: int) -> bool:
    """Does a task that has not ended come after this one, and still asks for it?"""
    return follower_of(tx, seq) is not None


def follower_of(tx: Transaction, seq: int) -> str | None:
    """The id of a task that comes after this one and has not ended; not one that had begun when this one was run again."""
    row = tx.one(_FOLLOWER, (seq,))
    return None if row is None else str(row[0])


def leads_back(tx: Transaction, start: Iterable[int], to: int) -> bool:
    """Does one of `start` wait for the task `to`, through whatever it waits for? A walk that grows too long counts as yes."""
    ways = list(start)
    seen = set(ways)
    while ways:
        seq = ways.pop()
        if seq == to or len(seen) > WAITS_FOLLOWED_MAX:
            return True
        new = _waits_for(tx, seq, to) - seen
        seen |= new
        ways += new
    return False


def _waits_for(tx: Transaction, seq: int, to: int) -> set[int]:
    """Everything that could make it wait, now or later, `to` being about to live again.

    A superset: whether it has its way clear already is not asked.
    """
    found = {row[0] for row in tx.execute(_ASKS_FOR, (seq, to))}
    mine = intents.claim_of(tx, seq)
    return found if mine is None else found | intents.holders(tx, mine.paths, mine.place)


_FOLLOWER: Final = (
    "SELECT t.id FROM dependencies d JOIN tasks t ON t.seq = d.task_seq"
    " WHERE d.on_seq = ? AND t.state <> 'finished' AND d.heard_run IS NOT t.run LIMIT 1"
)
_ASKS_FOR: Final = (
    "SELECT d.on_seq FROM dependencies d JOIN tasks t ON t.seq = d.on_seq JOIN tasks mine ON mine.seq = d.task_seq"
    " WHERE d.task_seq = ? AND d.heard_run IS NOT mine.run AND (t.state <> 'finished' OR t.seq = ?)"
)
