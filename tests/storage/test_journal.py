"""The journal: shared commits, refusals that undo only themselves, and that nothing is acknowledged which may be lost."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentqd.core.errors import JournalError, SchemaTooNew
from agentqd.core.lifecycle import Event
from agentqd.storage import audit
from agentqd.storage import journal as module
from agentqd.storage import tasks as store
from agentqd.storage.journal import Journal
from agentqd.storage.tasks import NewTask
from agentqd.storage.transaction import Transaction, event_hash
from agentqd.system.clock import ManualClock


def _say(text: str) -> Any:
    return lambda tx: tx.event(None, "said", text=text)


def _said(path: str) -> list[str]:
    """What a new reader of the file sees."""
    with closing(sqlite3.connect(path)) as other:
        return [
            row[0] for row in other.execute("SELECT json_extract(data, '$.text') FROM events ORDER BY seq")
        ]


def _new(name: str, event: Event = Event.ACCEPTED) -> NewTask:
    return NewTask(name, name, "q", "shell", 0, event, None, None, None, b"", "{}", b"{}")


def _check(path: str) -> dict[str, Any]:
    with closing(sqlite3.connect(path)) as other:
        progress = audit.begin(other)
        while not progress.done:
            progress = audit.step(other, progress, 3)
        return progress.as_json()


class _Gate:
    """Holds the journal's thread inside a unit until opened."""

    def __init__(self, journal: Journal) -> None:
        self._entered, self._open = threading.Event(), threading.Event()
        self.done = journal.submit(self._unit)

    def _unit(self, tx: Transaction) -> None:
        self._entered.set()
        assert self._open.wait(10)

    async def entered(self) -> None:
        assert await asyncio.to_thread(self._entered.wait, 10)

    def open(self) -> None:
        self._open.set()


async def test_a_commit_is_in_the_file_before_it_is_acknowledged(journal: Journal, path: str) -> None:
    assert await journal.commit(lambda tx: (tx.event(None, "said", text="x"), 7)[1]) == 7
    assert _said(path) == ["x"]


async def test_units_that_arrive_while_a_commit_is_under_way_share_the_next_one(
    journal: Journal, path: str
) -> None:
    gate = _Gate(journal)
    await gate.entered()
    waiting = [journal.submit(_say(str(n))) for n in range(50)]
    before = journal.commits
    gate.open()
    await asyncio.gather(gate.done, *waiting)
    assert journal.commits == before + 2
    assert _said(path) == [str(n) for n in range(50)]


async def test_a_refused_unit_undoes_only_itself(journal: Journal, path: str) -> None:
    did: list[str] = []

    def refused(tx: Transaction) -> None:
        store.insert_tasks(tx, [_new("no")])
        tx.event(None, "said", text="no")
        tx.count_outbox("s", "pending", 5)
        tx.next_entry_seq()
        tx.after_commit(lambda: did.append("no"))
        tx.later(lambda: did.append("no, later"))
        raise KeyError("refused")

    def good(name: str) -> Any:
        def unit(tx: Transaction) -> int:
            (seq,) = store.insert_tasks(tx, [_new(name)])
            tx.after_commit(lambda: did.append(name))
            return seq

        return unit

    gate = _Gate(journal)
    await gate.entered()
    first, no, duplicate, last = (journal.submit(unit) for unit in (good("a"), refused, good("a"), good("b")))
    gate.open()
    with pytest.raises(KeyError):
        await no
    with pytest.raises(sqlite3.IntegrityError):
        await duplicate
    assert (await first, await last) == (1, 2)
    assert journal.commits == 2
    assert did == ["a", "b"]
    rows = await journal.read(lambda c: c.execute("SELECT id, seq FROM tasks ORDER BY seq").fetchall())
    assert rows == [("a", 1), ("b", 2)]
    assert await journal.read(lambda c: c.execute("SELECT state, n FROM task_counts").fetchall()) == [("queued", 2)]  # fmt: skip
    assert await journal.read(lambda c: c.execute("SELECT * FROM outbox_counts").fetchall()) == []
    assert _check(path)["events"] == 2
    assert await journal.commit(lambda tx: tx.next_entry_seq()) == 1


async def test_what_a_commit_wants_done_is_done_in_order_before_the_waiter_and_the_rest_after(
    journal: Journal,
) -> None:
    order: list[str] = []

    def unit(tx: Transaction) -> None:
        tx.later(lambda: order.append("later"))
        tx.after_commit(lambda: order.append("first"))
        tx.after_commit(lambda: order.append("second"))

    future = journal.submit(unit)
    future.add_done_callback(lambda _: order.append("waiter"))
    await future
    await asyncio.sleep(0)
    assert order[:2] == ["first", "second"]
    assert sorted(order[2:]) == ["later", "waiter"]


