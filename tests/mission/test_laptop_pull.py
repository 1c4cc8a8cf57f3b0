"""A laptop that pulls results with their files, sleeps in the middle, dies in the middle, and comes back."""

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from realbox import RealBox, wait_for

pytestmark = pytest.mark.real


def laptop(box: RealBox, out: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "agentqd.cli.main", "--socket", str(box.runtime / "agentqd.sock")]
    with out.open("ab") as stdout:
        return subprocess.Popen([*command, "pull", *words], stdout=stdout, stderr=subprocess.DEVNULL)


def printed(out: Path) -> list[str]:
    return [json.loads(line)["name"] for line in out.read_text().splitlines()]


def jobs(box: RealBox, first: int, last: int) -> None:
    box.append(*(
        {"task": f"t{n}", "id": f"t{n}", "prompt": f"echo {n}; head -c 20000 /dev/urandom > data"} for n in range(first, last)
    ))  # fmt: skip


def check_folders(box: RealBox, to: Path) -> None:
    """Each result has its folder, each file its recorded sum."""
    results: dict[str, dict[str, Any]] = box.results()
    assert {path.name for path in to.iterdir()} == {".agentqctl"} | {f"{name}-{name}" for name in results}
    for name, row in results.items():
        folder = to / f"{name}-{name}"
        assert (folder / "stdout").read_text() == f"{name[1:]}\n"
        data = (folder / "artifacts" / "data").read_bytes()
        assert hashlib.sha256(data).hexdigest() == row["artifacts"][0]["sha256"]


@pytest.mark.row(4, 17, 24)
def test_a_laptop_asleep_in_mid_pull_holds_nothing_up_and_then_gets_everything_in_order(
    box: RealBox, tmp_path: Path
) -> None:
    out, to = tmp_path / "out", tmp_path / "to"
    pulling = laptop(box, out, "--follow", "--to", str(to))
    try:
        jobs(box, 0, 5)
        wait_for("the first rows", lambda: out.read_text().count("\n") >= 1)
        pulling.send_signal(signal.SIGSTOP)
        jobs(box, 5, 50)
        wait_for("50 results", lambda: len(box.results()) == 50)
        box.kill()
        box.start()
        pulling.send_signal(signal.SIGCONT)
        wait_for("50 rows", lambda: out.read_text().count("\n") >= 50)
    finally:
        pulling.kill()
        pulling.wait()
    assert printed(out) == [line["name"] for line in box.completions()]
    check_folders(box, to)


@pytest.mark.row(4, 16)
def test_a_pull_that_dies_in_the_middle_goes_on_with_that_row_after_both_sides_have_been_off(
    box: RealBox, tmp_path: Path
) -> None:
    out, to = tmp_path / "out", tmp_path / "to"
    jobs(box, 0, 20)
    box.until_pullable(20)
    names = [line["name"] for line in box.completions()]
    dying = f'test "$AGENTQ_NAME" != {names[6]} || kill -9 $PPID'
    assert laptop(box, out, "--to", str(to), "--exec", dying).wait(60) == -signal.SIGKILL
    assert printed(out) == names[:7]
    box.stop()
    box.start()
    assert laptop(box, out, "--to", str(to)).wait(60) == 0
    assert printed(out) == names[:7] + names[6:]  # that row had not been acknowledged: at least once
    check_folders(box, to)
