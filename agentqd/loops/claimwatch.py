"""`intent_ttl`: a claim whose task shows no sign of life for so long is released if no process of it lives, else told.

Promises:
1. The time counts from the last sign of life of a task that has started; one that waits for its first start never lapses,
   nor does one whose attempt is claimed and whose worker the supervisor has not begun with.
2. A lapse is noticed when it falls due (the loop sleeps until then), and again by a look every LOOK_EVERY_S.
3. Whether a process lives is the supervisor's word; only while none is connected for AWAY_S does /proc decide.
4. Nothing is kept in memory that the journal and the attempt's files do not say: a restart changes nothing.
"""

from __future__ import annotations

import asyncio
import sqlite3
from typing import Final, Protocol

import msgspec

from agentqd.core.lifecycle import ACTIVE_STATES, State
from agentqd.core.resolve import resolve
from agentqd.core.task import read_task
from agentqd.loops.box import Box, Signal
from agentqd.loops.finishing import settle
from agentqd.loops.lifesigns import has_process, last_sign_us, was_started
from agentqd.loops.live import Live
from agentqd.loops.reclaiming import Lapse, release_lapsed, tell_lapsed
from agentqd.storage import tasks as store
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction

US: Final = 1_000_000
LOOK_EVERY_S: Final = 30.0
AWAY_S: Final = 10.0
_SOON_S: Final = 1.0
_STEP_MIN_S: Final = 0.2
_HOLDERS_MAX: Final = 10_000
_ACTIVE: Final = (
    "SELECT t.seq FROM tasks t WHERE t.state IN ('running', 'stopping')"
    " AND EXISTS (SELECT 1 FROM intents i WHERE i.task_seq = t.seq AND i.expires_at IS NULL)"
)
_BETWEEN: Final = (
    "SELECT t.seq FROM tasks t INDEXED BY tasks_between_attempts"
    " WHERE t.run_attempts > 0 AND t.state IN ('scheduled', 'queued', 'held', 'retryable')"
    " AND EXISTS (SELECT 1 FROM intents i WHERE i.task_seq = t.seq AND i.expires_at IS NULL) LIMIT ?"
)
_LATE_CLAIMS: Final = (
    "SELECT seq FROM tasks WHERE state = 'blocked' AND reason = 'write_conflict' AND run_attempts > 0"
    " ORDER BY seq LIMIT ?"
)


class Workers(Protocol):
    """Of the supervision: what is known of running attempts."""

    @property
    def live(self) -> dict[str, Live]: ...
    def connected(self) -> bool: ...


class Holder(msgspec.Struct, frozen=True):
    """A started task that holds a claim with a TTL."""

    task: TaskRow
    ttl_s: float
    since_us: int  # its newest attempt's claim, or that attempt's end
    leader: tuple[int, int] | None  # that attempt's worker: pid and start


def holder_of(connection: sqlite3.Connection, box: Box, task: TaskRow) -> Holder | None:
    """None: it has no TTL, or has not started."""
    if task.run_attempts == 0:
        return None
    request = read_task(store.spec_of(connection, task.seq)[0])
    ttl_s = resolve(request, task.queue, task.runner, box.settings).intent_ttl_s
    if ttl_s is None:
        return None
    attempt = store.attempt_of(connection, task.seq, task.attempt)
    pid, start = attempt.pid, attempt.pid_start
    leader = None if pid is None or start is None else (pid, start)
    return Holder(task, ttl_s, attempt.ended_at or attempt.claimed_at, leader)


def sign_of(box: Box, holder: Holder) -> int | None:
    """When the task last showed a sign of life; None: the worker of its attempt has not been started yet. Blocking."""
    if holder.task.state not in ACTIVE_STATES:
        return min(holder.since_us, box.clock.now_us())
    folder = box.folders.attempt(holder.task.id, holder.task.attempt)
    if not was_started(folder):
        return None
    return last_sign_us(folder, holder.since_us, box.clock.now_us())


