"""A booted, real systemd (with journald) in a container of its own, and agentqd installed in it as docs/install.md says.

Invariants:
1. The root file system is made once per package list and is never written to: what a test does lies in an overlay in memory.
2. Every process of the box is in one cgroup of ours; `stop` ends all of it and removes the cgroup.
3. Nothing is written into the source tree: the box sees it read-only, and installs from a copy of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self, TypeVar

T = TypeVar("T")

PROJECT: Final = Path(__file__).resolve().parents[2]
SUITE: Final = "bookworm"
PACKAGES: Final = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "libpam-systemd",
    "python3",
    "python3-venv",
    "ca-certificates",
    "iproute2",
    "procps",
    "openssh-server",
)
TOOLS: Final = ("mmdebstrap", "systemd-nspawn", "nsenter", "setsid")
PATH: Final = "/opt/agentqd/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CGROUPS: Final = Path("/sys/fs/cgroup")
BOOT_S: Final = 60.0


def wait_for(what: str, look: Callable[[], T], wait_s: float = 30.0) -> T:
    """The first truthy value of `look`; AssertionError with what was last seen."""
    deadline = time.monotonic() + wait_s
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {wait_s:g} s for {what}; last seen: {seen!r}")
        time.sleep(0.05)


def missing() -> str | None:
    """Why no box can be booted here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"needs {', '.join(lacking)} (script/setup --test)" if lacking else None


# --- What is made once and kept --------------------------------------------------------------------------


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if base.startswith("/") else Path.home() / ".cache") / "agentqd-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _only_one_makes(cache: Path) -> Iterator[None]:
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def root_file_system() -> Path:
    """A Debian that can be booted or imported as a container image; made on first use (some 30 s)."""
    cache = cache_folder()
    key = hashlib.sha256(" ".join((SUITE, *PACKAGES)).encode()).hexdigest()[:12]
    folder = cache / f"root-{SUITE}-{key}"
    with _only_one_makes(cache):
        if not folder.exists():
            half = cache / f"{folder.name}.half"
            shutil.rmtree(half, ignore_errors=True)
            _run(
                "mmdebstrap",
                "--quiet",
                "--variant=minbase",
                f"--include={','.join(PACKAGES)}",
                SUITE,
                str(half),
            )
            # Shared by all boxes: each makes its own identity, and no service starts that no test asked for.
            (half / "etc/machine-id").write_text("")
            (half / "etc/systemd/system/ssh.service").symlink_to("/dev/null")
            half.rename(folder)
    return folder


def python_version(root: Path) -> str:
    """The root file system's Python, as 3.11."""
    return os.readlink(root / "usr/bin/python3").removeprefix("python")


def wheels(root: Path) -> Path:
    """A folder with the wheels of all that agentqd needs, to run and to be built, for the root file system's Python.

    Downloaded once per list of requirements.
    """
    cache = cache_folder()
    version = python_version(root)
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    needed = sorted({*project["project"]["dependencies"], *project["build-system"]["requires"]})
    key = hashlib.sha256("\n".join([version, *needed]).encode()).hexdigest()[:12]
    folder = cache / f"wheels-{key}"
    with _only_one_makes(cache):
        if not folder.exists():
            half = cache / f"{folder.name}.half"
            shutil.rmtree(half, ignore_errors=True)
            machine = os.uname().machine
            platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(36, 16, -1)] + [
                f"manylinux2014_{machine}"
            ]
            _run(
                *(
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "-q",
                    "--disable-pip-version-check",
                    "-d",
                    str(half),
                ),
                *("--only-binary=:all:", "--implementation", "cp", "--python-version", version),
                *[word for platform in platforms for word in ("--platform", platform)],
                *needed,
            )
            half.rename(folder)
    return folder


def _run(*command: str) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        raise AssertionError(
            f"{command[0]} failed ({done.returncode}):\n{done.stdout.decode(errors='replace')[-3000:]}"
        )


def install_commands(heading: str) -> str:
    """The first shell block under a heading of docs/install.md."""
    text = (PROJECT / "docs" / "install.md").read_text()
    section = text.partition(f"# {heading}\n")[2]
    return section.partition("```sh\n")[2].partition("```")[0]


# --- A booted box ----------------------------------------------------------------------------------------


