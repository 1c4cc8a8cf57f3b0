"""Start, environment, folder, exit."""

from __future__ import annotations

import json
import os
import stat

import pytest

from agentqd.supervisor.wire import Exited, Running

from .harness import Box, Daemon, run, until

pytestmark = pytest.mark.real


def test_a_worker_that_ends_is_told_and_its_exit_file_says_the_same(box: Box, daemon: Daemon) -> None:
    daemon.send(run("t", "echo out; echo err >&2; exit 3"))
    started = daemon.started("t")
    exited = daemon.exited("t")
    assert (exited.exit_code, exited.signal, exited.intent, exited.pid) == (3, None, None, started.pid)
    assert (exited.stdout_bytes, exited.stderr_bytes) == (4, 4)
    assert exited.ended_at >= (exited.started_at or 0) > 0
    assert json.loads(box.read("t", "exit.json"))["exit_code"] == 3
    assert box.read("t", "stdout") == b"out\n"
    assert box.read("t", "stderr") == b"err\n"


def test_a_worker_killed_by_a_stranger_has_a_signal_and_no_intent(daemon: Daemon) -> None:
    daemon.send(run("t", "kill -9 $$"))
    exited = daemon.exited("t")
    assert (exited.exit_code, exited.signal, exited.intent) == (None, 9, None)


def test_the_folder_has_its_parts_and_nobody_else_can_read_them(box: Box, daemon: Daemon) -> None:
    daemon.send(run("t", prompt="secret"))
    daemon.exited("t")
    names = set(os.listdir(box.path("t")))
    assert names == {"prompt", "started", "stdout", "stderr", "outbox", "work", "exit.json"}
    for name in ("", "outbox", "work"):
        assert stat.S_IMODE(os.stat(box.path("t", name)).st_mode) == 0o700
    for name in ("prompt", "started", "stdout", "stderr", "exit.json"):
        assert stat.S_IMODE(os.stat(box.path("t", name)).st_mode) == 0o600
    assert "secret" not in box.log()
    assert os.listdir(os.path.dirname(box.path("t").rstrip("/"))) == ["attempt-1"]


def test_the_prompt_comes_on_stdin_and_ends(box: Box, daemon: Daemon) -> None:
    daemon.send(run("t", "cat; echo end", prompt="zwölf\n", stdin="prompt"))
    daemon.exited("t")
    assert box.read("t", "stdout").decode() == "zwölf\nend\n"


def test_without_a_prompt_stdin_is_empty_and_not_open_for_ever(box: Box, daemon: Daemon) -> None:
    daemon.send(run("t", "cat; readlink /proc/self/fd/0"))
    daemon.exited("t")
    assert box.read("t", "stdout") == b"/dev/null\n"


def test_the_worker_gets_the_given_environment_and_the_markers_and_nothing_else(
    box: Box, daemon: Daemon
) -> None:
    daemon.send(run("t", argv=["/usr/bin/env"], env={"A": "b", "AGENTQ_TASK_ID": "other"}, attempt=2))
    daemon.exited("t", 2)
    lines = set(box.read("t", "stdout", 2).decode().split())
    expected = {"A=b", "AGENTQ_TASK_ID=t", "AGENTQ_ATTEMPT=2", f"AGENTQ_STATE_ID={box.state_id}"}
    assert {line for line in lines if not line.startswith("PATH=")} == expected


def test_the_worker_inherits_no_descriptor_and_no_ignored_signal(box: Box, daemon: Daemon) -> None:
    script = "ls -l /proc/self/fd | wc -l; grep -E 'Sig(Blk|Ign)' /proc/self/status"
    daemon.send(run("t", script))
    daemon.exited("t")
    count, *masks = box.read("t", "stdout").decode().splitlines()
    assert int(count) == 5  # "total", 0, 1, 2 and the listing's own
    # The C library's posix_spawn leaves its own two (32 and 33) ignored in every child; no program uses them.
    assert [int(mask.split()[1], 16) & 0x7FFFFFFF for mask in masks] == [0, 0]


def test_the_worker_leads_its_own_session_in_its_own_work_folder(box: Box, daemon: Daemon) -> None:
    daemon.send(run("t", "pwd; cut -d' ' -f1,5,6 /proc/$$/stat"))
    pid = daemon.started("t").pid
    daemon.exited("t")
    assert box.read("t", "stdout").decode().splitlines() == [box.path("t", "work"), f"{pid} {pid} {pid}"]


def test_the_worker_starts_in_the_folder_it_was_given(box: Box, daemon: Daemon) -> None:
    daemon.send(run("t", argv=["pwd"], cwd=box.root))
    daemon.exited("t")
    assert box.read("t", "stdout").decode().strip() == box.root


def test_output_is_appended_even_after_the_worker_cut_its_file(box: Box, daemon: Daemon) -> None:
    daemon.send(run("t", "echo long-line; truncate -s 0 /proc/self/fd/1 2>&1; echo x"))
    daemon.exited("t")
    assert box.read("t", "stdout") == b"x\n"


