"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import sqlite3
import time
from pathlib import Path
from typing import Any, Final

from agentqd.system.mounts import file_system_of
from benchmarks.measure import summary

_NOT_A_DISK: Final = frozenset({"tmpfs", "ramfs", "rootfs", None})
_BLOCK: Final = bytes(4096)
_IDLE_S: Final = 0.01  # the pause of the latency rows


def real_disk(candidates: list[str]) -> str:
    """The first of the folders that lies on a disk. Raises RuntimeError."""
    for folder in candidates:
        if os.path.isdir(folder) and file_system_of(folder) not in _NOT_A_DISK:
            return folder
    raise RuntimeError(f"none of {', '.join(candidates)} lies on a real disk: name one with --dir")


def describe(folder: Path) -> dict[str, Any]:
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        "?",
    )
    return {
        "cores": os.cpu_count(),
        "cpu": model,
        "virtual": any("hypervisor" in line for line in _lines("/proc/cpuinfo") if line.startswith("flags")),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "kernel": platform.release(),
        "file_system": file_system_of(str(folder)),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "load_before": os.getloadavg()[0],
    }


def fdatasync_cost(folder: Path, samples: int) -> dict[str, Any]:
    """Microseconds of an fdatasync after 4 KiB were written, by what was written and how busy the disk was before.

    append: the file grows. overwrite: it does not. from_idle: the same after a pause, as between two tasks of an idle box.
    """
    ways = (("append", True, 0.0), ("overwrite", False, 0.0), ("overwrite_from_idle", False, _IDLE_S))
    return {name: _fdatasync(folder / name, samples, growing, pause_s) for name, growing, pause_s in ways}


def _fdatasync(path: Path, samples: int, growing: bool, pause_s: float) -> dict[str, float]:
    path.write_bytes(b"" if growing else _BLOCK * 256)
    fd = os.open(path, os.O_WRONLY)
    os.fsync(fd)
    taken = []
    for n in range(samples):
        if pause_s:
            time.sleep(pause_s)
        os.pwrite(fd, _BLOCK, n * 4096 if growing else n % 256 * 4096)
        began = time.perf_counter()
        os.fdatasync(fd)
        taken.append(time.perf_counter() - began)
    os.close(fd)
    path.unlink()
    return summary(taken, 1e6)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
