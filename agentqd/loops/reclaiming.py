"""A write claim that has lapsed: released, alerted about, and made again before its task starts again. Journal units.

What may be found after a crash at any instant, each in one transaction:
1. The claim is there (it has not lapsed, or its task lives): nothing to do.
2. The claim has lapsed, its task has not ended and has no process: it is made again, in its old place in the line and under the
   policy, in the very transaction that would make the task ready (`reclaim`). So no task of ours runs without the
   claim that it declared.
"""

from __future__ import annotations

import msgspec

from agentqd.core.claims import Decision, decide
from agentqd.core.lifecycle import Event, Result, State
from agentqd.core.limits import CONFLICTS_TOLD_MAX, WAITERS_NAMED_MAX
from agentqd.core.resolve import resolve
from agentqd.core.settings import Conflict
from agentqd.core.units import format_duration, format_time
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.loops.claiming import WRITE_CONFLICT, Met, tell, waits_text
from agentqd.loops.claimorder import past, waiters
from agentqd.loops.finishing import finish_waiting, look_again
from agentqd.loops.unblocking import request_of
from agentqd.storage import intents
from agentqd.storage import tasks as store
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction

_SHOWN_PATHS = 20


class Lapse(msgspec.Struct, frozen=True):
    """A claim whose task has shown no sign of life for its TTL."""

    task: TaskRow
    ttl_s: float
    last_sign_us: int


def tell_lapsed(tx: Transaction, box: Box, lapse: Lapse) -> bool:
    """The worker lives and is silent: its claim stays, and that is said once for each silence."""
    task, mine = lapse.task, _live_claim(tx, lapse.task)
    if mine is None:
        return False
    paths = sorted(mine.paths)
    waiting = waiters(tx, task.seq, mine)[:WAITERS_NAMED_MAX]
    behind = f"; {len(waiting)} wait for it: {', '.join(waiting[:5])}" if waiting else ""
    message = (
        f"task {task.id} ({task.name}) runs, but has shown no sign of life for its intent_ttl of"
        f" {format_duration(lapse.ttl_s)}; it keeps its claim on {', '.join(paths[:3])}{behind}"
    )
    return alert(
        tx,
        box,
        "claim_expired",
        message,
        task=task,
        key=f"{task.attempt}:{lapse.last_sign_us}",
        attempt=task.attempt,
        paths=paths[:_SHOWN_PATHS],
        waiting=waiting,
        last_sign_at=format_time(lapse.last_sign_us),
        ttl_s=lapse.ttl_s,
    )


def release_lapsed(tx: Transaction, box: Box, lapse: Lapse) -> bool:
    """No process of the task lives: its claim is let go, and those that waited for it are unblocked with it.

    A task that is ready to start would claim again at once: it only lets others go first, if there are any.
    """
    task, mine = lapse.task, _live_claim(tx, lapse.task)
    if mine is None:
        return False
    ready = task.state is State.QUEUED
    if ready and not waiters(tx, task.seq, mine):
        return False
    paths = sorted(mine.paths)
    tx.event(
        task.id,
        "claim_released",
        reason="intent_ttl",
        ttl_s=lapse.ttl_s,
        last_sign_at=format_time(lapse.last_sign_us),
        paths=paths[:_SHOWN_PATHS],
        count=len(paths),
    )
    tx.later(
        lambda: box.log.warning(
            "claim_released", task=task.id, name=task.name, paths=len(paths), reason="intent_ttl"
        )
    )
    intents.lapse(tx, task.seq)
    look_again(tx, box, intents.take_waiters(tx, task.seq))
    if ready:
        reclaim(tx, box, store.get(tx, task.seq))
    return True


def _live_claim(tx: Transaction, task: TaskRow) -> intents.Claim | None:
    """The task's claim, if nothing has happened to it or to the task since that was looked at."""
    now = store.get(tx, task.seq)
    as_seen = (now.state, now.run, now.attempt) == (task.state, task.run, task.attempt)
    return intents.claim_of(tx, task.seq) if as_seen and not intents.has_lapsed(tx, task.seq) else None


def reclaim(tx: Transaction, box: Box, task: TaskRow, word: Conflict | None = None) -> TaskRow:
    """Part of the unit that has just made a task ready (or scheduled): if its claim has lapsed, it is made again, under the
    task's policy of today, or under a person's `word` (now, or at the retry that began this run).

    `queue`: the task waits, blocked. `refuse`: it ends, refused. `warn`: it goes on, and that is alerted.
    """
    if task.run_attempts == 0 or not intents.has_lapsed(tx, task.seq):
        return task
    said = word or intents.said_policy(tx, task.seq)
    policy = said or resolve(request_of(tx, task), task.queue, task.runner, box.settings).on_conflict
    intents.make_again(tx, task.seq, policy, said=said is not None)
    mine = intents.claim_of(tx, task.seq)
    assert mine is not None, "a claim that has lapsed is still there"
    before = intents.newest_before(tx, mine)
    found = ([before] if before is not None else []) + past(tx, task.seq, mine)[:CONFLICTS_TOLD_MAX]
    if not found:
        tx.event(task.id, "claimed_again", policy=policy, waits=False)
        return task
    met = Met(decide(policy, strangers=True), found, frozenset(), policy)
    tell(tx, task.id, task.name, met)
    if met.decision is Decision.REFUSE:
        text = f"its claim had lapsed, and {found[-1].who()} has claimed {found[-1].other_path} meanwhile"
        return finish_waiting(tx, box, task, Event.REFUSED, Result.REFUSED, WRITE_CONFLICT, text)
    waits = met.decision is Decision.WAIT
    tx.event(task.id, "claimed_again", policy=policy, waits=waits)
    if waits:
        intents.wait_for(tx, task.seq, found[-1].task_seq)
        return store.move_task(tx, task, Event.BLOCKED, reason=WRITE_CONFLICT, detail=waits_text(found[-1]))
    alert(
        tx,
        box,
        WRITE_CONFLICT,
        f"{met.text(task.name)}; the claim of {task.id} had lapsed",
        task=task,
        key=f"again:{task.attempt}",
        policy=policy,
        conflicts=met.told(),
    )
    return task
