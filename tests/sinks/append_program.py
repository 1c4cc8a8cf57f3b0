"""A small daemon for the crash tests: delivers deliveries 1..N to one append sink and marks each in a file of marks.

`python append_program.py TYPE BASE COUNT BATCH ROTATE_BYTES`; run again after a kill, it goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from agentqd.core.settings import Sink as SinkSettings
from agentqd.sinks.base import Context, Delivered
from agentqd.sinks.registry import make_sink
from sinks.conformance import NOW_US, delivery


class Marks:
    """Stands in for the journal: {delivery id: position}, one line a batch, fsynced."""

    def __init__(self, path: Path) -> None:
        self.positions: dict[str, int] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            self.positions.update(json.loads(line))
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def mark(self, positions: dict[str, int]) -> None:
        self.positions.update(positions)
        os.write(self._fd, json.dumps(positions).encode() + b"\n")
        os.fsync(self._fd)


def context(type_: str, base: Path) -> Context:
    path = str(base / "out.jsonl") if type_ == "file" else None
    return Context(type_, SinkSettings(type=type_, path=path), str(base), None, lambda: NOW_US)  # type: ignore[arg-type]


async def run(type_: str, base: Path, count: int, batch: int, rotate_bytes: int) -> dict[str, Any]:
    """Until every delivery is marked, or three rounds brought nothing. Returns what happened."""
    marks = Marks(base / "marks")
    sink = make_sink(context(type_, base), rotate_bytes)
    found = await sink.open(max(marks.positions.values(), default=0))
    told = {one.delivery_id: one.position for one in found if one.delivery_id not in marks.positions}
    if told:
        marks.mark(told)
    deferred = []
    for _ in range(3):
        pending = [
            one for one in map(delivery, range(1, count + 1)) if one.delivery_id not in marks.positions
        ]
        for start in range(0, len(pending), batch):
            part = pending[start : start + batch]
            outcomes = await sink.deliver(part)
            done = {
                one.delivery_id: outcome.position
                for one, outcome in zip(part, outcomes, strict=True)
                if isinstance(outcome, Delivered) and outcome.position is not None
            }
            deferred += [outcome.reason for outcome in outcomes if not isinstance(outcome, Delivered)]
            if done:
                marks.mark(done)
    await sink.close()
    return {"marked": len(marks.positions), "found": len(told), "deferred": deferred, "notices": sink.notices}  # type: ignore[attr-defined]


if __name__ == "__main__":
    kind, folder, *numbers = sys.argv[1:]
    said = asyncio.run(run(kind, Path(folder), *map(int, numbers)))
    print(json.dumps(said))
