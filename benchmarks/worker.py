"""The worker of the latency rows, built from worker.c; and the file in which its first instructions stand."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import time
from pathlib import Path
from typing import Final

WAIT_S: Final = 30.0
_SOURCE: Final = Path(__file__).with_name("worker.c")


def compile_worker(folder: Path, *, static: bool) -> str | None:
    """The path of the program; None without a C compiler (or without a static libc, where one is asked for)."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    path = folder / ("worker-static" if static else "worker-dynamic")
    options = ["-O2", *(["-static"] if static else [])]
    built = subprocess.run([compiler, *options, "-o", path, _SOURCE], capture_output=True, check=False)
    return str(path) if built.returncode == 0 else None


class Stamps:
    """One after another: the worker of sample n writes the n-th number."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._seen = 0

    def next_ns(self) -> int:
        """When the next worker ran its first instruction (CLOCK_MONOTONIC). Raises TimeoutError."""
        deadline = time.monotonic() + WAIT_S
        while len(raw := os.pread(self._fd, 8, 8 * self._seen)) < 8:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no worker has run within {WAIT_S:g} s")
            time.sleep(0.001)
        self._seen += 1
        return int(struct.unpack("q", raw)[0])

    def close(self) -> None:
        os.close(self._fd)
