"""The connection cut, silent, refused: what a verb says then, and that the next one works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from realbox import alive, wait_for

from tests.laptop.onelaptop import CTL, OneLaptop, one_laptop

pytestmark = [pytest.mark.real, pytest.mark.sshd]


def test_a_keeper_that_was_killed_is_followed_by_another(one: OneLaptop) -> None:
    one.ok("status")
    (keeper,) = one.keepers()
    os.kill(keeper, signal.SIGKILL)
    wait_for("its end", lambda: not one.keepers())
    assert one.keeper_socket.exists(), "a killed keeper leaves its socket behind"
    one.ok("status")
    assert one.keepers() not in ([], [keeper])


def test_sessions_killed_on_the_box_are_noticed_at_once(one: OneLaptop) -> None:
    one.ok("status")
    before = one.keepers()
    one.sshd.kill_sessions()
    wait_for("the keeper to leave", lambda: not one.keepers(), 5)
    assert not one.keeper_socket.exists()
    one.ok("status")
    assert one.keepers() != before


def test_an_sshd_killed_under_a_waiting_verb_does_not_end_it(one: OneLaptop) -> None:
    one.ok("submit", "echo begun; sleep 4; echo ended", "--id", "t")
    with one.start("wait", "t") as waiting, one.start("logs", "-f", "t") as logs:
        wait_for("the first line", lambda: b"begun" in one.ctl("logs", "t").stdout)
        one.sshd.kill()
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
        one.sshd.start()
        assert waiting.wait(40) == 0, waiting.communicate()
        said, _ = logs.communicate(timeout=40)
    assert said == b"begun\nended\n"


def test_no_sshd_is_said_with_the_box_and_the_reason(one: OneLaptop) -> None:
    one.sshd.kill()
    done = one.ctl("status", "--json")
    assert done.returncode == 69
    error = json.loads(done.stdout)
    assert error["error"] == "box_unreachable"
    assert error["box"] == "box"
    assert "refused" in error["message"]
    wait_for("the keeper to leave", lambda: not one.keepers(), 5)


def test_a_black_hole_under_a_request_ends_it(one: OneLaptop) -> None:
    one.ok("submit", "sleep 60", "--id", "t")
    with one.start("logs", "t", "--attempt", "1"):
        pass
    (keeper,) = one.keepers()
    with one.start("wait", "t", "--timeout", "100s") as waiting:
        wait_for("the request on its way", lambda: len(os.listdir(f"/proc/{keeper}/fd")) > 8)
        one.sshd.pause()
        began = time.monotonic()
        wait_for("the keeper to give up", lambda: not alive(keeper), 40)
        assert time.monotonic() - began < 35
        one.sshd.resume()
        one.ok("cancel", "t")
        assert waiting.wait(30) == 125


def test_after_a_sleep_a_dead_connection_costs_seconds_and_not_the_verb(one: OneLaptop) -> None:
    one.ok("status")
    (keeper,) = one.keepers()
    os.kill(keeper, signal.SIGSTOP)  # the laptop sleeps
    sleeping = one.sshd.sessions()
    for pid in sleeping:
        os.kill(pid, signal.SIGSTOP)  # and the network forgets its connection
    time.sleep(13)  # longer than what counts as silence: this is what the test is about
    os.kill(keeper, signal.SIGCONT)
    began = time.monotonic()
    one.ok("status")
    assert time.monotonic() - began < 12
    assert keeper not in one.keepers()
    for pid in sleeping:
        os.kill(pid, signal.SIGCONT)


def test_verbs_that_start_together_share_one_keeper(one: OneLaptop) -> None:
    verbs = [one.start("status", "--json") for _ in range(8)]
    for verb in verbs:
        said, wrong = verb.communicate(timeout=60)
        assert verb.returncode == 0, wrong
        assert json.loads(said)["daemon"]
    assert len(one.keepers()) == 1


def test_it_leaves_when_nobody_has_used_it_for_a_while(one: OneLaptop) -> None:
    one.add(
        "box", None, "--keep", "1s", "--state-dir", str(one.box.state), "--runtime-dir", str(one.box.runtime)
    )
    one.ok("status")
    assert one.keepers()
    wait_for("the keeper to leave", lambda: not one.keepers(), 10)
    assert not one.keeper_socket.exists()
    assert one.lock_is_free()
    one.ok("status")


def test_a_keeper_in_use_does_not_leave_for_idleness(one: OneLaptop) -> None:
    one.add(
        "box",
        None,
        "--keep",
        "500ms",
        "--state-dir",
        str(one.box.state),
        "--runtime-dir",
        str(one.box.runtime),
    )
    with one.start("submit", "sleep 3; echo x", "--id", "t", "--follow") as verb:
        wait_for("the keeper", one.keeper_socket.exists)
        (keeper,) = one.keepers()
        while verb.poll() is None:
            assert one.keeper_socket.exists(), "it can be found as long as somebody uses it"
        assert verb.returncode == 0
        assert one.keepers() in ([keeper], [])


def test_a_config_edit_and_another_version_are_served_by_a_new_keeper(one: OneLaptop, tmp_path: Path) -> None:
    one.ok("status")
    before = one.keepers()
    one.add(
        "box", None, "--keep", "5m", "--state-dir", str(one.box.state), "--runtime-dir", str(one.box.runtime)
    )
    one.ok("status")
    wait_for("the old one's end", lambda: not set(before) & set(one.keepers()))
    before = one.keepers()
    (tmp_path / "sitecustomize.py").write_text("import agentqd\nagentqd.__version__ = '99.0'\n")
    assert one.run("--box", "box", "status", PYTHONPATH=str(tmp_path)).returncode == 0
    wait_for("the old one's end", lambda: not set(before) & set(one.keepers()))
    assert one.keepers()


def test_a_keeper_that_is_told_to_leave_finishes_what_it_serves(one: OneLaptop) -> None:
    one.ok("submit", "sleep 3; echo x", "--id", "t")
    with one.start("wait", "t", "--json") as waiting:
        (keeper,) = wait_for("a keeper", one.keepers)
        wait_for("the request on its way", lambda: len(os.listdir(f"/proc/{keeper}/fd")) > 8)
        assert one.run("box", "forget-connection", "box").stdout == b"box  connection ended\n"
        assert not one.keeper_socket.exists()
        assert waiting.wait(30) == 0
    wait_for("its end", lambda: not alive(keeper), 5)


def test_a_keeper_holds_nothing_of_the_verb_that_started_it(one: OneLaptop) -> None:
    """Its session, its descriptors: a lock or a pipe of a script must not live as long as the connection."""
    ours, theirs = os.pipe()
    done = subprocess.run(
        [*CTL, "--box", "box", "status"],
        pass_fds=[theirs],
        stdout=subprocess.DEVNULL,
        env=one.laptop.env(),
        timeout=60,
        check=False,
    )
    os.close(theirs)
    assert done.returncode == 0
    (keeper,) = one.keepers()
    assert os.read(ours, 1) == b"", "nobody has the other end any more"
    os.close(ours)
    assert os.getsid(keeper) == keeper
    assert os.readlink(f"/proc/{keeper}/fd/0") == "/dev/null"


def test_the_socket_is_for_its_user_alone_and_an_open_folder_is_refused(one: OneLaptop) -> None:
    one.ok("status")
    assert one.keeper_socket.stat().st_mode & 0o777 == 0o600
    folder = one.keeper_socket.parent
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    done = one.ctl("status")
    assert done.returncode == 77
    assert b"chmod 700" in done.stderr
    folder.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(folder, 12345, 0)
        assert one.ctl("status").returncode == 77


def test_a_runtime_folder_too_long_for_a_socket_is_replaced(one: OneLaptop) -> None:
    long = one.laptop.home / ("x" * 90)
    long.mkdir(mode=0o700)
    assert one.run("--box", "box", "status", XDG_RUNTIME_DIR=str(long)).returncode == 0
    assert one.run("box", "forget-connection", "box", XDG_RUNTIME_DIR=str(long)).stdout.endswith(b"ended\n")


def test_a_keeper_that_cannot_start_is_said_with_its_last_words(one: OneLaptop, tmp_path: Path) -> None:
    (tmp_path / "asyncssh.py").write_text("raise RuntimeError('broken install')\n")
    done = one.run("--box", "box", "status", PYTHONPATH=str(tmp_path))
    assert done.returncode == 69
    log = next(word for word in done.stderr.decode().split() if word.endswith(".log"))
    assert "broken install" in Path(log).read_text()


def test_submit_through_a_cut_makes_one_task(one: OneLaptop) -> None:
    one.ok("status")
    for number in range(6):
        with one.start("submit", "echo x", "--id", f"t{number}") as verb:
            if number % 2:
                one.sshd.kill_sessions()
            else:
                for keeper in one.keepers():
                    os.kill(keeper, signal.SIGKILL)
            verb.wait(60)
        one.ok("submit", "echo x", "--id", f"t{number}")
    for number in range(6):
        one.ok("wait", f"t{number}")
    assert len(one.json("list")) == 6


@pytest.mark.root
def test_packets_that_vanish_are_noticed_by_silence() -> None:
    """A real black hole: packets are dropped, nobody says a word."""
    with one_laptop() as one:
        one.ok("status")
        (keeper,) = one.keepers()
        rule = ["INPUT", "-i", "lo", "-p", "tcp", "--dport", str(one.sshd.port), "-j", "DROP"]
        if subprocess.run(["iptables", "-I", *rule], check=False, capture_output=True).returncode:
            pytest.skip("needs iptables")
        try:
            wait_for("the keeper to give up", lambda: not alive(keeper), 45)
            assert not one.keeper_socket.exists()
            done = one.ctl("status", timeout=60)
            assert done.returncode == 69
            assert b"no answer" in done.stderr
        finally:
            subprocess.run(["iptables", "-D", *rule], check=True)
        one.ok("status")
