"""One sink's loop: take what is due, send it, record what became of it. What may be sent now, the breaker and the pace say.

Invariants:
1. A row is sent until its receiver's word is in the journal; sent again, it has the same id and the same bytes.
2. What a runner holds in memory (rows in flight) is a hint: lost in a crash, the rows are simply due again.
3. A plug that raises, hangs or answers nonsense is `Deferred`; it stops neither the loop nor another sink.
4. While the breaker is open, or the sink disabled, nothing is sent and no row uses an attempt.
"""

from __future__ import annotations

import asyncio
import functools
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, Final

from agentqd.core.breaker import Breaker, BreakerState
from agentqd.core.limits import CONTACT_EVERY_S, ROWS_A_COMMIT
from agentqd.core.outbox import RowEvent
from agentqd.core.pace import Pace
from agentqd.core.retry import Schedule
from agentqd.core.settings import Sink as SinkSettings
from agentqd.core.units import format_time
from agentqd.loops import parking, sinkmemory
from agentqd.loops.alerts import alert
from agentqd.loops.backlog import Backlog, OrderedBacklog
from agentqd.loops.box import Box, Signal
from agentqd.loops.marking import mark_for, mark_found
from agentqd.loops.recording import Answered, Recorder
from agentqd.loops.sending import Unfit, send
from agentqd.loops.sinkmemory import SinkMemory
from agentqd.sinks.base import Context, Deferred, Delivered, Disabled, Exec, Outcome, Sink
from agentqd.sinks.registry import make_sink, schedule_for
from agentqd.storage import outbox
from agentqd.storage.outbox import DueRow, Mark
from agentqd.storage.transaction import Transaction
from agentqd.system.failpoints import failpoint

