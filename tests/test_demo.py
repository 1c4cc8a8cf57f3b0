"""`script/demo` shows what it claims, notices when it does not, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.real


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="aqd-", dir="/tmp") as path:
        yield Path(path)


def start_demo(folder: Path, *command: str) -> subprocess.Popen[str]:
    """The demo as a process group of its own, its temporary folder below ours."""
    return subprocess.Popen(
        [sys.executable, *(command or ["script/demo.py"])],
        cwd=PROJECT,
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )


def left_behind(folder: Path) -> list[str]:
    """Files in the demo's TMPDIR, and processes that carry its name."""
    found = [path.name for path in folder.iterdir()]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if str(folder).encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def test_demo_shows_the_mission_and_leaves_nothing(folder: Path) -> None:
    demo = start_demo(folder)
    said, _ = demo.communicate(timeout=100)
    assert demo.returncode == 0, said
    for claim in (
        "two replies were delivered",
        "goes on without a daemon",
        "it ran once",
        "exit 0 without work is not success",
        "none twice",
    ):
        assert claim in said
    assert left_behind(folder) == []


def test_demo_fails_when_a_claim_does_not_hold(folder: Path) -> None:
    broken = (
        "import sys; sys.path.insert(0, 'script'); import demo; demo.WAIT_S = 5;"
        "demo.Demo.result = lambda self, name, real=demo.Demo.result: {**real(self, name), 'status': 'failed'};"
        "sys.exit(demo.main())"
    )
    demo = start_demo(folder, "-c", broken)
    said, _ = demo.communicate(timeout=100)
    assert demo.returncode == 1, said
    assert "The demo failed: not so: the task ended well" in said
    assert left_behind(folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_interrupted_in_mid_task_leaves_nothing(folder: Path, number: signal.Signals) -> None:
    demo = start_demo(folder)
    assert demo.stdout is not None
    seen = ""
    deadline = time.monotonic() + 60
    while "2. A worker" not in seen and time.monotonic() < deadline:
        seen += demo.stdout.readline()
    os.killpg(demo.pid, number)
    rest, _ = demo.communicate(timeout=60)
    assert demo.returncode == 128 + number, seen + rest
    assert left_behind(folder) == []
