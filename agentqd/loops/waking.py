"""Time passes for waiting tasks: start times, backoffs, late prompts, expiry, total and queue timeouts.

Each waiting task that time can change has a `wake_at`; this loop sleeps until the earliest, then looks at those that are due.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from agentqd.core.errors import InvalidTask
from agentqd.core.lifecycle import Event, Result, State
from agentqd.core.resolve import resolve
from agentqd.core.task import TaskRequest, content_digest, prompt_digest, read_task
from agentqd.core.units import format_duration
from agentqd.core.waking import next_wake_us, wake_times
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box, Signal
from agentqd.loops.claiming import WRITE_CONFLICT
from agentqd.loops.finishing import finish_waiting, settle
from agentqd.loops.preparing import PROMPT_LOOK_AGAIN_US, prompt_roots
from agentqd.storage import tasks as store
from agentqd.storage.prompts import Missing, read_prompt
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction

_BATCH: Final = 500
_IDLE_MAX_S: Final = 30.0
US: Final = 1_000_000
Prompts = dict[int, "bytes | InvalidTask | None"]


class Waker:
    """The loop; `before_commit` (a journal hook) tells it of earlier times."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self._earlier = Signal()
        self._next_us: int | None = None

    def before_commit(self, tx: Transaction) -> None:
        at = tx.earliest_wake
        if at is not None:
            tx.after_commit(lambda: self._hear(at))

    def _hear(self, at_us: int) -> None:
        if self._next_us is None or at_us < self._next_us:
            self._earlier.set()

    async def run(self) -> None:
        """Until cancelled. Raises JournalError."""
        while True:
            self.box.beat("waking")
            self._next_us = await self.box.journal.read(store.next_wake)
            now = self.box.clock.now_us()
            if self._next_us is not None and self._next_us <= now:
                await self._turn()
                continue
            wait_s = _IDLE_MAX_S if self._next_us is None else min(_IDLE_MAX_S, (self._next_us - now) / US)
            await self._earlier.wait(wait_s)

    async def _turn(self) -> None:
        prompts = await self._look_for_prompts()
        await self.box.journal.commit(lambda tx: self._wake_due(tx, prompts))

    async def _look_for_prompts(self) -> Prompts:
        """What has become of the prompt files that due tasks wait for (read outside the transaction)."""

        def query(connection: sqlite3.Connection) -> list[tuple[int, str]]:
            now = self.box.clock.now_us()
            rows = connection.execute(
                "SELECT seq, spec FROM tasks WHERE wake_at <= ? AND state = 'blocked' AND reason = 'prompt_missing' LIMIT ?",
                (now, _BATCH),
            ).fetchall()
            return [(seq, read_task(bytes(spec)).prompt_ref or "") for seq, spec in rows]

        prompts: Prompts = {}
        for seq, ref in await self.box.journal.read(query):
            try:
                found = read_prompt(ref, prompt_roots(self.box), self.box.settings.limits.prompt_bytes_max)
            except InvalidTask as wrong:
                prompts[seq] = wrong
            else:
                prompts[seq] = None if isinstance(found, Missing) else found
        return prompts

    def _wake_due(self, tx: Transaction, prompts: Prompts) -> None:
        for task in store.due(tx, tx.now_us, _BATCH):
            self._wake(tx, task, prompts)

    def _wake(self, tx: Transaction, task: TaskRow, prompts: Prompts) -> None:
        request = read_task(store.spec_of(tx, task.seq)[0])
        resolved = resolve(request, task.queue, task.runner, self.box.settings)
        times = wake_times(request, resolved, task.run_at)
        due = {what for at, what in times if at <= tx.now_us}
        after = next_wake_us(times, tx.now_us)
        if "expires" in due and task.run_at == task.accepted_at:  # a person's retry beats an expiry
            finish_waiting(tx, self.box, task, Event.EXPIRED, Result.EXPIRED, "expires_at")
        elif "total_timeout" in due:
            finish_waiting(tx, self.box, task, Event.FINISHED, Result.TIMEOUT, "total_timeout")
        elif task.state is State.BLOCKED and task.reason == "prompt_missing":
            self._prompt(tx, task, request, prompts.get(task.seq), after)
        else:
            if "queue_timeout" in due and task.state is not State.HELD:
                self._late(tx, task, resolved.queue_timeout_s or 0.0)
            self._go_on(tx, task, after)

    def _go_on(self, tx: Transaction, task: TaskRow, after: int | None) -> None:
        event = {State.SCHEDULED: Event.START_TIME_REACHED, State.RETRYABLE: Event.BACKOFF_ENDED}.get(
            task.state
        )
        if event is Event.START_TIME_REACHED and not self._start_reached(tx, task):
            store.set_wake(tx, task.seq, after)
        elif event is not None:
            store.move_task(tx, task, event, reason=None, wake_at=after)
        else:
            store.set_wake(tx, task.seq, after)
            if task.state is State.BLOCKED and task.reason == WRITE_CONFLICT:
                settle(
                    tx, self.box, store.get(tx, task.seq)
                )  # a journal of an older version: noted anew whom it waits for

    def _start_reached(self, tx: Transaction, task: TaskRow) -> bool:
        request = read_task(store.spec_of(tx, task.seq)[0])
        resolved = resolve(request, task.queue, task.runner, self.box.settings)
        return all(
            at <= tx.now_us for at, what in wake_times(request, resolved, task.run_at) if what == "start_time"
        )

    def _late(self, tx: Transaction, task: TaskRow, allowed_s: float) -> None:
        message = f"task {task.id} ({task.name}) has waited longer than its queue_timeout of {format_duration(allowed_s)}"
        alert(tx, self.box, "queue_timeout", message, task=task, state=task.state.value)

    def _prompt(
        self,
        tx: Transaction,
        task: TaskRow,
        request: TaskRequest,
        found: bytes | InvalidTask | None,
        after: int | None,
    ) -> None:
        if isinstance(found, InvalidTask):
            finish_waiting(tx, self.box, task, Event.REFUSED, Result.REFUSED, found.code, found.message)
        elif found is not None:
            content = content_digest(request, prompt_digest(found)) if task.content else b""
            tx.execute("UPDATE tasks SET prompt = ?, content = ? WHERE seq = ?", (found, content, task.seq))
            tx.event(task.id, "prompt_found", bytes=len(found), prompt_sha256=prompt_digest(found))
            store.set_wake(tx, task.seq, after)
            settle(tx, self.box, store.get(tx, task.seq))
        elif tx.now_us - task.run_at >= int(self.box.settings.limits.late_prompt * US):
            waited = format_duration(float(self.box.settings.limits.late_prompt))
            detail = f"prompt_ref {request.prompt_ref!r} was not there within {waited}"
            moved = finish_waiting(
                tx, self.box, task, Event.REFUSED, Result.REFUSED, "prompt_missing", detail
            )
            alert(tx, self.box, "prompt_missing", f"task {task.id} ({task.name}): {detail}", task=moved)
        else:
            store.set_wake(tx, task.seq, tx.now_us + PROMPT_LOOK_AGAIN_US)
