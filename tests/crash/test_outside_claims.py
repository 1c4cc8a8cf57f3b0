"""`agentqctl writes claim -- COMMAND`: SIGKILL at every mutating system call of its two processes and of the daemon, from the asking
to the release and the grant to whoever waits.

After each, once the daemon is back: no claim outlives its process, no two COMMANDs ran at once, and none ever ran without its claim.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from realbox import RealBox, wait_for

from crash.checker import query
from crash.inject import MUTATING, Strace, call_name, count_calls, has_died, is_gone, kill_at, threads_of
from crash.processes import daemon_died, is_stopped, reap_killed
from crash.test_kill_at_every_call import BOXES, THREADS_AT_START, Tally, Victim, roles, share

pytestmark = [pytest.mark.real, pytest.mark.root, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
AT_ONCE_MAX = 200
OF_THE_CLIENT = (*MUTATING, "execve", "prctl")
OF_THE_DAEMON = tuple(
    call for call in MUTATING if call != "openat"
)  # it opens /proc and the users here: only reads
UNREACHABLE = 69  # asked while the daemon was dead: COMMAND is not run


class Round:
    """One claim and one that waits for the same place."""

    def __init__(self, victim: Victim) -> None:
        self.box = victim.box
        self.name = victim.new_name()
        self.folder = victim.box.folder / f"round-{self.name}"
        self.folder.mkdir()
        self.record = self.folder / "record"
        self.go = self.folder / "go"
        self.place = f"{self.folder}/place"
        self.started: list[subprocess.Popen[bytes]] = []

    def claim(self, name: str, stop: str | None = None) -> subprocess.Popen[bytes]:
        """agentqctl, asking for the place, in line for it."""
        program = ["-m", "agentqd.cli.main"] if stop is None else [str(HERE / "claimctl.py")]
        folders = ["--state-dir", str(self.box.state), "--runtime-dir", str(self.box.runtime)]
        holder = [sys.executable, "-I", "-S", str(HERE / "claimholder.py")]
        holder += [str(self.box.state / "journal.db"), str(self.record), str(self.go), name]
        words = ["writes", "claim", self.place, "--wait", "60s", "--name", name, "--", *holder]
        with (self.folder / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, *program, *folders, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "AGENTQ_TEST_STOP": stop or ""},
            )
        self.started.append(child)
        return child

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.record.read_text().splitlines()] if self.record.exists() else []

    def runs(self, name: str) -> bool:
        return any(line[1] == name for line in self.lines())

    def waits(self, name: str) -> bool:
        return query(self.box, "SELECT 1 FROM outside_claims WHERE name = ? AND held_at IS NULL", name) == [
            (1,)
        ]

    def check(self, *, whole: bool) -> None:
        """No claim is left; who ran did so alone, and under a claim. `whole`: to its end."""
        look = "SELECT name FROM outside_claims UNION ALL SELECT path FROM intents"
        wait_for("the release of every claim", lambda: query(self.box, look) == [])
        inside: str | None = None
        for pid, name, what, held in self.lines():
            assert held == "True", f"{name} {what} without its claim"
            if what == "begins":
                assert inside is None or is_gone(int(inside)), f"{name} begins while another runs"
                inside = pid
            else:
                assert inside == pid
                inside = None
        assert inside is None or not whole, "one that began did not end"
        assert [what for _, _, what, _ in self.lines()].count("begins") <= len(self.started)

    def end(self) -> None:
        self.go.touch()
        for child in self.started:
            if child.poll() is None:
                child.kill()
            child.wait()


# agentqctl: the process that waits, and the one that asks and becomes COMMAND.


def test_the_command_and_its_keeper_killed_at_every_call(tmp_path: Path) -> None:
    began, tally = time.monotonic(), Tally()
    (tmp_path / "look").mkdir()
    with RealBox(tmp_path / "look") as box:
        box.start()
        victim = Victim(box, None, tag="look-")  # type: ignore[arg-type]  # no task runs here
        found = {who: calls_of(victim, who) for who in ("parent", "child")}
    jobs: list[Callable[[Victim], None]] = [
        client_job(tally, who, call, when)
        for who, calls in found.items()
        for call, n in calls.items()
        for when in range(1, n + 1)
    ]
    share(tmp_path, jobs)
    tally.show("agentqctl writes claim", began)
    assert tally.kills.total() >= 0.9 * len(jobs), f"{tally.kills.total()} kills at {len(jobs)} points"
    for what in ("child execve", "child connect", "child sendto", "parent wait4"):
        assert tally.kills[what], f"never killed at {what}: {tally.kills}"


def stopped_at_its_fork(run: Round, who: str) -> tuple[subprocess.Popen[bytes], int]:
    """agentqctl, and the process that has stopped."""
    ctl = run.claim("first", stop=who)

    def stopped() -> int | None:
        children = Path(f"/proc/{ctl.pid}/task/{ctl.pid}/children").read_text().split()
        pid = ctl.pid if who == "parent" else int(children[0]) if children else None
        return pid if pid is not None and is_stopped(pid) else None

    return ctl, wait_for("its fork", stopped)  # type: ignore[return-value]


def calls_of(victim: Victim, who: str) -> Counter[str]:
    """What it does from its fork to its end, or until it has become COMMAND."""
    run = Round(victim)
    try:
        ctl, pid = stopped_at_its_fork(run, who)
        strace = Strace([pid], ["-e", f"trace={','.join(OF_THE_CLIENT)}"], run.folder / "look")
        os.kill(pid, signal.SIGCONT)
        wait_for("its run", lambda: run.runs("first"))
        run.go.touch()
        assert ctl.wait(30) == 0
        strace.wait()
        run.check(whole=True)
        lines = strace.lines()
    finally:
        run.end()
    until = next((n for n, line in enumerate(lines) if call_name_of(line) == "execve"), len(lines) - 1)
    return Counter(name for line in lines[: until + 1] if (name := call_name_of(line)) is not None)


def call_name_of(line: str) -> str | None:
    """As `inject.call_name`, of a trace of one process."""
    found = call_name(f"0 {line}")
    return found if found in OF_THE_CLIENT else None


def client_job(tally: Tally, who: str, call: str, when: int) -> Callable[[Victim], None]:
    def job(victim: Victim) -> None:
        run = Round(victim)
        try:
            if kill_client(run, who, call, when):
                tally.count(f"{who} {call}")
        except AssertionError as error:
            logs = "".join(path.read_text()[-2000:] for path in run.folder.glob("*.log"))
            raise AssertionError(
                f"after SIGKILL of the {who} at {call} {when}: {error}\n{logs}{run.lines()}"
            ) from error
        finally:
            run.end()

    return job


def kill_client(run: Round, who: str, call: str, when: int) -> bool:
    """False: it was over before the N-th call."""
    ctl, pid = stopped_at_its_fork(run, who)
    strace = kill_at([pid], call, when, run.folder / "kill")
    os.kill(pid, signal.SIGCONT)
    wait_for("the kill, or its run", lambda: is_gone(pid) or run.runs("first"))
    second = run.claim("second")
    if not is_gone(pid):
        wait_for("the second in line", lambda: run.waits("second") or is_gone(pid))
    run.go.touch()
    assert second.wait(60) == 0, "whoever waited did not get the place"
    ctl.wait(60)
    strace.wait()
    run.check(whole=False)
    killed = "+++ killed by SIGKILL +++" in "".join(strace.lines())
    if killed and who == "child":
        assert ctl.returncode == 128 + signal.SIGKILL
    return killed


# The daemon.


def test_the_daemon_killed_at_every_call_while_claims_come_and_go(tmp_path: Path) -> None:
    began, tally = time.monotonic(), Tally()
    (tmp_path / "look").mkdir()
    with RealBox(tmp_path / "look") as box:
        box.start()
        victim = Victim(box, None, tag="look-")  # type: ignore[arg-type]
        wait_warm(victim)
        straces = {
            role: Strace(tids, ["-e", f"trace={','.join(OF_THE_DAEMON)}"], box.folder / f"look-{role}")
            for role, tids in roles(victim).items()
            if tids
        }
        run = Round(victim)
        try:
            play(run)
            run.check(whole=True)
        finally:
            run.end()
        found: dict[tuple[str, str], int] = {}
        for role, strace in straces.items():
            strace.detach()
            found |= {(role, call): n for call, n in count_calls(strace.lines()).items()}
    jobs: list[Callable[[Victim], None]] = []
    for (role, call), n in sorted(found.items(), key=lambda item: -item[1]):
        step = max(1, min(BOXES, n // 8))  # many calls are shared out
        jobs += [daemon_job(tally, role, call, first, step) for first in range(1, step + 1)]
    share(tmp_path, jobs)
    tally.show("daemon, claims from outside", began)
    calls = sum(found.values())
    assert tally.kills.total() >= 0.7 * calls, f"{tally.kills.total()} kills where {calls} calls were seen"
    for call in ("pwrite64", "fdatasync", "sendto"):
        assert any(what.endswith(call) for what in tally.kills), f"never killed at {call}"


def wait_warm(victim: Victim) -> None:
    """One claim, so that every thread is there."""
    pid = victim.box.daemon_pid()
    if victim.warm == pid:
        return
    wait_for("the threads of the start", lambda: len(threads_of(pid)) >= THREADS_AT_START)
    run = Round(victim)
    try:
        run.go.touch()
        assert run.claim("warm").wait(60) == 0
        run.check(whole=True)
    finally:
        run.end()
    victim.warm = pid


def play(run: Round) -> None:
    """The first holds the place until the second waits for it. Goes as far as the daemon lives."""
    box = run.box

    def over() -> bool:
        return daemon_died(box) or all(child.poll() is not None for child in run.started)

    run.claim("first")
    wait_for("the first to run", lambda: run.runs("first") or over(), 60)
    if not daemon_died(box):
        run.claim("second")
        wait_for("the second to wait", lambda: run.waits("second") or over(), 60)
    run.go.touch()
    wait_for("both ends", over, 60)
    if not daemon_died(box):
        look = "SELECT 1 FROM outside_claims"
        wait_for("the last release", lambda: daemon_died(box) or query(box, look) == [], 60)


def daemon_job(tally: Tally, role: str, call: str, first: int, step: int) -> Callable[[Victim], None]:
    def job(victim: Victim) -> None:
        when = first
        while kill_daemon(victim, role, call, when):
            tally.count(f"{role} {call}")
            when += step
            assert when < AT_ONCE_MAX

    return job


def kill_daemon(victim: Victim, role: str, call: str, when: int) -> bool:
    box = victim.box
    if box.daemon is None:
        box.start()
    wait_warm(victim)
    threads = roles(victim)[role]
    if not threads:
        return False  # of an executor: there are as many as were needed at once
    strace = kill_at(threads, call, when, box.folder / "kill")
    run = Round(victim)
    try:
        play(run)
        if not daemon_died(box):
            strace.detach()
        assert box.daemon is not None
        killed = has_died(box.daemon.pid)
        if killed:
            strace.wait()
            reap_killed(box)
            box.start()
        ends = [child.wait(90) for child in run.started]
        assert set(ends) <= {0, UNREACHABLE}, ends
        assert [line[2] for line in run.lines()].count("ends") == ends.count(0), (ends, run.lines())
        if not killed:
            assert ends == [0, 0]
        last = run.claim("last")  # the place is free again
        assert last.wait(90) == 0
        run.check(whole=True)
    except AssertionError as error:
        raise AssertionError(
            f"after SIGKILL at {role} {call} {when}: {error}\n{box.log_text()[-5000:]}"
        ) from error
    finally:
        run.end()
    return killed
