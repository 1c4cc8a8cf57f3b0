"""The sums that `status` shows are always those of a walk over all rows; marks are guarded; nothing is numbered twice."""

from __future__ import annotations

import sqlite3
from collections import Counter
from typing import Any

import pytest
from budget import tries
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from agentqd.core.errors import IllegalTransition
from agentqd.core.lifecycle import TABLE, Event, State
from agentqd.core.outbox import TABLE as ROW_TABLE
from agentqd.core.outbox import RowEvent, RowState, next_row_state
from agentqd.storage import audit, outbox
from agentqd.storage import tasks as store
from agentqd.storage.connection import migrate
from agentqd.storage.journal import Journal
from agentqd.storage.outbox import Mark, NewEntry
from agentqd.storage.tasks import NewTask, StaleState
from agentqd.storage.transaction import Numbers, Transaction
from agentqd.system.clock import ManualClock

FIRST = st.sampled_from(sorted(TABLE[State.NEW]))
QUEUES, SINKS = st.sampled_from(["q", "r"]), st.sampled_from(["completions", "s"])


def _new(task_id: str, queue: str = "q", event: Event = Event.ACCEPTED) -> NewTask:
    return NewTask(task_id, "n", queue, "shell", 0, event, None, None, None, b"", "{}", b"{}")


def _entry(delivery_id: str, task_seq: int | None, sinks: list[str], dead: str | None = None) -> NewEntry:
    return NewEntry(delivery_id, task_seq, 1, 1, "entry", delivery_id, "t", b"{}", sinks, dead_reason=dead)