@pytest.mark.parametrize(
    ("argv", "cwd", "says"),
    [
        (["no-such-program-at-all", "secret"], None, "No such file"),
        (["/etc/passwd"], None, "Permission denied"),
        (["true"], "/no/such/folder", "/no/such/folder"),
        (["true", "x" * 200_000], None, "Argument list too long"),
        (["nul\0"], None, "null"),
    ],
)
def test_a_program_that_cannot_be_started_is_an_end_with_an_error(
    box: Box, daemon: Daemon, argv: list[str], cwd: str | None, says: str
) -> None:
    daemon.send(run("t", argv=argv, cwd=cwd))
    exited = daemon.exited("t")
    assert exited.pid is None
    assert exited.exit_code is None
    assert says in (exited.error or "")
    assert "secret" not in (exited.error or "")
    assert json.loads(box.read("t", "exit.json"))["error"] == exited.error


def test_a_folder_that_cannot_be_made_starts_nothing(box: Box, daemon: Daemon) -> None:
    with open(f"{box.state}/tasks/t", "w"):
        pass
    daemon.send(run("t", f"touch {box.root}/ran"), run("u"))
    assert "cannot make the folder" in (daemon.exited("t").error or "")
    assert daemon.exited("u").exit_code == 0
    assert not os.path.exists(f"{box.root}/ran")


def test_a_symlink_in_place_of_the_task_folder_is_not_followed(box: Box, daemon: Daemon) -> None:
    os.mkdir(f"{box.root}/elsewhere")
    os.symlink(f"{box.root}/elsewhere", f"{box.state}/tasks/t")
    daemon.send(run("t"))
    assert daemon.exited("t").error
    assert os.listdir(f"{box.root}/elsewhere") == []


@pytest.mark.parametrize("folder", ["tasks/u/attempt-1", "/etc", "tasks/../t/attempt-1"])
def test_a_folder_that_is_not_the_attempts_place_is_refused(box: Box, daemon: Daemon, folder: str) -> None:
    request = run("t")
    daemon.send(
        type(request)(**{**{f: getattr(request, f) for f in request.__struct_fields__}, "folder": folder})
    )
    assert "the folder of attempt 1 of t" in (daemon.exited("t").error or "")


def test_a_known_attempt_is_never_started_twice(box: Box, daemon: Daemon) -> None:
    script = f"echo x >> {box.root}/starts; sleep 0.3"
    daemon.send(run("t", script), run("t", script))
    daemon.exited("t")
    daemon.send(run("t", script))
    until(
        lambda: daemon.pump(0.05) or len([r for r in daemon.seen if isinstance(r, Exited)]) == 2, "told again"
    )
    assert len([r for r in daemon.seen if isinstance(r, Running)]) == 2
    with open(f"{box.root}/starts") as file:
        assert file.read() == "x\n"


def test_a_forgotten_attempt_is_not_started_again_but_told_from_disk(box: Box, daemon: Daemon) -> None:
    from agentqd.supervisor.wire import Forget

    daemon.send(run("t", "exit 7"))
    first = daemon.exited("t")
    daemon.seen.clear()
    daemon.send(Forget("t", 1), run("t", "exit 8"))
    assert daemon.exited("t") == first
    assert box.daemon().welcome().exited == []


def test_what_another_instance_started_is_told_from_its_exit_file(box: Box, daemon: Daemon) -> None:
    daemon.send(run("t", "exit 4"))
    first = daemon.exited("t")
    assert box.process is not None
    box.process.kill()
    box.process.wait()
    box.start()
    newer = box.daemon()
    assert newer.welcome().exited == []
    newer.send(run("t", "exit 5"))
    assert newer.exited("t") == first


def test_what_another_instance_started_without_an_end_is_not_started_again(box: Box, daemon: Daemon) -> None:
    instance = daemon.welcome().instance
    daemon.send(run("t", f"echo x >> {box.root}/starts; sleep 60"))
    until(lambda: os.path.exists(f"{box.root}/starts"), "the worker runs")
    assert box.process is not None
    box.process.kill()
    box.process.wait()
    box.start()
    newer = box.daemon()
    newer.send(run("t", f"echo x >> {box.root}/starts"))
    exited = newer.exited("t")
    assert exited.instance == instance != newer.welcome().instance
    assert "another instance" in (exited.error or "")
    assert not os.path.exists(box.path("t", "exit.json"))
    with open(f"{box.root}/starts") as file:
        assert file.read() == "x\n"


def test_leftovers_of_a_crash_before_the_fork_are_replaced(box: Box, daemon: Daemon) -> None:
    os.makedirs(box.path("t", "work/half"))
    os.makedirs(f"{box.state}/tasks/t/.attempt-1.tmp-dead/work")
    daemon.send(run("t", "ls"))
    assert daemon.exited("t").exit_code == 0
    assert box.read("t", "stdout") == b""
    assert os.listdir(f"{box.state}/tasks/t") == ["attempt-1"]


def test_an_exit_file_that_cannot_be_written_is_told_anyway_and_written_later(
    box: Box, daemon: Daemon
) -> None:
    daemon.send(run("t", "mkdir -p ../.exit.json.tmp/x"))
    assert daemon.exited("t").exit_code == 0
    assert not os.path.exists(box.path("t", "exit.json"))
    os.rename(box.path("t", ".exit.json.tmp"), f"{box.root}/away")
    until(lambda: os.path.exists(box.path("t", "exit.json")), "exit.json is written at last")
