"""The door: what one written task becomes. The same code for a line of the queue file and for a submit over the socket.

Promises:
1. Every candidate ends in exactly one of: a new task; a duplicate of the first (an event on it); a refusal.
2. `admit` decides inside the transaction that makes it durable, so that two doors cannot both take one id.
3. An id whose dedup time has passed starts a new task, `-2` appended; the id of a refused task is free again.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Final

import msgspec

from agentqd.core.claims import Decision
from agentqd.core.errors import IdConflict, InvalidTask, WriteConflict
from agentqd.core.lifecycle import Event, Result, State
from agentqd.core.limits import TASK_ID_CHARS_MAX
from agentqd.core.outbox import OPEN_STATES
from agentqd.core.resolve import resolve
from agentqd.core.task import content_digest, read_task
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.loops.claiming import WRITE_CONFLICT, Met, leads_back, meet, tell, warn
from agentqd.loops.finishing import AttemptEnd, add_result, result_data, settle
from agentqd.loops.preparing import Candidate
from agentqd.loops.unblocking import DEPENDENCY
from agentqd.storage import intents
from agentqd.storage import tasks as store
from agentqd.storage.tasks import NewTask, TaskRow
from agentqd.storage.transaction import Transaction


class Accepted(msgspec.Struct, frozen=True):
    task_id: str
    seq: int
    state: State


class Duplicate(msgspec.Struct, frozen=True):
    task_id: str
    state: State
    result: str | None


Outcome = Accepted | Duplicate | InvalidTask | WriteConflict


def admit(tx: Transaction, box: Box, candidates: Sequence[Candidate | InvalidTask]) -> list[Outcome]:
    """Decide and record, in order. Refusals are returned as they are: what is told of them is the door's business."""
    batch = _Batch(tx, box, candidates)
    for item in candidates:
        batch.take(item)
    batch.flush()
    return batch.outcomes


class _Batch:
    """New tasks are inserted together; one that comes after others or claims places sees all before it."""

    def __init__(self, tx: Transaction, box: Box, candidates: Sequence[Candidate | InvalidTask]) -> None:
        self._tx = tx
        self._box = box
        self._known = store.find_many(tx, [item.new.id for item in candidates if isinstance(item, Candidate)])
        self._fresh: list[tuple[int, NewTask]] = []
        self._inside: dict[str, Candidate] = {}
        self.outcomes: list[Outcome] = []

    def take(self, item: Candidate | InvalidTask) -> None:
        self.outcomes.append(item if isinstance(item, InvalidTask) else self._decide(item))

    def _decide(self, item: Candidate) -> Outcome:
        tx = self._tx
        existing = self._known.get(item.new.id)
        newest = item.new.id if existing is None else _newest_replay(tx, item.new.id)
        if newest in self._inside:
            return _twice_in_batch(tx, item, self._inside[newest])
        if newest != item.new.id:
            existing = store.find(tx, newest) or existing
        refused = existing if existing is not None and existing.result == Result.REFUSED else None
        if existing is not None and refused is None:
            outcome = _meet(tx, self._box, item, existing, self._inside)
            if outcome is not None:
                return outcome
        if item.request.after is not None or item.writes or refused is not None:
            return self._entangled(item, refused)
        self._inside[item.new.id] = item
        self._fresh.append((len(self.outcomes), item.new))
        return Accepted(item.new.id, 0, State.QUEUED)

    def _entangled(self, item: Candidate, refused: TaskRow | None) -> Outcome:
        self.flush()
        outcome = admit_entangled(self._tx, self._box, item, refused)
        if isinstance(outcome, Accepted) and outcome.state is State.FINISHED:
            self._known[item.new.id] = store.get(self._tx, outcome.seq)  # refused: its id is free again
        elif isinstance(outcome, Accepted):
            self._inside[item.new.id] = item
        return outcome

    def flush(self) -> None:
        seqs = store.insert_tasks(self._tx, [new for _, new in self._fresh])
        for (at, new), seq in zip(self._fresh, seqs, strict=True):
            accepted = Accepted(new.id, seq, _state_after(new.event))
            if at < len(self.outcomes):
                self.outcomes[at] = accepted
        self._fresh.clear()


