"""A laptop, an sshd and a box with a daemon behind it: what the tests of `--box` are about."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from realbox import RealBox, real_box, wait_for
from realsshd import LOOPBACK, Account, Laptop, Place, RealSshd, current_account, real_sshd

CTL = [sys.executable, "-m", "agentqd.cli.main"]


class OneLaptop:
    """`ctl` runs agentqctl on the laptop with `--box box`; `here` the same verb on the box itself."""

    def __init__(self, laptop: Laptop, sshd: RealSshd, box: RealBox) -> None:
        self.laptop = laptop
        self.sshd = sshd
        self.box = box
        self.name = "box"

    @property
    def keeper_socket(self) -> Path:
        return self.laptop.runtime / "agentqctl" / f"{self.name}.sock"

    def add(self, name: str = "box", url: str | None = None, *more: str) -> None:
        folders = ["--state-dir", str(self.box.state), "--runtime-dir", str(self.box.runtime)]
        done = self.run("box", "add", "--force", name, url or self.sshd.url, *(more or folders))
        assert done.returncode == 0, done.stderr

    def run(
        self, *words: str, stdin: bytes = b"", timeout: float = 60, **env: str
    ) -> subprocess.CompletedProcess[bytes]:
        """agentqctl on the laptop."""
        return subprocess.run(
            [*CTL, *words],
            input=stdin,
            capture_output=True,
            timeout=timeout,
            check=False,
            env=self.laptop.env(**env),
        )

    def ctl(self, *words: str, stdin: bytes = b"", timeout: float = 60) -> subprocess.CompletedProcess[bytes]:
        """The same for the box."""
        return self.run("--box", self.name, *words, stdin=stdin, timeout=timeout)

    @property
    def command(self) -> list[str]:
        return [*CTL, "--box", self.name]

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self.command, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.laptop.env(),
        )

    def json(self, *words: str) -> Any:
        done = self.ctl(*words, "--json")
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    def ok(self, *words: str, stdin: bytes = b"") -> bytes:
        done = self.ctl(*words, stdin=stdin)
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        return done.stdout

    def here(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """agentqctl on the box."""
        return self.box.ctl(*words, stdin=stdin)

    def keepers(self) -> list[int]:
        """The keepers of this laptop, by the folder that stands in their argv."""
        mark = os.fsencode(str(self.laptop.runtime)) + b"/"
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if b"agentqd.client.keeper" in words and any(word.startswith(mark) for word in words):
                        found.append(int(entry.name))
        return sorted(found)

    def end_keepers(self) -> None:
        """Every keeper of this laptop, by pid; also one that a killed verb has only just started."""

        def gone() -> bool:
            for pid in self.keepers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            return not self.keepers()

        wait_for("the end of every keeper", gone)

    def lock_is_free(self) -> bool:
        path = self.keeper_socket.with_suffix(".lock")
        if not path.exists():
            return True
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
        return True


@contextlib.contextmanager
def one_laptop(
    account: Account | None = None,
    lines: Sequence[str] = (),
    *,
    start: bool = True,
    config: str | None = None,
    state: Path | None = None,
    place: Place = LOOPBACK,
) -> Iterator[OneLaptop]:
    """Everything in folders below /tmp with short names (sockets), gone afterwards."""
    top = Path(tempfile.mkdtemp(prefix="aq-lap-", dir="/tmp"))
    top.chmod(0o755)
    account = account or current_account()
    try:
        folder = top / "box"
        folder.mkdir()
        os.chown(folder, account.uid, account.gid)
        with (
            real_sshd(account, lines, place=place) as sshd,
            real_box(folder, config, start=False) as box,
        ):
            box.prefix = account.as_prefix()
            if state is not None:
                box.state = state
            if start:
                box.start()
            laptop = sshd.laptop(top / "lap")
            one = OneLaptop(laptop, sshd, box)
            one.add()
            try:
                yield one
            finally:
                sshd.resume()
                one.end_keepers()
    finally:
        shutil.rmtree(top, ignore_errors=True)


def timed(one: OneLaptop, *words: str) -> float:
    """Seconds of one successful verb."""
    began = time.monotonic()
    one.ok(*words)
    return time.monotonic() - began
