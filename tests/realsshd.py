"""A real OpenSSH server on loopback, and the home of a laptop that may log in to it.

    with real_sshd() as sshd:                              # as the user who runs the tests
        laptop = sshd.laptop(folder)                       # HOME with .ssh/: key, known_hosts, config
        subprocess.run([...], env=laptop.env())            # ... sshd.url is ssh://USER@127.0.0.1:PORT
        sshd.kill()                                        # server and every session, at once
        sshd.start()                                       # the same port, the same host key

`account` logs in as another one (fixture `ordinary_user`, which needs root); `lines=` are added to its sshd_config; `place=`
has it listen elsewhere than on loopback (a namespace: laptop/netns.py).
Tests with it are marked `sshd` (conftest.py skips them, with the reason, where there is none).
Its files lie in a folder of its own below /tmp (0755): pytest's own folders are closed to an ordinary user.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import pytest
from realbox import alive, wait_for

SSHD = "/usr/sbin/sshd"
PORTS = range(20000, 30000)  # below the kernel's own range, so that no client takes it while sshd is down
COMMON_LINES = (
    "UsePAM no",
    "StrictModes no",
    "PasswordAuthentication no",
    "KbdInteractiveAuthentication no",
    "PermitRootLogin yes",
    "UseDNS no",
    "LoginGraceTime 20",
    "MaxStartups 200",
    "MaxSessions 200",
    "PrintMotd no",
    "Subsystem sftp internal-sftp",
)


class Account(NamedTuple):
    """Who logs in."""

    name: str
    uid: int
    gid: int
    home: Path

    def as_prefix(self) -> list[str]:
        """A command prefix that runs a program as this account (of root), in its home."""
        if self.uid == os.geteuid():
            return []
        return [
            "setpriv",
            f"--reuid={self.uid}",
            f"--regid={self.gid}",
            "--clear-groups",
            *_may_read_the_interpreter(),
            "env",
            f"HOME={self.home}",
            f"USER={self.name}",
        ]


class Place(NamedTuple):
    """Where a server listens, and what must stand before its command to run it there."""

    host: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()


LOOPBACK = Place()


def _may_read_the_interpreter() -> list[str]:
    """An interpreter below a closed home (/root/.pyenv) is lent to the ordinary user, for reading only."""
    closed = [
        path for path in Path(os.path.realpath(sys.executable)).parents if not path.stat().st_mode & 0o001
    ]
    return ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"] if closed else []


def current_account() -> Account:
    entry = pwd.getpwuid(os.geteuid())
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))


class Laptop:
    """A home folder on the client's side: `.ssh/` with key, known_hosts and config, and XDG folders of its own."""

    def __init__(self, folder: Path) -> None:
        self.home = folder
        self.ssh = folder / ".ssh"
        self.ssh.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.runtime = folder / "run"
        self.runtime.mkdir(exist_ok=True, mode=0o700)

    @property
    def key(self) -> Path:
        return self.ssh / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.ssh / "known_hosts"

    @property
    def ssh_config(self) -> Path:
        return self.ssh / "config"

    @property
    def config(self) -> Path:
        return self.home / ".config" / "agentqctl" / "config.yaml"

    def env(self, **more: str) -> dict[str, str]:
        """The environment of a command on this laptop: no agent, nothing of agentqd from outside."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AGENTQ", "SSH_", "XDG_", "NOTIFY_"))
        }
        own = {
            "HOME": str(self.home),
            "XDG_CONFIG_HOME": str(self.home / ".config"),
            "XDG_STATE_HOME": str(self.home / ".local" / "state"),
            "XDG_RUNTIME_DIR": str(self.runtime),
        }
        return {**kept, **own, **more}


class RealSshd:
    """One sshd with its port, host key and one authorized client key."""

    def __init__(self, account: Account, lines: Sequence[str] = (), place: Place = LOOPBACK) -> None:
        self.account = account
        self.place = place
        self.folder = Path(tempfile.mkdtemp(prefix="aq-sshd-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.port, self._reserved = _reserve_port()
        self.lines = list(lines)
        self.client_key = self.folder / "client_key"
        self.host_key = self.folder / "host_key"
        self.log = self.folder / "sshd.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._left: set[int] = set()  # sessions of listeners that were stopped
        self.new_host_key()
        _make_key(self.client_key)
        shutil.copy(f"{self.client_key}.pub", self.folder / "authorized_keys")
        (self.folder / "authorized_keys").chmod(0o644)

    @property
    def url(self) -> str:
        return f"ssh://{self.account.name}@{self.place.host}:{self.port}"

    def laptop(self, folder: Path) -> Laptop:
        """A laptop that may log in here and knows the host key."""
        laptop = Laptop(folder)
        shutil.copy(self.client_key, laptop.key)
        shutil.copy(f"{self.client_key}.pub", f"{laptop.key}.pub")
        laptop.known_hosts.write_text(self.known_hosts_line())
        return laptop

    def known_hosts_line(self, host: str | None = None) -> str:
        words = Path(f"{self.host_key}.pub").read_text().split()
        return f"[{host or self.place.host}]:{self.port} {words[0]} {words[1]}\n"

    def new_host_key(self) -> None:
        """Another host key, used from the next start on."""
        for path in (self.host_key, Path(f"{self.host_key}.pub")):
            path.unlink(missing_ok=True)
        _make_key(self.host_key)

    # The server.

    def start(self) -> RealSshd:
        assert self.process is None, "already started"
        config = self.folder / "sshd_config"
        # The first value of an option counts: what a test asks for goes before the common lines; a Match block last.
        match = next((at for at, line in enumerate(self.lines) if line.startswith("Match ")), len(self.lines))
        text = [
            *self.lines[:match],
            f"ListenAddress {self.place.host}:{self.port}",
            f"HostKey {self.host_key}",
            f"AuthorizedKeysFile {self.folder}/authorized_keys",
            "PidFile none",
            *(line for line in COMMON_LINES if not _is_given(line, self.lines[:match])),
            *_penalties(),
            *self.lines[match:],
        ]
        config.write_text("\n".join(text) + "\n")
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)
        before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.place.prefix, SSHD, "-D", "-e", "-f", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for("sshd to listen", lambda: self._listens(before))
        return self

    def _listens(self, before: int) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"sshd ended:\n{self.log_text()[-3000:]}"
        return b"Server listening on" in self.log.read_bytes()[before:]

    def sessions(self) -> list[int]:
        """Every living process below the listener, now or when it was stopped: sessions and remote commands."""
        found = set(self._left)
        if self.process is not None:
            found |= _descendants({self.process.pid})
        found |= _descendants(found)
        return sorted(pid for pid in found if alive(pid))

    def stop(self) -> None:
        """No new connection; those that are there go on."""
        self._left |= set(self.sessions())
        process, self.process = self.process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(10)

    def kill_sessions(self) -> None:
        """Every connection is cut; the listener goes on."""
        for pid in self.sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for("the end of every session", lambda: not self.sessions())

    def kill(self) -> None:
        """The server and every session at once, by SIGKILL."""
        process, self.process = self.process, None
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGSTOP)  # no new session while we look
            self._left |= _descendants({process.pid})
            process.kill()
            process.wait(10)
        self.kill_sessions()

    def pause(self, *, listener: bool = True) -> None:
        """A black hole as the client sees it: connections stay, nothing is answered any more."""
        if listener and self.process is not None:
            os.kill(self.process.pid, signal.SIGSTOP)
        for pid in self.sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        for pid in [*self.sessions(), *([self.process.pid] if self.process else [])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._reserved.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def real_sshd(
    account: Account | None = None,
    lines: Sequence[str] = (),
    *,
    start: bool = True,
    place: Place = LOOPBACK,
) -> Iterator[RealSshd]:
    """An sshd that `account` (the current user without one) may log in to, with more lines of sshd_config."""
    with RealSshd(account or current_account(), lines, place) as sshd:
        if start:
            sshd.start()
        yield sshd


@contextlib.contextmanager
def made_user() -> Iterator[Account]:
    """An ordinary user with a home of its own below /tmp, gone afterwards with its processes' homes."""
    name = f"aq{secrets.token_hex(4)}"
    top = Path(tempfile.mkdtemp(prefix="aq-home-", dir="/tmp"))
    top.chmod(0o755)
    home = top / "h"
    subprocess.run(["useradd", "-M", "-d", str(home), "-s", "/bin/sh", "-U", name], check=True)
    try:
        subprocess.run(["usermod", "-p", "*", name], check=True)  # no password, yet not locked
        entry = pwd.getpwnam(name)
        home.mkdir(mode=0o700)
        os.chown(home, entry.pw_uid, entry.pw_gid)
        yield Account(name, entry.pw_uid, entry.pw_gid, home)
    finally:
        subprocess.run(["userdel", "-f", name], check=False, capture_output=True)
        shutil.rmtree(top, ignore_errors=True)