class ClaimWatch:
    """`run` is its loop."""

    def __init__(self, box: Box, workers: Workers) -> None:
        self.box = box
        self._workers = workers
        self._earlier = Signal()
        self._next_us: int | None = None
        self._connected_s = box.clock.monotonic_s()
        box.on_task_change.append(self._task_changed)
        box.on_settings.append(self._earlier.set)

    async def run(self) -> None:
        """Until cancelled. Raises JournalError."""
        while True:
            self.box.beat("claims")
            self._next_us = await self.turn()
            left_s = (self._next_us - self.box.clock.now_us()) / US
            await self._earlier.wait(max(0.0, min(LOOK_EVERY_S, left_s)))

    def _task_changed(self, task_id: str) -> None:
        """A task with a claim that has just started may lapse sooner than what we sleep for."""
        live = self._workers.live.get(task_id)
        if live is None or not live.request.writes_to or self._next_us is None:
            return
        ttl_s = resolve(live.request, live.task.queue, live.task.runner, self.box.settings).intent_ttl_s
        if ttl_s is not None and self.box.clock.now_us() + int(ttl_s * US) < self._next_us:
            self._earlier.set()

    async def turn(self) -> int:
        """Look at every holder once; when to look again."""
        now = self.box.clock.now_us()
        if self._workers.connected():
            self._connected_s = self.box.clock.monotonic_s()
        holders, late = await self.box.journal.read(self._holders)
        if late:  # rare: they claim under an old seq, and may wait for a task that has become blocked itself
            await self.box.journal.commit(lambda tx: self._settle(tx, late))
        if not holders:
            return now + int(LOOK_EVERY_S * US)
        signs = await asyncio.to_thread(lambda: [sign_of(self.box, holder) for holder in holders])
        again = now + int(LOOK_EVERY_S * US)
        for holder, sign in zip(holders, signs, strict=True):
            if sign is None:
                continue
            expires = sign + int(holder.ttl_s * US)
            if expires <= self.box.clock.now_us():
                expires = self.box.clock.now_us() + int(await self._lapsed(holder, sign) * US)
            again = min(again, expires)
        return again

    def _holders(self, connection: sqlite3.Connection) -> tuple[list[Holder], list[int]]:
        seqs = [
            *connection.execute(_ACTIVE).fetchall(),
            *connection.execute(_BETWEEN, (_HOLDERS_MAX,)).fetchall(),
        ]
        found = [holder_of(connection, self.box, store.get(connection, seq)) for (seq,) in seqs]
        late = [row[0] for row in connection.execute(_LATE_CLAIMS, (_HOLDERS_MAX,))]
        return [holder for holder in found if holder is not None], late

    def _settle(self, tx: Transaction, seqs: list[int]) -> None:
        for seq in seqs:
            task = store.get(tx, seq)
            if task.state is State.BLOCKED:
                settle(tx, self.box, task)

    async def _lapsed(self, holder: Holder, sign: int) -> float:
        """Do what is to be done about it; in how many seconds to look again."""
        lapse = Lapse(holder.task, holder.ttl_s, sign)
        alive = await self._is_alive(holder) if holder.task.state in ACTIVE_STATES else False
        if alive is None:
            return _SOON_S
        unit = tell_lapsed if alive else release_lapsed
        await self.box.journal.commit(lambda tx: unit(tx, self.box, lapse))
        return min(LOOK_EVERY_S, max(_STEP_MIN_S, holder.ttl_s))

    async def _is_alive(self, holder: Holder) -> bool | None:
        """None: nobody can say for the moment (it is being judged, sent again or reconciled)."""
        task = holder.task
        live = self._workers.live.get(task.id)
        if self._workers.connected():
            known = live is not None and live.task.attempt == task.attempt and not live.ended
            return True if known else None
        if live is not None and live.ended:
            return None
        away_s = self.box.clock.monotonic_s() - self._connected_s
        folder = self.box.folders.attempt(task.id, task.attempt)
        if away_s < AWAY_S or not was_started(folder):
            return None
        return await asyncio.to_thread(has_process, self.box.state_id, task.id, task.attempt, holder.leader)
