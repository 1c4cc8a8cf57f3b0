"""A real agentqd on folders of its own: started, killed, started again; everything it started is ended at the end.

Nothing here sleeps blindly: `wait_for` polls a condition with a deadline and says what it last saw.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

T = TypeVar("T")
WAIT_S = float(
    os.environ.get("AGENTQD_TEST_WAIT_S", "30")
)  # the mutants of crash/ are not waited for so long


def wait_for(what: str, look: Callable[[], T], wait_s: float = WAIT_S) -> T:
    """The first truthy value of `look`. Fails with what it last saw."""
    deadline = time.monotonic() + wait_s
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {wait_s:g} s for {what}; last seen: {seen!r}")
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Is this process there and not a zombie?"""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


class RealBox:
    """One state folder with its daemon and supervisor."""

    def __init__(self, folder: Path, config: str | None = None) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.runtime = folder / "run"
        self.config = folder / "agentqd.yaml"
        self.log = folder / "daemon.log"
        self.daemon: subprocess.Popen[bytes] | None = None
        self.prefix: list[str] = []  # e.g. strace and its options
        self.env: dict[str, str] = {}
        if config is not None:
            self.config.write_text(config)

    # The daemon.

    def start(self, *, wait: bool = True) -> RealBox:
        assert self.daemon is None, "already started"
        command = [*self.prefix, sys.executable, "-m", "agentqd.daemon"]
        command += ["--state-dir", str(self.state), "--runtime-dir", str(self.runtime)]
        if self.config.exists():
            command += ["--config", str(self.config)]
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("AGENTQ", "NOTIFY_"))
        }
        before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**clean, **self.env}
            )
        if wait:
            wait_for("the daemon's start", lambda: self._ready(before))
        return self

    def _ready(self, before: int) -> bool:
        assert self.daemon is not None
        if self.daemon.poll() is not None:
            raise AssertionError(
                f"the daemon ended with {self.daemon.returncode}:\n{self.log_text()[-3000:]}"
            )
        return '"event":"started"' in self.log_text()[before:]

    def daemon_pid(self) -> int:
        """The daemon itself, also behind a prefix like strace."""
        return int((self.state / "agentqd.lock").read_text())

    def supervisor_pid(self) -> int:
        return int((self.state / "supervisor.lock").read_text())

    def kill(self, number: int = signal.SIGKILL) -> int | None:
        """Signal the daemon and wait for its end; returns its exit status."""
        daemon, self.daemon = self.daemon, None
        if daemon is None:
            return None
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):
            os.kill(self.daemon_pid() if self.prefix else daemon.pid, number)
        return daemon.wait(WAIT_S)

    def stop(self) -> int | None:
        return self.kill(signal.SIGTERM)

    def kill_supervisor(self) -> int:
        pid = self.supervisor_pid()
        os.kill(pid, signal.SIGKILL)
        wait_for("the supervisor's end", lambda: not alive(pid))
        return pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End everything that carries this state folder's marker, by pid."""
        self.kill()
        wait_for("the end of every process of this box", lambda: not self._end_ours())

    def _end_ours(self) -> list[int]:
        """Again and again: a supervisor that a daemon had just forked is known as one only after its exec."""
        found = self._ours()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return found

    def _ours(self) -> list[int]:
        found = []
        marks = [b"AGENTQ_STATE_ID=" + self._state_id(), str(self.state).encode()]
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                environ = (entry / "environ").read_bytes().split(b"\0")
                words = (entry / "cmdline").read_bytes().split(b"\0")
                is_worker = marks[0] in environ
                is_supervisor = b"agentqd.supervisor" in words and marks[1] in words
                if (is_worker or is_supervisor) and alive(int(entry.name)):
                    found.append(int(entry.name))
        return found

    def _state_id(self) -> bytes:
        try:
            return (self.state / "state_id").read_bytes().strip()
        except FileNotFoundError:
            return b"?"

    # The front door and what comes out.

    @property
    def queue_file(self) -> Path:
        return self.state / "queue" / "tasks.jsonl"

    def append(self, *tasks: dict[str, Any] | str) -> None:
        """Each as one line with one write(), as a bare `>>` does."""
        self.queue_file.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.queue_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            for task in tasks:
                line = task if isinstance(task, str) else json.dumps(task)
                os.write(fd, line.encode() + b"\n")
        finally:
            os.close(fd)

    def completions(self) -> list[dict[str, Any]]:
        """Every whole line, in order, of all completion files."""
        lines: list[dict[str, Any]] = []
        rotated = sorted(
            self.state.glob("completions-*.jsonl"), key=lambda path: int(path.stem.split("-")[1])
        )
        for path in [*rotated, self.state / "completions.jsonl"]:
            if path.exists():
                text = path.read_bytes()
                lines += [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
        return lines

    def results(self) -> dict[str, dict[str, Any]]:
        """Task name → its newest result line."""
        return {line["name"]: line for line in self.completions() if "status" in line}

    def entries(self, name: str | None = None) -> list[dict[str, Any]]:
        """What workers handed over."""
        return [line for line in self.completions() if "status" not in line and name in {None, line["name"]}]

    def result(self, name: str, wait_s: float = WAIT_S) -> dict[str, Any]:
        try:
            return wait_for(f"the result of {name}", lambda: self.results().get(name), wait_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log_text()[-4000:]}") from None

    def until_pullable(self, count: int) -> None:
        """Wait until so many lines can be pulled: one that is in the file is not yet marked in the journal."""
        url = "/v1/completions?after=0&consumer=looks"
        wait_for(f"{count} rows to pull", lambda: len(self.api("GET", url)[1]["rows"]) >= count)

    def rejected(self) -> list[dict[str, Any]]:
        path = self.state / "queue" / "rejected.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def attempt_folder(self, task_id: str, attempt: int = 1) -> Path:
        return self.state / "tasks" / task_id / f"attempt-{attempt}"

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def events(self, name: str) -> list[dict[str, Any]]:
        """The daemon's log lines with this event name."""
        found = []
        for line in self.log_text().splitlines():
            with contextlib.suppress(ValueError):
                fields = json.loads(line)
                if fields.get("event") == name:
                    found.append(fields)
        return found

    def alerts(self, kind: str) -> list[dict[str, Any]]:
        return [fields for fields in self.events("alert") if fields["alert"] == kind]

    # The control socket.

    def api(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One HTTP exchange over the socket: (status, decoded JSON)."""
        payload = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: box\r\nConnection: close\r\nContent-Length: {len(payload)}\r\n\r\n"
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(WAIT_S)
            connection.connect(str(self.runtime / "agentqd.sock"))
            connection.sendall(head.encode() + payload)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        top, _, rest = answer.partition(b"\r\n\r\n")
        return int(top.split()[1]), json.loads(rest) if rest else None

    def submit(self, **fields: Any) -> dict[str, Any]:
        """Over the socket; the answer's body, whatever its status."""
        return self.api("POST", "/v1/tasks", fields)[1]

    def show(self, task_id: str) -> dict[str, Any]:
        return self.api("GET", f"/v1/tasks/{task_id}")[1]

    def status(self) -> dict[str, Any]:
        return self.api("GET", "/v1/status")[1]

    def wait_state(self, task_id: str, *states: str, wait_s: float = WAIT_S) -> dict[str, Any]:
        """The show object, once the task is in one of these states."""

        def look() -> dict[str, Any] | None:
            shown = self.show(task_id)
            return shown if shown.get("state") in states else None

        return wait_for(f"{task_id} to be {' or '.join(states)}", look, wait_s)

    def ctl_json(self, *words: str, stdin: bytes = b"") -> Any:
        """What a reading verb says with --json."""
        done = self.ctl(*words, "--json", stdin=stdin)
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    def ctl(
        self, *words: str, stdin: bytes = b"", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run agentqctl for real."""
        command = [
            sys.executable,
            "-m",
            "agentqd.cli.main",
            "--state-dir",
            str(self.state),
            "--runtime-dir",
            str(self.runtime),
            *words,
        ]
        return subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            timeout=120,
            check=False,
            env={**os.environ, **(env or {})},
        )


@contextlib.contextmanager
def real_box(folder: Path, config: str | None = None, *, start: bool = True) -> Iterator[RealBox]:
    box = RealBox(folder, config)
    with box:
        if start:
            box.start()
        yield box