def admit_entangled(tx: Transaction, box: Box, item: Candidate, refused: TaskRow | None = None) -> Outcome:
    """A task that comes after others, or claims places to write: checked before anything of it starts.

    `refused`: the task that had this id before, whose row it takes over.
    """
    request, new = item.request, item.new
    found = _dependencies(tx, request.after_list())
    wrong = _wrong_dependency(tx, request.after_list(), found, refused)
    if wrong is not None:
        return wrong
    after = [row.seq for row in found.values()]
    met = meet(tx, item.writes, item.on_conflict, after, None if refused is None else refused.seq)
    if refused is not None and leads_back(tx, {*after, *met.ahead}, refused.seq):
        return InvalidTask(
            f"id: a task that {new.id} would wait for waits for {new.id} itself; use another id",
            code="waits_for_itself",
            field="id",
        )
    if met.strangers:
        tell(tx, new.id, new.name, met)
        if met.decision is Decision.REFUSE:
            return _refuse_conflict(tx, box, item, met, after, refused)
    waits = bool(found) or met.decision is Decision.WAIT
    if waits and new.event is not Event.ACCEPTED_BLOCKED:
        new.event, new.reason = Event.ACCEPTED_BLOCKED, DEPENDENCY if found else WRITE_CONFLICT
    seq = _put(tx, new, refused, after)
    intents.claim(tx, seq, item.writes, item.on_conflict)
    task = store.get(tx, seq)
    if met.decision is Decision.WARN:
        warn(tx, box, task, met)
    if waits and task.reason in {DEPENDENCY, WRITE_CONFLICT}:
        task = settle(tx, box, task)
    return Accepted(new.id, seq, task.state)


def _dependencies(tx: Transaction, names: list[str]) -> dict[str, TaskRow]:
    """The tasks that are meant: of an id that was used again after its dedup time, the newest."""
    newest = {name: _newest_replay(tx, name) for name in names}
    rows = store.find_many(tx, [*newest.values(), *names])
    return {name: row for name in names if (row := rows.get(newest[name]) or rows.get(name)) is not None}


def _wrong_dependency(
    tx: Transaction, names: list[str], found: dict[str, TaskRow], refused: TaskRow | None
) -> InvalidTask | None:
    """What names an unknown task, or would wait for itself. A new task is younger than all that it comes after, so only one
    that takes over the id (and the row) of a refused task can close a circle."""
    missing = [name for name in names if name not in found]
    if missing:
        return InvalidTask(
            f"after: there is no task {missing[0]}; it must be submitted before the tasks that come after it (of lines: stand"
            " in an earlier one); one that ended long ago is gone with retention.tasks",
            code="unknown_dependency",
            field="after",
        )
    if refused is not None:
        for name, row in found.items():
            if row.seq == refused.seq or tx.one(_COMES_AFTER, (row.seq, refused.seq)) is not None:
                return InvalidTask(
                    f"after: {name} comes after {refused.id} itself: neither could ever run",
                    code="dependency_cycle",
                    field="after",
                )
    return None


_COMES_AFTER: Final = (
    "WITH RECURSIVE before(seq) AS (SELECT on_seq FROM dependencies WHERE task_seq = ?"
    " UNION SELECT d.on_seq FROM dependencies d JOIN before b ON d.task_seq = b.seq) SELECT 1 FROM before WHERE seq = ? LIMIT 1"
)


def _refuse_conflict(
    tx: Transaction,
    box: Box,
    item: Candidate,
    met: Met,
    after: Sequence[int],
    refused: TaskRow | None,
) -> Outcome:
    """By socket: an error and no task. By file: a task that has finished, refused; its result tells of it."""
    text, told = met.text(item.new.name), met.told()
    if msgspec.json.decode(item.new.source)["kind"] == "socket":
        return WriteConflict(
            f"write conflict: {text}; try again later, or wait in line (on_conflict: queue; --on-conflict queue)",
            conflicts=told,
        )
    new = item.new
    new.event, new.reason, new.detail, new.wake_at = Event.REFUSED, WRITE_CONFLICT, text, None
    seq = _put(tx, new, refused, after)
    task = store.get(tx, seq)
    data = result_data(box, task, AttemptEnd(task.id, 0, item.request), None, {}, tx.now_us)
    add_result(tx, box, task, item.request, {**data, "conflicts": told})
    alert(tx, box, "write_conflict", text, task=task, policy="refuse", conflicts=told)
    return Accepted(new.id, seq, State.FINISHED)


def _state_after(event: Event) -> State:
    return {Event.ACCEPTED_FOR_LATER: State.SCHEDULED, Event.ACCEPTED_BLOCKED: State.BLOCKED}.get(
        event, State.QUEUED
    )


def _twice_in_batch(tx: Transaction, item: Candidate, first: Candidate) -> Outcome:
    if item.checks_content and item.new.content != first.new.content:
        return _conflict(item)
    tx.event_json(first.new.id, "duplicate_submitted", item.new.source)
    return Duplicate(first.new.id, _state_after(first.new.event), None)


def _conflict(item: Candidate) -> IdConflict:
    return IdConflict(
        f"id: {item.new.id} is taken by a task with other content; use another id, or none",
        field="id",
        id=item.new.id,
    )


def _meet(
    tx: Transaction, box: Box, item: Candidate, first: TaskRow, inside: Container[str]
) -> Outcome | None:
    """What a candidate becomes whose id is known. None: a new task after all (its id has changed)."""
    if first.state is State.FINISHED and _dedup_over(tx, box, first):
        item.new.id = _next_id(tx, item.new.id, inside)
        return None
    if item.checks_content and item.new.content != first.content and not _same_without_prompt(item, first):
        return _conflict(item)
    tx.event_json(first.id, "duplicate_submitted", item.new.source)
    return Duplicate(first.id, first.state, first.result)


