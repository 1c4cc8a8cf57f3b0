"""Whose write claim goes before whose: tasks and outside claims in one order.

1. Whoever waits, waits for older claims: by task seq, outside claims in between (storage.outsideclaims).
2. A task that claims late under an old seq (again after its claim had lapsed; in a new run) also waits for younger tasks that
   had claimed before it and are not blocked themselves, and for outside claims that are held.
Those of rule 2 wait for nothing but slots, time and people, so the two rules together cannot make a circle.
"""

from __future__ import annotations

import sqlite3

from agentqd.core.lifecycle import State
from agentqd.core.task import TaskRequest
from agentqd.loops.box import Box
from agentqd.storage import intents, outsideclaims
from agentqd.storage import tasks as store
from agentqd.storage.intents import Conflict
from agentqd.storage.outsideclaims import OutsideClaim, is_outside
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction

_WAITING: tuple[str, str] = (State.BLOCKED.value, "write_conflict")


def all_conflicts(tx: Transaction, paths: list[str], related: set[str]) -> list[Conflict]:
    """Every claim that a newcomer meets."""
    return intents.conflicts_of(tx, paths, related) + outsideclaims.conflicts_for_task(tx, paths)


def in_the_way(tx: Transaction, task: TaskRow, request: TaskRequest, paths: list[str]) -> list[Conflict]:
    """The claims that a task with these paths has to wait for."""
    related = set(request.after_list())
    if task.run_attempts == 0 and task.run == 1:
        older = intents.conflicts_of(tx, paths, related, before_seq=task.seq)
        return older + outsideclaims.conflicts_for_task(tx, paths, task.seq)
    mine = _claimed_at(tx, task.seq)
    found = [
        each
        for each in intents.conflicts_of(tx, paths, related)
        if each.task_seq < task.seq or (each.task_seq > task.seq and _goes_first(tx, each.task_seq, mine))
    ]
    return found + outsideclaims.conflicts_for_task(tx, paths, task.seq, or_held=True)


def _goes_first(tx: Transaction, seq: int, mine: int | None) -> bool:
    """A younger task that is not blocked and had claimed before (`mine` None: we have not claimed at all)."""
    theirs = _claimed_at(tx, seq)
    before = mine is None or (theirs is not None and theirs < mine)
    return before and store.get(tx, seq).state is not State.BLOCKED


def _claimed_at(tx: Transaction, seq: int) -> int | None:
    row = tx.one("SELECT min(claimed_at) FROM intents WHERE task_seq = ?", (seq,))
    return None if row[0] is None else int(row[0])


def before_claim(tx: Transaction | sqlite3.Connection, claim: OutsideClaim) -> list[Conflict]:
    """What a waiting outside claim waits for."""
    paths = [path for path, _ in outsideclaims.paths_of(tx, claim.seq)]
    older = intents.conflicts_of(tx, paths, set(), before_seq=claim.after_seq + 1)
    return older + outsideclaims.conflicts_for_claim(tx, paths, claim.seq)


def grant_waiting(tx: Transaction, box: Box) -> None:
    """Part of the transaction that has released something: waiting outside claims with nothing older before them are held."""
    rows = tx.execute("SELECT id FROM outside_claims WHERE held_at IS NULL ORDER BY seq").fetchall()
    for (claim_id,) in rows:
        claim = outsideclaims.find(tx, claim_id)
        if claim is None or before_claim(tx, claim):
            continue
        outsideclaims.set_held(tx, claim.seq)
        tx.event(None, "outside_claim_held", claim=claim.id, name=claim.name, waited=True)
        tx.later(lambda claim_id=claim.id: box.task_changed(claim_id))  # type: ignore[misc]


def waiters(tx: Transaction, paths: list[str], after_seq: int) -> list[str]:
    """The ids of those who wait for one of `paths` behind the task with this seq, oldest first; bounded by the caller."""
    found: dict[str, None] = {}
    for each in intents.conflicts_of(tx, paths, set()):
        if each.task_seq > after_seq and each.task_id not in found:
            other = store.get(tx, each.task_seq)
            if (other.state.value, other.reason) == _WAITING:
                found[each.task_id] = None
    for each in outsideclaims.conflicts_for_task(tx, paths):
        claim = outsideclaims.find(tx, each.task_id)
        if claim is not None and not claim.held and claim.after_seq >= after_seq:
            found[each.task_id] = None
    return list(found)


def named(conflict: Conflict) -> str:
    """Who it is, for people."""
    kind = "the outside claim" if is_outside(conflict) else "task"
    return f"{kind} {conflict.task_id} ({conflict.task})"
