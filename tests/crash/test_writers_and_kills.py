"""Eight writers of each kind append while the daemon is killed again and again: lost = 0, unexpected = 0.

AGENTQD_SEED sets the seed; it is printed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeBox
from realbox import RealBox, alive, wait_for

from crash.checker import check_all, query, wait_until_at_rest

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

WRITERS = 8
TIME_S = 20.0
SUPERVISOR_KILLS = 2
LONG_CHARS = 9000  # longer than the buffer of the writer that tears


class Writers:
    """What was submitted, by which names, and by whom as a whole."""

    def __init__(self, box: RealBox, side: Path, seed: int) -> None:
        self.box = box
        self.side = side
        self.seed = seed
        self.until_s = time.monotonic() + TIME_S
        self.whole: set[str] = set()  # written with one write(), or acknowledged by the socket
        self.torn: set[str] = set()  # written in pieces: each may come through, or not
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self._shells: list[tuple[int, subprocess.Popen[bytes]]] = []

    def start(self) -> None:
        kinds = {
            "write": self._os_write,
            "torn": self._buffered,
            "ctl": self._enqueue,
            "socket": self._submit,
        }
        for kind, act in kinds.items():
            for number in range(WRITERS):
                thread = threading.Thread(
                    target=self._guard, args=(act, kind, number), name=f"{kind}-{number}"
                )
                self._threads.append(thread)
                thread.start()
        for number in range(WRITERS):
            self._shells.append((number, self._shell(number)))

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), f"{thread.name} does not end"
        for number, shell in self._shells:
            assert shell.wait(60) == 0
            written = int((self.side / f"count-{number}").read_text())
            self.whole |= {f"sh-{number}-{i}" for i in range(1, written + 1)}
        if self._errors:
            raise self._errors[0]

    def task(self, name: str, pad: str = "", **more: Any) -> dict[str, Any]:
        on_lost = "requeue" if hash_of(name) % 2 else "fail"
        prompt = f"echo $AGENTQ_ATTEMPT >> {self.side}/ran-{name}; echo ok {pad}"
        return {"task": name, **more, "on_lost": on_lost, "backoff": "50ms", "prompt": prompt}

    def _guard(self, act: Callable[[random.Random, str, int], None], kind: str, number: int) -> None:
        try:
            act(random.Random(f"{self.seed}-{kind}-{number}"), kind, number)
        except BaseException as error:
            self._errors.append(error)

    def _names(self, draw: random.Random, kind: str, number: int, pause_s: float) -> Any:
        n = 0
        while time.monotonic() < self.until_s:
            n += 1
            yield f"{kind}-{number}-{n}"
            time.sleep(draw.uniform(0.5, 1.5) * pause_s)

    def _did(self, names: set[str], name: str) -> None:
        with self._lock:
            names.add(name)

    def _shell(self, number: int) -> subprocess.Popen[bytes]:
        """A bare `>>`, opened anew for each line."""
        line = json.dumps(self.task("NAME")).replace("NAME", "sh-%s-%s").replace("\\", "\\\\")
        script = (
            f"i=0; end=$(($(date +%s) + {int(TIME_S)}))\n"
            f"while [ $(date +%s) -lt $end ]; do i=$((i + 1))\n"
            f"printf '{line}\\n' {number} $i {number} $i >> {self.box.queue_file}; sleep 0.5; done\n"
            f"echo $i > {self.side}/count-{number}"
        )
        return subprocess.Popen(["sh", "-c", script])

    def _os_write(self, draw: random.Random, kind: str, number: int) -> None:
        """One write() a line; each fifth has an id and comes twice."""
        for name in self._names(draw, kind, number, 0.5):
            twice = draw.random() < 0.2
            task = self.task(name, id=name) if twice else self.task(name)
            self.box.append(*[task] * (2 if twice else 1))
            self._did(self.whole, name)

    def _buffered(self, draw: random.Random, kind: str, number: int) -> None:
        """stdio's way: a long line leaves in several write() calls, and others write between them."""
        for name in self._names(draw, kind, number, 1.0):
            self._did(self.torn, name)
            line = json.dumps(self.task(name, "x" * LONG_CHARS)) + "\n"
            with self.box.queue_file.open("ab", buffering=0) as file:
                for at in range(0, len(line), 4096):
                    file.write(line[at : at + 4096].encode())
                    time.sleep(draw.uniform(0, 0.01))

    def _enqueue(self, draw: random.Random, kind: str, number: int) -> None:
        for name in self._names(draw, kind, number, 2.5):
            done = self.box.ctl("enqueue", stdin=json.dumps(self.task(name)).encode() + b"\n")
            assert done.returncode == 0, done.stderr.decode()
            self._did(self.whole, name)

    def _submit(self, draw: random.Random, kind: str, number: int) -> None:
        """Over the socket, with an id, again and again until it is acknowledged."""
        for name in self._names(draw, kind, number, 0.7):
            while True:
                try:
                    status, answer = self.box.api("POST", "/v1/tasks", self.task(name, id=name))
                except (
                    OSError,
                    IndexError,
                    ValueError,
                ):  # no daemon, or one that died in the middle of its answer
                    time.sleep(0.05)
                    continue
                assert status in {200, 201}, answer
                self._did(self.whole, name)
                break


def hash_of(name: str) -> int:
    return sum(name.encode())


