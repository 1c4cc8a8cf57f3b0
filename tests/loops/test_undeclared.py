"""What an attempt changed and had not declared: a look at change times, bounded, that nothing a worker leaves can mislead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agentqd.loops import undeclared
from agentqd.loops.undeclared import Asked, Undeclared


class Attempt:
    """A workdir with what was there before, and then an attempt that has begun."""

    def __init__(self, root: Path) -> None:
        self.work = root / "work"
        self.folder = root / "attempt-1"
        self.work.mkdir()
        self.folder.mkdir()

    def begin(self) -> None:
        """Not in the same tick of the kernel's file clock as what was there before."""
        started = self.folder / "started"
        newest = max((path.lstat().st_ctime_ns for path in [self.work, *self.work.rglob("*")]), default=0)
        started.touch()
        while started.stat().st_ctime_ns <= newest:
            started.touch()

    def look(self, *writes_to: str, ours: tuple[str, ...] = ()) -> Undeclared:
        found = undeclared.look(Asked(str(self.work), str(self.folder), list(writes_to), ours))
        assert found is not None
        return found


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    made = Attempt(tmp_path)
    for name in ("old", "sub/old", "sub/deep/old", ".git/index"):
        (made.work / name).parent.mkdir(parents=True, exist_ok=True)
        (made.work / name).touch()
    made.begin()
    return made


def test_what_was_there_before_is_not_named(attempt: Attempt) -> None:
    assert attempt.look() == Undeclared([], 0, incomplete=False)


def test_new_written_and_touched_files_are_named_and_declared_ones_are_not(attempt: Attempt) -> None:
    (attempt.work / "new").touch()
    (attempt.work / "sub/old").write_text("x")
    os.utime(attempt.work / "sub/deep/old", (0, 0))  # a set time hides nothing
    (attempt.work / "link").symlink_to("/etc")
    assert attempt.look().paths == ["link", "new", "sub/deep/old", "sub/old"]
    assert attempt.look("sub", "*w").paths == ["link"]
    assert attempt.look(str(attempt.work / "sub/old"), "link").paths == ["new", "sub/deep/old"]


def test_a_removed_file_shows_as_its_folder_unless_it_was_declared(attempt: Attempt) -> None:
    (attempt.work / "sub/deep/old").unlink()
    assert attempt.look().paths == ["sub/deep/"]
    assert attempt.look("sub/deep/old").paths == []
    (attempt.work / "sub/deep/new").touch()
    assert attempt.look().paths == ["sub/deep/new"]


def test_git_and_our_own_folders_are_not_looked_into(attempt: Attempt) -> None:
    (attempt.work / ".git/index").write_text("x")
    (attempt.work / "state").mkdir()
    (attempt.work / "state/journal.db").touch()
    assert attempt.look(ours=(str(attempt.work / "state"),)).paths == []


def test_another_mount_is_not_entered(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    (attempt.work / "sub/new").touch()
    real = os.stat
    device = real("/proc").st_dev

    def elsewhere(path: object, **more: object) -> os.stat_result:
        status = real(path, **more)  # type: ignore[call-overload]
        return os.stat_result((*status[:2], device, *status[3:])) if str(path) == str(attempt.work) else status  # fmt: skip

    monkeypatch.setattr(os, "stat", elsewhere)
    assert attempt.look().paths == []


def test_names_of_every_kind_are_harmless(attempt: Attempt) -> None:
    raw = os.fsencode(attempt.work)
    for name in (b"*", b"[a]", b"\xff\xfe", b"a\x1b[31m", b"n\nl"):
        (Path(os.fsdecode(raw + b"/" + name))).touch()
    long = "/".join(["d" * 200] * 5)
    (attempt.work / long).mkdir(parents=True)
    (attempt.work / long / "f").touch()
    found = attempt.look("declared")
    assert found.count == 6
    assert all(len(name.encode()) <= 304 for name in found.paths), found.paths
    assert "*" in found.paths


def test_the_look_is_bounded_in_names_files_and_time(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(150):
        (attempt.work / f"f{n:03}").touch()
    found = attempt.look()
    assert (len(found.paths), found.count, found.incomplete) == (100, 150, False)
    assert found.as_json()["truncated"] is True
    monkeypatch.setattr("agentqd.core.limits.UNDECLARED_FILES_MAX", 50)
    assert attempt.look().as_json()["incomplete"] is True
    monkeypatch.undo()
    asked = Asked(str(attempt.work), str(attempt.folder), [], ())
    times = iter([0.0, *[5.0] * 20, *[11.0] * 1000])
    slow = undeclared.look(asked, lambda: next(times))
    assert slow is not None
    assert (slow.incomplete, slow.count < 150) == (True, True)


def test_without_a_start_or_a_workdir_nothing_is_claimed(attempt: Attempt) -> None:
    assert undeclared.look(Asked(str(attempt.work / "none"), str(attempt.folder), [], ())) is None
    (attempt.folder / "started").unlink()
    assert undeclared.look(Asked(str(attempt.work), str(attempt.folder), [], ())) is None
