"""A Run that is held: its daemon's claim is not durable yet."""

from __future__ import annotations

import os
import resource
import signal

import msgspec
import pytest

from agentqd.supervisor.wire import NOT_STARTED, End, Exited, Go, Leave, Ping, Pong, Running, SurvivorsGone

from .harness import Box, Daemon, is_alive, run, until
from .test_survivors import kill

pytestmark = pytest.mark.real


def held(task: str, script: str, attempt: int = 1) -> msgspec.Struct:
    return msgspec.structs.replace(run(task, script, attempt=attempt), hold=True)


def test_a_held_run_has_its_folder_and_starts_with_go(box: Box, daemon: Daemon) -> None:
    daemon.send(held("t", "exit 3"), Ping(1))
    daemon.expect(Pong)
    assert os.path.exists(box.path("t", "outbox"))
    assert not os.path.exists(box.path("t", "started"))
    daemon.send(Go("t", 1))
    assert daemon.exited("t").exit_code == 3


def test_a_held_run_is_forgotten_with_its_connection(box: Box, daemon: Daemon) -> None:
    daemon.send(held("t", "exit 3"), Ping(1))
    daemon.expect(Pong)
    newer = box.daemon()
    newer.send(Go("t", 1), Ping(2))
    newer.expect(Pong)
    assert not os.path.exists(box.path("t", "started"))
    newer.send(run("t", "exit 4"))
    assert newer.exited("t").exit_code == 4


def test_a_supervisor_that_leaves_answers_a_held_run_at_go_and_not_before(box: Box, daemon: Daemon) -> None:
    """Before it, the daemon has nothing yet that the answer could meet."""
    daemon.send(run("a", "while [ ! -e go ]; do sleep 0.05; done"))
    daemon.started("a")
    daemon.send(Leave(), held("t", "true"), Ping(1))
    daemon.expect(Pong)
    assert not [
        report for report in daemon.seen if isinstance(report, Exited | Running) and report.task == "t"
    ]
    daemon.send(Go("t", 1))
    assert (daemon.exited("t").error or "").startswith(NOT_STARTED)
    with open(box.path("a", "work/go"), "w"):
        pass


def test_a_held_run_waits_for_survivors_of_its_task_after_go(box: Box, daemon: Daemon) -> None:
    daemon.send(run("t", "trap '' TERM; echo $$ > a; while :; do sleep 0.05; done"))
    pid = box.pid_in("t", "a")
    kill(box)
    box.start()
    newer = box.daemon()
    newer.send(held("t", "exit 3", attempt=2), Go("t", 2))
    newer.expect(SurvivorsGone)
    until(lambda: not is_alive(pid), "the survivor is gone")
    assert newer.exited("t", 2).exit_code == 3


@pytest.mark.parametrize("held_first", [True, False])
def test_nothing_starts_whose_end_has_arrived_with_the_order_to_start_it(
    box: Box, daemon: Daemon, held_first: bool
) -> None:
    start = [held("t", "touch ran; sleep 100"), Go("t", 1)] if held_first else [run("t", "touch ran; sleep 100")]  # fmt: skip
    others = [run(f"o{n}", "exit 3", env={"FILL": "x" * 1000}) for n in range(40)]
    daemon.send(*start, *others, End("t", 1, "cancelled"), Ping(1))
    exited = daemon.exited("t")
    assert (exited.pid, exited.intent, (exited.error or "").startswith(NOT_STARTED)) == (None, "cancelled", True)  # fmt: skip
    daemon.expect(Pong)
    assert not os.path.exists(box.path("t", "started"))
    assert [daemon.exited(f"o{n}").exit_code for n in range(40)] == [3] * 40
    daemon.send(run("t", "exit 4"))  # its number is free
    daemon.expect(Exited, lambda report: (report.task, report.exit_code) == ("t", 4))


def test_an_end_of_another_attempt_or_a_later_one_takes_no_start_back(box: Box, daemon: Daemon) -> None:
    ends = [End("t", 2, "cancelled"), End("u", 1, "cancelled"), End("t", 1, "result_grace", after_s=30.0)]
    daemon.send(run("t", "exit 3"), *ends)
    assert daemon.exited("t").exit_code == 3


def test_an_end_that_stands_too_far_behind_its_start_ends_the_program(box: Box, daemon: Daemon) -> None:
    daemon.send(run("t", "touch ran; sleep 100"))
    daemon.started("t")
    daemon.send(End("t", 1, "cancelled"))
    exited = daemon.exited("t")
    assert (exited.pid is not None, exited.signal, exited.intent) == (True, 15, "cancelled")


def test_nothing_of_an_older_daemon_starts_once_a_newer_one_has_connected(box: Box, daemon: Daemon) -> None:
    """Also where this process was stopped in between, and finds both at once."""
    assert box.process is not None
    daemon.send(held("t", "touch ran; exit 3"), Ping(1))
    daemon.expect(Pong)
    box.process.send_signal(signal.SIGSTOP)
    daemon.send(Ping(2), Go("t", 1), run("u", "touch ran; exit 3"))
    newer = box.raw(epoch=99)
    box.process.send_signal(signal.SIGCONT)
    assert newer.welcome().running == []
    newer.send(run("v", "exit 4"))
    assert newer.exited("v").exit_code == 4
    assert not [task for task in ("t", "u") if os.path.exists(box.path(task, "started"))]


def test_orders_to_start_are_answered_while_no_descriptor_is_left_to_hear_who_connects(
    box: Box, daemon: Daemon
) -> None:
    assert box.process is not None
    pid = box.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
    with box.connect(), box.connect():  # accept fails, and is tried again after a pause
        until(lambda: "accept_failed" in box.log(), "accept fails")
        daemon.send(run("t", "exit 3"), run("u", "exit 3"), Ping(1))
        daemon.expect(Pong)
        assert [daemon.exited(task).pid for task in ("t", "u")] == [None, None]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    daemon.send(run("v", "exit 4"))
    assert daemon.exited("v").exit_code == 4
