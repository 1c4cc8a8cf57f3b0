"""From the laptop: `agentqctl --box` over a real OpenSSH on loopback, against bare asyncssh and against the box itself."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.box import PARKED, Box, bench_box, task_lines  # puts tests/ on sys.path
from benchmarks.measure import Row, interleaved, percentile, summary

from laptop.onelaptop import OneLaptop  # isort: skip
from realsshd import real_sshd  # isort: skip

BLOCKS: Final = 20
TIMEOUT_S: Final = 600.0
_BARE: Final = str(Path(__file__).with_name("bare_ssh.py"))
_CTL: Final = str(Path(sys.executable).with_name("agentqctl"))

Side = Callable[[int], Sequence[float]]


@dataclass(frozen=True)
class Laptop:
    """One laptop and one box, with the command lines of each side."""

    one: OneLaptop
    box: Box

    def ctl(self, *words: str) -> list[str]:
        return [_CTL, "--box", self.one.name, *words]

    def bare(self, *words: str) -> list[str]:
        """A Python process that does the same with asyncssh alone."""
        sshd = self.one.sshd
        return [sys.executable, "-I", _BARE, str(sshd.port), sshd.account.name, *words]

    def ssh(self, command: str) -> list[str]:
        """OpenSSH takes its home from the passwd file, not from $HOME: all is said here."""
        laptop, sshd = self.one.laptop, self.one.sshd
        options = [f"IdentityFile={laptop.key}", f"UserKnownHostsFile={laptop.known_hosts}", "BatchMode=yes"]
        said = [word for option in options for word in ("-o", option)]
        where = ["-p", str(sshd.port), f"{sshd.account.name}@127.0.0.1"]
        return ["ssh", "-F", "none", *said, *where, command]

    def run_s(self, argv: Sequence[str], stdin: bytes = b"") -> float:
        """Seconds of one whole process, which must succeed."""
        env = self.one.laptop.env()
        began = time.perf_counter()
        done = subprocess.run(
            argv,
            input=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=env,
            timeout=TIMEOUT_S,
            check=False,
        )
        taken = time.perf_counter() - began
        if done.returncode != 0:
            raise RuntimeError(
                f"{shlex.join(argv)} ended with {done.returncode}: {done.stderr[-500:].decode()}"
            )
        return taken

    def end_keeper(self) -> None:
        """Told to leave, and its process gone: the next verb is a cold one and has the CPU to itself."""
        self.run_s([_CTL, "box", "forget-connection", self.one.name])
        deadline = time.monotonic() + 10
        while self.one.keepers():
            if time.monotonic() > deadline:
                raise TimeoutError("the keeper does not end")
            time.sleep(0.005)


@contextlib.contextmanager
def _laptop(folder: Path) -> Iterator[Laptop]:
    with bench_box(folder / "box") as box, real_sshd() as sshd:
        one = OneLaptop(sshd.laptop(folder / "laptop"), sshd, box)
        one.add()
        try:
            yield Laptop(one, box)
        finally:
            one.end_keepers()


def measure(folder: Path, *, submits: int, statuses: int, artifact_bytes: int, pulls: int) -> list[Row]:
    with _laptop(folder / "remote") as laptop:
        return [
            *_cold_submit(laptop, submits),
            _kept_status(laptop, statuses),
            _pull(laptop, artifact_bytes, pulls),
        ]


def _cold_submit(laptop: Laptop, samples: int) -> list[Row]:
    box = laptop.box
    queue = str(box.queue_file)

    def side(one_s: Callable[[], float]) -> Side:
        def run(count: int) -> list[float]:
            taken = []
            for _ in range(count):
                have = box.tasks_count()
                taken.append(one_s())
                box.wait_for_tasks(have + 1)  # it has arrived, and the daemon has done its work
                laptop.end_keeper()
            return taken

        return run

    def line() -> bytes:
        return task_lines(1, queue=PARKED)

    bare = side(lambda: laptop.run_s(laptop.bare("append", queue, line().decode().rstrip("\n"))))
    ours = side(lambda: laptop.run_s(laptop.ctl("submit", "--queue", PARKED, "echo line")))
    cat = side(lambda: laptop.run_s(laptop.ssh(f"cat >> {shlex.quote(queue)}"), line()))
    laptop.end_keeper()
    for each in (bare, ours, cat):
        each(2)  # warm
    low, high, plain = interleaved(min(BLOCKS, samples), samples, bare, ours, cat)
    detail = {"floor_ms": summary(low, 1e3), "ours_ms": summary(high, 1e3), "ssh_ms": summary(plain, 1e3)}
    p50 = [percentile(each, 0.5) * 1e3 for each in (low, high, plain)]
    return [
        Row(
            "cold agentqctl --box submit, p50", p50[0], p50[1], "ms", 1.3,
            note="floor: a bare asyncssh program", detail=detail,
        ),
        Row("the same beside ssh box 'cat >> queue'", p50[2], p50[1], "ms", note="not fsynced"),
    ]  # fmt: skip


def _kept_status(laptop: Laptop, samples: int) -> Row:
    def runs(argv: list[str]) -> Side:
        return lambda count: [laptop.run_s(argv) for _ in range(count)]

    here = runs([_CTL, "--socket", str(laptop.box.runtime / "agentqd.sock"), "status"])
    there = runs(laptop.ctl("status"))
    here(3), there(3)  # warm; and from now on there is a keeper
    keepers = laptop.one.keepers()
    low, high = interleaved(min(BLOCKS, samples), samples, here, there)
    if laptop.one.keepers() != keepers:
        raise RuntimeError("the connection was not kept: another keeper was started")
    detail = {"floor_ms": summary(low, 1e3), "ours_ms": summary(high, 1e3)}
    return Row(
        "agentqctl --box status, connection kept, p50",
        percentile(low, 0.5) * 1e3,
        percentile(high, 0.5) * 1e3,
        "ms",
        5.0,
        judged="difference",
        note="floor: the same on the box",
        detail=detail,
    )


def _pull(laptop: Laptop, size: int, rounds: int) -> Row:
    box = laptop.box
    file = _artifact(box, size)
    to = laptop.one.laptop.home / "to"
    consumers = iter(range(10_000))

    def one_s(argv: list[str]) -> float:
        to.mkdir()
        laptop.end_keeper()
        os.sync()  # what the last one has left to the disk is not paid for by this one
        taken = laptop.run_s(argv)
        got = [path.stat().st_size for path in to.rglob(file.name)]
        shutil.rmtree(to)
        if got != [size]:
            raise RuntimeError(f"{size} bytes were to come, not {got}: {shlex.join(argv)}")
        return taken

    def bare(count: int) -> list[float]:
        return [one_s(laptop.bare("get", str(file), str(to / file.name))) for _ in range(count)]

    def ours(count: int) -> list[float]:
        words = ["pull", "--to", str(to), "--consumer"]  # each a new one: it gets the row again
        return [one_s(laptop.ctl(*words, f"bench-{next(consumers)}")) for _ in range(count)]

    low, high = interleaved(rounds, rounds, bare, ours)
    detail = {"floor_s": summary(low), "ours_s": summary(high), "bytes": size}
    return Row(
        f"agentqctl --box pull --to of {size / 1e6:,.0f} MB, throughput",
        size / percentile(low, 0.5) / 1e6,
        size / percentile(high, 0.5) / 1e6,
        "MB/s",
        0.8,
        better="higher",
        note="floor: asyncssh's SFTP get; ours is checked and fsynced too",
        detail=detail,
    )


def _artifact(box: Box, size: int) -> Path:
    """A file of this size that a worker has made, recorded with its sum."""
    make = ["/bin/sh", "-c", f"head -c {size} /dev/urandom > artifact.bin"]
    done = box.results_count()
    box.append_bytes(json.dumps({"task": "artifact", "command": make}).encode() + b"\n")
    box.wait_for_results(done + 1)
    box.settle()
    found: list[Path] = list(box.state.rglob("artifact.bin"))
    assert len(found) == 1, found
    return found[0]
