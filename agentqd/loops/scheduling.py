"""Which task runs next. The choice rides on every journal commit: what a commit makes ready, or what slot it frees, is
claimed in the same transaction, so that one fdatasync stands between a line and its worker.

Invariants:
1. A claim names attempt, daemon epoch and supervisor instance; nothing is claimed without a connected supervisor.
2. Never more than `max_workers` in all and a queue's concurrency within it are running or stopping.
3. A runner whose usage limit is reached starts nothing until it is over; its tasks are passed over, not moved.
4. Between queues with free slots the one with the smallest share of its slots in use goes first (a flood in one delays no
   other), then the higher priority, then the older task; within a queue: priority, then age.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from agentqd.core.lifecycle import Event, State
from agentqd.loops.box import Box
from agentqd.loops.usage_limits import USAGE_LIMIT
from agentqd.storage import draining, runner_limits
from agentqd.storage import tasks as store
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction


class Claim(msgspec.Struct, frozen=True):
    """A task that is to be started now."""

    task: TaskRow
    spec: bytes
    prompt: bytes | None


class Target(msgspec.Struct, frozen=True):
    """The supervisor that claims are made for."""

    instance: str
    boot_id: str


class Scheduler:
    """Its `claim` is the journal's `before_commit` hook: it runs on the journal's thread, inside each transaction."""

    def __init__(
        self,
        box: Box,
        on_claims: Callable[[list[Claim]], None],
        on_chosen: Callable[[list[Claim]], None] | None = None,
    ) -> None:
        """`on_claims`: on the loop's thread, when the claims are durable. `on_chosen`: there too, while they become so."""
        self._box = box
        self._on_claims = on_claims
        self._on_chosen = on_chosen
        self.target: Target | None = None
        self.paused: frozenset[str] = frozenset()
        self._empty: set[str] = set()  # queues in which nothing was ready when last looked at
        self._closed: frozenset[str] = frozenset()  # runners whose usage limit was reached then

    async def load(self) -> None:
        """What a person has paused stays paused over a restart, and a box that drains goes on draining."""
        rows = await self._box.journal.read(lambda c: c.execute("SELECT queue FROM paused_queues").fetchall())
        self.paused = frozenset(row[0] for row in rows)
        self._box.drain(await self._box.journal.read(draining.since_us))

    def is_paused(self, queue: str) -> bool:
        """By a person's word, or by the config."""
        options = self._box.settings.queues.get(queue)
        return queue in self.paused or (options is not None and options.paused)

    def wake(self) -> None:
        """Something outside the journal changed (settings, pause, supervisor): choose again."""
        self._box.journal.submit(_nothing)

    def claim(self, tx: Transaction) -> None:
        target, box = self.target, self._box
        for queue in tx.queues_made_ready():
            self._empty.discard(queue)
        if target is None or box.draining:
            return
        closed = runner_limits.closed(tx, tx.now_us)
        if closed != self._closed:
            self._closed = closed
            self._empty.clear()
        names = [
            name
            for name in {"default", *box.settings.queues}
            if name not in self._empty and not self.is_paused(name)
        ]
        if not names:
            return
        running = tx.numbers.active.copy()
        free = box.max_workers - sum(running.values())
        if free <= 0:
            return
        claims = self._choose(tx, names, running, free, target)
        if claims:
            tx.after_commit(lambda: self._on_claims(claims))
            if self._on_chosen is not None:
                on_chosen = self._on_chosen
                tx.before_durable(lambda: on_chosen(claims))

    def _choose(
        self, tx: Transaction, names: list[str], running: dict[str, int], free: int, target: Target
    ) -> list[Claim]:
        ready: dict[str, list[TaskRow]] = {}
        drained: set[str] = set()  # all that is ready there is in hand
        for name in names:
            room = min(free, self._box.concurrency(name) - running.get(name, 0))
            if room <= 0:
                continue
            heads = (
                store.heads_of_open(tx, name, room, self._closed)
                if self._closed
                else store.heads(tx, name, room)
            )
            if heads:
                ready[name] = heads[::-1]
            if len(heads) < room:
                drained.add(name)
        claims: list[Claim] = []
        while free > 0 and ready:
            name = min(
                ready,
                key=lambda n: (
                    running.get(n, 0) / self._box.concurrency(n),
                    -ready[n][-1].priority,
                    ready[n][-1].seq,
                ),
            )
            claims.append(self._take(tx, ready[name].pop(), target))
            running[name] = running.get(name, 0) + 1
            free -= 1
            if not ready[name]:
                del ready[name]
        self._empty |= drained - ready.keys()
        return claims

    def _take(self, tx: Transaction, task: TaskRow, target: Target) -> Claim:
        attempt = task.attempt + 1
        claimed = store.move_task(
            tx,
            task,
            Event.CLAIMED,
            said={"attempt": attempt, "epoch": self._box.journal.epoch, "instance": target.instance},
            attempt=attempt,
            run_attempts=task.run_attempts + 1,
            started_at=tx.now_us,
            reason=None,
            detail=None,
            wake_at=None,
        )
        store.insert_attempt(tx, claimed, self._box.journal.epoch, target.instance, target.boot_id)
        return Claim(claimed, *store.spec_of(tx, task.seq))


def waiting_reason(
    task: TaskRow, box: Box, *, paused: bool, connected: bool, busy: bool, limited: bool = False
) -> str | None:
    """Why a waiting task waits, machine-readable; None for one that does not wait. The first that holds, in this order."""
    if task.state is State.QUEUED:
        return ready_reason(task.queue, box, paused=paused, connected=connected, busy=busy, limited=limited)
    if task.state is State.RETRYABLE:
        return USAGE_LIMIT if task.reason == USAGE_LIMIT else "backoff"
    if task.state is State.BLOCKED:
        return task.reason or "blocked"
    return {State.SCHEDULED: "start_time", State.HELD: "held"}.get(task.state)


def ready_reason(queue: str, box: Box, *, paused: bool, connected: bool, busy: bool, limited: bool) -> str:
    """The same for a task that only waits to be chosen."""
    causes = (
        (queue != "default" and queue not in box.settings.queues, "queue_removed"),
        (paused, "queue_paused"),
        (box.draining, "draining"),
        (not connected, "no_supervisor"),
        (limited, USAGE_LIMIT),
        (busy, "no_free_slot"),
    )
    return next((reason for holds, reason in causes if holds), "starting")


def _nothing(tx: Transaction) -> None:
    """A commit without a change: only for the claims that ride on it."""
