"""Timers, clocks and folders: no process, no waiting."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from agentqd.core.errors import StateFolderError
from agentqd.core.folders import choose_folders
from agentqd.storage.state_id import load_state_id
from agentqd.supervisor.clocks import AttemptClocks
from agentqd.supervisor.deadlines import Deadlines
from agentqd.supervisor.procfs import Process, read_process, signal_process
from agentqd.supervisor.wire import Clocks
from agentqd.system.clock import ManualClock
from agentqd.system.notify import Notifier, watchdog_interval_s


def test_timers_fire_in_order_and_cancelled_ones_never() -> None:
    clock, timers, fired = ManualClock(), Deadlines(), []
    now_s = clock.monotonic_s()
    timers.at(now_s + 2, lambda: fired.append("b"))
    timers.at(now_s + 1, lambda: fired.append("a"))
    timers.at(now_s + 2, lambda: fired.append("c"))
    dropped = timers.at(now_s + 1, lambda: fired.append("never"))
    dropped.cancel()
    assert timers.run_due(clock.monotonic_s()) == 0
    clock.advance(2)
    assert timers.run_due(clock.monotonic_s()) == 3
    assert fired == ["a", "b", "c"]
    assert timers.next_s() is None


def test_a_timer_cancelled_by_another_one_due_at_the_same_time_does_not_fire() -> None:
    timers, fired = Deadlines(), []
    later = []
    timers.at(1, lambda: later.pop().cancel())
    later.append(timers.at(1, lambda: fired.append("never")))
    assert timers.run_due(1) == 1
    assert fired == []


def test_the_deadline_that_passed_first_is_the_intent() -> None:
    clocks = AttemptClocks(Clocks(run_s=10, total_s=5), received_s=100, started_s=100)
    assert clocks.expired(104.9) is None
    assert clocks.expired(200) == "total_timeout"


def test_a_replaced_run_deadline_still_counts_from_the_start_and_a_total_one_from_its_message() -> None:
    clocks = AttemptClocks(Clocks(run_s=10), received_s=100, started_s=100)
    clocks.replace(Clocks(run_s=20), received_s=108)
    assert clocks.expired(119.9) is None
    assert clocks.expired(120) == "run_timeout"
    clocks.replace(Clocks(total_s=20), received_s=108)
    assert clocks.expired(127.9) is None
    assert clocks.expired(128) == "total_timeout"


def test_first_output_judges_alone_until_something_was_seen() -> None:
    clocks = AttemptClocks(Clocks(first_output_s=10, silence_s=2), received_s=0, started_s=0)
    assert clocks.expired(9) is None
    clocks.saw_activity(9)
    assert clocks.expired(10.9) is None
    assert clocks.expired(11) == "silence_timeout"


def test_silence_alone_counts_from_the_start() -> None:
    clocks = AttemptClocks(Clocks(silence_s=2), received_s=0, started_s=0)
    assert clocks.expired(2) == "silence_timeout"
    assert clocks.next_s(0) == 0.5


def test_the_warning_is_spent_once() -> None:
    clocks = AttemptClocks(Clocks(run_s=100, kill_grace_s=10, warning_signal=10), received_s=0, started_s=0)
    assert clocks.next_s(0) == 90
    assert clocks.take_warning(89) is None
    assert clocks.take_warning(90) == 10
    assert clocks.take_warning(91) is None
    assert clocks.next_s(91) == 100


def test_without_clocks_nothing_is_ever_due() -> None:
    clocks = AttemptClocks(Clocks(), received_s=0, started_s=0)
    assert clocks.next_s(0) is None
    assert clocks.expired(1e9) is None


@pytest.mark.parametrize(
    ("env", "uid", "arguments", "state", "runtime"),
    [
        ({}, 0, {}, "/var/lib/agentqd", "/run/agentqd"),
        ({"HOME": "/h"}, 5, {}, "/h/.local/state/agentqd", "/h/.local/state/agentqd/run"),
        (
            {"XDG_STATE_HOME": "/x", "XDG_RUNTIME_DIR": "/run/user/5"},
            5,
            {},
            "/x/agentqd",
            "/run/user/5/agentqd",
        ),
        ({"AGENTQD_STATE_DIR": "/s/", "AGENTQD_RUNTIME_DIR": "/r"}, 5, {}, "/s", "/r"),
        (
            {"AGENTQD_STATE_DIR": "/s", "AGENTQD_RUNTIME_DIR": "/r"},
            0,
            {"state_dir": "/a", "runtime_dir": "/b"},
            "/a",
            "/b",
        ),
        (
            {"HOME": "/h", "XDG_STATE_HOME": "relative"},
            5,
            {},
            "/h/.local/state/agentqd",
            "/h/.local/state/agentqd/run",
        ),
    ],
)
def test_folders_are_chosen_by_argument_then_environment_then_default(
    env: dict[str, str], uid: int, arguments: dict[str, str], state: str, runtime: str
) -> None:
    folders = choose_folders(env, uid, **arguments)
    assert (folders.state, folders.runtime) == (state, runtime)


def test_the_state_id_is_made_once_and_kept(tmp_path: Path) -> None:
    path = str(tmp_path / "state_id")
    made = load_state_id(path)
    assert len(made) == 32
    assert load_state_id(path) == made
    assert os.listdir(tmp_path) == ["state_id"]


def test_programs_that_start_at_once_agree_on_the_state_id(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert len(set(pool.map(load_state_id, [str(tmp_path / "state_id")] * 16))) == 1


def test_a_damaged_state_id_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "state_id").write_text("short")
    with pytest.raises(StateFolderError, match="not a state id"):
        load_state_id(str(tmp_path / "state_id"))


def test_a_pid_that_was_reused_gets_no_signal() -> None:
    child = os.posix_spawn("/bin/sleep", ["sleep", "1000"], {})
    try:
        real = read_process(child)
        assert real is not None
        signal_process(Process(child, real.start - 1, 0, 0, 0, "S", ""), 9)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        if real is not None:
            signal_process(real, 9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9


def test_without_a_manager_notifications_do_nothing() -> None:
    assert Notifier(None).ready() is False
    unheard = Notifier("/no/such/socket")
    assert unheard.watchdog() is False
    unheard.close()
    assert watchdog_interval_s({}, 1) is None
    assert watchdog_interval_s({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "2"}, 1) is None
    assert watchdog_interval_s({"WATCHDOG_USEC": "2000000"}, 1) == 1.0
