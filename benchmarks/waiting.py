"""Row 5: the same box with many tasks waiting in a paused queue, beside one with none. Two real boxes, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.box import PARKED, Box, bench_box, rss_mb, task_lines
from benchmarks.measure import Row, interleaved, percentile, summary
from benchmarks.spawn_latency import BLOCKS, Ours
from benchmarks.worker import compile_worker

LINES_A_SAMPLE: Final = 500
LINE_ROUNDS: Final = 20
RESTARTS: Final = 3


def measure(folder: Path, waiting: int, samples: int) -> list[Row]:
    worker = compile_worker(folder, static=True) or compile_worker(folder, static=False)
    assert worker is not None, "no C compiler"
    with bench_box(folder / "empty") as empty, bench_box(folder / "full") as full:
        full.fill(waiting)
        empty.settle()
        full.settle()
        with_many = f"with {waiting:,} waiting"
        rows = _latency(empty, full, worker, samples, with_many)
        rows.append(_status(empty, full, samples, with_many))
        rows.append(_line(empty, full, with_many))
        rows += _restart(full, with_many)
    return rows


def _latency(empty: Box, full: Box, worker: str, samples: int, with_many: str) -> list[Row]:
    floor, ours = Ours(empty, worker), Ours(full, worker)
    floor(5)
    ours(5)
    low, high = interleaved(BLOCKS, samples, floor, ours)
    detail = {"floor_us": summary(low, 1e6), "ours_us": summary(high, 1e6)}
    return [
        Row(
            f"{with_many}: spawn latency, {name}",
            percentile(low, share) * 1e6,
            percentile(high, share) * 1e6,
            "us",
            1.5,
            detail=detail,
        )
        for name, share in (("p50", 0.5), ("p99", 0.99))
    ]


def _status(empty: Box, full: Box, samples: int, with_many: str) -> Row:
    low, high = interleaved(BLOCKS, samples, *(_statuses(box) for box in (empty, full)))
    detail = {"floor_us": summary(low, 1e6), "ours_us": summary(high, 1e6)}
    return Row(
        f"{with_many}: GET /v1/status, p50",
        percentile(low, 0.5) * 1e6,
        percentile(high, 0.5) * 1e6,
        "us",
        2.0,
        detail=detail,
    )


def _statuses(box: Box) -> Callable[[int], list[float]]:
    return lambda count: [box.status_s() for _ in range(count)]


def _line(empty: Box, full: Box, with_many: str) -> Row:
    def taken(box: Box) -> Callable[[int], list[float]]:
        return lambda count: [_line_s(box) for _ in range(count)]

    low, high = interleaved(LINE_ROUNDS, LINE_ROUNDS, taken(empty), taken(full))
    detail = {"lines_a_sample": LINES_A_SAMPLE, "floor_us": summary(low, 1e6), "ours_us": summary(high, 1e6)}
    return Row(
        f"{with_many}: cost of a line, p50",
        percentile(low, 0.5) * 1e6,
        percentile(high, 0.5) * 1e6,
        "us",
        1.2,
        detail=detail,
    )


def _line_s(box: Box) -> float:
    """Seconds a line, of a few hundred appended at once to the paused queue."""
    have = box.tasks_count()
    text = task_lines(LINES_A_SAMPLE, queue=PARKED)
    began = time.perf_counter()
    box.append_bytes(text)
    box.wait_for_tasks(have + LINES_A_SAMPLE, poll_s=0.0003)
    took = (time.perf_counter() - began) / LINES_A_SAMPLE
    box.settle()
    return took


def _restart(full: Box, with_many: str) -> list[Row]:
    full.settle()
    memory = rss_mb(full.daemon_pid())
    full.forget_journal()
    took = [full.restart_s() for _ in range(RESTARTS)]
    full.settle()
    memory = max(memory, rss_mb(full.daemon_pid()))
    return [
        Row(
            f"{with_many}: ready again after SIGKILL",
            None,
            max(took),
            "s",
            3.0,
            judged="value",
            note=f"slowest of {RESTARTS}",
            detail={"took_s": took},
        ),
        Row(f"{with_many}: memory of the daemon", None, memory, "MB", 200.0, judged="value", note="resident"),
    ]
