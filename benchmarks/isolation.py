"""A dead, a slow and a flooded sink beside a healthy one, in one daemon: what the healthy one's deliveries notice of it.

The flood is, in turn, one of commands (processes keep both cores busy), of webhooks whose receiver answers at once (they keep the
daemon's thread busy) and of lines of a file (large batches).

From the transaction that ends a task (the envelope's time) to its line at the receiver, the healthy `file` sink, one task every
25 ms. Two boxes with the same config, measured in turns; one of them has rows for the three others.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from agentqd.core.envelope import delivery_id, seal
from agentqd.storage import outbox
from agentqd.storage.journal import Journal
from agentqd.storage.outbox import NewEntry
from agentqd.storage.transaction import Transaction
from benchmarks.box import WAIT_S, Box, command_line
from benchmarks.measure import Row, interleaved, percentile, summary
from benchmarks.webhook import web_server

FLOODS: Final = {
    "command": 40_000,
    "webhook": 100_000,
    "file": 400_000,
}  # they last as long as the samples, and most is left
DEAD: Final = 1000
SLOW: Final = 1000
SAMPLES: Final = 400  # at most: the flood is to last as long
BLOCKS: Final = 10
_PAUSE_S: Final = 0.025
_A_COMMIT: Final = 2000


def measure(folder: Path, samples: int, share: float = 1.0) -> list[Row]:
    """`share` of each flood."""
    with web_server() as port, _box(folder / "quiet", port, None, 0) as quiet:
        return [
            row
            for kind, rows in FLOODS.items()
            for row in _beside(folder, port, quiet, kind, int(rows * share), samples)
        ]


def _beside(folder: Path, port: int, quiet: Box, kind: str, rows: int, samples: int) -> list[Row]:
    with _box(folder / kind, port, kind, rows) as loud:
        quietly, loudly = _deliveries(quiet), _deliveries(loud)
        quietly(5)
        loudly(5)
        _signal(loud, signal.SIGSTOP)
        try:
            low, high = interleaved(BLOCKS, samples, quietly, _alone(loud, loudly))
        finally:
            _signal(loud, signal.SIGCONT)
        left = loud.status()["sinks"]["flooded"]["pending"]
    detail = {"floor_us": summary(low, 1e6), "ours_us": summary(high, 1e6), "flood_left": left}
    gone = f"{rows - left:,} of the flood went by meanwhile"
    return [
        Row(
            f"a dead, a slow and a flooded sink ({kind}): a healthy one's delivery, {name}",
            percentile(low, share) * 1e6,
            percentile(high, share) * 1e6,
            "us",
            limit,
            note=gone if left else "the flood was over before the end",
            detail=detail,
        )
        for name, share, limit in (("p50", 0.5, None), ("p99", 0.99, 2.0))
    ]


def _alone(box: Box, take: Callable[[int], list[float]]) -> Callable[[int], list[float]]:
    """It sleeps while the other one is measured: they share the cores."""

    def awake(count: int) -> list[float]:
        _signal(box, signal.SIGCONT)
        take(2)  # what the pause has piled up goes by
        taken = take(count)
        _signal(box, signal.SIGSTOP)
        return taken

    return awake


def _signal(box: Box, number: int) -> None:
    for pid in (box.supervisor_pid(), box.daemon_pid()):
        os.kill(pid, number)


@contextmanager
def _box(folder: Path, port: int, flood: str | None, rows: int) -> Iterator[Box]:
    folder.mkdir(parents=True)
    with socket.socket() as nobody:  # bound, not listening: every connection is refused
        nobody.bind(("127.0.0.1", 0))
        known_hosts = folder / "known_hosts"
        known_hosts.touch()
        sinks = {
            "healthy": {"type": "file", "path": str(folder / "healthy.jsonl")},
            "dead": {"type": "ssh", "host": "127.0.0.1", "port": nobody.getsockname()[1], "path": "/", "known_hosts": str(known_hosts), "backoff": "1s"},
            "slow": {"type": "command", "command": ["sleep", "2"]},
            "flooded": {
                "webhook": {"type": "webhook", "url": f"http://127.0.0.1:{port}/hook"},
                "file": {"type": "file", "path": str(folder / "flooded.jsonl")},
            }.get(flood or "", {"type": "command", "command": ["/bin/true"], "concurrency": 20}),
        }  # fmt: skip
        with Box(folder, {"sinks": sinks, "defaults": {"deliver_to": ["healthy"]}}) as box:
            box.start()
            box.wait_for_supervisor()
            if rows:
                box.stop()
                asyncio.run(
                    _fill(str(box.state / "journal.db"), {"flooded": rows, "dead": DEAD, "slow": SLOW})
                )
                box.start()
                box.wait_for_supervisor()
            yield box


async def _fill(path: str, rows: dict[str, int]) -> None:
    """Entries as the daemon writes them, into the journal of a box that is stopped."""
    journal = Journal(path, lambda: time.time_ns() // 1000)
    await journal.open()
    try:
        for sink, count in rows.items():
            for first in range(0, count, _A_COMMIT):
                numbers = range(first, min(count, first + _A_COMMIT))
                await journal.commit(lambda tx, sink=sink, numbers=numbers: _add(tx, sink, numbers))  # type: ignore[misc]
    finally:
        await journal.close()


def _add(tx: Transaction, sink: str, numbers: range) -> None:
    for entry in entries(sink, numbers):
        outbox.add_entry(tx, entry)


def entries(sink: str, numbers: range) -> Iterator[NewEntry]:
    """Of the size of a small result."""
    for n in numbers:
        data = {"task_id": f"{sink}-{n}", "name": "flood", "key": str(n), "content": "x" * 300}
        name = delivery_id("bench", f"{sink}-{n}", 0, "entry", str(n))
        payload = seal(name, "agentq.task.entry", "box", f"{sink}-{n}", tx_time(), data)
        yield NewEntry(name, None, 0, 0, "entry", str(n), "agentq.task.entry", payload, [sink])


def tx_time() -> int:
    return time.time_ns() // 1000


def _deliveries(box: Box) -> Callable[[int], list[float]]:
    path = Path(box.folder) / "healthy.jsonl"
    seen = _Lines(path)

    def take(count: int) -> list[float]:
        taken = []
        for _ in range(count):
            box.append_bytes(command_line("healthy", ["/bin/true"]))
            line, at_us = seen.next()
            taken.append((at_us - _ended_us(line)) / 1e6)
            time.sleep(_PAUSE_S)
        return taken

    return take


class _Lines:
    """The receiver: notes when it sees each line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def next(self) -> tuple[dict[str, Any], int]:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if self._path.exists() and self._path.stat().st_size > self._offset:
                now = time.time_ns() // 1000
                with open(self._path, "rb") as file:
                    file.seek(self._offset)
                    line = file.readline()
                if line.endswith(b"\n"):
                    self._offset += len(line)
                    return json.loads(line), now
            time.sleep(0.0003)
        raise TimeoutError("no delivery")


def _ended_us(line: dict[str, Any]) -> int:
    return round(datetime.fromisoformat(line["time"]).timestamp() * 1e6)
