"""Row 1: close of the append -> the worker's first instruction, on an idle box, one task at a time."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Final

from benchmarks.box import Box, bench_box, command_line
from benchmarks.measure import Row, interleaved, percentile, summary
from benchmarks.worker import Stamps, compile_worker

PAUSE_S: Final = 0.01  # between samples, on both sides: each one starts from an idle CPU
BLOCKS: Final = 20


class Floor:
    """subprocess.Popen of the same program."""

    def __init__(self, worker: str, folder: Path) -> None:
        self._argv = [worker, f"{folder}/stamps-floor"]
        self._stamps = Stamps(folder / "stamps-floor")

    def __call__(self, samples: int) -> list[float]:
        """Seconds from the call of Popen to the first instruction."""
        taken = []
        for _ in range(samples):
            began = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            process = subprocess.Popen(self._argv)
            process.wait()
            taken.append((self._stamps.next_ns() - began) / 1e9)
            time.sleep(PAUSE_S)
        return taken


class Ours:
    """One line appended; the next only when the result of this one was delivered."""

    def __init__(self, box: Box, worker: str) -> None:
        name = f"stamps-{Path(worker).name}"
        self._box = box
        self._argv = [worker, f"{box.folder}/{name}"]
        self._stamps = Stamps(box.folder / name)

    def __call__(self, samples: int) -> list[float]:
        """Seconds from the close of the append to the first instruction."""
        taken = []
        for n in range(samples):
            done = self._box.results_count()
            closed = self._box.append_bytes(command_line(f"sample {n}", self._argv))
            taken.append((self._stamps.next_ns() - closed) / 1e9)
            self._box.wait_for_results(done + 1)
            time.sleep(PAUSE_S)
        return taken


def measure(folder: Path, samples: int) -> list[Row]:
    rows: list[Row] = []
    static = compile_worker(folder, static=True)
    dynamic = compile_worker(folder, static=False)
    if dynamic is None:
        raise RuntimeError(
            "no C compiler: the worker of this row cannot be built (apt install gcc libc6-dev)"
        )
    with bench_box(folder / "latency") as box:
        for worker in (static, dynamic):
            if worker is None:
                continue
            floor, ours = Floor(worker, folder), Ours(box, worker)
            floor(5), ours(5)  # warm
            low, high = interleaved(BLOCKS, samples, floor, ours)
            main = worker == (static or dynamic)
            rows += _rows(low, high, main=main, linked="static" if worker == static else "dynamic")
    return rows


def _rows(low: list[float], high: list[float], *, main: bool, linked: str) -> list[Row]:
    detail = {"floor_us": summary(low, 1e6), "ours_us": summary(high, 1e6)}
    note = f"{linked} worker" if main else f"{linked} worker, for comparison"
    return [
        Row(
            f"append closed -> first instruction, {name}", percentile(low, share) * 1e6, percentile(high, share) * 1e6,
            "us", limit if main else None, note=note, detail=detail,
        )
        for name, share, limit in (("p50", 0.5, 2.5), ("p99", 0.99, 4.0))
    ]  # fmt: skip
