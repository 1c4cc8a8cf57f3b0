"""`pull --to` killed at every system call that changes something here, and the order in which it makes things durable."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from crash.inject import needs_strace
from realbox import RealBox, wait_for

pytestmark = [
    pytest.mark.real,
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.skipif(needs_strace() is not None, reason=str(needs_strace())),
]

CALLS = ("mkdir", "rename", "fsync", "write", "sendto", "unlinkat", "rmdir")
FILES = {"stdout": "out\n", "stderr": "err\n", "artifacts/sub/f": "content\n"}


def a_result(box: RealBox) -> None:
    box.append({"task": "t", "id": "t", "prompt": "echo out; echo err >&2; mkdir sub; echo content > sub/f"})
    box.until_pullable(1)


def traced(box: RealBox, out: Path, to: Path, consumer: str, trace: Path, *options: str) -> int:
    command = [
        "strace",
        "-q",
        "-y",
        "-s",
        "300",
        "-o",
        str(trace),
        "-e",
        f"trace={','.join(CALLS)}",
        *options,
    ]
    command += [sys.executable, "-m", "agentqd.cli.main", "--socket", str(box.runtime / "agentqd.sock")]
    command += ["pull", "--to", str(to), "--consumer", consumer]
    with out.open("ab") as stdout:
        return subprocess.run(
            command, stdout=stdout, stderr=subprocess.DEVNULL, timeout=60, check=False
        ).returncode


def check(out: Path, to: Path) -> int:
    """How often the row was told."""
    (folder,) = [path for path in to.iterdir() if path.name != ".agentqctl"]
    there = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert json.loads(there.pop("result.json"))["task_id"] == "t"
    assert (folder.name, there) == ("t-t", FILES)
    assert os.listdir(to / ".agentqctl") == ["lock"]
    return len([line for line in out.read_text().splitlines() if json.loads(line)["task_id"] == "t"])


def test_a_pull_killed_at_any_call_leaves_nothing_half_and_the_next_one_ends_it(
    box: RealBox, tmp_path: Path
) -> None:
    a_result(box)
    trace = tmp_path / "trace"
    assert traced(box, tmp_path / "plain", tmp_path / "plain-to", "plain", trace) == 0
    assert check(tmp_path / "plain", tmp_path / "plain-to") == 1
    counts = {call: len(re.findall(rf"^{call}\(", trace.read_text(), re.MULTILINE)) for call in CALLS}
    assert all(counts.values()), counts
    told_twice = killed = 0
    for call, count in counts.items():
        for when in range(1, count + 1):
            name = f"{call}-{when}"
            out, to = tmp_path / f"{name}.jsonl", tmp_path / name
            inject = ("-e", f"inject={call}:signal=SIGKILL:when={when}")
            killed += traced(box, out, to, name, trace, *inject) != 0
            visible = to / "t-t" / "result.json"
            if visible.exists():  # whoever sees it finds everything
                assert {path: (to / "t-t" / path).read_text() for path in FILES} == FILES, name
            done = box.ctl("pull", "--to", str(to), "--consumer", name)
            assert done.returncode == 0, (name, done.stderr)
            with out.open("ab") as file:
                file.write(done.stdout)
            told_twice += check(out, to) - 1
    assert killed >= 30
    assert told_twice <= 2  # behind the print: at its fsync, at the mkdir of the mark


def test_each_file_is_on_the_disk_before_its_result_is_seen_and_told(box: RealBox, tmp_path: Path) -> None:
    a_result(box)
    trace, to = tmp_path / "trace", tmp_path / "to"
    assert traced(box, tmp_path / "out", to, "c", trace) == 0
    lines = trace.read_text().splitlines()

    def place(what: str) -> int:
        found = [n for n, line in enumerate(lines) if re.search(what, line)]
        assert found, f"{what} is not in\n" + "\n".join(lines)
        return found[0]

    moved = place(r'^rename\(".*/files/artifacts"')
    for file in ("stdout", "stderr", "artifacts/sub/f", "result.json", "artifacts/sub", "artifacts"):
        assert place(rf"^fsync\(\d+<.*/files/{file}>") < moved
    assert place(r"^fsync\(\d+<.*/files>") < moved
    assert place(r'^rename\(".*/place.tmp"') < moved
    seen = place(r'^rename\(".*/files/result.json"')
    folder = [n for n, line in enumerate(lines) if re.search(r"^fsync\(\d+<.*/to/t-t>", line)]
    assert moved < folder[0] < seen < folder[-1]
    printed = place(r"^write\(1<")
    assert folder[-1] < printed < place(r"^sendto\(.*POST /v1/consumers/c/ack")


def test_the_fetched_files_of_a_killed_pull_are_not_fetched_again(box: RealBox, tmp_path: Path) -> None:
    a_result(box)
    out, to, trace = tmp_path / "out", tmp_path / "to", tmp_path / "trace"
    assert traced(box, out, to, "c", trace, "-e", "inject=rename:signal=SIGKILL:when=1") != 0
    wait_for("its end", lambda: not out.read_text())
    assert traced(box, out, to, "c", trace) == 0
    assert check(out, to) == 1
    asked = re.findall(
        r"GET /v1/tasks/t/attempts/1/files/(\w+) HTTP/1.1.{1,200}?Range: (bytes=\d+-\d*)", trace.read_text()
    )
    assert all(wanted == "bytes=0-0" for _, wanted in asked), asked  # only a sum is asked for
