"""Boxes that forbid something, and laptops that may not: what still works, and what is said about the rest."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from realbox import wait_for
from realsshd import Account, chroot_folder

from tests.laptop.onelaptop import CTL, OneLaptop, one_laptop

pytestmark = [pytest.mark.real, pytest.mark.sshd]


def test_where_forwarding_is_forbidden_a_relay_carries_every_verb_and_says_so_once() -> None:
    with one_laptop(lines=["AllowStreamLocalForwarding no"]) as one:
        first = one.ctl("status")
        assert first.returncode == 0
        assert b"AllowStreamLocalForwarding" in first.stderr
        second = one.ctl("submit", "echo x; sleep 1; echo y", "--id", "t", "--follow")
        assert (second.returncode, second.stdout) == (0, b"x\ny\n")
        assert b"AllowStreamLocalForwarding" not in second.stderr
        big = "z" * 300_000
        one.ok("submit", "--prompt-file", "-", "--id", "big", "--wait", stdin=f"echo {big}".encode())
        assert one.ok("logs", "big") == f"{big}\n".encode()
        steps = json.loads(one.run("box", "test", "box", "--json").stdout)
        assert steps["ok"]
        assert any("relayed" in step["message"] for step in steps["steps"])
        one.box.kill()
        down = one.ctl("status", "--json")
        assert (down.returncode, json.loads(down.stdout)["error"]) == (69, "unreachable")


@pytest.mark.root
def test_with_nothing_but_sftp_in_a_chroot_a_submission_still_gets_there(ordinary_user: Account) -> None:
    lines = ["ForceCommand internal-sftp", "AllowStreamLocalForwarding no", "AllowTcpForwarding no"]
    with chroot_folder() as chroot, one_laptop(ordinary_user, [*lines, f"ChrootDirectory {chroot}"]) as one:
        state = chroot / "state"
        for folder in (state, state / "queue", state / "prompts"):
            folder.mkdir()
            os.chown(folder, ordinary_user.uid, ordinary_user.gid)
        one.add("box", None, "--state-dir", "/state", "--runtime-dir", "/run")
        status = one.ctl("status", "--json")
        error = json.loads(status.stdout)
        assert (status.returncode, error["error"]) == (69, "forwarding_forbidden")
        assert "AllowStreamLocalForwarding" in error["message"]
        waited = one.ctl("wait", "t", "--json")
        assert json.loads(waited.stdout)["error"] == "forwarding_forbidden", "it does not wait for ever"
        said = json.loads(one.ok("submit", "echo x", "--id", "t", "--json"))
        assert (said["where"], said["queue_file"]) == ("queue_file", "/state/queue/tasks.jsonl")
        one.ok("submit", "--prompt-file", "-", "--id", "big", stdin=b"y" * 100_000)
        first, second = map(json.loads, (state / "queue/tasks.jsonl").read_bytes().splitlines())
        assert first["id"] == "t"
        assert (state / "prompts" / second["prompt_ref"]).read_bytes() == b"y" * 100_000
        assert not [path for path in (state / "prompts").iterdir() if path.name.startswith(".")]
        assert (state / "queue/tasks.jsonl").stat().st_mode & 0o777 == 0o600
        steps = {
            step["step"]: step for step in json.loads(one.run("box", "test", "box", "--json").stdout)["steps"]
        }
        assert steps["login"]["ok"]
        assert steps["queue file"]["ok"]
        assert steps["control socket"]["error"] == "forwarding_forbidden"


def test_an_unknown_host_key_is_refused_with_its_fingerprint_and_what_to_do(one: OneLaptop) -> None:
    one.laptop.known_hosts.unlink()
    done = one.ctl("status", "--json")
    error = json.loads(done.stdout)
    assert (done.returncode, error["error"]) == (77, "host_key_unknown")
    shown = subprocess.run(
        ["ssh-keygen", "-lf", f"{one.sshd.host_key}.pub"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split()[1] in error["message"]
    assert f"ssh -p {one.sshd.port} " in error["message"]
    assert not one.laptop.known_hosts.exists(), "nothing is learnt by itself"
    submit = one.ctl("submit", "echo x")
    assert submit.returncode == 77
    steps = json.loads(one.run("box", "test", "box", "--json").stdout)["steps"]
    assert [step["ok"] for step in steps] == [True, True, True, False]
    assert steps[-1]["step"] == "host key"


def test_a_changed_host_key_is_refused_as_such(one: OneLaptop) -> None:
    one.ok("status")
    one.sshd.kill()
    one.sshd.new_host_key()
    one.sshd.start()
    done = one.ctl("status", "--json")
    error = json.loads(done.stdout)
    assert (done.returncode, error["error"]) == (77, "host_key_changed")
    assert "ssh-keygen -R" in error["message"]
    assert error["fingerprint"].startswith("SHA256:")
    one.laptop.known_hosts.write_text(one.sshd.known_hosts_line())
    one.ok("status")


def test_a_host_key_of_another_kind_than_the_known_one_is_a_changed_one(one: OneLaptop) -> None:
    for path in (one.sshd.host_key, Path(f"{one.sshd.host_key}.pub")):
        path.unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", str(one.sshd.host_key)], check=True)
    one.sshd.kill()
    one.sshd.start()
    assert json.loads(one.ctl("status", "--json").stdout)["error"] == "host_key_changed"


def test_a_read_only_known_hosts_is_enough(one: OneLaptop) -> None:
    one.laptop.known_hosts.chmod(0o400)
    one.laptop.ssh.chmod(0o500)
    one.ok("status")
    one.laptop.ssh.chmod(0o700)


def test_no_accepted_key_is_said_with_what_to_do(one: OneLaptop) -> None:
    (one.sshd.folder / "authorized_keys").write_text("")
    done = one.ctl("status", "--json")
    error = json.loads(done.stdout)
    assert (done.returncode, error["error"]) == (77, "not_permitted")
    assert "ssh-copy-id" in error["message"]
    steps = json.loads(one.run("box", "test", "box", "--json").stdout)["steps"]
    assert [step["step"] for step in steps if not step["ok"]] == ["login"]


def test_ssh_config_names_host_port_user_and_key(one: OneLaptop) -> None:
    key = one.laptop.home / "elsewhere"
    one.laptop.key.rename(key)
    one.laptop.ssh_config.write_text(
        f"Host worker\n  HostName 127.0.0.1\n  Port {one.sshd.port}\n  User {one.sshd.account.name}\n  IdentityFile {key}\n"
    )
    one.add("box", "ssh://worker")
    one.ok("status")


def test_a_jump_host_is_passed_through(one: OneLaptop) -> None:
    one.laptop.ssh_config.write_text(
        f"Host inner\n  HostName 127.0.0.1\n  Port {one.sshd.port}\n  ProxyJump {one.sshd.account.name}@127.0.0.1:{one.sshd.port}\n"
    )
    one.add("box", f"ssh://{one.sshd.account.name}@inner")
    one.ok("submit", "echo x", "--wait")
    steps = json.loads(one.run("box", "test", "box", "--json").stdout)["steps"]
    assert all(step["ok"] for step in steps)
    assert "through" in steps[1]["message"]


def test_an_encrypted_key_is_asked_for_on_the_terminal_and_without_one_refused(one: OneLaptop) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-p", "-N", "sesame", "-P", "", "-f", str(one.laptop.key)], check=True
    )
    alone = subprocess.run(
        [*CTL, "--box", "box", "status"],
        env=one.laptop.env(),
        capture_output=True,
        timeout=60,
        check=False,
        start_new_session=True,
    )
    assert alone.returncode == 77
    assert b"ssh-add" in alone.stderr
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(CTL[0], [*CTL, "--box", "box", "status"], one.laptop.env())
    seen = b""
    until = time.monotonic() + 60
    asked = False
    while time.monotonic() < until:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                seen += os.read(terminal, 4096)
            except OSError:
                break
        if b"Passphrase for" in seen and not asked:
            asked = True
            os.write(terminal, b"sesame\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, seen
    os.close(terminal)
    assert asked
    assert b"sesame" not in seen
    assert b"agentqd" in seen
    one.ok("status")


@pytest.mark.root
def test_a_full_disk_on_the_box_is_an_error_and_costs_no_other_line(tmp_path: Path) -> None:
    state = tmp_path / "small"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(state)], check=True)
    try:
        with one_laptop(start=False, state=state) as one:
            for folder in ("queue", "prompts"):
                (state / folder).mkdir()
            one.ok("submit", "echo before", "--id", "a")
            filler = state / "filler"
            fd = os.open(filler, os.O_WRONLY | os.O_CREAT)
            with contextlib.suppress(OSError):
                while True:
                    os.write(fd, b"x" * 4096)
            os.close(fd)
            full = one.ctl("submit", "echo " + "y" * 9000, "--id", "b", "--json")
            error = json.loads(full.stdout)
            assert (full.returncode, error["error"]) == (75, "disk_full")
            assert one.ctl("submit", "--prompt-file", "-", "--id", "p", stdin=b"q" * 60000).returncode == 75
            large = one.ctl("submit", "--prompt-file", "-", "--id", "l", "--json", stdin=b"q" * 5_000_000)
            assert (large.returncode, json.loads(large.stdout)["error"]) == (75, "disk_full")
            assert list((state / "prompts").iterdir()) == [], "no half payload stays"
            filler.unlink()
            one.ok("submit", "echo after", "--id", "c")
            lines = (state / "queue/tasks.jsonl").read_bytes().split(b"\n")
            whole = [json.loads(line)["id"] for line in lines if line.endswith(b"}")]
            assert [name for name in whole if name != "b"] == ["a", "c"]
    finally:
        subprocess.run(["umount", "-l", str(state)], check=True)


@pytest.mark.root
def test_somebody_elses_queue_file_is_not_permitted(ordinary_user: Account) -> None:
    with one_laptop(ordinary_user, start=False) as one:
        queue = one.box.state / "queue"
        queue.mkdir(parents=True)
        queue.chmod(0o755)
        one.box.queue_file.touch(mode=0o600)
        done = one.ctl("submit", "echo x", "--json")
        assert (done.returncode, json.loads(done.stdout)["error"]) == (77, "not_permitted")
        one.box.queue_file.chmod(0o622)  # append only, as a control.group has it
        one.ok("submit", "echo x", "--id", "a")
        one.ok("submit", "echo x", "--id", "b")
        lines = one.box.queue_file.read_bytes().split(b"\n")
        assert [json.loads(line)["id"] for line in lines if line] == ["a", "b"]


def test_a_missing_folder_says_what_to_do_and_makes_nothing() -> None:
    with one_laptop(start=False) as one:
        done = one.ctl("submit", "echo x", "--json")
        error = json.loads(done.stdout)
        assert (done.returncode, error["error"]) == (1, "no_folder")
        assert "--state-dir" in error["message"]
        assert not one.box.state.exists()


@pytest.mark.root
def test_an_ordinary_users_folders_are_found_without_being_named(ordinary_user: Account) -> None:
    with one_laptop(ordinary_user, start=False) as one:
        state = ordinary_user.home / ".local/state/agentqd"
        one.box.state, one.box.runtime = state, state / "run"
        one.box.start()
        done = one.run("box", "add", "--force", "box", one.sshd.url)
        assert done.returncode == 0
        one.ok("submit", "echo x", "--id", "t", "--wait")
        one.box.kill()
        said = json.loads(one.ok("submit", "echo y", "--json"))
        assert said["queue_file"] == f"{state}/queue/tasks.jsonl"
        shutil.rmtree(state, ignore_errors=True)


def test_a_torn_line_costs_only_itself(one: OneLaptop) -> None:
    one.box.kill()
    one.box.append({"task": "a", "id": "a", "prompt": "echo a"})
    with one.box.queue_file.open("ab") as file:
        file.write(b'{"task": "torn", "pro')
    one.ok("submit", "echo b", "--id", "b")
    lines = one.box.queue_file.read_bytes().split(b"\n")
    assert [line[:10] for line in lines] == [b'{"task": "', b'{"task": "', lines[2][:10], b""]
    assert json.loads(lines[2])["id"] == "b"
    one.box.start()
    one.ok("wait", "a", "b")


def test_three_clients_appending_long_lines_at_once_damage_none(one: OneLaptop, tmp_path: Path) -> None:
    one.box.kill()
    laptops = [one.sshd.laptop(tmp_path / f"l{n}") for n in range(3)]
    writers = []
    for number, laptop in enumerate(laptops):
        laptop.config.parent.mkdir(parents=True)
        shutil.copy(one.laptop.config, laptop.config)
        lines = []
        for line in range(40):
            head = json.dumps({"task": "t", "id": f"w{number}-{line}", "prompt": ""})
            pad = 16383 - len(head)
            lines.append(json.dumps({"task": "t", "id": f"w{number}-{line}", "prompt": str(number) * pad}))
            assert len(lines[-1]) == 16383
        given = laptop.home / "lines"
        given.write_text("\n".join(lines))
        writers.append(
            subprocess.Popen(
                [*CTL, "--box", "box", "enqueue", str(given)],
                stdout=subprocess.DEVNULL,
                env=laptop.env(XDG_RUNTIME_DIR=str(one.laptop.home / f"r{number}")),
            )
        )
        (one.laptop.home / f"r{number}").mkdir(mode=0o700)
    try:
        for writer in writers:
            assert writer.wait(100) == 0
    finally:
        for number, laptop in enumerate(laptops):
            subprocess.run(
                [*CTL, "box", "forget-connection", "box"],
                env=laptop.env(XDG_RUNTIME_DIR=str(one.laptop.home / f"r{number}")),
                check=True,
                capture_output=True,
            )
    written = [line for line in one.box.queue_file.read_bytes().split(b"\n") if line]
    ids = [json.loads(line)["id"] for line in written]
    assert sorted(ids) == sorted(f"w{n}-{line}" for n in range(3) for line in range(40))
    order = [name[:2] for name in ids]
    assert order != sorted(order), "they did write at the same time"
    assert all(re.fullmatch(r"(\d)\1*", json.loads(line)["prompt"]) for line in written)


def test_a_prompt_over_one_packet_goes_before_its_line(one: OneLaptop) -> None:
    one.ok("status")
    one.box.kill()
    text = ("echo " + "x" * 50_000).encode()
    one.ok("submit", "--prompt-file", "-", "--id", "big", stdin=text)
    (line,) = [json.loads(line) for line in one.box.queue_file.read_bytes().splitlines()]
    assert (one.box.state / "prompts" / line["prompt_ref"]).read_bytes() == text
    one.box.start()
    one.ok("wait", "big")
    wait_for("nothing refused", lambda: not one.box.rejected())
