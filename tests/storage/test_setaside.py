"""Task folders on their way out: whichever instant a crash comes at, the journal tells what goes and what goes back."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from agentqd.storage.setaside import left_over, make_durable, put_back, remove, set_aside


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    (folder / "job-1" / "attempt-1").mkdir(parents=True)
    (folder / "job-1" / "attempt-1" / "exit.json").write_text("{}")
    return folder


def test_a_folder_loses_its_name_and_gets_it_back(tasks: Path, tmp_path: Path) -> None:
    aside = str(tmp_path / "aside")
    path = set_aside(str(tasks), aside, 7, "job-1")
    assert path is not None
    make_durable(str(tasks), aside)
    assert os.listdir(tasks) == []
    assert left_over(aside) == {path: 7}
    put_back(str(tasks), [path])
    assert (tasks / "job-1" / "attempt-1" / "exit.json").exists()
    assert left_over(aside) == {}


def test_a_task_without_a_folder_is_nothing_to_be_set_aside(tasks: Path, tmp_path: Path) -> None:
    assert set_aside(str(tasks), str(tmp_path / "aside"), 7, "job-2") is None
    assert left_over(str(tmp_path / "aside")) == {}


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    aside = tmp_path / "aside"
    for name in ("notes", "7", "x.job", "7.job/../..", ".7.job", "99999999999999999999.job"):
        (aside / name.replace("/", "_")).mkdir(parents=True)
    assert left_over(str(aside)) == {}


def test_a_worker_cannot_keep_its_folder_by_closing_it_and_what_its_links_lead_to_stays() -> None:
    """As a user who is not root: root may do all."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        base.chmod(0o755)
        inner = base / "tasks" / "job-1" / "attempt-1" / "work"
        outside = base / "outside"
        for folder in (inner / "deep", outside):
            folder.mkdir(parents=True)
            (folder / "file").touch()
        outside.chmod(0o755)
        (inner / "link").symlink_to(outside)
        if os.geteuid() == 0:
            for folder, _, _ in os.walk(base):
                os.chown(folder, NOBODY, NOBODY)
        for folder in (inner / "deep", inner, base / "tasks" / "job-1"):
            folder.chmod(0o500)
        assert (
            _as_nobody(lambda: remove([set_aside(f"{name}/tasks", f"{name}/aside", 7, "job-1") or ""])) == 0
        )
        assert os.listdir(base / "aside") == []
        assert os.listdir(outside) == ["file"]
        assert outside.stat().st_mode & 0o777 == 0o755


def _as_nobody(action: Callable[[], None]) -> int:
    """The exit status of a child that has done it; as nobody, if this is root."""
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


NOBODY = 65534
