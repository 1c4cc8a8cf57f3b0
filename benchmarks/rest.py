"""Row 6: what daemon and supervisor cost while nothing happens, on a box that has run tasks."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.box import bench_box, command_line, cpu_s, rss_mb
from benchmarks.measure import Row


def measure(folder: Path, seconds: float) -> list[Row]:
    with bench_box(folder / "rest") as box:
        box.append_bytes(command_line("no-op", ["/bin/true"]) * 50)
        box.wait_for_results(50)
        box.settle()
        pids = {"daemon": box.daemon_pid(), "supervisor": box.supervisor_pid()}
        before = {name: cpu_s(pid) for name, pid in pids.items()}
        began = time.monotonic()
        time.sleep(seconds)
        lasted = time.monotonic() - began
        used = {name: (cpu_s(pid) - before[name]) / lasted * 100 for name, pid in pids.items()}
        memory = {name: rss_mb(pid) for name, pid in pids.items()}
    note = f"of one core, over {lasted:.0f} s"
    return [
        Row(
            "at rest: CPU of both", None, sum(used.values()), "%", 0.2, judged="value", note=note, detail=used
        ),
        Row(
            "at rest: memory of the daemon",
            None,
            memory["daemon"],
            "MB",
            60.0,
            judged="value",
            note="resident",
        ),
        Row(
            "at rest: memory of the supervisor",
            None,
            memory["supervisor"],
            "MB",
            25.0,
            judged="value",
            note="resident",
        ),
    ]