class Box:
    """One booted machine. Use as a context manager."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.root = root_file_system()
        self._shown = {"/srv/agentqd": PROJECT, "/srv/wheels": wheels(self.root)}  # read-only
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0
        self._cgroups: list[Path] = []

    def __enter__(self) -> Self:
        try:
            self._boot()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _boot(self) -> None:
        self._cgroups = [base / self.name for base in _own_hierarchies()]
        for cgroup in self._cgroups:
            cgroup.mkdir()
        enter = "".join(f"echo $$ >'{cgroup}/cgroup.procs'; " for cgroup in self._cgroups)
        binds = " ".join(f"'--bind-ro={outside}:{inside}'" for inside, outside in self._shown.items())
        command = (
            f"{enter}exec systemd-nspawn -q -D '{self.root}' -b -M {self.name} --register=no --keep-unit"
            f" --private-network --link-journal=no --volatile=overlay {binds}"
        )
        self._nspawn = subprocess.Popen(
            ["setsid", "sh", "-c", command],
            env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self._leader = wait_for("the container's systemd", self._find_leader, BOOT_S)
        wait_for("the end of the boot", self._is_up, BOOT_S)

    def _find_leader(self) -> int:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            assert self._nspawn.stderr is not None
            raise AssertionError(
                f"systemd-nspawn ended: {self._nspawn.stderr.read().decode(errors='replace')}"
            )
        pid = self._nspawn.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in map(int, children):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return child
        return 0

    def _is_up(self) -> bool:
        state = self.run("systemctl", "is-system-running", check=False).strip()
        return state in {"running", "degraded"}

    def stop(self) -> None:
        """Ends every process of the box and removes its cgroups."""
        nspawn, self._nspawn = self._nspawn, None
        if nspawn is None:
            return
        nspawn.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            nspawn.wait(15)
        for cgroup in self._cgroups:
            with contextlib.suppress(
                OSError
            ):  # a v1 folder has no cgroup.kill; the v2 one has the same processes
                (cgroup / "cgroup.kill").write_text("1")
        nspawn.kill()
        nspawn.wait()
        if nspawn.stderr is not None:
            nspawn.stderr.close()
        for cgroup in self._cgroups:
            wait_for(f"the removal of {cgroup}", lambda cgroup=cgroup: _removed(cgroup))

    # What a test does in it.

    def install(self, heading: str, *, user: str | None = None) -> None:
        """Run the commands that docs/install.md has under this heading, in a copy of the tree, without a network."""
        home = self.sh(f"getent passwd {user or 'root'} | cut -d: -f6").strip()
        names = "pyproject.toml README.md LICENSE agentqd systemd"
        self.sh(
            f"cd /srv/agentqd; mkdir {home}/checkout; cp -r {names} {home}/checkout; chown -R {user or 'root'} {home}/checkout"
        )
        offline = "export PIP_NO_INDEX=1 PIP_FIND_LINKS=/srv/wheels PIP_DISABLE_PIP_VERSION_CHECK=1"
        session = f"export HOME={home} XDG_RUNTIME_DIR=/run/user/$(id -u)" if user else ":"
        self.sh(f"{offline}; {session}; cd {home}/checkout; {install_commands(heading)}", user=user)

    def run(self, *command: str, check: bool = True, user: str | None = None, stdin: str = "") -> str:
        """Run a program inside; returns stdout. As root, or as `user`."""
        words = ["nsenter", "-t", str(self._leader), "-m", "-u", "-i", "-n", "-p", "-C", "--"]
        words += ["env", "-i", f"PATH={PATH}", "LANG=C.UTF-8", "HOME=/root"]
        if user is not None:
            words += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
        done = subprocess.run(
            [*words, *command], input=stdin.encode(), capture_output=True, timeout=110, check=False
        )
        out = done.stdout.decode(errors="replace")
        if check and done.returncode:
            raise AssertionError(
                f"{' '.join(command)}: exit {done.returncode}\n{out}{done.stderr.decode(errors='replace')}"
            )
        return out

    def sh(self, script: str, *, check: bool = True, user: str | None = None) -> str:
        return self.run("sh", "-euc", script, check=check, user=user)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """systemctl show: property → value."""
        lines = self.run(
            "systemctl", "show", unit, *[f"--property={name}" for name in properties]
        ).splitlines()
        return dict(line.split("=", 1) for line in lines)

    def main_pid(self, unit: str) -> int:
        return int(self.show(unit, "MainPID")["MainPID"])

    def journal(self, unit: str) -> list[dict[str, Any]]:
        """What journald has from this unit, as journalctl -o json prints it."""
        return [
            json.loads(line) for line in self.run("journalctl", "-q", "-u", unit, "-o", "json").splitlines()
        ]

    def append(self, task: dict[str, Any]) -> None:
        """A bare `>>`, as the daemon's own user, from nothing but a shell."""
        line = json.dumps(task).replace("'", "'\\''")
        self.sh(f"printf '%s\\n' '{line}' >> /var/lib/agentqd/queue/tasks.jsonl", user="agentqd")

    def completions(self) -> list[dict[str, Any]]:
        text = self.sh("cat /var/lib/agentqd/completions.jsonl 2>/dev/null || true")
        return [json.loads(line) for line in text.splitlines()]

    def result(self, name: str, wait_s: float = 30.0) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            return next(
                (line for line in self.completions() if line.get("name") == name and "status" in line), None
            )

        try:
            return wait_for(f"the result of {name}", look, wait_s)
        except AssertionError as error:
            raise AssertionError(
                f"{error}\n{self.run('journalctl', '-q', '-n', '60', '-o', 'cat')}"
            ) from None

    def task(self, name: str) -> dict[str, Any]:
        """`agentqctl show --json` of the newest task with this name."""
        tasks = json.loads(self.run("agentqctl", "list", "--json"))
        found = [task for task in tasks if task["task"] == name]
        return dict(json.loads(self.run("agentqctl", "show", found[0]["id"], "--json"))) if found else {}

    def worker_pid(self, name: str) -> int:
        """The pid (as the box counts) of the running attempt of this task."""

        def look() -> int:
            attempts = self.task(name).get("attempts") or [{}]
            return int(attempts[-1].get("pid") or 0)

        return wait_for(f"the worker of {name}", look)

    def alive(self, pid: int) -> bool:
        return (
            self.sh(f"grep -q '^State:[[:space:]]*[^ZX]' /proc/{pid}/status 2>/dev/null && echo yes || true")
            != ""
        )


def _own_hierarchies() -> list[Path]:
    """Where the box gets cgroups of its own: the unified tree, and systemd's named one on a mixed machine."""
    mixed = [CGROUPS / name for name in ("unified", "systemd") if (CGROUPS / name / "cgroup.procs").exists()]
    return mixed or [CGROUPS]


def _removed(cgroup: Path) -> bool:
    for folder, _, _ in os.walk(cgroup, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)
    return not cgroup.exists()
