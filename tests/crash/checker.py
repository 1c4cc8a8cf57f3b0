"""What must hold after any crash, once everything has come to rest: asked of the files and of the journal, never of the program."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from realbox import WAIT_S, RealBox, wait_for

from agentqd.storage.transaction import event_hash


@contextmanager
def journal(box: RealBox) -> Iterator[sqlite3.Connection]:
    """Read-only, beside the living daemon."""
    connection = sqlite3.connect(f"file:{box.state}/journal.db?mode=ro", uri=True, timeout=10)
    try:
        yield connection
    finally:
        connection.close()


def query(box: RealBox, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    try:
        with journal(box) as connection:
            return connection.execute(sql, parameters).fetchall()
    except sqlite3.OperationalError:  # in the middle of its first start
        return []


def at_rest(box: RealBox, *names: str) -> bool:
    """These tasks are in the journal, every task has finished, every row is delivered and marked."""
    for name in names:
        if not query(box, "SELECT 1 FROM tasks WHERE name = ?", name):
            return False
    open_tasks = query(box, "SELECT count(*) FROM tasks WHERE state != 'finished'")
    open_rows = query(box, "SELECT count(*) FROM outbox WHERE state NOT IN ('delivered', 'dead')")
    return open_tasks == [(0,)] and open_rows == [(0,)]


def wait_until_at_rest(box: RealBox, *names: str, wait_s: float = 2 * WAIT_S) -> None:
    try:
        wait_for("every task finished and every row delivered", lambda: at_rest(box, *names), wait_s)
    except AssertionError as error:
        tasks = query(
            box, "SELECT id, name, state, reason, attempt FROM tasks WHERE state != 'finished' LIMIT 20"
        )
        rows = query(
            box, "SELECT entry_seq, sink, state, last_error FROM outbox WHERE state != 'delivered' LIMIT 20"
        )
        raise AssertionError(f"{error}\ntasks {tasks}\nrows {rows}\n{box.log_text()[-6000:]}") from None


def check_chain(box: RealBox) -> int:
    """The audit chain, hashed anew from its beginning. Returns its length."""
    head, expected = bytes(32), 1
    for seq, at, task, event, data, kept in query(
        box, "SELECT seq, at, task, event, data, hash FROM events ORDER BY seq"
    ):
        assert seq == expected, f"event {expected} is missing"
        head = event_hash(head, seq, at, task, event, data)
        assert head == bytes(kept), f"the chain breaks at event {seq} ({event})"
        expected += 1
    return expected - 1


def check_sums(box: RealBox) -> None:
    """The counted sums are what a count finds: in one snapshot, as the daemon lives."""
    with journal(box) as connection:
        connection.execute("BEGIN")
        tasks, kept_tasks, rows, kept_rows = [
            connection.execute(sql).fetchall()
            for sql in (
                "SELECT queue, state, coalesce(result, ''), count(*) FROM tasks GROUP BY 1, 2, 3 ORDER BY 1, 2, 3",
                "SELECT queue, state, result, n FROM task_counts WHERE n != 0 ORDER BY 1, 2, 3",
                "SELECT sink, state, count(*) FROM outbox GROUP BY 1, 2 ORDER BY 1, 2",
                "SELECT sink, state, n FROM outbox_counts WHERE n != 0 ORDER BY 1, 2",
            )
        ]
    assert tasks == kept_tasks
    assert rows == kept_rows


def check_folders(box: RealBox) -> None:
    """No half folder is left, and no blob under a temporary name."""
    left = [str(path) for path in box.state.glob("tasks/*/.attempt-*")] + [
        str(path) for path in box.state.glob("blobs/.tmp-*")
    ]
    assert not left, f"left behind: {left}"


def check_completions(box: RealBox) -> list[dict[str, Any]]:
    """No delivery twice, no seq twice, none out of order; what the journal calls delivered is in the file, and the reverse."""
    lines = box.completions()
    twice = [name for name, n in Counter(line["delivery_id"] for line in lines).items() if n > 1]
    assert not twice, f"in completions.jsonl more than once: {twice}"
    seqs = [line["seq"] for line in lines]
    assert seqs == sorted(set(seqs)), f"seqs out of order or doubled: {seqs[-20:]}"
    marked = query(
        box,
        "SELECT e.delivery_id, o.position FROM outbox o JOIN entries e ON e.seq = o.entry_seq"
        " WHERE o.sink = 'completions' AND o.state = 'delivered'",
    )
    assert dict(marked) == {line["delivery_id"]: line["seq"] for line in lines}, (
        "file and journal do not agree"
    )
    return lines


def check_all(box: RealBox) -> list[dict[str, Any]]:
    """All of the above. Returns the completions."""
    check_chain(box)
    check_sums(box)
    check_folders(box)
    return check_completions(box)


class Side:
    """The worker's side effects, in a folder of the test's: how often it ran, and whether two ran at once.

    The lock is held through an inherited descriptor, so it is free only when the whole tree is gone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def script(self, name: str, rest: str = "") -> str:
        """Writes to stdout, into work/ and hands one entry over; then `rest`."""
        return (
            f'exec 9>>"{self.folder}/lock-{name}"\n'
            f'flock -n 9 || echo "{name} $AGENTQ_ATTEMPT" >> "{self.folder}/violations"\n'
            f'echo "$AGENTQ_ATTEMPT" >> "{self.folder}/ran-{name}"\n'
            "echo hello\n"
            "echo made > made\n"
            'echo "{\\"n\\": 1}" > "$AGENTQ_OUTBOX/.part" && mv "$AGENTQ_OUTBOX/.part" "$AGENTQ_OUTBOX/entry.json"\n'
            f"{rest}\n"
        )

    def runs(self, name: str) -> list[int]:
        """The attempts that ran, in order."""
        path = self.folder / f"ran-{name}"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def check(self) -> None:
        violations = self.folder / "violations"
        assert not violations.exists(), f"two workers at once: {violations.read_text()}"


def check_once(box: RealBox, side: Side, name: str, lines: list[dict[str, Any]]) -> None:
    """One `success`, one entry, one run."""
    results = [line for line in lines if line["name"] == name and "status" in line]
    entries = [line for line in lines if line["name"] == name and "status" not in line]
    assert [line["status"] for line in results] == ["success"], f"{name}: {results}"
    assert [line["key"] for line in entries] == ["entry.json"], f"{name}: {entries}"
    assert side.runs(name) == [1], f"{name} ran {side.runs(name)}"
    result = results[0]
    assert result["stdout_tail"] == "hello\n", result
    assert [item["path"] for item in result["artifacts"]] == ["made"], result
    assert result["evidence"]["entries"] == 1, result
