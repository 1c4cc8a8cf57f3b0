"""What the delivery loop costs, in one process with a real journal: the daemon's loop, plugs and commits, and no workers.

Lines a second: rows that wait in the journal are delivered to `completions`; from the start of the loop until the last one is
marked. One floor appends the same lines in the same groups with the same fdatasync and does nothing else; the other one also
reads the rows from SQLite and marks them there in a transaction a group, with executemany, which any outbox has to.

Waiting rows: 100,000 for a `file` sink, beside 1,000: what one costs to drain, and how long a fresh row takes while the others
wait for their retry.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from agentqd.core.envelope import delivery_id, seal
from agentqd.core.limits import COMPLETIONS_BATCH_MAX
from agentqd.core.settings import Settings, Sink
from agentqd.loops.delivery import DeliveryLoop
from agentqd.sinks.base import Delivery
from agentqd.sinks.completions import CompletionLines
from agentqd.storage import outbox
from agentqd.storage.outbox import NewEntry
from agentqd.storage.transaction import Transaction
from agentqd.system.clock import SystemClock
from benchmarks.box import rss_mb
from benchmarks.measure import Row, percentile, summary

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from loops.harness import Bench

ROUNDS: Final = 3
FEW: Final = 1000
_A_COMMIT: Final = 2000
_LATER_US: Final = 3600 * 1_000_000
_READ: Final = "SELECT e.seq, e.delivery_id, e.type, e.key, e.payload, e.sha256 FROM outbox o JOIN entries e ON e.seq = o.entry_seq WHERE o.sink = 'completions' AND o.state = 'pending' ORDER BY o.due_at, o.entry_seq LIMIT ?"
_MARK: Final = "UPDATE outbox SET state = 'delivered', attempts = 1, due_at = NULL, delivered_at = ?, position = ? WHERE entry_seq = ? AND sink = 'completions'"


def measure(folder: Path, lines: int, waiting: int, samples: int, rounds: int) -> list[Row]:
    folder.mkdir()
    return [*_lines(folder, lines, rounds), *_waiting(folder, waiting, samples, rounds)]


# Lines a second.


def _lines(folder: Path, lines: int, rounds: int) -> list[Row]:
    ours, bare, marked = [], [], []
    for n in range(rounds):
        base = folder / f"lines-{n}"
        payloads = asyncio.run(_prepare(base, lines))
        shutil.copytree(base / "state", base / "copy")
        bare.append(lines / _bare_s(base / "bare.jsonl", payloads))
        marked.append(lines / _marked_s(base / "copy" / "journal.db", base / "marked.jsonl", lines))
        ours.append(lines / asyncio.run(_drain_s(base, Settings(), "completions", lines)))
        shutil.rmtree(base)
    return [
        Row("completions: lines a second, beside a loop that reads, appends and marks", statistics.median(marked), statistics.median(ours), "/s", 0.5, "higher", note=f"{lines:,} waiting rows, groups of {COMPLETIONS_BATCH_MAX:,}"),
        Row("the same beside a loop that only appends", statistics.median(bare), statistics.median(ours), "/s", 0.5, "higher", note="no journal at all"),
    ]  # fmt: skip


async def _prepare(base: Path, lines: int) -> list[tuple[str, bytes]]:
    async with _bench(base, Settings()) as bench:
        await _fill(bench, "completions", range(lines))
        return [(row[0], row[1]) for row in await bench.rows("SELECT delivery_id, payload FROM entries ORDER BY seq")]  # fmt: skip


def _bare_s(path: Path, payloads: list[tuple[str, bytes]]) -> float:
    made = CompletionLines()
    began = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for start in range(0, len(payloads), COMPLETIONS_BATCH_MAX):
        group = payloads[start : start + COMPLETIONS_BATCH_MAX]
        lines = [made.line(Delivery(name, 0, "agentq.task.success", "result", "", None, payload, 0, 0), n) for n, (name, payload) in enumerate(group, start + 1)]  # fmt: skip
        os.write(fd, b"".join(lines))
        os.fdatasync(fd)
    os.close(fd)
    return time.perf_counter() - began


def _marked_s(journal: Path, path: Path, count: int) -> float:
    made = CompletionLines()
    connection = sqlite3.connect(journal, isolation_level=None)
    connection.executescript("PRAGMA synchronous = FULL; PRAGMA temp_store = MEMORY")
    began = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for start in range(0, count, COMPLETIONS_BATCH_MAX):
        rows = connection.execute(_READ, (COMPLETIONS_BATCH_MAX,)).fetchall()
        lines = [made.line(Delivery(row[1], row[0], row[2], "result", row[3], None, row[4], 0, 0), n) for n, row in enumerate(rows, start + 1)]  # fmt: skip
        os.write(fd, b"".join(lines))
        os.fdatasync(fd)
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(_MARK, [(0, n, row[0]) for n, row in enumerate(rows, start + 1)])
        connection.execute("COMMIT")
    took = time.perf_counter() - began
    os.close(fd)
    connection.close()
    return took


# Rows that wait.


def _waiting(folder: Path, waiting: int, samples: int, rounds: int) -> list[Row]:
    drains: dict[int, list[float]] = {FEW: [], waiting: []}
    fresh: dict[int, list[float]] = {FEW: [], waiting: []}
    grown = 0.0
    for n in range(rounds):
        for count in (FEW, waiting):
            base = folder / f"waiting-{n}-{count}"
            settings = Settings(sinks={"archive": Sink(type="file", path=str(base / "archive.jsonl"))})
            repeats = 1 if count > FEW else 5
            taken, more = asyncio.run(_one_box(base, settings, count, samples // rounds, repeats))
            drains[count] += taken
            fresh[count] += more[0]
            grown = max(grown, more[1])
            shutil.rmtree(base)
    text = f"{waiting:,} rows waiting beside {FEW:,}, file sink"
    detail = {"floor_us": summary(fresh[FEW], 1e6), "ours_us": summary(fresh[waiting], 1e6)}
    return [
        Row(f"{text}: cost of a row to drain", statistics.median(drains[FEW]) * 1e6, statistics.median(drains[waiting]) * 1e6, "us", 1.2),
        Row(f"{text}: a fresh row, p50", percentile(fresh[FEW], 0.5) * 1e6, percentile(fresh[waiting], 0.5) * 1e6, "us", 1.2, detail=detail),
        Row(f"{text}: memory grown while they drain", None, grown, "MB", 64.0, judged="value"),
    ]  # fmt: skip


async def _one_box(
    base: Path, settings: Settings, count: int, samples: int, repeats: int
) -> tuple[list[float], tuple[list[float], float]]:
    """Seconds a row, of each drain; of fresh rows while as many wait for their retry; memory grown in MB."""
    taken = []
    async with _bench(base, settings) as bench:
        for n in range(repeats):
            await _fill(bench, "archive", range(n * count, (n + 1) * count))
            before = rss_mb(os.getpid())
            async with _delivering(bench):
                began = time.perf_counter()
                await _until_delivered(bench, "archive", (n + 1) * count)
                taken.append((time.perf_counter() - began) / count)
            grown = rss_mb(os.getpid()) - before
        await _fill(bench, "archive", range(repeats * count, (repeats + 1) * count), due_in_us=_LATER_US)
        fresh = []
        async with _delivering(bench):
            await asyncio.sleep(0.2)
            path = Path(str(settings.sinks["archive"].path))
            for n in range(samples):
                size = path.stat().st_size
                began = time.perf_counter()
                await _fill(bench, "archive", range(-n - 1, -n))
                while path.stat().st_size == size:
                    await asyncio.sleep(0.0003)
                fresh.append(time.perf_counter() - began)
                await asyncio.sleep(0.03)  # longer than what an append sink gathers under load
    return taken, (fresh, grown)


async def _drain_s(base: Path, settings: Settings, sink: str, count: int) -> float:
    async with _bench(base, settings) as bench:
        began = time.perf_counter()
        async with _delivering(bench):
            await _until_delivered(bench, sink, count)
            return time.perf_counter() - began


@asynccontextmanager
async def _bench(base: Path, settings: Settings) -> AsyncIterator[Bench]:
    made = Bench(base, settings)
    made.clock = SystemClock()  # type: ignore[assignment]
    async with made as bench:
        bench.hooks.clear()  # no scheduler
        yield bench


@asynccontextmanager
async def _delivering(bench: Bench) -> AsyncIterator[None]:
    async def no_exec(*_: Any, **__: Any) -> Any:
        raise AssertionError("no sink here runs a command")

    loop = DeliveryLoop(bench.box, no_exec)
    bench.hooks.append(loop.before_commit)
    task = asyncio.create_task(loop.run())
    try:
        yield
    finally:
        bench.hooks.remove(loop.before_commit)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _until_delivered(bench: Bench, sink: str, count: int) -> None:
    sql = "SELECT coalesce(sum(n), 0) FROM outbox_counts WHERE sink = ? AND state = 'delivered'"
    async with asyncio.timeout(600):
        while (await bench.rows(sql, sink))[0][0] < count:
            await asyncio.sleep(0.005)


async def _fill(bench: Bench, sink: str, numbers: range, due_in_us: int = 0) -> None:
    for start in range(0, len(numbers), _A_COMMIT):
        part = numbers[start : start + _A_COMMIT]

        def unit(tx: Transaction, part: range = part) -> None:
            for n in part:
                entry = _result(n, sink)
                entry.due_at = tx.now_us + due_in_us
                outbox.add_entry(tx, entry)

        await bench.do(unit)


def _result(n: int, sink: str) -> NewEntry:
    """Of the size of a small task's."""
    task = f"t{n}"
    data = {
        "task_id": task, "name": "a task", "status": "success", "attempt": 1, "exit_code": 0, "signal": None, "reason": None,
        "submitted_at": "2026-01-01T00:00:00.000Z", "started_at": "2026-01-01T00:00:00.000Z", "completed_at": "2026-01-01T00:00:00.000Z",
        "duration_s": 0.1, "output_dir": f"/var/lib/agentqd/tasks/{task}/attempt-1", "stdout_tail": "x" * 50, "artifacts": [], "evidence": {}, "usage": None,
    }  # fmt: skip
    name = delivery_id("bench", task, 1, "result", "")
    payload = seal(name, "agentq.task.success", "box", task, 0, data)
    return NewEntry(name, None, 1, 1, "result", "", "agentq.task.success", payload, [sink], task_id=task)
