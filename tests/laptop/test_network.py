"""A real OpenSSH behind a network that loses packets, swallows them, or goes away. Nothing lost, nothing doubled."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from realbox import wait_for

from .netns import Network, network
from .onelaptop import OneLaptop, one_laptop

pytestmark = [pytest.mark.real, pytest.mark.root, pytest.mark.sshd, pytest.mark.timeout(180)]

BIG_BYTES = 30_000_000
PROMPT_BYTES = 5_000_000
BEGUN_BYTES = 3_000_000  # so much of the big file is there: a transfer's middle
HALF_BYTES = 12_000_000
# keeper/link.py: three keepalives in 20 s, then one attempt of 15 s to connect anew; and a little for a busy machine.
DEAD_S = 25.0
NOTICED_S = DEAD_S + 20
SLEEP_S = 13.0  # keeper/serve.py: SILENCE_S
CONFIG = "runners:\n  counted: {command: [sh, -c, 'wc -c >> $COUNTED; echo counted'], prompt: stdin}\n"


class World(NamedTuple):
    one: OneLaptop
    net: Network
    started: list[subprocess.Popen[bytes]]

    @property
    def ran(self) -> Path:
        return self.one.box.folder / "ran"

    @property
    def spool(self) -> Path:
        return self.one.laptop.home / ".local/state/agentqctl/spool" / self.one.name

    def start(self, out: Path, *words: str) -> subprocess.Popen[bytes]:
        """A verb in the background, its stdout in a file."""
        with out.open("ab") as stdout, out.with_suffix(".err").open("ab") as stderr:
            process = subprocess.Popen(
                [*self.one.command, *words],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=self.one.laptop.env(),
            )
        self.started.append(process)
        return process


@pytest.fixture
def world() -> Iterator[World]:
    with network() as net, one_laptop(config=CONFIG, place=net.place) as one, ended_verbs() as started:
        yield World(one, net, started)


@contextmanager
def ended_verbs() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        stack.callback(lambda: [process.wait(10) for process in started])
        stack.callback(lambda: [process.kill() for process in started])
        yield started


def script(world: World, name: str, work: str = "") -> str:
    return f"echo {name} >> {world.ran}; {work or f'echo {name} > made'}; echo {name} is done"


def check_ran_once(world: World, names: list[str]) -> None:
    """On the box: each task ran once and has one result."""
    wait_for("the results", lambda: set(names) <= set(world.one.box.results()))
    ran = Counter(world.ran.read_text().split())
    told = Counter(line["name"] for line in world.one.box.completions() if "status" in line)
    assert {name: (ran[name], told[name]) for name in told} == dict.fromkeys(names, (1, 1))


def check_pulled_once(world: World, out: Path, to: Path) -> None:
    """On the laptop: each result was told once, in order, and every file has the bytes that the box has."""
    rows = [line for line in world.one.box.completions() if "status" in line]
    assert [json.loads(line)["delivery_id"] for line in out.read_text().splitlines()] == [
        row["delivery_id"] for row in rows
    ]
    folders = {f"{row['name']}-{row['task_id']}": row for row in rows}
    assert {path.name for path in to.iterdir()} == {".agentqctl", *folders}
    assert unacknowledged(to) == []
    for name, row in folders.items():
        folder = to / name
        assert json.loads((folder / "result.json").read_text())["delivery_id"] == row["delivery_id"]
        there = {
            str(path.relative_to(folder)): sha256(path)
            for path in folder.rglob("*")
            if path.is_file() and path != folder / "result.json"
        }
        wanted = {f"artifacts/{item['path']}": item["sha256"] for item in row["artifacts"]}
        for stream in ("stdout", "stderr"):
            wanted[stream] = sha256(world.one.box.attempt_folder(row["task_id"]) / stream)
        assert there == wanted


def check_acknowledged(world: World, to: Path) -> None:
    """Nothing comes again."""
    done = world.one.ctl("pull", "--to", str(to))
    assert (done.returncode, done.stdout) == (0, b""), done


def unacknowledged(to: Path) -> list[str]:
    """The rows whose folders are not yet done with."""
    return [path.name for path in (to / ".agentqctl").iterdir() if path.name != "lock"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def big_file(world: World) -> None:
    """A task with a file whose transfer takes some seconds, finished."""
    world.one.box.append(
        {"task": "big", "prompt": script(world, "big", f"head -c {BIG_BYTES} /dev/urandom > big.bin")}
    )
    world.one.box.until_pullable(1)


def fetched(to: Path) -> int:
    """Bytes of artifacts that are on this disk and not yet shown."""
    return sum(path.stat().st_size for path in to.glob(".agentqctl/*/files/**/*") if path.is_file())


def end(process: subprocess.Popen[bytes], out: Path, within_s: float) -> tuple[int, str]:
    code = process.wait(within_s)
    error = out.with_suffix(".err").read_text()
    assert "Traceback" not in error, error
    return code, error


def keepers_port(world: World) -> int:
    """Our end of the one connection to the box's sshd."""
    shown = subprocess.run(
        ["ss", "-Htn", "state", "established", "dst", f"{world.net.host}:{world.one.sshd.port}"],
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = shown.stdout.splitlines()
    return int(line.split()[2].rpartition(":")[2])


def seconds(act: Callable[[], Any]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def test_with_three_packets_of_ten_lost_everything_arrives_once(world: World, tmp_path: Path) -> None:
    world.net.lose(0.3)
    names = [f"n{n}" for n in range(10)]
    ids = []
    for name in names:
        done = world.one.ctl("submit", "--json", "--task", name, script(world, name))
        assert done.returncode == 0, done
        ids.append(json.loads(done.stdout)["task_id"])
    assert world.one.run("flush").returncode == 0
    waited = world.one.ctl("wait", *ids, "--json", timeout=90)
    assert waited.returncode == 0, waited
    out, to = tmp_path / "out", tmp_path / "to"
    assert end(world.start(out, "pull", "--to", str(to)), out, 90) == (0, "")
    assert world.net.dropped() > 30
    check_ran_once(world, names)
    check_pulled_once(world, out, to)


def test_a_black_hole_in_the_middle_of_a_pull_and_of_a_submit_loses_and_doubles_nothing(
    world: World, tmp_path: Path
) -> None:
    big_file(world)
    counted, prompt = tmp_path / "counted", tmp_path / "prompt"
    prompt.write_bytes(b"x" * PROMPT_BYTES)
    out, to, said = tmp_path / "out", tmp_path / "to", tmp_path / "said"
    pull = world.start(out, "pull", "--to", str(to))
    wait_for("the pull's middle", lambda: fetched(to) > BEGUN_BYTES)
    sent = world.net.sent()
    words = ("--runner", "counted", "--env", f"COUNTED={counted}", "--prompt-file", str(prompt))
    submit = world.start(said, "submit", "--json", "--task", "long", *words)
    wait_for("the submit's middle", lambda: world.net.sent() - sent > PROMPT_BYTES // 3)
    world.net.black_hole()
    before = fetched(to)
    began = time.monotonic()
    assert 0 < before < BIG_BYTES
    assert end(submit, said, NOTICED_S) == (0, "")
    noticed_s = time.monotonic() - began
    answer = json.loads(said.read_text())
    assert answer["where"] == "spool", answer
    assert len(list(world.spool.glob("*.json"))) == 1
    assert pull.poll() is None  # it bears a cut for a minute
    world.net.heal()
    assert end(pull, out, NOTICED_S) == (0, "")
    flushed = world.one.ctl("flush", "--json")
    assert flushed.returncode == 0, flushed
    world.one.ok("wait", answer["task_id"])
    assert counted.read_text().split() == [str(PROMPT_BYTES)]
    print(f"noticed after {noticed_s:.1f} s with {before} of {BIG_BYTES} bytes there")
    world.one.box.until_pullable(2)
    last = world.start(out, "pull", "--to", str(to))
    assert end(last, out, NOTICED_S) == (0, "")
    check_pulled_once(world, out, to)
    assert Counter(line["name"] for line in world.one.box.completions()) == {"big": 1, "long": 1}
    check_acknowledged(world, to)


def test_a_link_that_goes_down_and_comes_back_stops_no_follower_and_repeats_nothing(
    world: World, tmp_path: Path
) -> None:
    big_file(world)
    go = tmp_path / "go"
    work = f"i=0; until [ -e {shlex.quote(str(go))} ]; do i=$((i+1)); echo line $i; sleep 0.05; done"
    ticks = world.one.here("submit", "--json", "--task", "ticks", script(world, "ticks", work))
    ticking = json.loads(ticks.stdout)["task_id"]
    logs, waited, out, to = (tmp_path / name for name in ("logs", "waited", "out", "to"))
    follow = world.start(logs, "logs", "-f", ticking)
    wait = world.start(waited, "wait", ticking)
    wait_for("some lines", lambda: b"line 3\n" in logs.read_bytes())
    received = world.net.received()
    pull = world.start(out, "pull", "--to", str(to), "--follow")
    wait_for("the pull's middle", lambda: fetched(to) > HALF_BYTES)
    keepers = world.one.keepers()
    world.net.link_down()
    before = fetched(to)
    dead_s = seconds(
        lambda: wait_for("the keeper's end", lambda: not set(keepers) & set(world.one.keepers()), DEAD_S)
    )
    assert (follow.poll(), wait.poll(), pull.poll()) == (None, None, None)
    world.net.heal()
    back_s = seconds(lambda: wait_for("the big file", lambda: out.read_bytes().count(b"\n") == 1))
    go.touch()
    assert end(wait, waited, NOTICED_S) == (0, "")
    assert end(follow, logs, NOTICED_S) == (0, "")
    wait_for("both rows", lambda: out.read_bytes().count(b"\n") == 2)
    wait_for("the last acknowledgement", lambda: unacknowledged(to) == [])
    pull.send_signal(signal.SIGINT)
    assert end(pull, out, NOTICED_S) == (130, "")
    print(f"dead after {dead_s:.1f} s, back after {back_s:.1f} s; {before} of {BIG_BYTES} bytes were there")
    assert 0 < before < BIG_BYTES
    # What had come was not fetched again: frames, SSH and what was on its way when the link fell add some per cent.
    assert world.net.received() - received < BIG_BYTES + before // 2
    stdout = world.one.box.attempt_folder(ticking) / "stdout"
    assert logs.read_bytes() == stdout.read_bytes()
    lines = [int(each) for each in re.findall(rb"line (\d+)\n", logs.read_bytes())]
    assert lines == list(range(1, len(lines) + 1))
    assert waited.read_text().split() == [ticking, "success"]
    check_ran_once(world, ["big", "ticks"])
    check_pulled_once(world, out, to)


def test_after_a_sleep_the_next_verb_notices_the_dead_connection_and_makes_a_new_one(world: World) -> None:
    world.one.ok("status")
    (keeper,) = world.one.keepers()
    os.kill(keeper, signal.SIGSTOP)  # the laptop sleeps; on the way its connection is forgotten
    began = time.monotonic()
    try:
        world.net.black_hole(keepers_port(world))
        wait_for("longer than two keepalives", lambda: time.monotonic() - began > SLEEP_S, SLEEP_S + 5)
    finally:
        os.kill(keeper, signal.SIGCONT)
    took_s = seconds(lambda: world.one.ok("status"))
    print(f"the first verb after the sleep took {took_s:.1f} s")
    assert took_s < 8
    assert world.net.dropped() > 0
    assert keeper not in world.one.keepers()
    assert len(world.one.keepers()) == 1
    assert seconds(lambda: world.one.ok("status")) < 2
