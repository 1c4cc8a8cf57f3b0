"""One sink's loop: take what is due, send it, record what became of it. What may be sent now, the breaker and the pace say.

Invariants:
1. A row is sent until its receiver's word is in the journal; sent again, it has the same id and the same bytes.
2. What a runner holds in memory (rows in flight) is a hint: lost in a crash, the rows are simply due again.
3. A plug that raises, hangs or answers nonsense is `Deferred`; it stops neither the loop nor another sink.
4. While the breaker is open, the sink disabled, or its rate used up (`gate`), nothing is sent and no row uses an attempt.
"""

from __future__ import annotations

import asyncio
import functools
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from agentqd.core.breaker import BreakerState
from agentqd.core.giveway import BATCH_GAP_S, SEND_GAP_S, GiveWay
from agentqd.core.limits import CONTACT_EVERY_S, ROWS_A_COMMIT
from agentqd.core.outbox import RowEvent
from agentqd.core.retry import Schedule
from agentqd.core.settings import Sink as SinkSettings
from agentqd.loops import parking, sinkmemory
from agentqd.loops.alerts import alert
from agentqd.loops.backlog import Backlog, OrderedBacklog
from agentqd.loops.box import Box, Signal
from agentqd.loops.courtesy import Courtesy
from agentqd.loops.gate import Gate
from agentqd.loops.marking import mark_for, mark_found
from agentqd.loops.notices import tell_notices
from agentqd.loops.recording import Answered, Recorder
from agentqd.loops.sending import Unfit, send
from agentqd.loops.sinkcounts import SinkCounts
from agentqd.loops.sinkmemory import Kept, SinkMemory, Word
from agentqd.sinks.base import Context, Deferred, Delivered, Disabled, Exec, Outcome, Sink
from agentqd.sinks.reason import bounded, explained
from agentqd.sinks.registry import make_sink, schedule_for
from agentqd.storage import outbox
from agentqd.storage.outbox import DueRow, Mark
from agentqd.storage.transaction import Transaction
from agentqd.system.failpoints import failpoint

US: Final = 1_000_000
_GATHER_S: Final = 0.02
_OPEN_RETRY_S: Final = (0.2, 1.0, 5.0, 15.0)


