"""The cap on what a worker writes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from agentqd.supervisor import output
from agentqd.supervisor.output import OutputCap, SignsOfLife

from .harness import Box, Daemon, run

KIB = 1024
MIB = 1024 * KIB


def test_beyond_the_cap_the_middle_is_punched_out_and_head_and_tail_stay(box: Box, daemon: Daemon) -> None:
    cap = 1 * MIB
    script = "echo the-first-line; head -c 20000000 /dev/zero | tr '\\0' x; echo; echo the-last-line"
    daemon.send(run("t", script, stdout_bytes_max=cap))
    exited = daemon.exited("t")
    status = os.stat(box.path("t", "stdout"))
    assert exited.exit_code == 0
    assert exited.stdout_truncated
    assert not exited.stderr_truncated
    assert exited.stdout_bytes == status.st_size > 20_000_000
    assert status.st_blocks * 512 <= cap + 16 * KIB
    content = box.read("t", "stdout")
    assert content[: cap // 4].strip(b"x") == b"the-first-line\n" + content[15 : cap // 4].strip(b"x")
    assert content.startswith(b"the-first-line\nxxx")
    assert content.endswith(b"xxx\nthe-last-line\n")
    assert b"\0" not in content[-(cap * 3 // 4) :]


def test_output_below_the_cap_is_whole(box: Box, daemon: Daemon) -> None:
    daemon.send(run("t", "head -c 1000000 /dev/zero | tr '\\0' x", stdout_bytes_max=MIB))
    assert not daemon.exited("t").stdout_truncated
    assert box.read("t", "stdout") == b"x" * 1_000_000


def test_a_file_system_without_holes_is_told_and_nothing_is_called_truncated(monkeypatch: object) -> None:
    told: list[bool] = []
    original = output.punch_hole
    output.punch_hole = lambda *_: False  # type: ignore[assignment]
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"x" * 100_000)
            file.flush()
            cap = OutputCap(file.fileno(), 20_000, lambda: told.append(True))
            assert cap.look() == 100_000
            assert (cap.truncated, told) == (False, [True])
    finally:
        output.punch_hole = original


def test_what_a_worker_does_before_the_first_look_is_a_sign_of_life(tmp_path: Path) -> None:
    (tmp_path / "outbox").mkdir()
    folder_fd = os.open(tmp_path, os.O_RDONLY)
    with (tmp_path / "stdout").open("wb") as stdout, (tmp_path / "stderr").open("wb") as stderr:
        signs = SignsOfLife(folder_fd, stdout.fileno(), stderr.fileno())
        (tmp_path / "outbox" / "at-once").touch()
        assert signs.changed()
        assert not signs.changed()
        os.write(stdout.fileno(), b"x")
        assert signs.changed()
    os.close(folder_fd)


def test_the_pace_fits_the_writer() -> None:
    with tempfile.TemporaryFile() as file:
        cap = OutputCap(file.fileno(), 4 * MIB, lambda: None)
    assert cap.next_look_s(0, 0.5) == 1.0
    assert cap.next_look_s(0, 1.0) == 1.0
    assert cap.next_look_s(100 * MIB, 1.0) == 0.05
    assert cap.next_look_s(2 * MIB, 1.0) == 0.5
