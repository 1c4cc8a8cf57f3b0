"""The append sinks killed for real, at every system call that changes something; and the order of those calls."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentqd.sinks.base import Delivered

from . import append_program
from .adapters import APPENDING, AppendAdapter, FileAdapter
from .conformance import delivery, ids, some

pytestmark = pytest.mark.root

PROGRAM = str(Path(append_program.__file__))
CHANGING = "write,fdatasync,fsync,ftruncate,rename,pwrite64,openat"
ROTATE = {"completions": "500", "rejected": "1000000", "file": "1000000"}


def path_of(adapter: type[AppendAdapter], base: Path) -> Path:
    return base / ("out.jsonl" if adapter is FileAdapter else adapter.file_name)


def run_traced(
    adapter: type[AppendAdapter], base: Path, *inject: str, watch: str = "file and marks"
) -> tuple[int, list[str], dict[str, Any]]:
    """(exit code, traced calls on the sink's file, its folder and the marks, what it said).

    Without --seccomp-bpf: with it, strace 6.1 injects errors but no signals.
    """
    (base / "queue").mkdir(parents=True, exist_ok=True)
    path = path_of(adapter, base)
    trace = base / "trace"
    names = [
        *([path, path.parent] if "file" in watch else []),
        *([base / "marks"] if "marks" in watch else []),
    ]
    watched = [item for name in names for item in ("-P", str(name))]
    injected = [item for one in inject for item in ("-e", f"inject={one}")]
    command = [
        *("strace", "-f", "-o", str(trace), *watched, "-e", f"trace={CHANGING}", *injected),
        *(sys.executable, PROGRAM, adapter.type, str(base), "6", "2", ROTATE[adapter.type]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    said = json.loads(done.stdout) if done.stdout else {"stderr": done.stderr}
    return done.returncode, trace.read_text().splitlines(), said


def in_files(adapter: type[AppendAdapter], base: Path) -> list[dict[str, Any]]:
    """Every line, rotated files first, in order."""
    path = path_of(adapter, base)
    rotated = sorted(
        path.parent.glob(f"{path.stem}-*.jsonl"), key=lambda one: int(re.findall(r"\d+", one.name)[-1])
    )
    text = b"".join(one.read_bytes() for one in [*rotated, *([path] if path.exists() else [])])
    assert text == b"" or text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


def finish(adapter: type[AppendAdapter], base: Path) -> dict[str, Any]:
    return asyncio.run(append_program.run(adapter.type, base, 6, 2, int(ROTATE[adapter.type])))


def assert_each_once(adapter: type[AppendAdapter], base: Path) -> None:
    lines = in_files(adapter, base)
    key = "id" if adapter is FileAdapter else "delivery_id"
    assert sorted(line[key] for line in lines) == sorted(ids(some(6))), "each once"
    if adapter.type == "completions":
        seqs = [line["seq"] for line in lines]
        assert seqs == sorted(set(seqs))
        marks = append_program.Marks(base / "marks").positions
        assert marks == {line["delivery_id"]: line["seq"] for line in lines}


@pytest.mark.parametrize("adapter", APPENDING, ids=lambda adapter: adapter.type)
@pytest.mark.parametrize("watch", ["file", "marks"])
def test_a_kill_at_any_call_loses_and_doubles_no_line(
    adapter: type[AppendAdapter], watch: str, tmp_path: Path
) -> None:
    """strace counts each thread's calls by themselves: hence once at the worker's and once at the main thread's."""
    kills = 0
    for call in (
        ("write", "fsync") if watch == "marks" else ("write", "fdatasync", "fsync", "rename", "openat")
    ):
        for when in range(1, 20):
            base = tmp_path / f"{call}-{when}"
            code, _, said = run_traced(adapter, base, f"{call}:signal=SIGKILL:when={when}", watch=watch)
            assert code in (0, -9, 137), said
            finish(adapter, base)
            assert_each_once(adapter, base)
            if code == 0:
                break
            kills += 1
    assert kills >= (6 if watch == "marks" else 11), "it was killed at every call, and not once too few"


@pytest.mark.parametrize("adapter", APPENDING, ids=lambda adapter: adapter.type)
def test_a_kill_between_append_and_mark_is_told_as_found_at_the_next_start(
    adapter: type[AppendAdapter], tmp_path: Path
) -> None:
    code, calls, _ = run_traced(adapter, tmp_path, "fdatasync:signal=SIGKILL:when=2")
    assert code != 0
    assert any("killed by SIGKILL" in call for call in calls)
    assert len(in_files(adapter, tmp_path)) == 4, "two batches were written, the second not synced"
    assert finish(adapter, tmp_path)["found"] == 2
    assert_each_once(adapter, tmp_path)


@pytest.mark.parametrize("adapter", APPENDING, ids=lambda adapter: adapter.type)
def test_the_order_is_one_write_then_fdatasync_then_the_folder_then_the_answer(
    adapter: type[AppendAdapter], tmp_path: Path
) -> None:
    code, calls, said = run_traced(adapter, tmp_path)
    assert (code, said["marked"]) == (0, 6)
    marks_fd = next(re.search(r"= (\d+)", call)[1] for call in calls if "/marks" in call)  # type: ignore[index]
    matches = [re.search(r"^\d+ +(write|fdatasync|fsync|rename)\((\d*)", call) for call in calls]
    names = ["mark" if match[2] == marks_fd else match[1] for match in matches if match]
    made, later = "write fdatasync fsync mark", "write fdatasync mark"
    third = (
        f"rename {made}" if adapter.type == "completions" else later
    )  # rotated: the folder before the answer
    assert " ".join(names).replace("mark mark", "mark") == f"{made} {later} {third}"


@pytest.mark.parametrize("adapter", APPENDING, ids=lambda adapter: adapter.type)
def test_a_failed_fdatasync_is_no_delivery_and_the_lines_are_written_again_before_they_count(
    adapter: type[AppendAdapter], tmp_path: Path
) -> None:
    code, calls, said = run_traced(adapter, tmp_path, "fdatasync:error=EIO:when=1")
    assert code == 0
    assert len(said["deferred"]) == 2
    assert "Input/output error" in said["deferred"][0]
    assert_each_once(adapter, tmp_path)
    failed = next(index for index, call in enumerate(calls) if "EIO" in call)
    after = [call.split()[1].partition("(")[0] for call in calls[failed + 1 :]]
    assert after[1:3] == ["pwrite64", "fdatasync"], "the same bytes again, then synced"


@pytest.mark.parametrize("adapter", APPENDING, ids=lambda adapter: adapter.type)
def test_a_folder_that_cannot_be_synced_is_no_delivery(adapter: type[AppendAdapter], tmp_path: Path) -> None:
    code, _, said = run_traced(adapter, tmp_path, "fsync:error=EIO:when=1", watch="file")
    assert code == 0
    assert len(said["deferred"]) == 2
    assert_each_once(adapter, tmp_path)


async def test_a_full_disk_defers_what_did_not_fit_and_tears_nothing(tmp_path: Path) -> None:
    """On a real tmpfs of 64 KiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=True)
    try:
        adapter = AppendProbe(tmp_path)
        sink = adapter.make()
        await sink.open(0)
        big = [delivery(number, padding=9000) for number in range(1, 11)]
        outcomes = await sink.deliver(big)
        kinds = [isinstance(outcome, Delivered) for outcome in outcomes]
        assert kinds == sorted(kinds, reverse=True)
        assert 0 < sum(kinds) < 10
        assert adapter.received() == ids(big)[: sum(kinds)], "a true yes for each whole line, and no torn one"
        (outcome,) = await sink.deliver([delivery(11, padding=30_000)])
        assert "No space left" in outcome.reason or "disk full" in outcome.reason  # type: ignore[union-attr]
        subprocess.run(["mount", "-o", "remount,size=1m", str(tmp_path)], check=True)
        again = [one for one, delivered in zip(big, kinds, strict=True) if not delivered]
        assert all(isinstance(outcome, Delivered) for outcome in await sink.deliver(again))
        assert adapter.received() == ids(big)
        await sink.close()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


class AppendProbe(AppendAdapter):
    type = "completions"
    file_name = "completions.jsonl"