def kill_again_and_again(box: RealBox, draw: random.Random, until_s: float) -> Counter[str]:
    kills: Counter[str] = Counter()
    supervisor_at = [until_s - TIME_S * part for part in (0.65, 0.3)][:SUPERVISOR_KILLS]
    patient = True
    while time.monotonic() < until_s:
        time.sleep(draw.uniform(0.3, 1.0) if patient else draw.uniform(0.02, 0.5))
        assert box.daemon is not None
        assert box.daemon.poll() is None, f"the daemon ended by itself:\n{box.log_text()[-4000:]}"
        kills["daemon"] += 1
        kills["daemon, before it was ready"] += not box._ready(kills["log"])
        box.kill()
        if supervisor_at and time.monotonic() > supervisor_at[0]:
            supervisor_at.pop(0)
            pid = box.supervisor_pid()
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
                kills["supervisor"] += 1
        kills["log"] = len(box.log_text())
        patient = draw.random() < 0.7
        box.start(wait=patient)
    del kills["log"]
    return kills


def test_no_line_is_lost_and_nothing_comes_unexpected(make_box: MakeBox, tmp_path: Path) -> None:
    seed = int(os.environ.get("AGENTQD_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
    print(f"\nAGENTQD_SEED={seed}")
    box = make_box()
    side = tmp_path / "side"
    side.mkdir()
    writers = Writers(box, side, seed)
    writers.start()
    kills = kill_again_and_again(box, random.Random(seed), writers.until_s)
    writers.join()
    wait_for(
        "everything to be read",
        lambda: query(box, "SELECT offset FROM sources") == [(box.queue_file.stat().st_size,)],
        60,
    )
    wait_until_at_rest(box, wait_s=120)
    lines = check_all(box)
    counted = check_lost(box, writers, lines)
    check_unexpected(box, writers, lines, side)
    print(f"kills: {dict(kills)}; {counted}")
    assert kills["daemon"] >= 8
    assert kills["supervisor"] == SUPERVISOR_KILLS


def check_lost(box: RealBox, writers: Writers, lines: list[dict[str, Any]]) -> dict[str, int]:
    """Every byte of the queue file belongs to exactly one outcome, and every task has exactly one result."""
    tasks = [json.loads(row[0]) for row in query(box, "SELECT source FROM tasks")]
    repeats = [
        json.loads(row[0])
        for row in query(box, "SELECT data FROM events WHERE event = 'duplicate_submitted'")
    ]
    refused = [
        json.loads(row[0]) for row in query(box, "SELECT data FROM events WHERE event = 'line_rejected'")
    ]
    parts = [(item["offset"], item["length"]) for item in [*tasks, *repeats, *refused] if "offset" in item]
    content, at = box.queue_file.read_bytes(), 0
    for offset, length in sorted(parts):
        assert not content[at:offset].strip(), f"lost: bytes {at} to {offset}: {content[at:offset][:300]!r}"
        assert offset >= at, f"two outcomes for byte {offset}"
        at = offset + length
    assert not content[at:].strip(), f"lost: the end, {content[at:][:300]!r}"
    kept = [(item["offset"], item["length"]) for item in box.rejected()]
    assert sorted(kept) == sorted((item["offset"], item["length"]) for item in refused), (
        "rejected.jsonl is not what was rejected"
    )
    names = [row[0] for row in query(box, "SELECT name FROM tasks")]
    results = Counter(line["name"] for line in lines if "status" in line and line["task_id"] is not None)
    assert results == Counter(names), "not exactly one result for each task"
    missing = writers.whole - results.keys()
    assert not missing, f"lost: {sorted(missing)[:20]} ({len(missing)})"
    return {
        "bytes": len(content),
        "tasks": len(tasks),
        "duplicates": len(repeats),
        "rejected": len(refused),
        "lost": 0,
    }


def check_unexpected(box: RealBox, writers: Writers, lines: list[dict[str, Any]], side: Path) -> None:
    """Nothing that nobody submitted, nothing twice, no worker that ran again without an attempt that says so."""
    known = writers.whole | writers.torn
    results = [line for line in lines if "status" in line]
    strange = {line["name"] for line in results if line["task_id"] is not None} - known
    assert not strange, f"nobody submitted {sorted(strange)[:20]}"
    assert max(Counter(row[0] for row in query(box, "SELECT name FROM tasks")).values()) == 1, (
        "one line became two tasks"
    )
    refused = [line for line in results if line["task_id"] is None]
    assert all(line["status"] == "refused" for line in refused)
    attempts = dict(
        query(box, "SELECT t.name, count(*) FROM tasks t JOIN attempts a ON a.task_seq = t.seq GROUP BY 1")
    )
    for line in results:
        if line["task_id"] is None:
            continue
        path = side / f"ran-{line['name']}"
        runs = [int(text) for text in path.read_text().split()] if path.exists() else []
        assert runs == sorted(set(runs)), f"{line['name']}: an attempt ran twice: {runs}"
        assert len(runs) <= attempts.get(line["name"], 0), f"{line['name']} ran {runs}"
        assert line["status"] in {"success", "lost"}, line
        if line["status"] == "success":
            assert line["attempt"] in runs, f"{line['name']}: success without a run"
    lost = [line for line in results if line["status"] == "lost"]
    assert len(lost) <= SUPERVISOR_KILLS * 16, f"{len(lost)} lost with {SUPERVISOR_KILLS} supervisors killed"
