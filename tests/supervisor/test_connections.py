"""Who may speak, what is repeated, and that nothing on the socket hurts a worker."""

from __future__ import annotations

import os
import resource
import signal
import socket
import stat
import subprocess

import pytest

from agentqd.supervisor.connection import Connection
from agentqd.supervisor.wire import End, Forget, Leave, Ping, Pong, Refuse, Run, Running

from .harness import Box, Daemon, is_alive, run, until

pytestmark = pytest.mark.real


def test_the_socket_is_for_its_user_only(box: Box) -> None:
    assert stat.S_IMODE(os.stat(f"{box.runtime}/supervisor.sock").st_mode) == 0o600
    assert stat.S_IMODE(os.stat(box.state).st_mode) == 0o700


def test_a_second_supervisor_on_the_same_folder_is_refused_and_told_who_is_first(box: Box) -> None:
    assert box.process is not None
    second = box.spawn()
    assert second.wait(20) == 1
    assert f"pid {box.process.pid}" in box.log()
    box.daemon().welcome()


def test_a_second_state_folder_does_not_take_over_a_socket_in_use(box: Box) -> None:
    second = box.spawn("--state-dir", f"{box.root}/other")
    assert second.wait(20) == 1
    assert "in use by another supervisor" in box.log()
    box.daemon().welcome()


def test_a_stale_socket_is_replaced(box: Box) -> None:
    assert box.process is not None
    box.process.kill()
    box.process.wait()
    assert os.path.exists(f"{box.runtime}/supervisor.sock")
    box.start()
    box.daemon().welcome()


@pytest.mark.parametrize(
    ("hello", "code"),
    [
        ({"epoch": 1, "state_id": "0" * 32}, "other_state_folder"),
        ({"epoch": 1, "protocol": 99}, "protocol"),
        ({"epoch": 0}, "old_epoch"),
    ],
)
def test_a_wrong_hello_is_refused_and_closed(box: Box, hello: dict[str, object], code: str) -> None:
    box.daemon() if code == "old_epoch" else None
    stranger = box.raw(**hello)
    assert stranger.expect(Refuse).code == code
    stranger.until_closed()


def test_an_equal_epoch_is_refused_even_when_the_first_has_gone(box: Box, daemon: Daemon) -> None:
    daemon.close()
    assert box.raw(epoch=1).expect(Refuse).code == "old_epoch"


def test_a_newer_epoch_cuts_off_the_older_connection_and_its_unread_requests(
    box: Box, daemon: Daemon
) -> None:
    assert box.process is not None
    box.process.send_signal(signal.SIGSTOP)
    # 40 requests are more than are acted on in one turn of the loop; the newer Hello comes in between.
    daemon.send(*(run(f"old{n}", "sleep 100") for n in range(200)))
    newer = box.raw(epoch=2)
    box.process.send_signal(signal.SIGCONT)
    daemon.until_closed()
    newer.send(Ping(1))
    newer.expect(Pong)
    started = {report.task for report in newer.welcome().running}
    assert len(started) < 200
    assert not any(isinstance(report, Running) for report in newer.seen)
    assert set(os.listdir(f"{box.state}/tasks")) == started


def test_the_next_daemon_is_told_what_runs_and_what_has_ended_until_it_is_forgotten(
    box: Box, daemon: Daemon
) -> None:
    daemon.send(
        run("ended", "exit 2"),
        run("running", "sleep 100"),
        run("ending", "trap '' TERM; echo; sleep 9; sleep 9"),
    )
    daemon.exited("ended")
    until(lambda: os.stat(box.path("ending", "stdout")).st_size, "the trap is set")
    daemon.send(End("ending", 1, "cancelled"))
    daemon.close()
    newer = box.daemon()
    welcome = newer.welcome()
    assert [report.task for report in welcome.exited] == ["ended"]
    assert {report.task: report.intent for report in welcome.running} in (
        {"running": None, "ending": "cancelled"},
        {"running": None, "ending": None},  # our End was not read before we left
    )
    newer.send(Forget("ended", 1))
    assert box.daemon().welcome().exited == []


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b'{"type":"nonsense"}\n',
        b'{"type":"run"}\n',
        b"\xff\xfe\n",
        b"[" * 50_000 + b"\n",
        b"x" * 100_000,
    ],
    ids=["text", "kind", "fields", "bytes", "deep", "long"],
)
@pytest.mark.parametrize("welcomed", [True, False])
def test_garbage_closes_the_connection_and_touches_no_worker(
    box: Box, daemon: Daemon, line: bytes, welcomed: bool
) -> None:
    daemon.send(run("t", "sleep 100"))
    pid = daemon.started("t").pid
    victim = daemon
    if not welcomed:
        victim = box.raw(epoch=0)  # refused anyway; then once more with nothing but garbage
        victim.until_closed()
        victim.closed = False
        victim.sock.close()
        victim.sock = box.connect()
    elif line.endswith(b"x"):
        line += b"\n"
    victim.sock.sendall(line)
    victim.until_closed()
    assert isinstance(victim.seen[-1], Refuse)
    assert is_alive(pid)
    assert [report.task for report in box.daemon().welcome().running] == ["t"]


def test_requests_before_hello_are_refused(box: Box) -> None:
    stranger = box.raw(epoch=-5)
    stranger.until_closed()
    stranger.sock.close()
    stranger.sock, stranger.closed = box.connect(), False
    stranger.send(Ping(1))
    stranger.until_closed()
    assert isinstance(stranger.seen[-1], Refuse)


