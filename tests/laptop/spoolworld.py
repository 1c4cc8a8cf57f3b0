"""A laptop and a box with a link between them, and the checker: nothing lost, nothing doubled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from realbox import RealBox, real_box, wait_for

from agentqd.client.spool import Spool

from .link import Link

PROGRAM = [sys.executable, str(Path(__file__).with_name("fakectl.py"))]
RUN_TIMEOUT_S = 60


class Done:
    def __init__(self, done: subprocess.CompletedProcess[bytes]) -> None:
        self.code = done.returncode
        self.out = done.stdout.decode()
        self.err = done.stderr.decode()

    @property
    def json(self) -> Any:
        assert self.out, self.err
        return json.loads(self.out)


class World:
    """One box (`box1`) and one laptop."""

    def __init__(self, root: Path, box: RealBox) -> None:
        self.root = root
        self.box = box
        self.link = Link(f"{root}/l", str(box.runtime / "agentqd.sock"))
        self.home = root / "home"
        self.home.mkdir(exist_ok=True)
        self.state = self.home / "state"
        config = self.home / ".config/agentqctl/config.yaml"
        config.parent.mkdir(parents=True)
        config.write_text("boxes: {box1: {url: 'ssh://nobody@127.0.0.1:1'}}\n")

    @property
    def spool(self) -> Spool:
        return Spool(f"{self.state}/agentqctl/spool", "box1")

    @property
    def folder(self) -> Path:
        return Path(self.spool.folder)

    def environment(self) -> dict[str, str]:
        tests = str(Path(__file__).parents[1])
        boxes = {"box1": {"link": self.link.path, "state": str(self.box.state)}}
        return {
            "PATH": os.environ["PATH"], "HOME": str(self.home), "XDG_STATE_HOME": str(self.state), "LC_ALL": "C.UTF-8",
            "PYTHONPATH": f"{Path(tests).parent}:{tests}", "AGENTQ_TEST_BOXES": json.dumps(boxes), "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    def popen(self, *words: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*prefix, *PROGRAM, *words],
            env=self.environment(),
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def ctl(self, *words: str, box: bool = True, prefix: tuple[str, ...] = ()) -> Done:
        with self.popen(*(("--box", "box1") if box else ()), *words, prefix=prefix) as process:
            try:
                out, err = process.communicate(timeout=RUN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        assert b"Traceback" not in err, err.decode()
        return Done(subprocess.CompletedProcess(process.args, process.returncode, out, err))

    def submit(self, name: str, *more: str, prefix: tuple[str, ...] = ()) -> Done:
        """A task that leaves a line in `ran` each time it runs."""
        return self.ctl("submit", "--json", "--task", name, *more, self.script(name), prefix=prefix)

    def script(self, name: str) -> str:
        return f"echo {name} >> {self.root}/ran; echo done"

    def ran(self) -> list[str]:
        path = self.root / "ran"
        return path.read_text().split() if path.exists() else []

    def waiting(self) -> list[str]:
        """Names in the spool, in order, as a reader sees it who knows nothing of it."""
        if not self.folder.exists():
            return []
        return sorted(name for name in os.listdir(self.folder) if name.endswith(".json"))

    def flush(self) -> Done:
        return self.ctl("flush", "--json")

    def at_rest(self) -> None:
        """Everything that was accepted has ended."""

        def look() -> bool:
            states = self.box.status()["tasks"]
            return all(state == "finished" or not count for state, count in states.items())

        wait_for("every task's end", look)

    def check_once(self, *names: str) -> None:
        """Each of these has run exactly once and is told exactly once."""
        wait_for("the results", lambda: set(names) <= set(self.box.results()))
        self.at_rest()
        ran = Counter(self.ran())
        told = Counter(line["name"] for line in self.box.completions() if "status" in line)
        assert {name: (ran[name], told[name]) for name in names} == dict.fromkeys(names, (1, 1))


@contextmanager
def world(config: str | None = None, *, start: bool = True) -> Iterator[World]:
    with tempfile.TemporaryDirectory(
        prefix="aql-", dir="/tmp"
    ) as root:  # short: a socket's path has 107 bytes
        folder = Path(root) / "b"
        folder.mkdir()
        with real_box(folder, config, start=start) as box:
            made = World(Path(root), box)
            made.link.up()
            try:
                yield made
            finally:
                made.link.down()
