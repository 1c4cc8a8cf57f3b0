"""A real daemon, a real agentqctl, and a network that is cut between them at every step of a pull."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeBox
from realbox import RealBox, wait_for

from .cutproxy import Cut, CutProxy, points

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

RUN_S = 60
WORK = """
i=0; while [ $i -lt 4000 ]; do echo "line $i of {name}"; i=$((i+1)); done
echo problem >&2
mkdir -p sub; head -c 300000 /dev/urandom > sub/data.bin; echo {name} > 'odd name
.txt'
"""


@pytest.fixture
def proxied(make_box: MakeBox) -> Iterator[tuple[RealBox, CutProxy]]:
    box = make_box()
    with CutProxy(str(box.folder / "p.sock"), str(box.runtime / "agentqd.sock")) as proxy:
        yield box, proxy


def pull(proxy: CutProxy, out: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "agentqd.cli.main", "--socket", proxy.path, "pull", *words]
    with out.open("ab") as stdout:
        return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    try:
        error = process.communicate(timeout=RUN_S)[1].decode()
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in error, error
    return process.returncode, error


def some_results(box: RealBox, count: int = 2) -> list[dict[str, Any]]:
    for n in range(count):
        box.append({"task": f"job {n}", "id": f"id{n}", "prompt": WORK.replace("{name}", f"job {n}")})
    box.until_pullable(count)
    return [row for row in box.completions() if "status" in row]


def check(box: RealBox, rows: list[dict[str, Any]], out: Path, to: Path) -> None:
    """Lost = doubled = 0; every file is there with the bytes that the box has."""
    printed = [json.loads(line)["delivery_id"] for line in out.read_text().splitlines()]
    assert printed == [row["delivery_id"] for row in rows]
    assert sorted(path.name for path in to.iterdir()) == [
        ".agentqctl",
        *(f"job_{n}-id{n}" for n in range(len(rows))),
    ]
    assert [path.name for path in (to / ".agentqctl").iterdir()] == ["lock"]
    for row in rows:
        folder = to / f"{row['name'].replace(' ', '_')}-{row['task_id']}"
        assert json.loads((folder / "result.json").read_text())["delivery_id"] == row["delivery_id"]
        there = {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        for stream in ("stdout", "stderr"):
            assert there.pop(stream) == (box.attempt_folder(row["task_id"]) / stream).read_bytes()
        del there["result.json"]
        (renamed,) = json.loads(there.pop("problems.json"))
        assert (renamed["reason"], renamed["as"]) == ("renamed", "artifacts/odd name\\x0a.txt")
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in there.items()}
        wanted = {f"artifacts/{item['path']}": item["sha256"] for item in row["artifacts"]}
        wanted["artifacts/odd name\\x0a.txt"] = wanted.pop("artifacts/odd name\n.txt")
        assert sums == wanted


def behind(box: RealBox, consumer: str) -> int:
    (found,) = [each for each in box.api("GET", "/v1/consumers")[1]["consumers"] if each["name"] == consumer]
    return int(found["behind"])


def all_points(box: RealBox, proxy: CutProxy, rows: list[dict[str, Any]]) -> list[Cut]:
    """Of a pull that nothing cuts, which is checked too."""
    out, to = box.folder / "plain.jsonl", box.folder / "plain"
    proxy.begin(lambda _: None)
    assert ended(pull(proxy, out, "--to", str(to), "--consumer", "plain")) == (0, remarks(rows))
    check(box, rows, out, to)
    found = points(list(proxy.seen))
    assert len(found) >= 80, [each.what for each in proxy.seen]
    return found


def remarks(rows: list[dict[str, Any]]) -> str:
    text = "odd name\\n.txt: its name cannot be a file's name here\n"
    return "".join(f"{row['name']} ({row['task_id']}): {text}" for row in rows)


def test_a_pull_cut_once_at_any_step_goes_on_and_loses_and_doubles_nothing(
    proxied: tuple[RealBox, CutProxy],
) -> None:
    box, proxy = proxied
    rows = some_results(box)
    tried = 0
    for n, cut in enumerate(all_points(box, proxy, rows)):
        out, to = box.folder / f"{n}.jsonl", box.folder / f"to{n}"
        proxy.begin(lambda number, cut=cut: cut if number == cut.number else None)  # type: ignore[misc]
        code, error = ended(pull(proxy, out, "--to", str(to), "--consumer", f"c{n:04}"))
        assert proxy.cut_count == 1, cut
        if cut.number == 0:  # nothing had begun: said, and the next run does it
            assert (code, out.read_text()) == (69, ""), (cut, error)
            code, error = ended(pull(proxy, out, "--to", str(to), "--consumer", f"c{n:04}"))
        assert (code, error) == (0, remarks(rows)), cut
        check(box, rows, out, to)
        assert behind(box, f"c{n:04}") == 0, cut
        tried += 1
    assert tried >= 40


def test_a_pull_killed_at_any_step_is_ended_by_the_next_one(proxied: tuple[RealBox, CutProxy]) -> None:
    box, proxy = proxied
    rows = some_results(box)
    tried = 0
    for n, cut in enumerate(all_points(box, proxy, rows)[::2]):
        out, to = box.folder / f"{n}.jsonl", box.folder / f"to{n}"
        words = ("--to", str(to), "--consumer", f"c{n:04}")
        started = threading.Event()
        running: list[subprocess.Popen[bytes]] = []

        def kill(started: threading.Event = started, running: list[Any] = running) -> None:
            started.wait(10)
            running[0].send_signal(signal.SIGKILL)

        proxy.begin(lambda number, cut=cut: cut if number == cut.number else None, kill)  # type: ignore[misc]
        running.append(pull(proxy, out, *words))
        started.set()
        assert ended(running[0])[0] == -signal.SIGKILL, cut
        proxy.begin(lambda _: None)
        assert ended(pull(proxy, out, *words))[0] == 0, cut
        check(box, rows, out, to)
        assert behind(box, f"c{n:04}") == 0, cut
        tried += 1
    assert tried >= 40


def test_a_cut_transfer_goes_on_at_the_byte_where_it_stopped(proxied: tuple[RealBox, CutProxy]) -> None:
    box, proxy = proxied
    box.append({"task": "big", "id": "big", "prompt": "echo x; head -c 20000000 /dev/urandom > big.bin"})
    row = box.result("big")
    box.until_pullable(1)
    out, to = box.folder / "out.jsonl", box.folder / "to"
    proxy.begin(lambda number: Cut(number, "down", 3_000_000))
    assert ended(pull(proxy, out, "--to", str(to)))[0] == 0
    ranges = [each for each in proxy.seen if b"/files/a0" in each.up]
    assert len(ranges) == 7
    assert sum(each.down for each in ranges) < 20_000_000 + 7 * 1000  # no byte came twice
    got = (to / "big-big" / "artifacts" / "big.bin").read_bytes()
    assert hashlib.sha256(got).hexdigest() == row["artifacts"][0]["sha256"]


def test_follow_goes_on_over_cuts_and_restarts_of_the_daemon(proxied: tuple[RealBox, CutProxy]) -> None:
    box, proxy = proxied
    out, to = box.folder / "out.jsonl", box.folder / "to"
    proxy.begin(
        lambda number: (
            Cut(number, "down", 700 + 97 * number) if number % 3 else Cut(number, "up", number % 150)
        )
    )
    process = pull(proxy, out, "--to", str(to), "--follow")
    try:
        for n in range(6):
            box.append({"task": f"t{n}", "id": f"t{n}", "prompt": f"echo {n}; echo {n} > f"})
            wait_for(f"row {n}", lambda n=n: len(out.read_text().splitlines()) > n)  # type: ignore[misc]
            if n % 2:
                box.kill()
                box.start()
    finally:
        process.send_signal(signal.SIGINT)
        code, error = ended(process)
    assert (code, error) == (130, "")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["name"] for line in lines] == [f"t{n}" for n in range(6)]
    for n in range(6):
        assert (to / f"t{n}-t{n}" / "artifacts" / "f").read_text() == f"{n}\n"
    assert proxy.cut_count > 10
    wait_for(
        "the last acknowledgement", lambda: box.api("GET", "/v1/consumers")[1]["consumers"][0]["behind"] <= 1
    )


def test_the_sockets_of_a_pull_are_closed(proxied: tuple[RealBox, CutProxy]) -> None:
    box, proxy = proxied
    some_results(box, 1)
    proxy.begin(lambda number: Cut(number, "down", 100_000))
    out = box.folder / "out.jsonl"
    assert ended(pull(proxy, out, "--to", str(box.folder / "to")))[0] == 0
    before = len(os.listdir(f"/proc/{box.daemon_pid()}/fd"))
    for n in range(3):
        proxy.begin(lambda number: Cut(number, "down", 50_000))
        ended(pull(proxy, out, "--to", str(box.folder / f"to{n}"), "--consumer", f"c{n:04}"))
    wait_for("its files to be closed", lambda: len(os.listdir(f"/proc/{box.daemon_pid()}/fd")) <= before + 2)