@contextlib.contextmanager
def chroot_folder() -> Iterator[Path]:
    """A folder that sshd takes as ChrootDirectory: root's, and no part of its path open to others (so not /tmp)."""
    folder = Path(tempfile.mkdtemp(prefix="aq-chroot-", dir="/var/lib"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# Fixtures: a conftest.py takes them by `from realsshd import ordinary_user, sshd, user_sshd`.


@pytest.fixture
def sshd() -> Iterator[RealSshd]:
    """An sshd for the current user."""
    with real_sshd() as server:
        yield server


@pytest.fixture(scope="session")
def ordinary_user() -> Iterator[Account]:
    """An ordinary user on this machine (root only)."""
    with made_user() as account:
        yield account


@pytest.fixture
def user_sshd(ordinary_user: Account) -> Iterator[RealSshd]:
    """An sshd for an ordinary user."""
    with real_sshd(ordinary_user) as server:
        yield server


def _descendants(roots: set[int]) -> set[int]:
    """Every process below these, by parent."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                after = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(after[1])
    found: set[int] = set()
    layer = set(roots)
    while layer:
        layer = {pid for pid, parent in parents.items() if parent in layer} - found
        found |= layer
    return found


def _reserve_port() -> tuple[int, socket.socket]:
    """A port that is free, and what keeps every other test on this machine from taking it while no sshd listens: a name
    that one process can have. Not from `random`: pytest-randomly has every worker draw the same numbers."""
    while True:
        port = secrets.choice(PORTS)
        reserved = socket.socket(socket.AF_UNIX)
        try:
            reserved.bind(f"\0agentqd-test-port-{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            reserved.close()
            continue
        return port, reserved


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _is_given(line: str, given: Sequence[str]) -> bool:
    """A subsystem may be defined once only."""
    return line.startswith("Subsystem") and any(other.startswith("Subsystem") for other in given)


def _penalties() -> list[str]:
    """OpenSSH 9.8 shuts out an address that fails often: our tests fail on purpose, from one address."""
    said = subprocess.run([SSHD, "-V"], capture_output=True, text=True, check=False)
    version = (said.stdout + said.stderr).partition("OpenSSH_")[2][:4].split("p")[0]
    with contextlib.suppress(ValueError):
        if float(version) >= 9.8 or version.startswith("1"):
            return ["PerSourcePenalties no"]
    return []
