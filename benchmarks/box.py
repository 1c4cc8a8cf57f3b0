"""A real agentqd on folders of its own, as the tests start it, with what the benchmarks ask of it."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from realbox import RealBox

PARKED: Final = "parked"  # a queue that is paused: what is put there waits
WAIT_S: Final = 600.0
_TICKS_A_S: Final = os.sysconf("SC_CLK_TCK")


class Box(RealBox):
    """Counts results and journal rows without asking the daemon."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        super().__init__(folder, json.dumps(config))  # JSON is YAML
        self._results = 0
        self._read_to = 0
        self._journal: sqlite3.Connection | None = None

    def append_bytes(self, lines: bytes) -> int:
        """One open, one write, one close, as a bare `>>` does. Returns the time of the close (CLOCK_MONOTONIC, ns)."""
        fd = os.open(self.queue_file, os.O_WRONLY | os.O_APPEND)
        try:
            written = os.write(fd, lines)
        finally:
            closed = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            os.close(fd)
        assert written == len(lines), "a short write"
        return closed

    def results_count(self) -> int:
        """Results delivered to completions.jsonl so far (whole lines)."""
        with contextlib.suppress(FileNotFoundError), open(self.state / "completions.jsonl", "rb") as file:
            file.seek(self._read_to)
            part = file.read()
            whole = part[: part.rfind(b"\n") + 1]
            self._read_to += len(whole)
            self._results += whole.count(b"\n")
        return self._results

    def wait_for_results(self, count: int, poll_s: float = 0.001) -> None:
        """Until `count` have been delivered in this box's life."""
        deadline = time.monotonic() + WAIT_S
        while self.results_count() < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._results} of {count} results after {WAIT_S:g} s")
            time.sleep(poll_s)

    def tasks_count(self) -> int:
        """Tasks that are durable in the journal: its newest number, which counts from 1 without a gap."""
        if self._journal is None:
            self._journal = sqlite3.connect(
                f"file:{self.state}/journal.db?mode=ro", uri=True, isolation_level=None
            )
        return int(self._journal.execute("SELECT max(seq) FROM tasks").fetchone()[0] or 0)

    def wait_for_tasks(self, count: int, poll_s: float = 0.002) -> None:
        deadline = time.monotonic() + WAIT_S
        while (have := self.tasks_count()) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{have} of {count} tasks in the journal after {WAIT_S:g} s")
            time.sleep(poll_s)

    def forget_journal(self) -> None:
        """Give the reading connection back."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def wait_for_supervisor(self) -> None:
        """Connected, so that the first sample does not pay for its start."""
        deadline = time.monotonic() + WAIT_S
        while not (self.api("GET", "/v1/status")[1]["supervisor"] or {}).get("pid"):
            if time.monotonic() > deadline:
                raise TimeoutError("no supervisor")
            time.sleep(0.01)

    def pause(self, queue: str = PARKED) -> None:
        status, answer = self.api("POST", f"/v1/queues/{queue}/pause", {})
        assert status == 200, answer

    def status_s(self) -> float:
        """How long GET /v1/status takes, with a connection of its own."""
        began = time.perf_counter()
        status, _ = self.api("GET", "/v1/status")
        assert status == 200, status
        return time.perf_counter() - began

    def fill(self, lines: int, per_write: int = 100_000) -> None:
        """That many tasks into the paused queue."""
        have = self.tasks_count()
        for start in range(0, lines, per_write):
            self.append_bytes(task_lines(min(per_write, lines - start), queue=PARKED))
            self.wait_for_tasks(have + min(start + per_write, lines), poll_s=0.05)

    def restart_s(self) -> float:
        """SIGKILL, start, and how long until the control socket answers and the supervisor is connected."""
        self.kill()
        began = time.perf_counter()
        self.start(wait=False)
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError, IndexError):
                status, answer = self.api("GET", "/v1/status")
                if status == 200 and (answer["supervisor"] or {}).get("pid"):
                    return time.perf_counter() - began
            time.sleep(0.005)
        raise TimeoutError("not ready again")

    def settle(self) -> None:
        """Until the daemon has nothing left to do: no CPU used for half a second."""
        last, quiet = cpu_s(self.daemon_pid()), 0
        while quiet < 5:
            time.sleep(0.1)
            now = cpu_s(self.daemon_pid())
            quiet = quiet + 1 if now == last else 0
            last = now


@contextlib.contextmanager
def bench_box(folder: Path, **config: Any) -> Iterator[Box]:
    """Started, with a paused queue beside the default one."""
    folder.mkdir(parents=True)
    with Box(folder, {"queues": {PARKED: {}}, **config}) as box:
        box.start()
        box.wait_for_supervisor()
        box.pause()
        try:
            yield box
        finally:
            box.forget_journal()


def task_lines(count: int, **fields: Any) -> bytes:
    """`count` lines as a program writes them: a name, an id of their own, a short prompt."""
    unique = os.urandom(4).hex()
    tail = json.dumps(fields)[1:-1]
    tail = f", {tail}" if tail else ""
    return "".join(
        f'{{"task": "line {n}", "id": "{unique}-{n}", "prompt": "echo line {n}"{tail}}}\n'
        for n in range(count)
    ).encode()


def command_line(name: str, argv: Sequence[str]) -> bytes:
    """A task that may do no work."""
    return (
        json.dumps({"task": name, "command": list(argv), "expect": {"allow_no_work": True}}).encode() + b"\n"
    )


def cpu_s(pid: int) -> float:
    """CPU used by a process so far (all threads, user and system; steps of 10 ms)."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / _TICKS_A_S


def rss_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
