from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from places import SHORT_TMP

from .standin import SaysBytes, StandIn

PROGRAM = [sys.executable, "-m", "agentqd.cli.main"]
RUN_TIMEOUT_S = 30


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Process(subprocess.Popen[bytes]):
    """One that does not outlive a test that has failed."""

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(None, None, None)


@dataclass
class Ctl:
    """Runs `agentqctl` for real, in a world of its own."""

    root: str
    env: dict[str, str] = field(default_factory=dict)

    @property
    def state(self) -> str:
        return f"{self.root}/state"

    @property
    def socket(self) -> str:
        return f"{self.root}/run/agentqd.sock"

    @property
    def queue_file(self) -> str:
        return f"{self.state}/queue/tasks.jsonl"

    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH") if name in os.environ}
        return {
            **kept, "HOME": f"{self.root}/home", "AGENTQD_STATE_DIR": self.state, "AGENTQD_RUNTIME_DIR": f"{self.root}/run",
            "LC_ALL": "C.UTF-8", "TZ": "UTC", **self.env,
        }  # fmt: skip

    def popen(self, *args: str, **settings: Any) -> Process:
        settings.setdefault("stdout", subprocess.PIPE)
        settings.setdefault("stderr", subprocess.PIPE)
        return Process([*PROGRAM, *args], env=self.environment(), cwd=self.root, **settings)

    def __call__(self, *args: str, stdin: bytes = b"", program: list[str] | None = None) -> Done:
        done = subprocess.run(
            [*(program or PROGRAM), *args], input=stdin, capture_output=True, env=self.environment(), cwd=self.root,
            timeout=RUN_TIMEOUT_S, check=False,
        )  # fmt: skip
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return Done(done.returncode, done.stdout.decode(errors="surrogateescape"), done.stderr.decode())

    def on_terminal(self, *args: str, columns: int = 80) -> Done:
        """The same with a terminal of so many columns on stdout and stderr."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        with subprocess.Popen(
            [*PROGRAM, *args], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, cwd=self.root,
            env={**self.environment(), "TERM": "xterm-256color"},
        ) as process:  # fmt: skip
            os.close(theirs)
            read: list[bytes] = []
            while True:
                try:
                    piece = os.read(ours, 65536)
                except OSError:
                    break
                if not piece:
                    break
                read.append(piece)
            code = process.wait(RUN_TIMEOUT_S)
        os.close(ours)
        return Done(code, b"".join(read).decode().replace("\r\n", "\n"), "")


@pytest.fixture
def ctl() -> Iterator[Ctl]:
    root = tempfile.mkdtemp(prefix="aqc-", dir=SHORT_TMP)  # short: a socket's path has 107 bytes
    for name in ("run", "state", "state/queue", "home"):
        os.makedirs(f"{root}/{name}", mode=0o700)
    yield Ctl(root)
    shutil.rmtree(root)


@pytest.fixture
def daemon(ctl: Ctl) -> Iterator[StandIn]:
    standin = StandIn(ctl.socket).start()
    yield standin
    standin.stop()


@pytest.fixture
def says(ctl: Ctl) -> Iterator[Callable[[bytes], None]]:
    """Something else than agentqd listens on the socket."""
    servers: list[SaysBytes] = []
    yield lambda data: servers.append(SaysBytes(ctl.socket, data))
    for server in servers:
        server.stop()
