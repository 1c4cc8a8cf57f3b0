"""The same box with many live write claims, beside one with none: what a task pays that declares a path. Two real boxes, in turns."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from benchmarks.box import PARKED, Box, bench_box, command_line
from benchmarks.measure import Row, interleaved, percentile, summary
from benchmarks.spawn_latency import BLOCKS, Ours
from benchmarks.worker import compile_worker

LINES_A_SAMPLE: Final = 200
LINE_ROUNDS: Final = 20
CROWD: Final = 1000
FREED_EVERY_S: Final = 0.0003


def measure(folder: Path, claims: int, samples: int) -> list[Row]:
    worker = compile_worker(folder, static=True) or compile_worker(folder, static=False)
    assert worker is not None, "no C compiler"
    with bench_box(folder / "none") as none, bench_box(folder / "claimed") as full:
        fill(full, claims)
        for box in (none, full):
            box.settle()
        name = f"with {claims:,} claims"
        rows = _latency(none, full, worker, samples, name)
        rows.append(_line(none, full, name))
        rows.append(_end(none, full, samples))
    return rows


def fill(box: Box, claims: int) -> None:
    """Two thirds below one folder, as a large repository's; every hundredth is a pattern."""
    lines = []
    for n in range(claims):
        place = f"/srv/repo/src/m{n % 97}/f{n}" if n % 3 else f"/srv/jobs/{n}/out"
        lines.append(claim_line(f"{place}*.py" if n % 100 == 0 else place, id=f"held-{n}"))
    have = box.tasks_count()
    box.append_bytes(b"".join(lines))
    box.wait_for_tasks(have + claims)


def claim_line(path: str, **fields: Any) -> bytes:
    task = {"task": "claim", "prompt": "echo x", "queue": PARKED, "writes_to": [path], **fields}
    return json.dumps(task).encode() + b"\n"


class Claiming(Ours):
    """As spawn latency, of a task that claims a path among those that are claimed."""

    def __call__(self, samples: int) -> list[float]:
        taken = []
        for n in range(samples):
            done = self._box.results_count()
            task = json.loads(command_line(f"sample {n}", self._argv))
            task["writes_to"] = [f"/srv/repo/src/m{n % 97}/new{n}"]
            closed = self._box.append_bytes(json.dumps(task).encode() + b"\n")
            taken.append((self._stamps.next_ns() - closed) / 1e9)
            self._box.wait_for_results(done + 1)
            time.sleep(0.01)
        return taken


def _latency(none: Box, full: Box, worker: str, samples: int, name: str) -> list[Row]:
    floor, ours = Claiming(none, worker), Claiming(full, worker)
    floor(5)
    ours(5)
    low, high = interleaved(BLOCKS, samples, floor, ours)
    return [_row(f"{name}: line that claims -> first instruction, {what}", low, high, share, 2.0) for what, share in (("p50", 0.5), ("p99", 0.99))]  # fmt: skip


def _row(
    what: str, low: list[float], high: list[float], share: float, limit: float | None, note: str = ""
) -> Row:
    detail = {"floor_us": summary(low, 1e6), "ours_us": summary(high, 1e6)}
    return Row(
        what,
        percentile(low, share) * 1e6,
        percentile(high, share) * 1e6,
        "us",
        limit,
        note=note,
        detail=detail,
    )


def _line(none: Box, full: Box, name: str) -> Row:
    count = 0

    def taken(box: Box) -> Callable[[int], list[float]]:
        def sample(rounds: int) -> list[float]:
            nonlocal count
            found = []
            for _ in range(rounds):
                count += 1
                lines = [claim_line(f"/srv/repo/src/new/{count}-{n}") for n in range(LINES_A_SAMPLE)]
                have = box.tasks_count()
                began = time.perf_counter()
                box.append_bytes(b"".join(lines))
                box.wait_for_tasks(have + LINES_A_SAMPLE, poll_s=0.0003)
                found.append((time.perf_counter() - began) / LINES_A_SAMPLE)
                box.settle()
            return found

        return sample

    low, high = interleaved(LINE_ROUNDS, LINE_ROUNDS, taken(none), taken(full))
    return _row(f"{name}: cost of a line that claims, p50", low, high, 0.5, 2.0)


def _end(none: Box, full: Box, samples: int) -> Row:
    """A crowd waits for one path; each end frees the next. Beside it: the same end where two wait."""
    rounds = min(samples, CROWD // 4)
    crowds = ((none, "/crowd/few"), (full, "/crowd/many"))
    for (box, path), waiting in zip(crowds, (2, CROWD), strict=True):
        _crowd(box, path, 0, waiting)
    few = _Ends(none, "/crowd/few", refill=True)
    many = _Ends(full, "/crowd/many", refill=False)
    low, high = interleaved(min(BLOCKS, rounds), rounds, few, many)
    return _row(f"with {CROWD:,} waiting for one path: an end, until the next is freed, p50", low, high, 0.5, 2.0, "floor: two wait")  # fmt: skip


def _crowd(box: Box, path: str, start: int, count: int) -> None:
    have = box.tasks_count()
    lines = [claim_line(path, id=f"c{n}", on_conflict="queue") for n in range(start, start + count)]
    box.append_bytes(b"".join(lines))
    box.wait_for_tasks(have + count)


class _Ends:
    """Cancels the first in line, over the socket, and waits until the next may start."""

    def __init__(self, box: Box, path: str, *, refill: bool) -> None:
        self._box, self._path, self._refill = box, path, refill
        self._next = 0

    def __call__(self, samples: int) -> list[float]:
        taken = []
        for _ in range(samples):
            n = self._next
            self._next += 1
            began = time.perf_counter()
            status, answer = self._box.api("POST", f"/v1/tasks/c{n}/cancel", {})
            assert status == 200, answer
            while self._box.show(f"c{n + 1}")["state"] != "queued":
                time.sleep(FREED_EVERY_S)
            taken.append(time.perf_counter() - began)
            if self._refill:
                _crowd(self._box, self._path, n + 2, 1)
        return taken
