"""The line of write claims where not only tasks on their way in stand: outside claims, and lapsed ones that are made again.

A claim that is made again has its old place, so that what waits behind it still does. But others may have been let past it
meanwhile: for those it waits too, as long as they are not blocked. They wait for nothing but slots, time and people, so that
cannot close a circle; one of them that becomes blocked (held and released) is found by ClaimWatch's slow look.
"""

from __future__ import annotations

from collections.abc import Iterable

from agentqd.core.lifecycle import State
from agentqd.loops.box import Box
from agentqd.storage import intents, outsideclaims
from agentqd.storage import tasks as store
from agentqd.storage.intents import Claim, Conflict
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction

_WAITING: tuple[str, str] = (State.BLOCKED.value, "write_conflict")


def late_holder(tx: Transaction, task: TaskRow) -> Conflict | None:
    """Of a task that has started before: a claim behind its own that was let past it while its own had lapsed."""
    if task.run_attempts == 0:
        return None
    mine = intents.claim_of(tx, task.seq)
    if mine is None or mine.policy == "warn":
        return None
    return next(iter(past(tx, task.seq, mine)), None)


def past(tx: Transaction, seq: int, mine: Claim) -> list[Conflict]:
    """Claims behind `mine` that overlap it, were made before it was made again, and are held."""
    since = _claimed_at(tx, seq)
    return [
        each
        for each in intents.conflicts_of(tx, list(mine.paths), {seq})
        if _place(tx, each.task_seq) > mine.place
        and _claimed_at(tx, each.task_seq) <= since
        and _is_held(tx, each.task_seq)
    ]


def _is_held(tx: Transaction, seq: int) -> bool:
    if seq > 0:
        return store.get(tx, seq).state is not State.BLOCKED
    claim = outsideclaims.get(tx, -seq)
    return claim is not None and claim.held


def _place(tx: Transaction, seq: int) -> int:
    return int(tx.one("SELECT place FROM intents WHERE task_seq = ? LIMIT 1", (seq,))[0])


def _claimed_at(tx: Transaction, seq: int) -> int:
    return int(tx.one("SELECT min(claimed_at) FROM intents WHERE task_seq = ?", (seq,))[0])


def grant_those(tx: Transaction, box: Box, seqs: Iterable[int]) -> None:
    """What outside claims among `seqs` (negative) waited for is gone: they are held now, or wait for the next one."""
    for seq in sorted(seq for seq in seqs if seq < 0):
        claim = outsideclaims.get(tx, -seq)
        if claim is None or claim.held:
            continue
        before = outsideclaims.before(tx, claim)
        if before is not None:
            intents.wait_for(tx, claim.in_line, before.task_seq)
            continue
        outsideclaims.set_held(tx, claim.seq)
        tx.event(None, "outside_claim_held", claim=claim.id, name=claim.name, waited=True)
        tx.later(lambda claim_id=claim.id: box.task_changed(claim_id))  # type: ignore[misc]


def waiters(tx: Transaction, seq: int, mine: Claim) -> list[str]:
    """The ids of those who wait for one of the claim's paths behind it."""
    found: dict[str, None] = {}
    for each in intents.conflicts_of(tx, list(mine.paths), {seq}):
        if _place(tx, each.task_seq) > mine.place and _waits(tx, each.task_seq):
            found[each.task_id] = None
    return list(found)


def _waits(tx: Transaction, seq: int) -> bool:
    if seq < 0:
        return not _is_held(tx, seq)
    other = store.get(tx, seq)
    return (other.state.value, other.reason) == _WAITING
