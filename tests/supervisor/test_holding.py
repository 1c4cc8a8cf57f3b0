"""A Run that is held: its daemon's claim is not durable yet."""

from __future__ import annotations

import os

import msgspec
import pytest

from agentqd.supervisor.wire import NOT_STARTED, Exited, Go, Leave, Ping, Pong, Running, SurvivorsGone

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
