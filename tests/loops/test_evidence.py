"""What an ended attempt left behind, read from a real folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from agentqd.core import limits
from agentqd.core.task import Expect, ExpectFile
from agentqd.core.units import Size
from agentqd.loops import evidence
from agentqd.loops.evidence import Asked, Seen, as_json, collect


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "tasks" / "t" / "attempt-1"
    (made / "work").mkdir(parents=True)
    return made


def _start(folder: Path) -> None:
    (folder / "started").touch()


def _collect(folder: Path, workdir: Path | None = None, expect: Expect | None = None) -> Seen:
    sizes = [
        (folder / name).stat().st_size if (folder / name).exists() else 0 for name in ("stdout", "stderr")
    ]
    return collect(Asked(str(folder), str(workdir) if workdir else None, expect, *sizes))


def _files(*paths: str, **more: Any) -> Expect:
    return Expect(files=[ExpectFile(path=path, **more) for path in paths])


def test_nothing_left_is_nothing_seen(folder: Path) -> None:
    assert _collect(folder) == Seen("", 0, (), [], False, [])


def test_every_regular_file_in_work_is_an_artifact_with_size_and_digest(folder: Path) -> None:
    (folder / "work/deep/er").mkdir(parents=True)
    (folder / "work/deep/er/b.txt").write_bytes(b"bb")
    (folder / "work/a.txt").write_bytes(b"")
    (folder / "work/link").symlink_to("/etc/passwd")
    (folder / "work/up").symlink_to("..")
    os.mkfifo(folder / "work/fifo")
    seen = _collect(folder)
    assert seen.work_files == 2
    assert sorted((item["path"], item["bytes"], item["sha256"]) for item in as_json(seen)) == [
        ("a.txt", 0, hashlib.sha256(b"").hexdigest()),
        ("deep/er/b.txt", 2, hashlib.sha256(b"bb").hexdigest()),
    ]


def test_with_a_workdir_only_expected_files_are_artifacts(folder: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "repo"
    workdir.mkdir()
    (workdir / "other").write_text("x")
    _start(folder)
    (workdir / "out").write_text("x")
    seen = _collect(folder, workdir, _files("out"))
    assert [item.path for item in seen.artifacts] == ["out"]
    assert seen.work_files == 0


def test_a_stale_file_is_seen_as_unchanged_and_a_touched_one_as_changed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("x")
    os.utime(tmp_path / "old", (2**31, 2**31))  # a worker's own clock does not count
    past = (tmp_path / "old").stat().st_ctime_ns
    while not (folder / "started").exists() or (folder / "started").stat().st_ctime_ns == past:
        (folder / "started").unlink(missing_ok=True)  # until the kernel's coarse clock has moved on
        _start(folder)
    (tmp_path / "new").write_text("x")
    seen = _collect(folder, tmp_path, _files("old", "new"))
    assert [(item.path, item.changed) for item in seen.expected] == [("old", False), ("new", True)]


def test_what_is_missing_or_no_regular_file_is_not_there(folder: Path, tmp_path: Path) -> None:
    _start(folder)
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    seen = _collect(folder, tmp_path, _files("none", "dir", "fifo", "dangling", "dir/../none"))
    assert [item.bytes for item in seen.expected] == [None] * 5
    assert seen.artifacts == []


def test_an_expected_link_counts_as_what_it_points_to(folder: Path, tmp_path: Path) -> None:
    _start(folder)
    (tmp_path / "real").write_text("four")
    (tmp_path / "out").symlink_to("real")
    seen = _collect(folder, tmp_path, _files("out", min_bytes=Size(4)))
    assert (seen.expected[0].bytes, seen.expected[0].changed) == (4, True)
    assert [item.path for item in seen.artifacts] == ["out"]


@pytest.mark.parametrize(
    ("content", "tail"),
    [
        (b"short\n", "short\n"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"x" * 10_000, "x" * limits.STDOUT_TAIL_BYTES),
        ("ä".encode() * 4096 + b"z", "ä" * 2047 + "z"),
    ],
)
def test_the_tail_of_stdout_is_text_and_begins_with_a_whole_character(folder: Path, content: bytes, tail: str) -> None:  # fmt: skip
    (folder / "stdout").write_bytes(content)
    assert _collect(folder).stdout_tail == tail


def test_a_worker_that_removed_its_own_files_is_told_and_no_error(folder: Path) -> None:
    (folder / "work").rmdir()
    seen = collect(Asked(str(folder), None, _files("x"), 5, 5))
    assert seen.stdout_tail == ""
    assert [problem.partition(":")[0] for problem in seen.problems] == ["stdout", "stdout", "stderr"]
    folder.rmdir()
    assert collect(Asked(str(folder), None, None, 5, 0)).work_files == 0


def test_a_stdout_that_became_a_link_is_not_followed(folder: Path) -> None:
    (folder / "stdout").symlink_to("/etc/passwd")
    assert collect(Asked(str(folder), None, None, 5, 0)).stdout_tail == ""


def test_more_files_than_the_limit_are_truncated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ARTIFACTS_MAX", 5)
    for n in range(9):
        (folder / "work" / str(n)).write_text("x")
    seen = _collect(folder)
    assert (len(seen.artifacts), seen.artifacts_truncated, seen.work_files) == (5, True, 6)


def test_beyond_the_hashing_limit_files_are_named_without_a_digest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(limits, "ARTIFACT_HASH_BYTES_MAX", 10)
    for name, size in (("a", 6), ("b", 6), ("c", 4)):
        (folder / "work" / name).write_bytes(b"x" * size)
    seen = _collect(folder)
    assert [(item.path, item.sha256 is None) for item in seen.artifacts] == [("a", False), ("b", True), ("c", False)]  # fmt: skip
    assert seen.artifacts_truncated


def test_a_name_that_is_not_utf8_can_be_told(folder: Path) -> None:
    with open(os.fsencode(folder) + b"/work/caf\xe9", "wb") as file:
        file.write(b"x")
    (item,) = as_json(_collect(folder))
    item["path"].encode()


def test_result_files_and_their_folders_are_fsynced_before_they_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (folder / "stdout").write_text("x")
    (folder / "work/deep").mkdir()
    (folder / "work/deep/a").write_text("x")
    synced: set[str] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(evidence.os, "fsync", fsync)
    _collect(folder)
    wanted = [folder / "stdout", folder / "work/deep/a", folder / "work/deep", folder / "work", folder, folder.parent, folder.parents[1]]  # fmt: skip
    assert {str(path) for path in wanted} == synced


@pytest.mark.parametrize("which", ["stdout", "work/a", "work", "."])
def test_a_disk_that_fails_at_fsync_is_an_error_and_no_evidence(folder: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:  # fmt: skip
    (folder / "work/a").write_text("x")
    (folder / "stdout").write_text("x")
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == os.path.normpath(folder / which):
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(evidence.os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        _collect(folder)