def test_a_daemon_that_does_not_read_is_cut_off_before_memory_grows() -> None:
    ours, theirs = socket.socketpair()
    connection = Connection(ours, pending_bytes_max=1 << 20)
    line = b"x" * 999 + b"\n"
    sent = 0
    while connection.queue(line):
        connection.flush()
        sent += len(line)
        assert sent < 1 << 24, "never cut off"
    assert connection.pending_bytes <= (1 << 20) + len(line)
    connection.close()
    theirs.close()


def test_a_daemon_that_does_not_read_does_not_hold_up_deadlines(box: Box, daemon: Daemon) -> None:
    daemon.send(*(run(f"t{n}", "sleep 100", run_s=0.3) for n in range(5)))
    until(lambda: all(os.path.exists(box.path(f"t{n}", "exit.json")) for n in range(5)), "all were ended")


def test_a_request_as_large_as_a_large_prompt_is_taken(box: Box, daemon: Daemon) -> None:
    prompt = "p" * (8 << 20)
    daemon.send(run("t", "wc -c", prompt=prompt, stdin="prompt"))
    daemon.exited("t")
    assert int(box.read("t", "stdout")) == len(prompt)


def test_running_out_of_descriptors_kills_neither_the_loop_nor_a_worker(box: Box, daemon: Daemon) -> None:
    assert box.process is not None
    daemon.send(run("t", "sleep 100"))
    pid = daemon.started("t").pid
    resource.prlimit(
        box.process.pid, resource.RLIMIT_NOFILE, (3, 1024)
    )  # not even what it closes can be opened again
    daemon.send(run("u"))
    assert "Too many open files" in (daemon.exited("u").error or "")
    waiting = [box.connect() for _ in range(4)]
    daemon.send(Ping(1))
    daemon.expect(Pong)
    resource.prlimit(box.process.pid, resource.RLIMIT_NOFILE, (1024, 1024))
    for sock in waiting:
        sock.close()
    assert is_alive(pid)
    newer = box.daemon()
    newer.send(run("v"))
    assert newer.exited("v").exit_code == 0


def test_leave_waits_for_the_last_worker_and_starts_nothing_new(box: Box, daemon: Daemon) -> None:
    assert box.process is not None
    daemon.send(run("t", "sleep 0.5; exit 6"))
    daemon.started("t")
    daemon.send(Leave(), run("u"))
    assert "leaving" in (daemon.exited("u").error or "")
    assert not os.path.exists(box.path("u"))
    assert daemon.exited("t").exit_code == 6
    assert box.process.wait(20) == 0
    assert not os.path.exists(f"{box.runtime}/supervisor.sock")


def test_leave_can_stop_the_workers_first(box: Box, daemon: Daemon) -> None:
    assert box.process is not None
    daemon.send(run("t", "sleep 100"))
    daemon.started("t")
    daemon.send(Leave(stop_workers=True))
    assert daemon.exited("t").intent == "shutdown"
    assert box.process.wait(20) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_ends_its_workers_and_writes_their_ends(
    box: Box, daemon: Daemon, number: signal.Signals
) -> None:
    assert box.process is not None
    daemon.send(run("t", "sleep 100"))
    pid = daemon.started("t").pid
    box.process.send_signal(number)
    assert box.process.wait(20) == 0
    assert not is_alive(pid)
    assert b'"intent":"shutdown"' in box.read("t", "exit.json")


def test_sighup_is_ignored(box: Box, daemon: Daemon) -> None:
    assert box.process is not None
    box.process.send_signal(signal.SIGHUP)
    daemon.send(Ping(3))
    assert daemon.expect(Pong).n == 3


def test_it_leaves_when_idle_for_the_linger_time_but_not_while_a_daemon_is_there(empty_box: Box) -> None:
    process = empty_box.start("--linger", "0.3")
    daemon = empty_box.daemon()
    daemon.send(run("t", "sleep 1"))
    daemon.exited("t")
    assert process.poll() is None
    daemon.close()
    assert process.wait(20) == 0


def test_under_systemd_it_says_ready_and_feeds_the_watchdog(empty_box: Box) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(20)
        name = "agentqd-test-" + os.urandom(6).hex()
        manager.bind("\0" + name)
        process = empty_box.start(env={"NOTIFY_SOCKET": "@" + name, "WATCHDOG_USEC": "200000"})
        got = [manager.recv(4096) for _ in range(3)]
        assert got[0].startswith(b"READY=1")
        assert got[1:] == [b"WATCHDOG=1", b"WATCHDOG=1"]
        process.terminate()
        while not manager.recv(4096).startswith(b"STOPPING=1"):
            pass
        assert process.wait(20) == 0


def test_another_user_may_not_connect(box: Box) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    os.chmod(box.root, 0o755)
    os.chmod(box.runtime, 0o755)
    os.chmod(f"{box.runtime}/supervisor.sock", 0o666)
    script = "import socket,os;os.setuid(65534);s=socket.socket(socket.AF_UNIX);s.connect(os.sys.argv[1]);print(s.recv(999))"
    done = subprocess.run(
        ["python3", "-c", script, f"{box.runtime}/supervisor.sock"],
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert b"not_permitted" in done.stdout


def test_resident_memory_at_rest_is_small(box: Box, daemon: Daemon) -> None:
    assert box.process is not None
    with open(f"/proc/{box.process.pid}/status") as file:
        (line,) = [line for line in file if line.startswith("VmRSS")]
    assert int(line.split()[1]) <= 25 * 1024


def test_a_run_is_not_kept_with_its_prompt(box: Box) -> None:
    assert {"prompt", "env"} <= set(Run.__struct_fields__)
