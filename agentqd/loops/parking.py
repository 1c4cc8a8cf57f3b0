"""Moves of many rows of one sink at once: held while it is disabled, released, woken, expired. Units, a bounded number of rows each."""

from __future__ import annotations

from typing import Final

from agentqd.core.limits import ROWS_A_COMMIT, SINK_ERROR_CHARS_MAX
from agentqd.core.outbox import RowEvent, RowState
from agentqd.core.units import format_duration
from agentqd.loops import sinkmemory
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.loops.marking import DISABLED, US
from agentqd.loops.sinkmemory import SinkMemory, Word
from agentqd.storage import outbox
from agentqd.storage.outbox import Mark
from agentqd.storage.transaction import Transaction

_OPEN_ROWS: Final = "SELECT entry_seq, state, attempts, due_at FROM outbox WHERE sink = ? AND state IN ('pending','delivering','retryable') AND due_at IS NOT NULL LIMIT ?"
_HELD_ROWS: Final = "SELECT entry_seq, due_at FROM outbox WHERE state = 'held' AND sink = ? AND substr(last_error, 1, ?) = ? LIMIT ?"
_HELD_COUNT: Final = (
    "SELECT count(*) FROM outbox WHERE state = 'held' AND sink = ? AND substr(last_error, 1, ?) = ?"
)
_WAKE: Final = (
    "UPDATE outbox SET due_at = ? WHERE sink = ? AND entry_seq IN (SELECT entry_seq FROM outbox"
    " WHERE sink = ? AND state IN ('pending','delivering','retryable') AND due_at > ? ORDER BY due_at LIMIT ?)"
)
_EXPIRED: Final = (
    "SELECT o.entry_seq, o.state, o.attempts, e.delivery_id, t.id FROM outbox o JOIN entries e ON e.seq = o.entry_seq"
    " LEFT JOIN tasks t ON t.seq = e.task_seq"
    " WHERE o.state IN ('pending','delivering','retryable') AND o.created_at < ? AND +o.sink = ? ORDER BY o.created_at LIMIT ?"
)


def hold_open(tx: Transaction, sink: str, in_flight: frozenset[int]) -> int:
    """Hold what is open, but for what is being sent; returns how many. None once the sink is enabled again. A row keeps the time
    of its next try: being held does not bring it forward."""
    reason = sinkmemory.load_all(tx, sink).why_disabled
    if reason is None:
        return 0
    text = f"{DISABLED}{reason}"[:SINK_ERROR_CHARS_MAX]
    rows = tx.execute(_OPEN_ROWS, (sink, ROWS_A_COMMIT + len(in_flight))).fetchall()
    marks = [
        Mark(seq, sink, RowState(state), RowEvent.HELD, attempts, due_at, None, text)
        for seq, state, attempts, due_at in rows
        if seq not in in_flight
    ]
    held = len(outbox.mark(tx, marks))
    if held:
        tx.event(None, "sink_rows_held", sink=sink, count=held)
    return held


def held_by_it(tx: Transaction, sink: str) -> int:
    """How many rows are held because the sink was disabled: those that `release_disabled` lets go on."""
    (count,) = tx.one(_HELD_COUNT, (sink, len(DISABLED), DISABLED))
    return int(count)


def release_disabled(tx: Transaction, sink: str) -> int:
    """Release what was held because the sink was disabled (not what a person holds); returns how many. A row whose next try
    lay later waits for that (its receiver may have asked for it). Once none is left, the journal says so: a daemon that dies in
    between goes on releasing. None while it is disabled (again)."""
    kept = sinkmemory.load_all(tx, sink)
    if kept.why_disabled is not None:
        return 0
    rows = tx.execute(_HELD_ROWS, (sink, len(DISABLED), DISABLED, ROWS_A_COMMIT)).fetchall()
    for seq, due_at in rows:
        later = max(tx.now_us, due_at or 0)
        outbox.change_row(tx, seq, sink, RowEvent.RELEASED, due_at=later, last_error=None)
    if rows:
        tx.event(None, "sink_rows_released", sink=sink, count=len(rows))
    if len(rows) < ROWS_A_COMMIT and kept.word.releasing:
        sinkmemory.save_word(tx, sink, Word())
    return len(rows)


def begin_anew(tx: Transaction, sink: str, *, release: bool) -> None:
    """The sink was edited: what its receiver did is forgotten, a person's word is not. `release`: its held rows are to go on."""
    sinkmemory.save(tx, sink, SinkMemory())
    word = sinkmemory.load_word(tx, sink)
    if release and not word.off:
        sinkmemory.save_word(tx, sink, Word(releasing=True))


def disable(tx: Transaction, sink: str, reason: str, uid: int | None) -> Word | None:
    """A person's word: nothing is sent to this sink, over restarts and edits, until they say `enable`. None: said before."""
    if sinkmemory.load_word(tx, sink).off:
        return None
    word = Word(off=True, at_us=tx.now_us, reason=reason, uid=uid)
    sinkmemory.save_word(tx, sink, word)
    tx.event(None, "sink_disabled", sink=sink, by="person", uid=uid, reason=reason)
    return word


def enable(tx: Transaction, sink: str, uid: int | None) -> bool:
    """Whoever has disabled it: it is enabled, its breaker closed, and what was held because of it is to be released.

    True if it was disabled. (Also one that was not: a release may be under way.)
    """
    was = sinkmemory.load_all(tx, sink).why_disabled is not None
    sinkmemory.save(tx, sink, SinkMemory())
    sinkmemory.save_word(tx, sink, Word(releasing=True))
    if was:
        tx.event(None, "sink_enabled", sink=sink, by="person", uid=uid)
    return was


def wake(tx: Transaction, sink: str) -> int:
    """Deferred rows become due now; returns how many."""
    cursor = tx.execute(_WAKE, (tx.now_us, sink, sink, tx.now_us, ROWS_A_COMMIT))
    return max(0, cursor.rowcount)


def expire(
    tx: Transaction, box: Box, sink: str, lifetime_s: float, why: str | None, in_flight: frozenset[int]
) -> int:
    """Rows that wait behind an open breaker past their lifetime are dead letters, told in one alert; returns how many."""
    rows = tx.execute(_EXPIRED, (tx.now_us - int(lifetime_s * US), sink, ROWS_A_COMMIT)).fetchall()
    reason = f"not delivered within {format_duration(lifetime_s)}: {why}"[:SINK_ERROR_CHARS_MAX]
    marks = {
        seq: Mark(seq, sink, RowState(state), RowEvent.GAVE_UP, attempts, None, None, reason)
        for seq, state, attempts, _, _ in rows
        if seq not in in_flight
    }
    done = {mark.entry_seq for mark in outbox.mark(tx, marks.values())}
    first = None
    for seq, _, _, delivery_id, task_id in rows:
        if seq in done:
            first = first or delivery_id
            tx.event(task_id, "delivery_dead", sink=sink, delivery_id=delivery_id, reason=reason)
    if first is not None:
        message = f"{len(done)} deliveries to {sink} are now dead letters, {first} the first: {reason}"
        alert(
            tx, box, "dead_letter", message, key=f"{first}:{sink}:expired", group=sink, not_to=sink, sink=sink
        )
    return len(done)
