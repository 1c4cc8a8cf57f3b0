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
from typing import Final

import msgspec

from agentqd.core.errors import AgentqError, IllegalTransition, RefusedForNow, WriteConflict
from agentqd.core.limits import CONFLICTS_TOLD_MAX, OUTSIDE_CLAIMS_MAX, OUTSIDE_CLAIMS_PER_USER_MAX
from agentqd.core.settings import Conflict as Policy
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box, Signal
from agentqd.loops.claimorder import all_conflicts, before_claim, named
from agentqd.loops.finishing import settle_waiting
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
        return Answer(known, [] if known.held else before_claim(tx, known)[:CONFLICTS_TOLD_MAX])
    _check_room(tx, wish.holder)
    paths = [path for path, _ in wish.paths]
    conflicts = (all_conflicts(tx, paths, set()) + outsideclaims.conflicts_for_claim(tx, paths))[
        :CONFLICTS_TOLD_MAX
    ]
    conflicts = list(dict.fromkeys(conflicts))
    if conflicts:
        intents.record_conflicts(tx, wish.id, wish.name, conflicts, wish.policy)
        others = [each.task_id for each in conflicts][:20]
        tx.event(None, "write_conflict", claim=wish.id, name=wish.name, policy=wish.policy, others=others)
    if conflicts and wish.policy == "refuse":
        first = conflicts[0]
        return WriteConflict(
            f"write conflict: {first.path} overlaps {first.other_path}, which {named(first)} has claimed; try again later,"
            " or use on_conflict: queue",
            conflicts=[each.as_json() for each in conflicts],
        )
    waits = bool(conflicts) and wish.policy == "queue"
    claim = outsideclaims.add(tx, wish.id, wish.name, wish.holder, wish.policy, wish.paths, held=not waits)
    said = {
        "claim": claim.id,
        "name": claim.name,
        "user": claim.holder.user,
        "pid": claim.holder.pid,
        "paths": len(paths),
    }
    event = "outside_claim_waits" if waits else "outside_claim_held"
    tx.event(None, event, **said, policy=claim.policy)
    tx.later(lambda: box.log.info(event, **said))
    if conflicts and wish.policy == "warn":
        _warn(tx, box, claim, conflicts)
    return Answer(claim, conflicts)


def _check_room(tx: Transaction, holder: Holder) -> None:
    every, own = outsideclaims.count(tx, holder.uid)
    if every >= OUTSIDE_CLAIMS_MAX or own >= OUTSIDE_CLAIMS_PER_USER_MAX:
        most = f"{OUTSIDE_CLAIMS_MAX} in all, {OUTSIDE_CLAIMS_PER_USER_MAX} of one user"
        text = f"there are {every} outside claims, {own} of {holder.user}; at most {most}: end some of their commands first"
        raise RefusedForNow(text, reason="too_many_claims")


def _warn(tx: Transaction, box: Box, claim: OutsideClaim, conflicts: list[Conflict]) -> None:
    first = conflicts[0]
    alert(
        tx,
        box,
        "write_conflict",
        f"{claim.name} ({claim.id}) claims {first.path}, which {named(first)} has claimed as {first.other_path}",
        key=claim.id,
        policy="warn",
        claim=claim.id,
        conflicts=[each.as_json() for each in conflicts],
    )


def release(tx: Transaction, box: Box, claim_id: str, reason: str) -> bool:
    """A unit: the claim goes, and whoever waited for it goes on. False: there is none (any more)."""
    claim = outsideclaims.find(tx, claim_id)
    if claim is None or not outsideclaims.remove(tx, claim.seq):
        return False
    held_s = 0.0 if claim.held_at is None else round(max(0, tx.now_us - claim.held_at) / 1e6, 3)
    said = {"claim": claim.id, "name": claim.name, "reason": reason, "held_s": held_s}
    tx.event(None, "outside_claim_released", **said)
    tx.later(lambda: box.log.info("outside_claim_released", **said))
    tx.later(lambda: box.task_changed(claim_id))
    settle_waiting(tx, box)
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