class Sums(RuleBasedStateMachine):
    """Transactions as the journal makes them, some rolled back, over an in-memory database."""

    @initialize()
    def open(self) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        migrate(self.connection, ":memory:")
        self.numbers = Numbers.load(self.connection)
        self.made = 0

    def teardown(self) -> None:
        if hasattr(self, "connection"):
            self.connection.close()

    def _commit(self, unit: Any, undo: bool = False) -> None:
        self.connection.execute("BEGIN")
        tx = Transaction(self.connection, self.numbers.copy(), 0)
        mark = tx.mark()
        self.connection.execute("SAVEPOINT unit")
        unit(tx)
        if undo:
            self.connection.execute("ROLLBACK TO unit")
            tx.return_to(mark)
        tx.flush()
        self.connection.execute("COMMIT")
        self.numbers = tx.numbers

    def _task(self, n: int) -> store.TaskRow | None:
        rows = self.connection.execute("SELECT seq FROM tasks ORDER BY seq").fetchall()
        return store.get(self.connection, rows[n % len(rows)][0]) if rows else None

    @rule(queue=QUEUES, events=st.lists(FIRST, min_size=1, max_size=4), undo=st.booleans())
    def insert(self, queue: str, events: list[Event], undo: bool) -> None:
        self.made += 10
        self._commit(lambda tx: store.insert_tasks(tx, [_new(f"t{self.made + n}", queue, event) for n, event in enumerate(events)]), undo)  # fmt: skip

    @rule(n=st.integers(0, 50), legal=st.sampled_from([True, True, False]), pick=st.integers(0, 50),
          result=st.sampled_from(["success", "failed"]), undo=st.booleans())  # fmt: skip
    def move(self, n: int, legal: bool, pick: int, result: str, undo: bool) -> None:
        task = self._task(n)
        if task is None:
            return
        events = sorted(TABLE[task.state]) if legal else list(Event)
        event = events[pick % len(events)]
        to = TABLE[task.state].get(event)
        columns = {"result": result} if to is State.FINISHED else {}

        def unit(tx: Transaction) -> None:
            if to is None:
                with pytest.raises(IllegalTransition):
                    store.move_task(tx, task, event, **columns)
            else:
                assert store.move_task(tx, task, event, **columns) == store.get(tx, task.seq)

        self._commit(unit, undo)

    @rule(
        n=st.integers(0, 50),
        sinks=st.lists(SINKS, unique=True, max_size=2),
        dead=st.booleans(),
        undo=st.booleans(),
    )
    def hand_over(self, n: int, sinks: list[str], dead: bool, undo: bool) -> None:
        task = self._task(n)
        self.made += 1
        self._commit(lambda tx: outbox.add_entry(tx, _entry(f"d{self.made}", task and task.seq, sinks, "broken" if dead else None)), undo)  # fmt: skip

    @rule(
        n=st.integers(0, 50),
        pick=st.integers(0, 50),
        by_person=st.booleans(),
        stale=st.none() | st.sampled_from(RowState),
    )
    def deliver(self, n: int, pick: int, by_person: bool, stale: RowState | None) -> None:
        rows = self.connection.execute("SELECT entry_seq, sink, state FROM outbox ORDER BY 1, 2").fetchall()
        if not rows:
            return
        seq, sink, state = rows[n % len(rows)]
        was = stale or RowState(state)
        events = list(RowEvent) if by_person else sorted(ROW_TABLE[RowState.DELIVERING])
        event = events[pick % len(events)]

        def unit(tx: Transaction) -> None:
            if by_person:
                if event in ROW_TABLE[RowState(state)]:
                    assert outbox.change_row(tx, seq, sink, event) is next_row_state(RowState(state), event)
                else:
                    with pytest.raises(IllegalTransition):
                        outbox.change_row(tx, seq, sink, event)
            else:
                done = outbox.mark(tx, [Mark(seq, sink, was, event, 1)])
                assert bool(done) == (was.value == state)

        self._commit(unit)

    @rule()
    def restart(self) -> None:
        before = self.numbers
        self.numbers = Numbers.load(self.connection)
        assert (self.numbers.task, self.numbers.entry, self.numbers.event, self.numbers.head) == (
            before.task, before.entry, before.event, before.head,
        )  # fmt: skip

    @invariant()
    def sums_are_true(self) -> None:
        if not hasattr(self, "connection"):
            return
        for kept, walked in (
            ("SELECT queue, state, result, n FROM task_counts WHERE n", "SELECT queue, state, coalesce(result, ''), count(*) FROM tasks GROUP BY 1, 2, 3"),
            ("SELECT sink, state, n FROM outbox_counts WHERE n", "SELECT sink, state, count(*) FROM outbox GROUP BY 1, 2"),
        ):  # fmt: skip
            assert Counter(self.connection.execute(kept).fetchall()) == Counter(self.connection.execute(walked).fetchall())  # fmt: skip

    @invariant()
    def active_tasks_are_counted_in_memory_too(self) -> None:
        if hasattr(self, "connection"):
            walked = self.connection.execute("SELECT queue, count(*) FROM tasks WHERE state IN ('running', 'stopping') GROUP BY 1")  # fmt: skip
            kept = {queue: n for queue, n in self.numbers.active.items() if n}
            assert kept == dict(walked.fetchall())

    @invariant()
    def the_chain_is_whole(self) -> None:
        if hasattr(self, "connection"):
            progress = audit.step(self.connection, audit.begin(self.connection), 10_000)
            assert progress.broken_at is None
            assert progress.done

    @invariant()
    def a_result_is_there_exactly_when_finished(self) -> None:
        if hasattr(self, "connection"):
            assert self.connection.execute("SELECT count(*) FROM tasks WHERE (result IS NULL) = (state = 'finished')").fetchone() == (0,)  # fmt: skip


TestSums = Sums.TestCase
TestSums.settings = settings(max_examples=tries(200), stateful_step_count=40)


