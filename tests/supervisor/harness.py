"""A real supervisor and a tiny daemon for it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from agentqd.supervisor import wire
from agentqd.supervisor.wire import Clocks, Exited, Hello, Report, Request, Run, Running, Welcome

R = TypeVar("R", bound=Report)
PATH = "/usr/local/bin:/usr/bin:/bin"
WAIT_S = 20.0


def until(condition: Callable[[], object], what: str, within_s: float = WAIT_S) -> None:
    """Poll until the condition holds; fail with `what` if it does not in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.01)


def read_text(path: str) -> str:
    """A file's content; nothing if it is not there."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (FileNotFoundError, ProcessLookupError):
        return False


class Daemon:
    """One connection, as a daemon would hold it. Reports are kept in `seen` in the order they came."""

    def __init__(self, box: Box, epoch: int, state_id: str | None = None, protocol: int = 1) -> None:
        self.box = box
        self.seen: list[Report] = []
        self.closed = False
        self._rest = b""
        self.sock = box.connect()
        self.send(Hello(protocol, epoch, state_id or box.state_id, os.getpid()))

    def send(self, *requests: Request) -> None:
        self.sock.sendall(b"".join(wire.encode(request) for request in requests))

    def pump(self, timeout_s: float) -> None:
        if self.closed or not select.select([self.sock], [], [], timeout_s)[0]:
            return
        try:
            part = self.sock.recv(1 << 20)
        except ConnectionError:
            part = b""
        self.closed = not part
        *lines, self._rest = (self._rest + part).split(b"\n")
        self.seen += [wire.decode_report(line) for line in lines]

    def expect(
        self, kind: type[R], matches: Callable[[R], bool] = lambda _: True, within_s: float = WAIT_S
    ) -> R:
        """The first report of this kind (seen before or not) that matches."""
        deadline = time.monotonic() + within_s
        while True:
            for report in self.seen:
                if isinstance(report, kind) and matches(report):
                    return report
            assert not self.closed, f"closed before any {kind.__name__}; seen: {self.seen}"
            assert time.monotonic() < deadline, f"no {kind.__name__} within {within_s} s; seen: {self.seen}"
            self.pump(0.1)

    def welcome(self) -> Welcome:
        return self.expect(Welcome)

    def started(self, task: str, attempt: int = 1) -> Running:
        return self.expect(Running, lambda report: (report.task, report.attempt) == (task, attempt))

    def exited(self, task: str, attempt: int = 1) -> Exited:
        return self.expect(Exited, lambda report: (report.task, report.attempt) == (task, attempt))

    def until_closed(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while not self.closed:
            assert time.monotonic() < deadline, "the connection was not closed"
            self.pump(0.1)

    def close(self) -> None:
        self.sock.close()
        self.closed = True


class Box:
    """A state folder and the supervisor on it."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.state = f"{root}/s"
        self.runtime = f"{root}/r"
        self.process: subprocess.Popen[bytes] | None = None
        self.processes: list[subprocess.Popen[bytes]] = []
        self.daemons: list[Daemon] = []
        self._epoch = 0

    def start(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a supervisor and wait until it answers."""
        self.process = self.spawn(*arguments, env=env)
        process = self.process

        def answers() -> bool:
            assert process.poll() is None, self.log()
            try:
                self.connect().close()
            except OSError:
                return False
            return True

        until(answers, "the supervisor answers")
        return process

    def spawn(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "agentqd.supervisor",
            "--state-dir",
            self.state,
            "--runtime-dir",
            self.runtime,
        ]
        environment = {"PATH": PATH, "PYTHONPATH": os.getcwd(), **(env or {})}
        with open(f"{self.root}/log", "ab") as log:
            process = subprocess.Popen(
                [*command, *arguments], env=environment, stdin=subprocess.DEVNULL, stderr=log
            )
        self.processes.append(process)
        return process

    @property
    def state_id(self) -> str:
        with open(f"{self.state}/state_id", encoding="ascii") as file:
            return file.read().strip()

    def log(self) -> str:
        with open(f"{self.root}/log", encoding="utf-8") as file:
            return file.read()

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(f"{self.runtime}/supervisor.sock")
        except OSError:
            sock.close()
            raise
        return sock

    def daemon(self) -> Daemon:
        """A newer daemon, welcomed."""
        self._epoch += 1
        daemon = Daemon(self, self._epoch)
        self.daemons.append(daemon)
        daemon.welcome()
        return daemon

    def raw(self, **hello: object) -> Daemon:
        daemon = Daemon(self, **hello)  # type: ignore[arg-type]
        self.daemons.append(daemon)
        return daemon

    def path(self, task: str, name: str = "", attempt: int = 1) -> str:
        return f"{self.state}/tasks/{task}/attempt-{attempt}/{name}"

    def read(self, task: str, name: str, attempt: int = 1) -> bytes:
        with open(self.path(task, name, attempt), "rb") as file:
            return file.read()

    def pid_in(self, task: str, name: str) -> int:
        """The pid that a worker writes to a file in its work folder, once it is there."""
        path = self.path(task, f"work/{name}")
        until(lambda: read_text(path).endswith("\n"), f"{task} writes {name}")
        return int(read_text(path))

    def clean(self) -> None:
        """End what is left: the supervisor politely, then whoever is still marked as ours."""
        for daemon in self.daemons:
            daemon.sock.close()
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGCONT)
        for process in self.processes:
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self.marked():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def marked(self) -> list[int]:
        """Living processes that carry our state folder's id."""
        try:
            mark = f"AGENTQ_STATE_ID={self.state_id}".encode()
        except FileNotFoundError:
            return []
        found = []
        for name in os.listdir("/proc"):
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    marked = mark in file.read().split(b"\0")
            except OSError:
                continue
            if marked and is_alive(int(name)):
                found.append(int(name))
        return found


def run(
    task: str,
    script: str | None = None,
    *,
    argv: list[str] | None = None,
    attempt: int = 1,
    env: dict[str, str] | None = None,
    prompt: str | None = None,
    stdin: str = "null",
    cwd: str | None = None,
    stdout_bytes_max: int = 1 << 26,
    **clocks: object,
) -> Run:
    """A Run of a shell script (or an argv)."""
    return Run(
        task=task,
        attempt=attempt,
        folder=f"tasks/{task}/attempt-{attempt}",
        argv=argv or ["/bin/sh", "-c", script or "true"],
        env={"PATH": PATH, **(env or {})},
        clocks=Clocks(**{"kill_grace_s": 5.0, **clocks}),  # type: ignore[arg-type]
        cwd=cwd,
        prompt=prompt,
        stdin=stdin,
        stdout_bytes_max=stdout_bytes_max,
    )