def _same_without_prompt(item: Candidate, first: TaskRow) -> bool:
    """One of the two still waits for its prompt file: then only what is written can be compared."""
    if item.request.prompt_ref is None or (item.missing_prompt is None and first.reason != "prompt_missing"):
        return False
    return first.reason == "prompt_missing" and content_digest(item.request, None) == first.content


def _newest_replay(tx: Transaction, base: str) -> str:
    row = tx.one("SELECT newest FROM ids WHERE id = ?", (base,))
    return base if row is None else str(row[0])


def _next_id(tx: Transaction, base: str, inside: Container[str]) -> str:
    """The first free one; `inside` are ids that this batch has given and not yet written."""
    row = tx.one("SELECT replays FROM ids WHERE id = ?", (base,))
    replays = (row[0] if row else 1) + 1
    while (newest := _suffixed(base, replays)) in inside or store.find(tx, newest) is not None:
        replays += 1
    tx.execute(
        "INSERT INTO ids (id, newest, replays) VALUES (?, ?, ?)"
        " ON CONFLICT DO UPDATE SET newest = excluded.newest, replays = excluded.replays",
        (base, newest, replays),
    )
    return newest


def _suffixed(base: str, replays: int) -> str:
    suffix = f"-{replays}"
    return base[: TASK_ID_CHARS_MAX - len(suffix)] + suffix


def _dedup_over(tx: Transaction, box: Box, first: TaskRow) -> bool:
    """Counted from the task's end; never over while a row is undelivered or a known consumer has not pulled it."""
    assert first.finished_at is not None
    request = read_task(store.spec_of(tx, first.seq)[0])
    ttl_s = resolve(request, first.queue, first.runner, box.settings).dedup_ttl_s
    if tx.now_us < first.finished_at + int(ttl_s * 1_000_000):
        return False
    states = ",".join(f"'{state.value}'" for state in OPEN_STATES)
    undelivered = tx.one(
        f"SELECT 1 FROM outbox o JOIN entries e ON e.seq = o.entry_seq WHERE e.task_seq = ? AND o.state IN ({states})",  # noqa: S608 - fixed names
        (first.seq,),
    )
    unpulled = tx.one(
        "SELECT 1 FROM outbox o JOIN entries e ON e.seq = o.entry_seq WHERE e.task_seq = ? AND o.sink = 'completions'"
        " AND o.position > (SELECT min(acknowledged) FROM consumers) LIMIT 1",
        (first.seq,),
    )
    return undelivered is None and unpulled is None


def _put(tx: Transaction, new: NewTask, refused: TaskRow | None, after: Sequence[int]) -> int:
    """A row of its own, or the row of the refused task whose id it has; its seq."""
    if refused is not None:
        seq = _take_over(tx, new, refused).seq
    else:
        (seq,) = store.insert_tasks(tx, [new])
    sql = "INSERT OR IGNORE INTO dependencies (task_seq, on_seq) VALUES (?, ?)"
    tx.executemany(sql, [(seq, on_seq) for on_seq in after])
    return seq


def _take_over(tx: Transaction, new: NewTask, refused: TaskRow) -> TaskRow:
    """The id of a refused task is free again: the row begins a new run with what was written now."""
    moved = store.move_task(
        tx,
        refused,
        Event.RETRY_REQUESTED,
        said=msgspec.json.decode(new.source),
        name=new.name,
        priority=new.priority,
        runner=new.runner,
        reason=None,
        detail=None,
        run=refused.run + 1,
        run_attempts=0,
        submitted_at=new.submitted_at,
        accepted_at=tx.now_us,
        run_at=tx.now_us,
        finished_at=None,
        wake_at=new.wake_at,
        content=new.content,
        source=new.source,
        spec=new.spec,
        prompt=new.prompt,
    )
    tx.execute("DELETE FROM dependencies WHERE task_seq = ?", (moved.seq,))
    if new.queue != moved.queue:
        tx.count_task(moved.queue, moved.state.value, None, -1)
        tx.count_task(new.queue, moved.state.value, None, 1)
        tx.execute("UPDATE tasks SET queue = ? WHERE seq = ?", (new.queue, moved.seq))
        moved = store.get(tx, moved.seq)
    if new.event is Event.ACCEPTED:
        return moved
    if new.event is Event.REFUSED:
        return store.move_task(
            tx,
            moved,
            Event.REFUSED,
            result=Result.REFUSED.value,
            reason=new.reason,
            detail=new.detail,
            finished_at=tx.now_us,
            wake_at=None,
        )
    moved = store.move_task(tx, moved, Event.BLOCKED, reason=new.reason, wake_at=new.wake_at)
    if new.event is Event.ACCEPTED_FOR_LATER:
        return store.move_task(tx, moved, Event.UNBLOCKED_FOR_LATER, reason=None, wake_at=new.wake_at)
    return moved