class SinkRunner:
    """`run` until cancelled; the other methods may be called meanwhile, from the loop's thread."""

    def __init__(
        self,
        box: Box,
        name: str,
        settings: SinkSettings,
        exec_: Exec,
        draw: Callable[[], float],
        way: GiveWay,
        *,
        built_in: bool = False,
    ) -> None:
        self.box = box
        self.name = name
        self.settings = settings
        self.schedule: Schedule = schedule_for(name, None if built_in else settings, settings.type)
        self.kick = Signal()
        self.in_flight: set[int] = set()
        self.last_error: str | None = None
        self.is_open = False
        self.counts = SinkCounts(box.clock.now_us())
        self.delivered_us: int | None = None  # when something last arrived, since this runner began
        self._draw = draw
        context = Context(name, settings, box.folders.state, exec_, box.clock.now_us)
        self.plug: Sink = make_sink(context, int(box.settings.limits.completions_bytes_max))
        gap_s = SEND_GAP_S if self.plug.batch_max == 1 else BATCH_GAP_S
        courtesy = Courtesy(way, name, gap_s, lambda: box.stirs, lambda: self.backlog.waiting)
        self._ordered = bool(settings.ordered)
        kind = OrderedBacklog if self._ordered else Backlog
        self.backlog = kind(box, name, self.in_flight, self.plug.batch_max, courtesy.page)
        most = 1 if self._ordered else self.plug.concurrency
        self.gate = Gate(most, settings.rate, box.clock.monotonic_s(), courtesy)
        self._kept = SinkMemory()  # as the journal has it
        self._under_way = 0
        self._waits_for_send = False  # the end of a send may let another begin
        self._recorder = Recorder(box, name, self._keep, self._marked, courtesy.within_s)
        self._chores: dict[str, Callable[[Transaction], int]] = {}  # some hundred rows a commit
        self._said: Word | None = None  # a person's, since this runner began: newer than what it reads
        self._heard_of_s: float | None = None
        self._sent_s = 0.0

    async def run(self) -> None:
        """Until cancelled. Raises JournalError."""
        await self._open()
        try:
            async with asyncio.TaskGroup() as sends:
                while True:
                    self.box.beat(f"sink:{self.name}")
                    await self._do_chores()
                    if self.backlog.runs_low:
                        await self.backlog.refill()
                    if self._may_send() and (batch := await self._next_batch()):
                        if not self._may_send():  # a send has failed while the journal was read
                            self.backlog.put_back(batch)
                            continue
                        self._begin(batch)
                        sends.create_task(self._send_on(batch))
                        continue
                    await self.kick.wait(self._idle_s())
        finally:
            self._recorder.flush()
            await self.plug.close()

    # From outside.

    def offer(self, rows: list[DueRow], *, look: bool) -> None:
        """After a commit: new rows, and whether there are others to be looked for in the journal."""
        self.backlog.offer(rows, look=look)
        self.gate.courtesy.offered(len(rows))
        if self.gate.why_disabled is not None:
            self._hold_all()
        self.kick.set()

    def forget(self) -> None:
        """A person has held, dropped or moved rows."""
        self.backlog.forget()
        self.kick.set()

    @property
    def disabled_by_receiver(self) -> bool:
        """Then a person who has rows sent again enables it. What a person has disabled, `enable` alone does."""
        return self.gate.disabled is not None and not self.gate.word.off

    def disable(self, word: Word) -> None:
        """A person's word; the journal knows it already. Its rows are held, some hundred a commit."""
        self._said = self.gate.word = word
        self._hold_all()
        self.kick.set()

    def enable(self) -> None:
        """A person's word; the journal knows it already. All that is held because it was disabled goes on."""
        self.gate.enable()
        self._said = self.gate.word
        self._kept = SinkMemory()
        self._chores.clear()
        self._release_all()
        self.backlog.forget()
        self.kick.set()

    def hears_of(self, names: frozenset[str]) -> None:
        """A peer with one of these names has contacted the box: if it is this sink's, it is awake (RFC 1123, 5.3.1.1)."""
        if self.settings.type != "ssh" or not names & {
            each.lower() for each in (self.settings.host, self.settings.peer) if each
        }:
            return
        now = self.box.clock.monotonic_s()
        if self._heard_of_s is not None and now < self._heard_of_s + CONTACT_EVERY_S:
            return
        if not self.gate.rests and self.backlog.look_at is None:
            return  # nothing waits for it
        self._heard_of_s = now
        self.wake()

    def wake(self) -> None:
        """It is there, somebody has seen it: an open breaker probes at once, deferred rows are due now."""
        self.gate.heard_of(self.box.clock.monotonic_s())
        self._chores["wake"] = lambda tx: parking.wake(tx, self.name)
        self.kick.set()

    def lift(self) -> None:
        """A person has rows sent again: that its receiver asked to be left alone no longer counts."""
        self.gate.lift()
        self.kick.set()

    def health(self) -> dict[str, Any]:
        """What `status` shows of it."""
        return self.gate.health(self.box.clock.monotonic_s(), self.box.clock.now_us(), self._under_way)

    # What may be sent, and when to look again.

    def _may_send(self) -> bool:
        may = self._has_room()
        self._waits_for_send = not may
        return may

    def _has_room(self) -> bool:
        return self.gate.allows(self.box.clock.monotonic_s(), self._under_way)

    async def _next_batch(self) -> list[DueRow]:
        await self.backlog.refill()
        if self.plug.batch_max > 1 and (waiting := self.backlog.only_fresh):
            await self._gather(waiting)
        return self._take()

    def _take(self) -> list[DueRow]:
        return self.backlog.take(self.gate.most(self.plug.batch_max, self.box.clock.monotonic_s()))

    async def _gather(self, waiting: int) -> None:
        """Under load an append sink takes what comes in 20 ms together: its fdatasync costs the whole box, the journal too."""
        now = self.box.clock.monotonic_s()
        wait_s = self._sent_s + _GATHER_S - now
        if wait_s > 0 and waiting < self.plug.batch_max:
            await asyncio.sleep(wait_s)
        self._sent_s = self.box.clock.monotonic_s()

    def _idle_s(self) -> float:
        at = self.backlog.look_at
        look_in_s = None if at is None else (at - self.box.clock.now_us()) / US
        return self.gate.idle_s(self.box.clock.monotonic_s(), self._under_way, look_in_s)

    # Begin.

    async def _open(self) -> None:
        """Open the plug; an append sink first reads back what its file already holds."""
        failures = 0
        while True:
            position, kept = await self.box.journal.read(self._read_kept)
            if not failures:
                await self._remember(kept)
            try:
                found = await self.plug.open(position)
            except OSError as error:
                self.last_error = bounded(explained(error))
                self.box.log.error("sink_open_failed", sink=self.name, error=self.last_error)
                if self.gate.why_disabled is not None:
                    await self._do_chores()
                await asyncio.sleep(_OPEN_RETRY_S[min(failures, len(_OPEN_RETRY_S) - 1)])
                failures += 1
                continue
            if found:
                await self.box.journal.commit(functools.partial(mark_found, sink=self.name, found=found))
            self.is_open = True
            return

    def _read_kept(self, connection: sqlite3.Connection) -> tuple[int, Kept]:
        return outbox.last_position(connection, self.name), sinkmemory.load_all(connection, self.name)

    async def _remember(self, kept: Kept) -> None:
        """Take up where the last daemon was; under edited settings everything but a person's word and the rate begins anew,
        and what was held because of the receiver's is released."""
        same, clock = kept.memory.digest == self._digest, self.box.clock
        if self._said is not None:
            forgiven = msgspec.structs.replace(kept.memory, disabled=None)
            kept = msgspec.structs.replace(
                kept, word=self._said, memory=kept.memory if self._said.off else forgiven
            )
        self.gate.resume(kept, clock.monotonic_s(), clock.now_us(), same_settings=same)
        if same:
            self._kept = kept.memory
        elif kept.memory != SinkMemory():
            release = kept.memory.disabled is not None
            await self.box.journal.commit(lambda tx: parking.begin_anew(tx, self.name, release=release))
            kept = msgspec.structs.replace(kept, word=msgspec.structs.replace(kept.word, releasing=release))
        if self.gate.why_disabled is not None:
            self.last_error = (
                f"disabled {self.gate.why_disabled}" if self.gate.word.off else self.gate.disabled
            )
            self._hold_all()
        elif kept.word.releasing:
            self._release_all()

    @functools.cached_property
    def _digest(self) -> str:
        return sinkmemory.digest_of(self.settings)

    async def _do_chores(self) -> None:
        while self._chores:
            name, chore = self._chores.popitem()
            moved = await self.box.journal.commit(chore)
            if moved:
                self.backlog.forget()
            if moved >= ROWS_A_COMMIT:
                self._chores.setdefault(name, chore)

    def _release_all(self) -> None:
        self._chores["release"] = lambda tx: parking.release_disabled(tx, self.name)

    def _hold_all(self) -> None:
        self._chores["hold"] = lambda tx: parking.hold_open(tx, self.name, frozenset(self.in_flight))

    # Send and record.

    async def _send_on(self, batch: list[DueRow]) -> None:
        """One batch, and then what is in memory and may be sent in its place: the loop need not turn for each."""
        while batch:
            await self._send(batch)
            batch = []
            if self.plug.batch_max == 1 and not self._chores and self._has_room():
                batch = self._take()
                self._begin(batch)
            may_begin = self._waits_for_send and (not batch or self._under_way < self.gate.pace.limit)
            if may_begin or self.gate.courtesy.left_s > 0 or self.backlog.runs_low:
                self.kick.set()

    def _begin(self, batch: list[DueRow]) -> None:
        if batch:
            self.gate.begin(len(batch), self.box.clock.monotonic_s())
            self._under_way += 1
            self.in_flight.update([row.entry_seq for row in batch])

    async def _send(self, batch: list[DueRow]) -> None:
        failpoint("send_begun")
        try:
            outcomes = await send(self.plug, self.name, batch, self.box.log)
        except BaseException:
            self.kick.set()
            raise
        finally:
            self._under_way -= 1
        tell_notices(self.box, self.name, self.plug)
        now = self.box.clock.now_us()
        marks = [
            mark_for(row, outcome, self.schedule, self._draw(), now)
            for row, outcome in zip(batch, outcomes, strict=True)
        ]
        self.backlog.answered(marks)
        changed = self._learn(outcomes, marks, now)
        bucket = self.gate.bucket
        tokens = None if bucket is None else bucket.memory(self.box.clock.monotonic_s(), now)
        failpoint("receiver_answered")
        self._recorder.take(Answered(batch, outcomes, marks, changed, tokens))

    def _learn(self, outcomes: Sequence[Outcome], marks: Sequence[Mark], now_us: int) -> SinkMemory | None:
        """What the outcomes say about the receiver; what is to be kept of it, if that has changed."""
        now = self.box.clock.monotonic_s()
        gate = self.gate
        was = gate.breaker.state
        troubles = [each for each in outcomes if type(each) is not Delivered]
        if len(troubles) < len(outcomes):
            self.counts.delivered.add(now, len(outcomes) - len(troubles))
            self.delivered_us = now_us
        if not troubles and was is BreakerState.CLOSED:
            gate.breaker.reached(now)
            gate.pace.succeeded()
            self.last_error = None
            return None
        self.counts.failed.add(now, len(troubles))
        deferred = [each for each in troubles if isinstance(each, Deferred)]
        if any(each.connection for each in deferred):
            gate.breaker.failed(now, self._draw())
        elif not all(isinstance(each, Unfit) for each in outcomes):
            gate.breaker.reached(now)
        if deferred:
            gate.pace.failed()
            if alone_s := gate.leave_alone(deferred, now):
                self.box.log.info("sink_left_alone", sink=self.name, for_s=round(alone_s, 1))
        else:
            gate.pace.succeeded()
        self.last_error = (
            next((m.error for m in reversed(marks) if m.error is not None), None) if troubles else None
        )
        disabled = next((each.reason for each in troubles if isinstance(each, Disabled)), None)
        if disabled is None and gate.breaker.state is was:
            return None
        if disabled is not None:
            gate.disabled = gate.disabled or disabled  # its rows are held once this is in the journal
        self.kick.set()
        if gate.breaker.state is BreakerState.OPEN:
            self._rest(now)
        elif was is not BreakerState.CLOSED:
            gate.pace.begin_anew()
            self.box.log.info("sink_back", sink=self.name)
        kept = SinkMemory(self._digest, now_us, gate.breaker.memory(now), gate.disabled)
        before, self._kept = self._kept, kept
        return None if (kept.breaker, kept.disabled) == (before.breaker, before.disabled) else kept

    def _rest(self, now_s: float) -> None:
        """The breaker has opened: nothing is sent for a while; what has waited for its whole lifetime is given up."""
        for_s = round(self.gate.breaker.open_until_s - now_s, 1)
        self.box.log.warning("sink_rests", sink=self.name, for_s=for_s, error=self.last_error)
        lifetime_s, why = self.schedule.lifetime_s, self.last_error
        if lifetime_s is not None and self.gate.why_disabled is None:
            self._chores["expire"] = lambda tx: parking.expire(
                tx, self.box, self.name, lifetime_s, why, frozenset(self.in_flight)
            )

    def _keep(self, tx: Transaction, memory: SinkMemory) -> None:
        sinkmemory.save(tx, self.name, memory)
        if memory.disabled is not None:
            message = (
                f"the sink {self.name} is disabled, its deliveries are held: {memory.disabled}; "
                f"mend it, then: agentqctl sink enable {self.name}"
            )
            alert(tx, self.box, "sink_disabled", message, key=f"{self.name}:{memory.at_us}", not_to=self.name, sink=self.name)  # fmt: skip

    def _marked(self, rows: list[DueRow], marks: list[Mark], *, failed: bool) -> None:
        self.in_flight.difference_update([row.entry_seq for row in rows])
        self.backlog.marked(marks)
        if failed:
            self.backlog.look()
        if self.gate.why_disabled is not None:  # it was under way when the sink was disabled
            self._hold_all()
            self.kick.set()
        elif self._ordered or failed or any(m.event is RowEvent.DEFERRED for m in marks):
            self.kick.set()