async def test_a_move_from_a_state_that_is_no_more_changes_nothing(journal: Journal) -> None:
    await journal.commit(lambda tx: store.insert_tasks(tx, [_new("a")]))
    stale = await journal.read(lambda c: store.get(c, 1))
    await journal.commit(lambda tx: store.move_task(tx, stale, Event.CLAIMED))
    with pytest.raises(StaleState, match="no longer queued"):
        await journal.commit(lambda tx: store.move_task(tx, stale, Event.CLAIMED))
    with pytest.raises(AssertionError):
        await journal.commit(lambda tx: store.move_task(tx, store.get(tx, 1), Event.FINISHED, result=None))
    assert (await journal.read(lambda c: store.get(c, 1))).state is State.RUNNING


async def test_a_mark_of_a_row_that_a_person_has_dropped_is_left_out(journal: Journal) -> None:
    await journal.commit(lambda tx: [outbox.add_entry(tx, _entry(f"d{n}", None, ["s"])) for n in range(2)])
    await journal.commit(lambda tx: outbox.change_row(tx, 1, "s", RowEvent.DROPPED))
    marks = [Mark(n, "s", RowState.PENDING, RowEvent.ACKNOWLEDGED, 1, None, n) for n in (1, 2)]
    done = await journal.commit(lambda tx: outbox.mark(tx, marks))
    assert done == marks[1:]
    counts = await journal.read(
        lambda c: c.execute("SELECT state, n FROM outbox_counts WHERE n ORDER BY 1").fetchall()
    )
    assert counts == [("delivered", 1), ("dropped", 1)]
    assert await journal.read(lambda c: c.execute("SELECT state, position FROM outbox ORDER BY 1").fetchall()) == [("delivered", 2), ("dropped", None)]  # fmt: skip
    assert await journal.read(lambda c: outbox.last_position(c, "s")) == 2
    assert await journal.read(lambda c: outbox.last_position(c, "other")) == 0


async def test_a_mark_that_the_table_does_not_know_is_refused(journal: Journal) -> None:
    await journal.commit(lambda tx: outbox.add_entry(tx, _entry("d1", None, ["s"])))
    with pytest.raises(IllegalTransition):
        await journal.commit(
            lambda tx: outbox.mark(tx, [Mark(1, "s", RowState.PENDING, RowEvent.DROPPED, 1)])
        )


async def test_rows_fall_due_in_order_and_the_next_due_time_is_known(
    journal: Journal, clock: ManualClock
) -> None:
    now = clock.now_us()

    def unit(tx: Transaction) -> None:
        for n, due in enumerate([now + 5, now, now + 3, now - 4]):
            entry = _entry(f"d{n}", None, ["s"])
            entry.due_at = due
            outbox.add_entry(tx, entry)
        outbox.add_row(tx, 1, "other")

    await journal.commit(unit)
    assert [row.delivery_id for row in await journal.read(lambda c: outbox.due(c, "s", now + 4, 10))] == ["d3", "d1", "d2"]  # fmt: skip
    assert await journal.read(lambda c: outbox.next_due(c, "s", now + 4)) == now + 5
    assert await journal.read(lambda c: outbox.next_due(c, "s", now + 5)) is None
    assert await journal.read(outbox.open_sinks) == {"s", "other"}


async def test_the_fresh_row_of_a_commit_is_the_row_that_the_journal_holds(
    journal: Journal, clock: ManualClock
) -> None:
    fresh: list[Any] = []

    def unit(tx: Transaction) -> None:
        (seq,) = store.insert_tasks(tx, [_new("a")])
        entry = _entry("d1", seq, ["s"])
        entry.task_id = "a"
        outbox.add_entry(tx, entry)
        fresh.extend(row for _, row in tx.fresh_rows)

    await journal.commit(unit)
    assert fresh == await journal.read(lambda c: outbox.due(c, "s", clock.now_us(), 10))


async def test_thousands_of_ids_are_found_at_once(journal: Journal) -> None:
    await journal.commit(lambda tx: store.insert_tasks(tx, [_new(f"t{n}") for n in range(1200)]))
    found = await journal.read(lambda c: store.find_many(c, [f"t{n}" for n in range(0, 2400, 2)]))
    assert len(found) == 600
    assert all(row.id == task_id for task_id, row in found.items())
