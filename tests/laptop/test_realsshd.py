"""The harness itself: the sshd that the other tests rely on is real, and can be cut in every way they need."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from realbox import wait_for
from realsshd import PORTS, Account, Laptop, RealSshd, chroot_folder, real_sshd

pytestmark = [pytest.mark.real, pytest.mark.sshd]


def ssh(laptop: Laptop, sshd: RealSshd, *words: str) -> list[str]:
    """OpenSSH's own client with this laptop's files (it does not look at HOME)."""
    options = ["-F", "none", "-i", str(laptop.key), "-o", f"UserKnownHostsFile={laptop.known_hosts}"]
    options += ["-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-p", str(sshd.port)]
    return ["ssh", *options, f"{sshd.account.name}@127.0.0.1", *words]


def said(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def session(sshd: RealSshd, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A session whose remote command answers what it is sent."""
    command = ssh(sshd.laptop(tmp_path / "laptop"), sshd, "exec cat")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert _echoes(process)
        yield process
        process.kill()


def _echoes(process: subprocess.Popen[bytes]) -> bool:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"x\n")
    process.stdin.flush()
    return process.stdout.readline() == b"x\n"


def test_logs_in_as_the_current_user(sshd: RealSshd, tmp_path: Path) -> None:
    assert said(ssh(sshd.laptop(tmp_path / "laptop"), sshd, "id -un")) == sshd.account.name


@pytest.mark.root
def test_logs_in_as_an_ordinary_user(user_sshd: RealSshd, ordinary_user: Account, tmp_path: Path) -> None:
    shown = said(ssh(user_sshd.laptop(tmp_path / "laptop"), user_sshd, "id -u; pwd"))
    assert shown.split() == [str(ordinary_user.uid), str(ordinary_user.home)]


def test_a_stopped_server_leaves_its_sessions_and_a_killed_one_none(
    sshd: RealSshd, session: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    sshd.stop()
    assert _echoes(session)
    sshd.start()
    assert _echoes(session)
    sshd.kill()
    assert session.wait(10) != 0
    sshd.start()
    assert said(ssh(sshd.laptop(tmp_path / "laptop"), sshd, "echo back")) == "back"


def test_a_paused_server_answers_when_it_goes_on(sshd: RealSshd, session: subprocess.Popen[bytes]) -> None:
    sshd.pause()
    assert session.stdin is not None
    session.stdin.write(b"later\n")
    session.stdin.flush()
    states = {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in sshd.sessions()}
    assert states == {"T"}
    sshd.resume()
    assert session.stdout is not None
    assert session.stdout.readline() == b"later\n"


@pytest.mark.root
def test_a_chroot_with_nothing_but_sftp(ordinary_user: Account, tmp_path: Path) -> None:
    with chroot_folder() as chroot:
        lines = [f"ChrootDirectory {chroot}", "ForceCommand internal-sftp"]
        (chroot / "here").touch()
        with real_sshd(ordinary_user, lines) as sshd:
            laptop = sshd.laptop(tmp_path / "laptop")
            command = ["sftp", "-q", "-b", "-", *ssh(laptop, sshd)[1:-1]]
            command[command.index("-p")] = "-P"
            done = subprocess.run(
                [*command, f"{ordinary_user.name}@127.0.0.1"],
                input="ls /\n",
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
            assert "here" in done.stdout, done.stderr
            refused = subprocess.run(
                ssh(laptop, sshd, "id"),
                capture_output=True,
                timeout=30,
                check=False,
                stdin=subprocess.DEVNULL,
            )
            assert b"uid=" not in refused.stdout


def test_no_two_servers_have_the_same_port_even_while_none_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = iter([PORTS[7], PORTS[7], PORTS[7], PORTS[8]])
    monkeypatch.setattr("random.choice", lambda _: next(draws))
    monkeypatch.setattr("secrets.choice", lambda _: next(draws))
    with real_sshd(start=False) as one, real_sshd(start=False) as other:
        assert one.port != other.port


def test_every_session_is_gone_after_the_test(tmp_path: Path) -> None:
    with real_sshd() as sshd:
        command = ssh(sshd.laptop(tmp_path / "laptop"), sshd, "exec sleep 1000")
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            wait_for("the session", lambda: len(sshd.sessions()) >= 2)
            folder = sshd.folder
            sshd.kill()
    assert not folder.exists()
    assert not sshd.sessions()
