"""Row 4: lines appended at once, until all are durable in the journal.

Floor: read the file, decode each line, and ONE executemany of the same rows (those that agentqd's own journal holds afterwards:
tasks, events, counts, position) in one transaction of a new journal with the same schema and pragmas.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec

from agentqd.storage.connection import connect, migrate
from benchmarks.box import PARKED, bench_box, task_lines
from benchmarks.measure import Row

ROUNDS: Final = 3
_TABLES: Final = ("tasks", "events", "task_counts", "sources")


def written_rows(journal: Path) -> dict[str, list[Any]]:
    """What agentqd has written for the lines."""
    connection = sqlite3.connect(f"file:{journal}?mode=ro", uri=True)
    try:
        return {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in _TABLES}
    finally:
        connection.close()


def floor_s(folder: Path, lines: bytes, rows: dict[str, list[Any]]) -> float:
    """Decode and write, with nothing decided, checked, hashed or numbered."""
    folder.mkdir()
    file, journal = folder / "lines", folder / "journal.db"
    file.write_bytes(lines)
    connection = connect(str(journal))
    migrate(connection, str(journal))
    decode = msgspec.json.Decoder().decode
    began = time.perf_counter()
    decoded = [decode(line) for line in file.read_bytes().splitlines()]
    connection.execute("BEGIN IMMEDIATE")
    for table, values in rows.items():
        if values:
            marks = ",".join("?" * len(values[0]))
            connection.executemany(f"INSERT INTO {table} VALUES ({marks})", values)
    connection.execute("COMMIT")
    took = time.perf_counter() - began
    assert len(decoded) <= len(rows["tasks"])
    connection.close()
    return took


def measure(folder: Path, lines: int, rounds: int = ROUNDS) -> list[Row]:
    floors, ours = [], []
    text = task_lines(lines, queue=PARKED)
    for n in range(rounds):
        with bench_box(folder / f"intake-{n}") as box:
            began = time.perf_counter()
            box.append_bytes(text)
            box.wait_for_tasks(lines)
            ours.append(time.perf_counter() - began)
            box.stop()
            rows = written_rows(box.state / "journal.db")
        floors.append(floor_s(folder / f"intake-floor-{n}", text, rows))
    detail = {"lines": lines, "floor_s": floors, "ours_s": ours}
    floor, mine = lines / median(floors), lines / median(ours)
    return [
        Row(
            f"intake of {lines:,} lines at once, lines a second",
            floor,
            mine,
            "/s",
            0.25,
            "higher",
            detail=detail,
        )
    ]