US: Final = 1_000_000
IDLE_MAX_S: Final = 30.0
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
        self.disabled: str | None = None  # why; until a person acts
        self._draw = draw
        context = Context(name, settings, box.folders.state, exec_, box.clock.now_us)
        self._sink: Sink = make_sink(context, int(box.settings.limits.completions_bytes_max))
        self._ordered = bool(settings.ordered)
        kind = OrderedBacklog if self._ordered else Backlog
        self.backlog = kind(box, name, self.in_flight, self._sink.batch_max)
        self._pace = Pace(1 if self._ordered else self._sink.concurrency)
        self._breaker = Breaker()
        self._kept = SinkMemory()  # as the journal has it
        self._under_way = 0
        self._waits_for_send = False  # the end of a send may let another begin
        self._recorder = Recorder(box, name, self._keep, self._marked)
        self._chores: dict[
            str, Callable[[Transaction], int]
        ] = {}  # moves of many rows, some hundred a commit
        self._heard_of_s: float | None = None
        self._sent_s = 0.0

    async def run(self) -> None:
        """Until cancelled. Raises JournalError."""
        await self._open()
        try:
            async with asyncio.TaskGroup() as sends:
                while True:
                    self.box.beat(f"sink:{self.name}")
                    while self._chores:
                        await self._do_chore(*self._chores.popitem())
                    if self._may_send() and (batch := await self._next_batch()):
                        if not self._may_send():  # a send has failed while the journal was read
                            self.backlog.put_back(batch)
                            continue
                        self._under_way += 1
                        self.in_flight.update([row.entry_seq for row in batch])
                        sends.create_task(self._send_on(batch))
                        continue
                    await self.kick.wait(self._idle_s())
        finally:
            self._recorder.flush()
            await self._sink.close()

    # From outside.

    def offer(self, rows: list[DueRow], *, look: bool) -> None:
        """After a commit: new rows, and whether there are others to be looked for in the journal."""
        self.backlog.offer(rows, look=look)
        if self.disabled is not None:
            self._hold_all()
        self.kick.set()

    def forget(self) -> None:
        """A person has held or dropped rows."""
        self.backlog.forget()
        self.kick.set()

    def enable(self) -> None:
        """A person has had rows of a disabled sink sent again; the journal knows it already."""
        self.disabled = None
        self._kept = SinkMemory()
        self._breaker = Breaker()
        self._chores.clear()
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
        if self._breaker.state is not BreakerState.OPEN and self.backlog.look_at is None:
            return  # nothing waits for it
        self._heard_of_s = now
        self._breaker.heard_of(now)
        self._chores["wake"] = lambda tx: parking.wake(tx, self.name)
        self.kick.set()

    def health(self) -> dict[str, Any]:
        """What `status` shows of it."""
        resting = self._breaker.state is BreakerState.OPEN
        left_s = self._breaker.open_until_s - self.box.clock.monotonic_s()
        return {
            "breaker": "disabled" if self.disabled is not None else self._breaker.state.value,
            "next_probe_at": format_time(self.box.clock.now_us() + int(max(0.0, left_s) * US))
            if resting
            else None,
            "disabled": self.disabled,
            "concurrency": self._pace.limit,
            "in_flight": self._under_way,
        }

    # What may be sent, and when to look again.

    def _may_send(self) -> bool:
        may = self._has_room()
        self._waits_for_send = not may
        return may

    def _has_room(self) -> bool:
        return (
            self.disabled is None
            and self._under_way < self._pace.limit
            and self._breaker.allows(self.box.clock.monotonic_s(), self._under_way)
        )

    async def _next_batch(self) -> list[DueRow]:
        await self.backlog.refill()
        if self._sink.batch_max > 1 and (waiting := self.backlog.only_fresh):
            await self._gather(waiting)
        return self.backlog.take()

    async def _gather(self, waiting: int) -> None:
        """Under load an append sink takes what comes in 20 ms together: its fdatasync costs the whole box, the journal too."""
        now = self.box.clock.monotonic_s()
        wait_s = self._sent_s + _GATHER_S - now
        if wait_s > 0 and waiting < self._sink.batch_max:
            await asyncio.sleep(wait_s)
        self._sent_s = self.box.clock.monotonic_s()

    def _idle_s(self) -> float:
        waits = [IDLE_MAX_S]
        if self.disabled is None and self._breaker.state is BreakerState.OPEN:
            waits.append(self._breaker.open_until_s - self.box.clock.monotonic_s())
        elif self._under_way < self._pace.limit and self.backlog.look_at is not None:
            waits.append((self.backlog.look_at - self.box.clock.now_us()) / US)
        return max(0.001, min(waits))

    # Begin.

    async def _open(self) -> None:
        """Open the plug; an append sink first reads back what its file already holds."""
        failures = 0
        while True:
            position, kept = await self.box.journal.read(self._read_kept)
            try:
                found = await self._sink.open(position)
            except OSError as error:
                self.last_error = str(error)
                self.box.log.error("sink_open_failed", sink=self.name, error=str(error))
                await asyncio.sleep(_OPEN_RETRY_S[min(failures, len(_OPEN_RETRY_S) - 1)])
                failures += 1
                continue
            if found:
                await self.box.journal.commit(functools.partial(mark_found, sink=self.name, found=found))
            await self._remember(kept)
            return

    def _read_kept(self, connection: sqlite3.Connection) -> tuple[int, SinkMemory]:
        return outbox.last_position(connection, self.name), sinkmemory.load(connection, self.name)

    async def _remember(self, kept: SinkMemory) -> None:
        """Take up where the last daemon was; under edited settings everything begins anew, and what was held is released."""
        if kept == SinkMemory():
            return
        if kept.digest == self._digest:
            self._kept, self.disabled = kept, kept.disabled
            now = self.box.clock
            self._breaker = Breaker(kept.breaker_at(now.now_us()), now.monotonic_s())
            if self._breaker.state is not BreakerState.CLOSED:
                self._pace.begin_anew()
            if self.disabled is not None:
                self.last_error = self.disabled
                self._hold_all()
            return
        await self.box.journal.commit(lambda tx: sinkmemory.save(tx, self.name, SinkMemory()))
        if kept.disabled is not None:
            self._chores["release"] = lambda tx: parking.release_disabled(tx, self.name)

    @functools.cached_property
    def _digest(self) -> str:
        return sinkmemory.digest_of(self.settings)

    async def _do_chore(self, name: str, chore: Callable[[Transaction], int]) -> None:
        moved = await self.box.journal.commit(chore)
        if moved:
            self.backlog.forget()
        if moved >= ROWS_A_COMMIT:
            self._chores.setdefault(name, chore)

    def _hold_all(self) -> None:
        self._chores["hold"] = lambda tx: parking.hold_open(tx, self.name, frozenset(self.in_flight))

    # Send and record.

    async def _send_on(self, batch: list[DueRow]) -> None:
        """One batch, and then what is in memory and may be sent in its place: the loop need not turn for each."""
        while batch:
            await self._send(batch)
            batch = []
            if self._sink.batch_max == 1 and not self._chores and self._has_room():
                batch = self.backlog.take()
                self._under_way += len(batch)
                self.in_flight.update([row.entry_seq for row in batch])
            if self._waits_for_send and (not batch or self._under_way < self._pace.limit):
                self.kick.set()

    async def _send(self, batch: list[DueRow]) -> None:
        failpoint("send_begun")
        try:
            outcomes = await send(self._sink, self.name, batch, self.box.log)
        except BaseException:
            self.kick.set()
            raise
        finally:
            self._under_way -= 1
        self._tell_notices()
        now = self.box.clock.now_us()
        marks = [
            mark_for(row, outcome, self.schedule, self._draw(), now)
            for row, outcome in zip(batch, outcomes, strict=True)
        ]
        self.backlog.answered(marks)
        changed = self._learn(outcomes, marks)
        failpoint("receiver_answered")
        self._recorder.take(Answered(batch, outcomes, marks, changed))

    def _learn(self, outcomes: Sequence[Outcome], marks: Sequence[Mark]) -> SinkMemory | None:
        """What the outcomes say about the receiver; what is to be kept of it, if that has changed."""
        now = self.box.clock.monotonic_s()
        was = self._breaker.state
        troubles = [each for each in outcomes if type(each) is not Delivered]
        deferred = [each for each in troubles if isinstance(each, Deferred)]
        if any(each.connection for each in deferred):
            self._breaker.failed(now, self._draw())
        elif not all(isinstance(each, Unfit) for each in outcomes):
            self._breaker.reached(now)
        if deferred:
            self._pace.failed()
        else:
            self._pace.succeeded()
        self.last_error = (
            next((m.error for m in reversed(marks) if m.error is not None), None) if troubles else None
        )
        disabled = next((each.reason for each in troubles if isinstance(each, Disabled)), None)
        if disabled is None and self._breaker.state is was:
            return None
        if disabled is not None:
            self.disabled = self.disabled or disabled  # its rows are held once this is in the journal
        self.kick.set()
        if self._breaker.state is BreakerState.OPEN:
            self._rest(now)
        elif was is not BreakerState.CLOSED:
            self._pace.begin_anew()
            self.box.log.info("sink_back", sink=self.name)
        kept = SinkMemory(self._digest, self.box.clock.now_us(), self._breaker.memory(now), self.disabled)
        before, self._kept = self._kept, kept
        return None if (kept.breaker, kept.disabled) == (before.breaker, before.disabled) else kept

    def _rest(self, now_s: float) -> None:
        """The breaker has opened: nothing is sent for a while; what has waited for its whole lifetime is given up."""
        for_s = round(self._breaker.open_until_s - now_s, 1)
        self.box.log.warning("sink_rests", sink=self.name, for_s=for_s, error=self.last_error)
        lifetime_s, why = self.schedule.lifetime_s, self.last_error
        if lifetime_s is not None and self.disabled is None:
            self._chores["expire"] = lambda tx: parking.expire(
                tx, self.box, self.name, lifetime_s, why, frozenset(self.in_flight)
            )

    def _keep(self, tx: Transaction, memory: SinkMemory) -> None:
        sinkmemory.save(tx, self.name, memory)
        if memory.disabled is not None:
            message = (
                f"the sink {self.name} is disabled, its deliveries are held: {memory.disabled}; "
                f"mend it, then: agentqctl outbox retry ALL --sink {self.name} --state held"
            )
            alert(tx, self.box, "sink_disabled", message, key=f"{self.name}:{memory.at_us}", not_to=self.name, sink=self.name)  # fmt: skip

    def _marked(self, answered: Answered, *, failed: bool) -> None:
        self.in_flight.difference_update([row.entry_seq for row in answered.batch])
        self.backlog.marked(answered.marks)
        if failed:
            self.backlog.look()
        if self.disabled is not None:  # it was under way when the sink was disabled
            self._hold_all()
            self.kick.set()
        elif self._ordered or failed or any(m.event is RowEvent.DEFERRED for m in answered.marks):
            self.kick.set()

    def _tell_notices(self) -> None:
        """What a plug has noticed (a file replaced, a host key changed) becomes an alert."""
        notices: list[str] | None = getattr(self._sink, "notices", None)
        if not notices:
            return
        told, notices[:] = list(notices), []
        at, kind = self.box.clock.now_us(), getattr(self._sink, "notice_kind", "sink_file")

        def unit(tx: Transaction) -> None:
            for n, text in enumerate(told):
                message = f"{self.name}: {text}"
                alert(tx, self.box, kind, message, key=f"{self.name}:{at}:{n}", sink=self.name)

        self.box.journal.submit(unit)
