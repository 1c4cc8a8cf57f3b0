"""Workers of a supervisor that was killed."""

from __future__ import annotations

import os

import pytest

from agentqd.supervisor.wire import SurvivorsGone

from .harness import Box, Daemon, is_alive, run, until

pytestmark = pytest.mark.real


def kill(box: Box) -> None:
    assert box.process is not None
    box.process.kill()
    box.process.wait()


def test_survivors_are_ended_reported_until_gone_and_block_only_their_task(box: Box, daemon: Daemon) -> None:
    stubborn = "trap '' TERM; echo $$ > a; while :; do sleep 0.05; done"
    daemon.send(run("t", stubborn))
    pid = box.pid_in("t", "a")
    kill(box)
    assert is_alive(pid)
    box.start()
    newer = box.daemon()
    survivors = newer.welcome().survivors
    assert ("t", 1, pid) in [(survivor.task, survivor.attempt, survivor.pid) for survivor in survivors]
    newer.send(run("t", "exit 3", attempt=2), run("u", "sleep 0.5; exit 4"))
    assert newer.exited("u").exit_code == 4
    newer.expect(SurvivorsGone)
    assert not is_alive(pid)
    assert newer.exited("t", 2).exit_code == 3
    assert (newer.exited("t", 2).started_at or 0) > (newer.exited("u").started_at or 0) + 200_000


def test_children_of_survivors_are_ended_too(box: Box, daemon: Daemon) -> None:
    daemon.send(
        run("t", "setsid env -i sh -c 'echo $$ > a; exec sleep 1000' & setsid sleep 1000 & sleep 1000")
    )
    pid = box.pid_in("t", "a")
    kill(box)
    box.start()
    until(lambda: not is_alive(pid) and box.marked() == [], "all survivors are gone")


def test_another_state_folders_workers_are_no_survivors(box: Box, daemon: Daemon) -> None:
    daemon.send(run("t", "sleep 1000"))
    pid = daemon.started("t").pid
    other = Box(box.root + "/x")
    os.mkdir(other.root)
    try:
        other.start()
        assert other.daemon().welcome().survivors == []
        assert is_alive(pid)
    finally:
        other.clean()