async def test_lazy_units_become_durable_without_a_push(journal: Journal, path: str) -> None:
    before = journal.commits
    async with asyncio.timeout(5):
        await asyncio.gather(*(journal.submit_lazily(_say(str(n))) for n in range(10)))
    assert _said(path) == [str(n) for n in range(10)]
    assert journal.commits == before + 1


async def test_lazy_units_ride_on_a_commit_that_is_made_anyway_and_come_first(
    journal: Journal, path: str
) -> None:
    lazy = journal.submit_lazily(_say("lazy"), 3600)
    before = journal.commits
    await journal.commit(_say("urgent"))
    assert lazy.done()
    assert journal.commits == before + 1
    assert _said(path) == ["lazy", "urgent"]


async def test_of_lazy_units_the_most_urgent_takes_the_others_along(journal: Journal, path: str) -> None:
    units = [journal.submit_lazily(_say(f"within {s}"), s) for s in (3600, 0.001, 1800)]
    async with asyncio.timeout(10):
        await asyncio.gather(*units)
    assert _said(path) == ["within 3600", "within 0.001", "within 1800"]
    assert journal.asked == 0, "nobody waits for them"
    await journal.commit(_say("now"))
    assert journal.asked == 1


async def test_closing_commits_what_was_asked_for_before(path: str, clock: ManualClock) -> None:
    journal = Journal(path, clock.now_us)
    await journal.open()
    futures = [journal.submit(_say("a")), journal.submit_lazily(_say("b"))]
    await journal.close()
    await asyncio.gather(*futures)
    assert sorted(_said(path)) == ["a", "b"]


async def test_more_units_than_a_batch_holds_are_all_committed(journal: Journal, path: str) -> None:
    await asyncio.gather(*(journal.submit(_say("x")) for _ in range(1500)))
    assert len(_said(path)) == 1500
    assert _check(path)["ok"]


