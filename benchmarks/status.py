"""Row 7: the whole command `agentqctl status` against an interpreter that does nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.box import bench_box, command_line
from benchmarks.measure import Row, interleaved, percentile, summary

BLOCKS: Final = 20


def measure(folder: Path, samples: int) -> list[Row]:
    agentqctl = Path(sys.executable).with_name("agentqctl")
    with bench_box(folder / "status") as box:
        box.append_bytes(command_line("no-op", ["/bin/true"]) * 50)
        box.wait_for_results(50)
        box.settle()
        status = [str(agentqctl), "--socket", str(box.runtime / "agentqd.sock"), "status"]
        low, high = interleaved(BLOCKS, samples, _runs([sys.executable, "-I", "-c", "pass"]), _runs(status))
    detail = {"floor_ms": summary(low, 1e3), "ours_ms": summary(high, 1e3)}
    return [
        Row(
            "agentqctl status, p50",
            percentile(low, 0.5) * 1e3,
            percentile(high, 0.5) * 1e3,
            "ms",
            8.0,
            note="floor: python -I -c pass",
            detail=detail,
        )
    ]


def _runs(argv: list[str]) -> Callable[[int], list[float]]:
    def run(count: int) -> list[float]:
        taken = []
        for _ in range(count):
            began = time.perf_counter()
            subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            taken.append(time.perf_counter() - began)
        return taken

    return run
