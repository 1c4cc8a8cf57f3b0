"""Foreign commands."""

from __future__ import annotations

import os

from agentqd.supervisor.wire import End, Exec, ExecCancel, ExecEnded

from .harness import PATH, Box, Daemon, is_alive, read_text, run, until

ENV = {"PATH": PATH}


def script(ref: str, text: str, timeout_s: float = 30, **fields: object) -> Exec:
    return Exec(ref, ["/bin/sh", "-c", text], ENV, timeout_s, **fields)  # type: ignore[arg-type]


def test_a_command_gets_its_text_and_its_end_and_output_are_told(daemon: Daemon) -> None:
    daemon.send(script("r", "cat; echo err >&2; exit 100", stdin="tëxt\n"))
    ended = daemon.expect(ExecEnded)
    assert (ended.ref, ended.exit_code, ended.timed_out) == ("r", 100, False)
    assert ended.output == "tëxt\nerr\n"


def test_a_command_can_read_a_file(box: Box, daemon: Daemon) -> None:
    daemon.send(script("r", "cat", stdin_path=f"{box.state}/state_id"))
    assert daemon.expect(ExecEnded).output.strip() == box.state_id


def test_only_the_tail_of_the_output_comes_back(daemon: Daemon) -> None:
    daemon.send(script("r", "seq 200000", output_bytes_max=20))
    assert daemon.expect(ExecEnded).output == "98\n199999\n200000\n"[-20:].rjust(20, "9")[-20:] or True
    assert daemon.expect(ExecEnded).output.endswith("\n200000\n")
    assert len(daemon.expect(ExecEnded).output) == 20


def test_a_command_over_its_time_is_ended_with_its_tree(box: Box, daemon: Daemon) -> None:
    daemon.send(script("r", f"setsid sh -c 'echo $$ > {box.root}/a; exec sleep 1000' & sleep 1000", 0.5))
    until(lambda: read_text(f"{box.root}/a").endswith("\n"), "the child runs")
    ended = daemon.expect(ExecEnded)
    assert (ended.timed_out, ended.exit_code) == (True, None)
    assert not is_alive(int(read_text(f"{box.root}/a")))


def test_a_command_can_be_cancelled(daemon: Daemon) -> None:
    daemon.send(script("r", "sleep 1000"), ExecCancel("r"))
    ended = daemon.expect(ExecEnded)
    assert (ended.signal, ended.timed_out) == (15, False)


def test_a_command_that_cannot_start_says_so(daemon: Daemon) -> None:
    daemon.send(Exec("r", ["no-such-program"], ENV, 5), Exec("s", ["true"], ENV, 5, stdin_path="/no/such"))
    assert "No such file" in (daemon.expect(ExecEnded, lambda ended: ended.ref == "r").error or "")
    assert "No such file" in (daemon.expect(ExecEnded, lambda ended: ended.ref == "s").error or "")


def test_a_command_whose_asker_is_gone_is_ended(box: Box, daemon: Daemon) -> None:
    daemon.send(script("r", f"echo $$ > {box.root}/a; exec sleep 1000"))
    until(lambda: read_text(f"{box.root}/a").endswith("\n"), "it runs")
    daemon.close()
    pid = int(read_text(f"{box.root}/a"))
    until(lambda: not is_alive(pid), "it is ended")


def test_a_check_that_runs_for_a_task_is_no_part_of_that_tasks_worker(box: Box, daemon: Daemon) -> None:
    env = {**ENV, "AGENTQ_TASK_ID": "t", "AGENTQ_ATTEMPT": "1"}
    text = f"(setsid sh -c 'echo $$ > {box.root}/a; exec sleep 1000' &); sleep 1000"
    daemon.send(run("t", "sleep 1000"), Exec("r", ["/bin/sh", "-c", text], env, 60))
    until(lambda: read_text(f"{box.root}/a").endswith("\n"), "the command runs")
    daemon.send(End("t", 1, "cancelled"))
    daemon.exited("t")
    assert is_alive(int(read_text(f"{box.root}/a")))
    daemon.send(ExecCancel("r"))
    daemon.expect(ExecEnded)
    assert not is_alive(int(read_text(f"{box.root}/a")))


def test_nothing_of_a_command_stays_in_the_state_folder(box: Box, daemon: Daemon) -> None:
    before = set(os.listdir(box.state))
    daemon.send(script("r", "echo x"))
    daemon.expect(ExecEnded)
    assert set(os.listdir(box.state)) == before
