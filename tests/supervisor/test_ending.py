"""Deadlines and the end of whole trees."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from agentqd.supervisor.wire import Clocks, End, Ending, SetClocks

from .harness import Box, Daemon, is_alive, read_text, run, until

pytestmark = pytest.mark.real


# A python that forks twice, makes its own session, clears its environment, and writes its pid.
HIDDEN = """
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execve('/bin/sh', ['sh', '-c', 'echo $$ > "$0"; exec sleep 1000', sys.argv[1]], {'PATH': '/bin:/usr/bin'})
    os._exit(0)
os.wait()
"""


def hidden(name: str) -> str:
    return f'{sys.executable} -S -c "$HIDDEN" "$PWD/{name}"'


def is_up(box: Box) -> None:
    until(lambda: read_text(box.path("t", "stdout")) == "up\n", "the trap is set")


def let_the_deadline_pass(box: Box, daemon: Daemon, kill_grace_s: float = 10.0) -> None:
    """Once its trap is set, however long that takes."""
    is_up(box)
    daemon.send(SetClocks("t", 1, Clocks(run_s=0.001, kill_grace_s=kill_grace_s)))


def test_the_run_deadline_ends_the_worker_and_says_why(daemon: Daemon) -> None:
    daemon.send(run("t", "sleep 100", run_s=0.2))
    assert daemon.expect(Ending).intent == "run_timeout"
    exited = daemon.exited("t")
    assert (exited.intent, exited.signal) == ("run_timeout", signal.SIGTERM)


def test_the_total_deadline_has_a_name_of_its_own(daemon: Daemon) -> None:
    daemon.send(run("t", "sleep 100", run_s=50, total_s=0.2))
    assert daemon.exited("t").intent == "total_timeout"


def test_a_worker_that_handles_sigterm_keeps_its_exit_code_beside_our_intent(
    box: Box, daemon: Daemon
) -> None:
    daemon.send(run("t", "trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done", run_s=60))
    let_the_deadline_pass(box, daemon)
    exited = daemon.exited("t")
    assert (exited.intent, exited.exit_code) == ("run_timeout", 0)


def test_sigterm_comes_once_to_each_process(box: Box, daemon: Daemon) -> None:
    script = "n=0; trap 'n=$((n+1))' TERM; echo up; for i in $(seq 40); do sleep 0.02; done; echo $n"
    daemon.send(run("t", script, kill_grace_s=60))
    is_up(box)
    daemon.send(End("t", 1, "cancelled"))
    assert daemon.exited("t").intent == "cancelled"
    assert box.read("t", "stdout") == b"up\n1\n"


def test_a_worker_that_ignores_sigterm_is_killed_after_its_grace(box: Box, daemon: Daemon) -> None:
    daemon.send(run("t", "trap '' TERM; echo up; while :; do sleep 0.05; done", run_s=60))
    began = time.monotonic()
    let_the_deadline_pass(box, daemon, kill_grace_s=0.4)
    exited = daemon.exited("t")
    assert (exited.intent, exited.signal) == ("run_timeout", signal.SIGKILL)
    assert 0.4 <= time.monotonic() - began < 8


def test_a_stopped_worker_is_ended_by_sigterm(box: Box, daemon: Daemon) -> None:
    daemon.send(run("t", "kill -STOP $$; sleep 100", run_s=0.2, kill_grace_s=30))
    exited = daemon.exited("t")
    assert (exited.intent, exited.signal) == ("run_timeout", signal.SIGTERM)


@pytest.mark.parametrize(
    "script",
    [
        "setsid sh -c 'echo $$ > a; exec sleep 1000' & sleep 1000",
        "(setsid sh -c 'echo $$ > a; exec sleep 1000' &) ; sleep 1000",
        "setsid sh -c \"trap '' TERM; echo \\$\\$ > a; while :; do sleep 0.05; done\" & sleep 1000",
        "env -i setsid sh -c 'echo $$ > a; exec sleep 1000' & sleep 1000",
        f"{hidden('a')}; sleep 1000",
        "setsid sh -c 'echo $$ > a; kill -STOP $$' & sleep 1000",
    ],
    ids=["own_session", "double_fork", "ignores_sigterm", "clean_environment", "hidden", "stopped"],
)
def test_no_child_outlives_a_cancelled_worker(box: Box, daemon: Daemon, script: str) -> None:
    daemon.send(run("t", script, env={"HIDDEN": HIDDEN}, kill_grace_s=0.3))
    pid = box.pid_in("t", "a")
    daemon.send(End("t", 1, "cancelled"))
    exited = daemon.exited("t")
    assert not is_alive(pid)
    assert exited.intent == "cancelled"
    assert exited.left_behind == []


@pytest.mark.parametrize(
    "script",
    [
        "sleep 1000 & echo $! > a",
        "setsid sh -c 'echo $$ > a; exec sleep 1000' & while [ ! -s a ]; do sleep 0.01; done",
        f"{hidden('a')}; while [ ! -s a ]; do sleep 0.01; done",
    ],
    ids=["same_session", "own_session", "hidden"],
)
def test_what_a_finished_worker_leaves_is_ended_and_named(box: Box, daemon: Daemon, script: str) -> None:
    daemon.send(run("t", script, env={"HIDDEN": HIDDEN}))
    exited = daemon.exited("t")
    pid = box.pid_in("t", "a")
    assert not is_alive(pid)
    assert (pid, "sleep") in [(left.pid, left.name) for left in exited.left_behind]
    assert (exited.exit_code, exited.intent) == (0, None)


def test_a_leftover_that_ignores_sigterm_gets_two_seconds_whatever_the_grace(
    box: Box, daemon: Daemon
) -> None:
    script = "setsid sh -c \"trap '' TERM; echo \\$\\$ > a; while :; do sleep 0.05; done\" & while [ ! -s a ]; do sleep 0.01; done"
    begun = time.monotonic()
    daemon.send(run("t", script, kill_grace_s=60))
    exited = daemon.exited("t")
    assert 1.9 < time.monotonic() - begun < 30
    assert not is_alive(box.pid_in("t", "a"))
    assert exited.left_behind


def test_one_workers_end_leaves_the_other_workers_tree_alone(box: Box, daemon: Daemon) -> None:
    other = "(setsid sh -c 'echo $$ > a; exec sleep 1000' &); sleep 1000"
    daemon.send(run("other", other), run("t", "sleep 1000 & echo $! > a; sleep 1000"))
    mine, others = box.pid_in("t", "a"), box.pid_in("other", "a")
    daemon.send(End("t", 1, "cancelled"))
    daemon.exited("t")
    assert not is_alive(mine)
    assert is_alive(others)
    assert is_alive(daemon.started("other").pid)


def test_a_process_nobody_can_claim_is_ended_with_the_last_that_could_have_made_it(
    box: Box, daemon: Daemon
) -> None:
    daemon.send(run("other", "sleep 1000"))
    daemon.started("other")
    daemon.send(run("t", f"{hidden('a')}; while [ ! -s a ]; do sleep 0.01; done", env={"HIDDEN": HIDDEN}))
    daemon.exited("t")
    pid = box.pid_in("t", "a")
    assert is_alive(pid)  # `other` started before it and may have made it
    until(lambda: "unattributed_process" in box.log(), "it is logged")
    daemon.send(End("other", 1, "cancelled"))
    daemon.exited("other")
    assert not is_alive(pid)


def test_a_tree_that_forks_all_the_time_is_ended(box: Box, daemon: Daemon) -> None:
    script = """
