"""SIGKILL at every mutating system call of one accept → delivered run: of the daemon, thread by thread, and of the supervisor.

Each kill point is one run on a box that lives on: append, killed at the N-th call (asserted), started again, checked. N grows
until a run is not killed any more. Four boxes share the work.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from realbox import RealBox, wait_for

from crash.checker import Side, at_rest, check_all, check_once, wait_until_at_rest
from crash.inject import MUTATING, Strace, count_calls, has_died, is_gone, kill_at, threads_of
from crash.processes import daemon_died, holders, is_idle, reap_killed, start_supervisor, without_a_stock

pytestmark = [pytest.mark.real, pytest.mark.root, pytest.mark.timeout(900)]

BOXES = 4
AT_ONCE_MAX = 400  # a call name that never stops being killed is a bug of this test
WORK = "sleep 0.05"
THREADS_AT_START = 6  # main, an executor's, journal, journal-reads, two sinks'


@dataclass
class Victim:
    """One box with a daemon that is killed again and again."""

    box: RealBox
    side: Side
    names: int = 0
    tag: str = ""
    warm: int = 0  # the pid of the daemon that has run a task

    def new_name(self) -> str:
        self.names += 1
        return f"{self.tag}{self.names}"

    def append(self, **more: object) -> str:
        name = self.new_name()
        self.box.append({"task": name, "id": name, "prompt": self.side.script(name, WORK), **more})
        return name

    def warm_up(self) -> None:
        """One task, so that every thread is there."""
        pid = self.box.daemon_pid()
        if self.warm != pid:
            wait_for("the threads of the start", lambda: len(threads_of(pid)) >= THREADS_AT_START)
            wait_until_at_rest(self.box, self.append())
            self.warm = pid


class Tally:
    """The kills, by victim and call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.kills: Counter[str] = Counter()

    def count(self, what: str) -> None:
        with self._lock:
            self.kills[what] += 1

    def show(self, title: str, began: float) -> None:
        text = ", ".join(f"{what} {n}" for what, n in sorted(self.kills.items()))
        print(f"\n{title}: {self.kills.total()} kills in {time.monotonic() - began:.0f} s: {text}")


def share(
    folder: Path, jobs: list[Callable[[Victim], None]], prepare: Callable[[RealBox], None] | None = None
) -> None:
    """Each job on a free box. The first failure is raised; every box is ended."""
    waiting = deque(jobs)

    def work(number: int) -> None:
        own = folder / f"box{number}"
        own.mkdir()
        box = RealBox(own)
        with box:
            if prepare is not None:
                prepare(box)
            victim = Victim(box, Side(own / "side"), tag=f"b{number}-")
            while waiting:
                try:
                    job = waiting.popleft()
                except IndexError:
                    return
                if box.daemon is None:
                    box.start()
                try:
                    job(victim)
                except BaseException:
                    waiting.clear()
                    raise

    with ThreadPoolExecutor(BOXES) as pool:
        for future in [pool.submit(work, number) for number in range(BOXES)]:
            future.result()


