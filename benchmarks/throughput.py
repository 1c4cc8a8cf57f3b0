"""Rows 2 and 3: no-op tasks a second, 2 at once; beside a bare Popen loop, task-spooler and nq.

agentqd's time runs from the append of all lines to the last result line in completions.jsonl (fdatasync behind it); the
others' from the first process that hands a task over to the end of the last task. Each task keeps its output in files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.box import Box, bench_box, command_line
from benchmarks.measure import Row

AT_ONCE: Final = 2
ROUNDS: Final = 5
NO_OP: Final = ("/bin/true",)
WAIT_S: Final = 300.0


def popen_loop(folder: Path, tasks: int) -> float:
    """Tasks a second of a bare loop: two files opened, Popen, the next one when one of two has ended."""
    folder.mkdir()
    running: dict[int, subprocess.Popen[bytes]] = {}
    began = time.perf_counter()
    for n in range(tasks):
        if len(running) == AT_ONCE:
            pid, status = os.wait()
            running.pop(pid).returncode = status
        with open(folder / f"{n}.out", "wb") as out, open(folder / f"{n}.err", "wb") as err:
            process = subprocess.Popen(NO_OP, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        running[process.pid] = process
    for process in running.values():
        process.wait()
    rate = tasks / (time.perf_counter() - began)
    shutil.rmtree(folder)
    return rate


def agentqd(box: Box, tasks: int) -> float:
    """Appended at once, every one durable and delivered."""
    lines = command_line("no-op", NO_OP) * tasks
    before = box.results_count()
    began = time.perf_counter()
    box.append_bytes(lines)
    box.wait_for_results(before + tasks, poll_s=0.005)
    return tasks / (time.perf_counter() - began)


def task_spooler(program: str, folder: Path, tasks: int) -> float:
    """`tsp true` for each, 2 slots. It keeps a client process for each waiting task."""
    folder.mkdir()
    env = {
        **os.environ,
        "TS_SOCKET": str(folder / "s"),
        "TMPDIR": str(folder),
        "TS_SLOTS": str(AT_ONCE),
        "TS_MAXFINISHED": str(tasks),
    }
    try:
        subprocess.run([program], env=env, check=True, stdout=subprocess.DEVNULL)  # its server is up
        began = time.perf_counter()
        for _ in range(tasks):
            subprocess.run([program, *NO_OP], env=env, check=True, stdout=subprocess.DEVNULL)
        subprocess.run([program, "-w", str(tasks - 1)], env=env, check=False, stdout=subprocess.DEVNULL)
        _wait_until(lambda: _spooler_waits(program, env) == 0)
        return tasks / (time.perf_counter() - began)
    finally:
        subprocess.run([program, "-K"], env=env, check=False, stdout=subprocess.DEVNULL)
        shutil.rmtree(folder, ignore_errors=True)


def _spooler_waits(program: str, env: dict[str, str]) -> int:
    listed = subprocess.run([program], env=env, check=True, capture_output=True).stdout.splitlines()
    return sum(b" queued " in line or b" running " in line for line in listed)


def nq(program: str, folder: Path, tasks: int) -> float:
    """`nq true` for each. One directory is one queue that runs one task after another, so two directories, half the tasks each.

    A task waits for the locks of all files before it: nq gets slower the longer its queue is.
    """
    queues = [folder / str(n) for n in range(AT_ONCE)]
    for queue in queues:
        queue.mkdir(parents=True)
    began = time.perf_counter()
    for n in range(tasks):
        env = {**os.environ, "NQDIR": str(queues[n % AT_ONCE])}
        subprocess.run([program, "-q", *NO_OP], env=env, check=True, stdout=subprocess.DEVNULL)
    for queue in queues:
        subprocess.run([program, "-w"], env={**os.environ, "NQDIR": str(queue)}, check=True)
    rate = tasks / (time.perf_counter() - began)
    shutil.rmtree(folder)
    return rate


def _wait_until(is_over: object) -> None:
    assert callable(is_over)
    deadline = time.monotonic() + WAIT_S
    while not is_over():
        if time.monotonic() > deadline:
            raise TimeoutError("a spooler has not ended its tasks")
        time.sleep(0.01)


def measure(folder: Path, tasks: int, rounds: int = ROUNDS) -> list[Row]:
    """All of them in turns, `rounds` times; the median of each."""
    spooler, queue = shutil.which("tsp") or shutil.which("ts"), shutil.which("nq")
    rates: dict[str, list[float]] = {"bare": [], "agentqd": [], "task-spooler": [], "nq": []}
    with bench_box(folder / "throughput", max_workers=AT_ONCE) as box:
        agentqd(box, 20), popen_loop(folder / "bare", 20)  # warm
        for n in range(rounds):
            rates["bare"].append(popen_loop(folder / f"bare-{n}", tasks))
            rates["agentqd"].append(agentqd(box, tasks))
            if spooler is not None:
                rates["task-spooler"].append(task_spooler(spooler, folder / f"tsp-{n}", tasks))
            if queue is not None:
                rates["nq"].append(nq(queue, folder / f"nq-{n}", tasks))
    of = {name: median(taken) for name, taken in rates.items() if taken}
    detail = {
        "tasks": tasks,
        "rates": {name: [round(rate, 1) for rate in taken] for name, taken in rates.items()},
    }
    ours = of["agentqd"]
    rows = [
        Row(
            "no-op tasks a second, 2 at once",
            of["bare"],
            ours,
            "/s",
            0.30,
            "higher",
            note="floor: bare Popen loop",
            detail=detail,
        )
    ]
    if "nq" in of:
        rows.append(
            Row("the same beside nq", of["nq"], ours, "/s", 1.0, "higher", note="two queue directories")
        )
    if "task-spooler" in of:
        share = of["task-spooler"] / of["bare"]
        rows.append(
            Row(
                "the same beside task-spooler",
                of["task-spooler"],
                ours,
                "/s",
                better="higher",
                note=f"it reaches {share:.0%} of bare",
            )
        )
    return rows