import os, time, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for _ in range(4):
    if os.fork() == 0:
        os.setsid()
        while True:
            if os.fork() == 0:
                os.setsid()
                time.sleep(0.2)
                os._exit(0)
            time.sleep(0.002)
time.sleep(1000)
"""
    daemon.send(run("t", argv=[sys.executable, "-S", "-c", script], kill_grace_s=0.2))
    until(lambda: len(box.marked()) > 20, "it forks")
    daemon.send(End("t", 1, "cancelled"))
    assert daemon.exited("t").signal == signal.SIGKILL
    assert box.marked() == []


def test_dead_orphans_do_not_stay_zombies(box: Box, daemon: Daemon) -> None:
    daemon.send(
        run(
            "t",
            "for i in 1 2 3; do (setsid sh -c 'while [ ! -e go ]; do sleep 0.05; done' &); done; sleep 1000",
        )
    )
    daemon.started("t")
    assert box.process is not None
    children = f"/proc/{box.process.pid}/task/{box.process.pid}/children"
    until(lambda: len(read_text(children).split()) == 4, "the orphans are the supervisor's children")
    with open(box.path("t", "work/go"), "w"):
        pass
    until(lambda: len(read_text(children).split()) == 1, "only the worker is left as a child")


def test_a_marked_orphan_is_ended_with_its_own_worker_while_another_one_lives(
    box: Box, daemon: Daemon
) -> None:
    daemon.send(run("other", "sleep 1000"))
    other = daemon.started("other").pid
    polite = "trap 'echo bye > b; exit' TERM; echo $$ > a; while :; do sleep 0.02; done"
    daemon.send(run("t", '(setsid sh -c "$POLITE" &); sleep 1000', env={"POLITE": polite}))
    pid = box.pid_in("t", "a")
    daemon.send(End("t", 1, "cancelled"))
    daemon.exited("t")
    assert not is_alive(pid)
    assert read_text(box.path("t", "work/b")) == "bye\n"
    assert is_alive(other)


def test_quiet_from_the_start_is_a_first_output_timeout(daemon: Daemon) -> None:
    daemon.send(run("t", "sleep 100", first_output_s=0.3, silence_s=50))
    assert daemon.exited("t").intent == "first_output_timeout"


def test_quiet_after_output_is_a_silence_timeout(daemon: Daemon) -> None:
    daemon.send(run("t", "echo hello; sleep 100", first_output_s=50, silence_s=0.4))
    assert daemon.exited("t").intent == "silence_timeout"


@pytest.mark.parametrize(
    "sign",
    ["echo x", "echo x >&2", "touch ../heartbeat", "touch ../outbox/$i"],
    ids=["out", "err", "beat", "outbox"],
)
def test_every_sign_of_life_counts_against_silence(daemon: Daemon, sign: str) -> None:
    script = f"for i in 1 2 3 4 5 6 7 8 9; do {sign}; sleep 0.25; done"
    daemon.send(run("t", script, first_output_s=1.8, silence_s=1.8))
    exited = daemon.exited("t")
    assert (exited.intent, exited.exit_code) == (None, 0)


def test_the_warning_comes_once_before_the_deadline(box: Box, daemon: Daemon) -> None:
    script = "trap 'echo warned' USR1; echo up; while :; do sleep 0.05; done"
    daemon.send(run("t", script, run_s=2.5, kill_grace_s=0.5, warning_signal=int(signal.SIGUSR1)))
    exited = daemon.exited("t")
    assert box.read("t", "stdout") == b"up\nwarned\n"
    assert exited.intent == "run_timeout"


def test_a_deadline_raised_in_mid_run_lets_the_worker_live_on(daemon: Daemon) -> None:
    daemon.send(run("t", "sleep 2.5; exit 9", run_s=2.0))
    daemon.started("t")
    daemon.send(SetClocks("t", 1, Clocks(run_s=60)))
    exited = daemon.exited("t")
    assert (exited.intent, exited.exit_code) == (None, 9)


def test_a_deadline_lowered_below_the_elapsed_time_ends_the_worker_now(daemon: Daemon) -> None:
    daemon.send(run("t", "sleep 100", run_s=60))
    daemon.started("t")
    daemon.send(SetClocks("t", 1, Clocks(run_s=0.001)))
    assert daemon.exited("t").intent == "run_timeout"


def test_an_end_with_a_wait_lets_the_worker_end_by_itself(daemon: Daemon) -> None:
    daemon.send(run("t", "sleep 0.3; exit 5"), End("t", 1, "result_grace", after_s=30))
    exited = daemon.exited("t")
    assert (exited.intent, exited.exit_code) == (None, 5)


def test_an_end_with_a_wait_ends_the_worker_after_it(daemon: Daemon) -> None:
    daemon.send(run("t", "sleep 100"), End("t", 1, "result_grace", after_s=0.2))
    assert daemon.exited("t").intent == "result_grace"


def test_the_first_intent_wins(box: Box, daemon: Daemon) -> None:
    daemon.send(run("t", "trap '' TERM; echo up; while :; do sleep 0.05; done", run_s=60))
    let_the_deadline_pass(box, daemon, kill_grace_s=1.5)
    assert daemon.expect(Ending).intent == "run_timeout"
    daemon.send(End("t", 1, "cancelled"))
    assert daemon.exited("t").intent == "run_timeout"
    assert [report.intent for report in daemon.seen if isinstance(report, Ending)] == ["run_timeout"]


def test_deadlines_hold_while_no_daemon_is_there(box: Box, daemon: Daemon) -> None:
    daemon.send(run("t", "sleep 100", run_s=0.3))
    daemon.started("t")
    daemon.close()
    until(lambda: os.path.exists(box.path("t", "exit.json")), "the deadline was kept")
    (exited,) = box.daemon().welcome().exited
    assert exited.intent == "run_timeout"