def test_the_daemon_killed_at_every_call_of_every_thread(tmp_path: Path) -> None:
    began, tally = time.monotonic(), Tally()
    (tmp_path / "look").mkdir()
    with RealBox(tmp_path / "look") as box:
        box.start()
        victim = Victim(box, Side(tmp_path / "look" / "side"), tag="look-")
        victim.warm_up()
        found = calls_by_role(victim)
    jobs: list[Callable[[Victim], None]] = []
    for (role, call), calls in sorted(found.items(), key=lambda item: -item[1]):
        step = max(1, min(BOXES, calls // 8))  # many calls are shared out
        jobs += [daemon_job(tally, role, call, first, step) for first in range(1, step + 1)]
    share(tmp_path, jobs)
    tally.show("daemon", began)
    calls = sum(found.values())
    assert tally.kills.total() >= 0.8 * calls, f"{tally.kills.total()} kills where {calls} calls were seen"
    for call in ("pwrite64", "fdatasync", "fsync", "openat", "sendto", "write"):
        assert any(what.endswith(call) for what in tally.kills), f"never killed at {call}"


def roles(victim: Victim) -> dict[str, list[int]]:
    """Threads by the order of their start; those that came with the first task (they read evidence) together."""
    tids = threads_of(victim.box.daemon_pid())
    named = {f"thread {number}": [tid] for number, tid in enumerate(tids[:THREADS_AT_START])}
    return {**named, "evidence": tids[THREADS_AT_START:]}


def calls_by_role(victim: Victim) -> dict[tuple[str, str], int]:
    """What one run does, thread by thread."""
    found: dict[tuple[str, str], int] = {}
    straces = {
        role: Strace(tids, ["-e", f"trace={','.join(MUTATING)}"], victim.box.folder / f"look-{role}")
        for role, tids in roles(victim).items()
    }
    name = victim.append()
    wait_until_at_rest(victim.box, name)
    for role, strace in straces.items():
        strace.detach()
        for call, n in count_calls(strace.lines()).items():
            found[role, call] = n
    return found


def daemon_job(tally: Tally, role: str, call: str, first: int, step: int) -> Callable[[Victim], None]:
    def job(victim: Victim) -> None:
        when = first
        while kill_daemon_once(victim, role, call, when):
            tally.count(f"{role} {call}")
            when += step
            assert when < AT_ONCE_MAX

    return job


def kill_daemon_once(victim: Victim, role: str, call: str, when: int) -> bool:
    """One run. False: it was over before the N-th call."""
    box = victim.box
    if box.daemon is None:
        box.start()
    victim.warm_up()
    strace = kill_at(roles(victim)[role], call, when, box.folder / "kill")
    name = victim.append()
    wait_for("the kill, or the end", lambda: daemon_died(box) or at_rest(box, name), 60)
    if not daemon_died(box) and wait_calm(box):
        strace.detach()
    assert box.daemon is not None
    killed = has_died(box.daemon.pid)
    if killed:
        strace.wait()
        reap_killed(box)
        box.start()
    wait_until_at_rest(box, name)
    try:
        check_once(box, victim.side, name, check_all(box))
        victim.side.check()
    except AssertionError as error:
        raise AssertionError(
            f"after SIGKILL at {role} {call} {when}: {error}\n{box.log_text()[-5000:]}"
        ) from error
    return killed


def wait_calm(box: RealBox) -> bool:
    """At rest; what still comes of this run (a Forget, a log line) comes at once. False: the daemon died in it."""
    until = time.monotonic() + 0.06
    while time.monotonic() < until:
        if daemon_died(box):
            return False
        time.sleep(0.01)
    return True


# The start: folders, lock, migrations, the first commits; the line is there before.

START_CALLS = (
    "mkdir", "mkdirat", "chmod", "fchmod", "rename", "renameat", "unlink", "unlinkat", "ftruncate", "fsync", "fdatasync", "pwrite64",
    "write", "sendto", "bind", "listen", "connect", "flock", "inotify_add_watch",
)  # fmt: skip


def test_the_daemon_killed_at_every_call_of_its_first_start(tmp_path: Path) -> None:
    """On an empty state folder with one line in its queue file. Thousands of alike writes (the schema, the log's first
    growth) are taken ever more sparsely; openat only where it creates."""
    began, tally = time.monotonic(), Tally()
    folder = tmp_path / "look"
    folder.mkdir()
    calls, creating = calls_of_a_start(folder)
    points = [(call, when) for call in START_CALLS for when in sparsely(calls[call])]
    points += [("openat", when) for when in creating]
    jobs = deque(enumerate(points))

    def work() -> None:
        while jobs:
            try:
                number, (call, when) = jobs.popleft()
            except IndexError:
                return
            try:
                if kill_a_start(tmp_path / f"start{number}", call, when):
                    tally.count(call)
            except BaseException:
                jobs.clear()
                raise

    with ThreadPoolExecutor(BOXES) as pool:
        for future in [pool.submit(work) for _ in range(BOXES)]:
            future.result()
    tally.show("first start", began)
    assert tally.kills.total() >= len(points) * 0.7, f"{tally.kills.total()} kills at {len(points)} points"


def sparsely(calls: int) -> list[int]:
    """1, 2, 3, ... and from 8 on a third further each time."""
    points, at = [], 1
    while at <= calls:
        points.append(at)
        at += max(1, at // 3) if at >= 8 else 1
    return points


def calls_of_a_start(folder: Path) -> tuple[Counter[str], list[int]]:
    """How often each call comes in the busiest thread, and the numbers of the main thread's openat calls that create."""
    box = RealBox(folder)
    side = Side(folder / "side")
    with box:
        supervisor = start_supervisor(box)
        out = folder / "start.trace"
        box.prefix = [
            "strace",
            "-f",
            "-q",
            "-o",
            str(out),
            "-e",
            f"trace={','.join({*START_CALLS, 'openat'})}",
        ]
        box.append({"task": "t", "id": "t", "prompt": side.script("t")})
        box.start()
        wait_until_at_rest(box, "t")
        box.kill()
        supervisor.kill()
        supervisor.wait()
    by_thread: Counter[tuple[str, str]] = Counter()
    creating, main = [], None
    for line in out.read_text(errors="replace").splitlines():
        tid, _, rest = line.partition(" ")
        call, parenthesis, arguments = rest.strip().partition("(")
        if not parenthesis or (not call.isalnum() and "_" not in call):
            continue
        main = main or tid
        by_thread[tid, call] += 1
        if call == "openat" and tid == main and "O_CREAT" in arguments:
            creating.append(by_thread[tid, call])
    busiest: Counter[str] = Counter()
    for (_, call), n in by_thread.items():
        busiest[call] = max(busiest[call], n)
    return busiest, creating


def kill_a_start(folder: Path, call: str, when: int) -> bool:
    folder.mkdir()
    box = RealBox(folder)
    side = Side(folder / "side")
    with box:
        box.append({"task": "t", "id": "t", "prompt": side.script("t")})
        supervisor = start_supervisor(box)
        try:
            follow = [] if call == "openat" else ["-f"]
            box.prefix = [
                "strace",
                *follow,
                "-q",
                "-o",
                "/dev/null",
                "-e",
                f"trace={call}",
                "-e",
                f"inject={call}:signal=SIGKILL:when={when}",
            ]
            box.start(wait=False)
            wait_for("the kill, or the end", lambda: daemon_died(box) or at_rest(box, "t"), 60)
            killed = daemon_died(box)
            if killed:
                reap_killed(box)
            else:
                box.kill()
            box.prefix = []
            box.start()
            wait_until_at_rest(box, "t")
            check_once(box, side, "t", check_all(box))
            side.check()
        except AssertionError as error:
            raise AssertionError(
                f"start killed at {call} {when}: {error}\n{box.log_text()[-5000:]}"
            ) from error
        finally:
            supervisor.kill()
            supervisor.wait()
    return killed


# The supervisor.


@pytest.mark.parametrize(("on_lost", "stock"), [("fail", True), ("fail", False), ("requeue", True)])
def test_the_supervisor_killed_at_every_call(tmp_path: Path, on_lost: str, stock: bool) -> None:
    """With a folder from the stock, and with one made by hand."""
    began, tally = time.monotonic(), Tally()

    def append(victim: Victim) -> str:
        return victim.append(on_lost=on_lost, backoff="50ms")

    def check(victim: Victim, name: str, killed: bool) -> None:
        check_lost(victim, name, killed, on_lost)

    run_supervisor_jobs(tmp_path, tally, append, check, None if stock else without_a_stock)
    tally.show(f"supervisor, on_lost: {on_lost}, {'from the stock' if stock else 'made by hand'}", began)
    for call in ("mkdirat", "renameat", "openat", "write", "sendto", "pidfd_open"):
        assert any(what.endswith(call) for what in tally.kills), f"never killed at {call}"
    assert {"clone3", "vfork", "clone"} & set(tally.kills)
    assert {"wait4", "waitid"} & set(tally.kills)


def test_the_supervisor_killed_at_every_call_of_ending_a_tree(tmp_path: Path) -> None:
    """A worker that is over its time, with a child in a session of its own: signals are among the calls."""
    began, tally = time.monotonic(), Tally()

    def append(victim: Victim) -> str:
        name = victim.new_name()
        script = victim.side.script(name, "setsid sleep 60 & trap '' TERM; sleep 60 & sleep 60")
        victim.box.append(
            {"task": name, "id": name, "prompt": script, "run_timeout": "150ms", "kill_grace": "50ms"}
        )
        return name

    def check(victim: Victim, name: str, killed: bool) -> None:
        wait_until_at_rest(victim.box, name)
        lines = check_all(victim.box)
        status = [line["status"] for line in lines if line["name"] == name and "status" in line]
        assert status == ["timeout"] or (killed and status == ["lost"]), status
        assert len(victim.side.runs(name)) <= 1
        victim.side.check()
        wait_for("the end of the worker's tree", lambda: not holders(victim.side.folder / f"lock-{name}"))

    run_supervisor_jobs(tmp_path, tally, append, check)
    tally.show("supervisor, ending a tree", began)
    assert {"kill", "pidfd_send_signal"} & set(tally.kills), tally.kills


def run_supervisor_jobs(
    tmp_path: Path,
    tally: Tally,
    append: Callable[[Victim], str],
    check: Callable[[Victim, str, bool], None],
    prepare: Callable[[RealBox], None] | None = None,
) -> None:
    (tmp_path / "look").mkdir()
    with RealBox(tmp_path / "look") as box:
        if prepare is not None:
            prepare(box)
        box.start()
        victim = Victim(box, Side(tmp_path / "look" / "side"), tag="look-")
        victim.warm_up()
        strace = Strace([box.supervisor_pid()], ["-e", f"trace={','.join(MUTATING)}"], box.folder / "look")
        check(victim, append(victim), False)
        strace.detach()
        found = count_calls(strace.lines())
    jobs: list[Callable[[Victim], None]] = []
    for call, calls in found.most_common():
        step = 2 if calls > 6 else 1
        jobs += [supervisor_job(tally, call, first, step, append, check) for first in range(1, step + 1)]
    share(tmp_path, jobs, prepare)


def supervisor_job(
    tally: Tally,
    call: str,
    first: int,
    step: int,
    append: Callable[[Victim], str],
    check: Callable[[Victim, str, bool], None],
) -> Callable[[Victim], None]:
    def job(victim: Victim) -> None:
        when = first
        while kill_supervisor_once(victim, call, when, append, check):
            tally.count(call)
            when += step
            assert when < AT_ONCE_MAX

    return job


def kill_supervisor_once(
    victim: Victim,
    call: str,
    when: int,
    append: Callable[[Victim], str],
    check: Callable[[Victim, str, bool], None],
) -> bool:
    """One run. False: it was over before the N-th call."""
    box = victim.box
    wait_for("an idle supervisor", lambda: is_idle(box))
    pid = box.supervisor_pid()
    strace = kill_at([pid], call, when, box.folder / "kill")
    name = append(victim)
    wait_for("the kill, or the end", lambda: is_gone(pid) or at_rest(box, name), 60)
    let_go = not is_gone(pid) and wait_calm(box)
    if let_go:
        strace.detach()
    killed = has_died(pid)
    strace.wait()
    if killed and not let_go:
        assert any("killed by SIGKILL" in line for line in strace.lines()), strace.lines()[-3:]
    try:
        check(victim, name, killed)
    except AssertionError as error:
        log = (box.runtime / "supervisor.log").read_text()[-3000:]
        raise AssertionError(
            f"supervisor killed at {call} {when}: {error}\n{box.log_text()[-5000:]}\n{log}"
        ) from error
    return killed


def check_lost(victim: Victim, name: str, killed: bool, on_lost: str) -> None:
    """Exactly one result: the true end, or `lost` with at most one run; with requeue a success in the end."""
    wait_until_at_rest(victim.box, name)
    lines = [line for line in check_all(victim.box) if line["name"] == name]
    victim.side.check()
    status = [line["status"] for line in lines if "status" in line]
    entries = [line for line in lines if "status" not in line]
    runs = victim.side.runs(name)
    assert status == ["success"] or (killed and on_lost == "fail" and status == ["lost"]), f"{status}"
    assert len(entries) <= 1
    assert runs == sorted(set(runs)), f"an attempt ran twice: {runs}"
    if status == ["success"]:
        assert len(entries) == 1
        assert runs
    if on_lost == "fail" or not killed:
        assert len(runs) <= 1, f"ran {runs}"