async def test_a_read_sees_every_commit_before_it_and_can_write_nothing(journal: Journal) -> None:
    for n in range(20):
        await journal.commit(_say(str(n)))
        assert await journal.read(lambda c: c.execute("SELECT count(*) FROM events").fetchone()[0]) == n + 1
    with pytest.raises(JournalError):
        await journal.read(lambda c: c.execute("DELETE FROM events"))
    with pytest.raises(ZeroDivisionError):
        await journal.read(lambda c: 1 // 0)
    await journal.commit(_say("still alive"))


async def test_the_file_and_its_log_are_private(journal: Journal, path: str) -> None:
    await journal.commit(_say("x"))
    for name in (path, path + "-wal", path + "-shm"):
        assert stat.S_IMODE(os.stat(name).st_mode) == 0o600


async def test_the_commits_are_durable_ones(journal: Journal) -> None:
    modes = await journal.commit(
        lambda tx: [
            tx.one(f"PRAGMA {name}")[0] for name in ("journal_mode", "synchronous", "wal_autocheckpoint")
        ]
    )
    assert modes == ["wal", 2, 0]


async def test_the_epoch_grows_with_each_opening(path: str, clock: ManualClock) -> None:
    epochs = []
    for _ in range(3):
        journal = Journal(path, clock.now_us)
        await journal.open()
        epochs.append(journal.epoch)
        await journal.close()
    assert epochs == [1, 2, 3]


async def test_a_daemon_that_has_been_superseded_can_write_nothing(
    journal: Journal, path: str, clock: ManualClock
) -> None:
    await journal.commit(_say("first"))
    second = Journal(path, clock.now_us)
    await second.open()
    with pytest.raises(JournalError, match="taken over"):
        await journal.commit(_say("stale"))
    with pytest.raises(JournalError):
        await journal.failed
    await second.commit(_say("second"))
    await second.close()
    assert _said(path) == ["first", "second"]


async def _fails_for_all(journal: Journal, path: str) -> None:
    """A failure that the next commit meets: nobody who waits is acknowledged, nothing is taken any more."""
    before = _said(path)
    acted: list[str] = []

    def unit(tx: Transaction) -> None:
        tx.event(None, "said", text="x" * 100_000)
        tx.after_commit(lambda: acted.append("acted"))

    futures = [journal.submit(unit), journal.submit_lazily(unit), journal.submit(unit)]
    for outcome in await asyncio.gather(*futures, return_exceptions=True):
        assert isinstance(outcome, JournalError), outcome
    for ask in (journal.commit(unit), journal.submit_lazily(unit), journal.read(lambda c: None)):
        with pytest.raises(JournalError):
            await ask
    with pytest.raises(JournalError):
        await journal.failed
    assert acted == []
    await journal.close()
    assert _said(path) == before


async def test_a_write_that_sqlite_refuses_fails_everyone_who_waits(journal: Journal, path: str) -> None:
    await journal.commit(_say("before"))
    await journal.commit(lambda tx: tx.execute("PRAGMA query_only=1").close())
    await _fails_for_all(journal, path)


async def test_a_full_database_fails_everyone_who_waits(journal: Journal, path: str) -> None:
    await journal.commit(_say("before"))
    pages = await journal.commit(lambda tx: tx.one("PRAGMA page_count")[0])
    await journal.commit(lambda tx: tx.execute(f"PRAGMA max_page_count={pages + 1}").fetchone())
    await _fails_for_all(journal, path)


async def test_an_error_in_the_middle_of_a_batch_fails_the_good_units_too(
    journal: Journal, path: str
) -> None:
    gate = _Gate(journal)
    await gate.entered()
    good = journal.submit(_say("good"))
    bad = journal.submit(lambda tx: tx.execute("SELECT * FROM no_such_table"))
    gate.open()
    for future in (gate.done, good, bad):
        if future is not gate.done:
            with pytest.raises(JournalError):
                await future
    assert _said(path) == []


async def test_a_log_that_cannot_be_watched_fails_loudly_and_never_hangs(journal: Journal, path: str) -> None:
    """What EMFILE does, too: the wal-index cannot be opened after the first commit."""
    os.unlink(path + "-shm")
    await journal.commit(_say("x"))
    async with asyncio.timeout(5):
        with pytest.raises(JournalError):
            await journal.failed
        with pytest.raises(JournalError):
            await journal.commit(_say("y"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_bug_in_a_hook_commits_nothing_and_ends_the_journal(journal: Journal, path: str) -> None:
    def hook(tx: Transaction) -> None:
        raise AssertionError("bug")

    journal.before_commit = hook
    with pytest.raises(JournalError, match="bug"):
        await journal.commit(_say("x"))
    with pytest.raises(JournalError):
        await journal.commit(_say("y"))
    assert _said(path) == []


async def test_an_action_that_fails_after_the_commit_is_told_to_the_owner(
    journal: Journal, path: str
) -> None:
    await journal.commit(lambda tx: (tx.event(None, "said", text="x"), tx.after_commit(lambda: 1 // 0))[1])
    with pytest.raises(ZeroDivisionError):
        await journal.failed
    assert _said(path) == ["x"]


async def test_the_log_starts_over_before_it_grows_for_ever(journal: Journal, path: str, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(module, "_CHECKPOINT_FRAMES", 50)
    for n in range(60):
        await journal.commit(lambda tx, n=n: tx.event(None, "said", text=str(n) * 20_000))
    assert os.stat(path + "-wal").st_size < 3_000_000
    assert os.stat(path).st_size > 200_000


@pytest.mark.parametrize(
    "content", [b"this is no database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 5000]
)
async def test_a_file_that_is_no_journal_is_an_error_and_left_alone(
    path: str, clock: ManualClock, content: bytes
) -> None:
    Path(path).write_bytes(content)
    with pytest.raises(JournalError, match="cannot be opened"):
        await Journal(path, clock.now_us).open()
    assert Path(path).read_bytes() == content


async def test_a_journal_in_a_missing_folder_is_an_error(tmp_path: Path, clock: ManualClock) -> None:
    with pytest.raises(JournalError, match="cannot be opened"):
        await Journal(str(tmp_path / "no" / "journal.db"), clock.now_us).open()


async def test_a_newer_schema_is_refused_and_not_touched(path: str, clock: ManualClock) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version=999")
    with pytest.raises(SchemaTooNew, match="999"):
        await Journal(path, clock.now_us).open()
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("PRAGMA user_version").fetchone() == (999,)
        assert other.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'tasks'").fetchone() == (0,)


# The chain.


async def _chain(journal: Journal) -> None:
    for n in range(10):
        await journal.commit(
            lambda tx, n=n: tx.event(f"t{n % 3}" if n % 2 else None, "said", text=f"event {n}")
        )


async def test_the_chain_of_events_verifies_and_goes_on_after_a_restart(journal: Journal, path: str, clock: ManualClock) -> None:  # fmt: skip
    await _chain(journal)
    await journal.close()
    again = Journal(path, clock.now_us)
    await again.open()
    await _chain(again)
    await again.close()
    found = _check(path)
    assert (found["ok"], found["events"], found["first_seq"], found["last_seq"]) == (True, 20, 1, 20)


@pytest.mark.parametrize(
    ("change", "at"),
    [
        ("UPDATE events SET data = replace(data, 'event 4', 'event 5') WHERE seq = 5", 5),
        ("UPDATE events SET at = at + 1 WHERE seq = 3", 3),
        ("UPDATE events SET task = 't9' WHERE seq = 2", 2),
        ("UPDATE events SET task = 't9' WHERE seq = 1", 1),
        ("UPDATE events SET event = 'sa1d' WHERE seq = 10", 10),
        ("UPDATE events SET hash = zeroblob(32) WHERE seq = 7", 7),
        ("DELETE FROM events WHERE seq = 6", 6),
        ("DELETE FROM events WHERE seq = 1", 1),
        ("UPDATE events SET seq = 11 WHERE seq = 10", 10),
        ("UPDATE events SET seq = seq + 1000 WHERE seq > 4", 5),
        ("INSERT INTO events SELECT 11, at, task, event, data, hash FROM events WHERE seq = 10", 11),
    ],
)  # fmt: skip
async def test_a_changed_event_is_found(journal: Journal, path: str, change: str, at: int) -> None:
    await _chain(journal)
    await journal.close()
    with closing(sqlite3.connect(path)) as other:
        assert other.execute(change).rowcount >= 1
        other.commit()
    found = _check(path)
    assert (found["ok"], found["broken_at"]) == (False, at)
    assert str(at) in found["reason"]


async def test_a_forger_who_mends_the_hash_of_the_event_is_found_at_the_next_one(
    journal: Journal, path: str
) -> None:
    await _chain(journal)
    await journal.close()
    with closing(sqlite3.connect(path)) as other:
        (before,) = other.execute("SELECT hash FROM events WHERE seq = 4").fetchone()
        at, task, event = other.execute("SELECT at, task, event FROM events WHERE seq = 5").fetchone()
        forged = event_hash(before, 5, at, task, event, "{}")
        other.execute("UPDATE events SET data = '{}', hash = ? WHERE seq = 5", (forged,))
        other.commit()
    assert _check(path)["broken_at"] == 6


async def test_no_two_events_read_alike_to_the_chain(journal: Journal) -> None:
    hashes = {event_hash(bytes(32), *event) for event in ((1, 2, "a", "b", "{}"), (1, 2, None, "b", "{}"), (12, 2, "a", "b", "{}"),
                                                          (1, 22, "a", "b", "{}"), (1, 2, "ab", "", "{}"))}  # fmt: skip
    assert len(hashes) == 5


async def test_a_file_that_is_no_database_is_refused_and_not_kept_open(path: str) -> None:
    Path(path).write_bytes(b"no database at all, and long enough to be one\n" * 100)
    with pytest.raises(JournalError, match="not a database") as caught:
        await Journal(path, lambda: 0).open()
    opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]  # fmt: skip
    assert path not in opened, caught.value


# A real I/O error, by strace in a process of its own.

WRITER = """
import asyncio, sys
from agentqd.core.errors import JournalError
from agentqd.storage import connection as module
from agentqd.storage.journal import Journal
module._WAL_WARM_BYTES = 4096

async def main():
    journal = Journal(sys.argv[1], lambda: 0)
    await journal.open()
    for n in range(100):
        try:
            await journal.commit(lambda tx: tx.event(None, "said", text=str(n)))
        except JournalError:
            print("failed", flush=True)
            break
        print("acknowledged", n, flush=True)
    await journal.close()

asyncio.run(main())
"""


@pytest.mark.root
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize(("call", "when"), [("fdatasync", 12), ("pwrite64", 80)])  # counted in each thread
async def test_an_io_error_is_never_acknowledged_and_nothing_acknowledged_is_lost(
    path: str, clock: ManualClock, error: str, call: str, when: int
) -> None:
    made = Journal(path, clock.now_us)  # so that opening it again takes few calls
    await made.open()
    await made.close()
    command = ["strace", "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={when}+",
               sys.executable, "-c", WRITER, path]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.splitlines()
    assert lines[-1] == "failed", done.stdout + done.stderr
    acknowledged = [line.split()[1] for line in lines[:-1]]
    assert acknowledged, "the error came too early to show anything"
    assert acknowledged == _said(path)[: len(acknowledged)]
