"""Write claims from outside of any task: asked for over the control socket, tied to a process, released with its end.

Promises:
1. A claim that was answered as held is in the journal; it survives any end of the daemon, and lasts as long as its process lives
   (pid, start, boot id). Nobody has to come back for it, and no connection holds it.
2. The end of the process is noticed at once (pidfd), by a look every LOOK_EVERY_S, and at the daemon's next start; after a reboot
   no process of before lives. The release and whom it frees are one transaction.
3. The same id asked for again by the same process is the same claim (a lost answer costs nothing).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from typing import Final

import msgspec

from agentqd.core.claims import Decision
from agentqd.core.errors import AgentqError, IllegalTransition, RefusedForNow, WriteConflict
from agentqd.core.limits import OUTSIDE_CLAIMS_MAX, OUTSIDE_CLAIMS_PER_USER_MAX
from agentqd.core.settings import Conflict as Policy
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box, Signal
from agentqd.loops.claiming import meet, tell
from agentqd.loops.finishing import look_again
from agentqd.storage import intents, outsideclaims
from agentqd.storage.intents import Conflict
from agentqd.storage.outsideclaims import Holder, OutsideClaim
from agentqd.storage.transaction import Transaction
from agentqd.supervisor.procfs import boot_id, read_process

LOOK_EVERY_S: Final = 5.0


class NoSuchClaim(AgentqError):
    code = "no_such_claim"
    http_status = 404


class Wish(msgspec.Struct, frozen=True):
    """What a process asks for, checked."""

    id: str
    name: str
    holder: Holder
    policy: Policy
    paths: list[tuple[str, str]]  # (resolved, as given)


class Answer(msgspec.Struct, frozen=True):
    claim: OutsideClaim
    conflicts: list[Conflict]  # what it waits for; under `warn` what it overlaps


def is_alive(holder: Holder, boot: str) -> bool:
    """Is this very process there, and no zombie?"""
    if holder.boot_id != boot:
        return False
    process = read_process(holder.pid)
    if process is None or process.start != holder.pid_start:
        return False
    if process.state not in "ZX":
        return True
    try:
        return len(os.listdir(f"/proc/{holder.pid}/task")) > 1  # only its first thread has ended
    except OSError:
        return False


def ask(tx: Transaction, box: Box, wish: Wish) -> Answer | WriteConflict:
    """A unit. A refusal is a value: the conflict that it records is kept. Raises RefusedForNow, IllegalTransition."""
    known = outsideclaims.find(tx, wish.id)
    if known is not None:
        if known.holder != wish.holder:
            raise IllegalTransition(
                f"{wish.id} is the claim of another process; leave the id out", id=wish.id
            )
        return Answer(known, waits_for(tx, known))
    _check_room(tx, wish.holder)
    met = meet(tx, wish.paths, wish.policy, ())
    if met.strangers:
        tell(tx, wish.id, wish.name, met)
    if met.decision is Decision.REFUSE:
        text = f"write conflict: {met.text(wish.name)}; try again later, or wait in line (on_conflict: queue; --on-conflict queue, --wait TIME)"
        return WriteConflict(text, conflicts=met.told())
    waits = met.decision is Decision.WAIT
    claim = outsideclaims.add(tx, wish.id, wish.name, wish.holder, wish.policy, wish.paths, held=not waits)
    said = {
        "claim": claim.id,
        "name": claim.name,
        "user": claim.holder.user,
        "pid": claim.holder.pid,
        "paths": len(wish.paths),
    }
    event = "outside_claim_waits" if waits else "outside_claim_held"
    tx.event(None, event, **said, policy=claim.policy)
    tx.later(lambda: box.log.info(event, **said))
    if waits:
        before = outsideclaims.before(tx, claim)
        assert before is not None, "it met somebody in the line"
        intents.wait_for(tx, claim.in_line, before.task_seq)
    if met.decision is Decision.WARN:
        text = f"{met.text(claim.name)} ({claim.id})"
        alert(
            tx, box, "write_conflict", text, key=claim.id, policy="warn", claim=claim.id, conflicts=met.told()
        )
    return Answer(claim, met.strangers)


def waits_for(source: Transaction | sqlite3.Connection, claim: OutsideClaim) -> list[Conflict]:
    """What a waiting claim is looked at again after; nothing for one that is held."""
    before = None if claim.held else outsideclaims.before(source, claim)
    return [] if before is None else [before]


def _check_room(tx: Transaction, holder: Holder) -> None:
    every, own = outsideclaims.count(tx, holder.uid)
    if every >= OUTSIDE_CLAIMS_MAX or own >= OUTSIDE_CLAIMS_PER_USER_MAX:
        most = f"{OUTSIDE_CLAIMS_MAX} in all, {OUTSIDE_CLAIMS_PER_USER_MAX} of one user"
        text = f"there are {every} outside claims, {own} of {holder.user}; at most {most}: end some of their commands first"
        raise RefusedForNow(text, reason="too_many_claims")


def release(tx: Transaction, box: Box, claim_id: str, reason: str) -> bool:
    """A unit: the claim goes, and whoever waited for it goes on. False: there is none (any more)."""
    claim = outsideclaims.find(tx, claim_id)
    if claim is None or not outsideclaims.remove(tx, claim):
        return False
    held_s = 0.0 if claim.held_at is None else round(max(0, tx.now_us - claim.held_at) / 1e6, 3)
    said = {"claim": claim.id, "name": claim.name, "reason": reason, "held_s": held_s}
    tx.event(None, "outside_claim_released", **said)
    tx.later(lambda: box.log.info("outside_claim_released", **said))
    tx.later(lambda: box.task_changed(claim_id))
    look_again(tx, box, intents.take_waiters(tx, claim.in_line))
    return True


class OutsideClaims:
    """Watches the processes behind the claims; `run` is its loop, `watch` tells it of a new one."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.boot_id = boot_id()
        self._wake = Signal()
        self._pidfds: dict[str, int] = {}  # claim id: its process

    def watch(self) -> None:
        """There is a new claim in the journal."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled. Raises JournalError."""
        try:
            while True:
                self.box.beat("outside_claims")
                await self.turn()
                await self._wake.wait(LOOK_EVERY_S)
        finally:
            for claim_id in list(self._pidfds):
                self._let_go(claim_id)

    async def turn(self) -> None:
        """Release the claims of processes that are gone; watch the others."""
        claims = await self.box.journal.read(outsideclaims.all_claims)
        known = {claim.id for claim in claims}
        for claim_id in self._pidfds.keys() - known:
            self._let_go(claim_id)
        for claim in claims:
            if claim.id not in self._pidfds:
                self._watch(claim)  # before it is looked at: an end in between makes the descriptor readable
        ended = [claim for claim in claims if not is_alive(claim.holder, self.boot_id)]
        for claim in ended:
            reason = "ended" if claim.holder.boot_id == self.boot_id else "rebooted"
            await self.box.journal.commit(lambda tx, c=claim, r=reason: release(tx, self.box, c.id, r))  # type: ignore[misc]
            self._let_go(claim.id)

    def _watch(self, claim: OutsideClaim) -> None:
        """A hint only: without it (no descriptors left) the slow look finds out."""
        if claim.holder.boot_id != self.boot_id:
            return
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(claim.holder.pid)
            self._pidfds[claim.id] = descriptor
            asyncio.get_running_loop().add_reader(descriptor, self._process_ended, claim.id)

    def _process_ended(self, claim_id: str) -> None:
        self._let_go(claim_id)
        self._wake.set()

    def _let_go(self, claim_id: str) -> None:
        descriptor = self._pidfds.pop(claim_id, None)
        if descriptor is not None:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)
