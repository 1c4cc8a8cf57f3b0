"""Copies in blobs/: a name for each, the same content once, and no order of making and removing them that loses one."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from pathlib import Path

import pytest

from agentqd.storage import blobs
from agentqd.storage.blobs import Copies, Copy, copy_in, digest_of, names_of, remove, remove_left_over


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "blobs")


def _copy(folder: str, content: bytes) -> Copy:
    source = Path(folder).with_name(f"source-{threading.get_ident()}")
    source.write_bytes(content)
    with source.open("rb") as file:
        return copy_in(file.fileno(), len(content), folder)


def _copies(folder: str) -> set[str]:
    return {f"{folder}/{name}" for name in names_of(folder) if not name.startswith(".once-")}


def test_a_copy_has_a_name_of_its_own_that_says_its_sum(folder: str) -> None:
    first, second = _copy(folder, b"x" * 10), _copy(folder, b"x" * 10)
    assert first.path != second.path
    for copy in (first, second):
        assert Path(copy.path).read_bytes() == b"x" * 10
        assert digest_of(copy.path) == copy.sha256 == hashlib.sha256(b"x" * 10).hexdigest()
    assert _copies(folder) == {first.path, second.path}


def test_the_same_content_lies_on_the_disk_once_and_goes_with_its_last_copy(folder: str) -> None:
    first, other = _copy(folder, b"same"), _copy(folder, b"other")
    remove([first.path])
    assert names_of(folder) == sorted([Path(other.path).name, f".once-{other.sha256}"], key=names_of(folder).index)  # fmt: skip
    second, third = _copy(folder, b"same"), _copy(folder, b"same")
    assert os.path.samefile(second.path, third.path)
    remove([second.path, other.path])
    assert Path(third.path).read_bytes() == b"same"
    remove([third.path, second.path])
    assert names_of(folder) == []


def test_a_damaged_file_is_not_shared_with_what_is_handed_over_now(folder: str) -> None:
    first = _copy(folder, b"sound")
    Path(first.path).write_bytes(b"souNd")
    second, third = _copy(folder, b"sound"), _copy(folder, b"sound")
    assert [Path(copy.path).read_bytes() for copy in (second, third)] == [b"sound", b"sound"]
    assert os.path.samefile(second.path, third.path)


def test_without_hard_links_each_copy_is_a_file(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(blobs.os, "link", link)
    first, second = _copy(folder, b"same"), _copy(folder, b"same")
    assert not os.path.samefile(first.path, second.path)
    assert _copies(folder) == {first.path, second.path} == {f"{folder}/{name}" for name in names_of(folder)}


@pytest.mark.parametrize("call", ["fsync", "rename", "fsync_folder"])
def test_a_copy_that_fails_leaves_nothing(folder: str, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(blobs if call == "fsync_folder" else blobs.os, call, fail)
    with pytest.raises(OSError, match="Input/output"):
        _copy(folder, b"x")
    assert names_of(folder) == []


def test_of_a_scan_only_what_came_of_it_stays(folder: str, tmp_path: Path) -> None:
    copies = Copies(folder)
    (tmp_path / "x").write_bytes(b"x")
    with (tmp_path / "x").open("rb") as file:
        made = [copies.add(file.fileno(), 1) for _ in range(3)]
    copies.keep_only({made[1].path})
    assert _copies(folder) == {made[1].path}


def test_what_nobody_names_goes_by_its_age_a_piece_at_once_and_what_is_not_ours_never(folder: str) -> None:
    old, young, named = _copy(folder, b"old"), _copy(folder, b"young"), _copy(folder, b"named")
    os.utime(old.path, (1000, 1000))
    os.utime(named.path, (1000, 1000))
    legacy = Path(folder, "ab" * 32)
    for strange in (
        legacy,
        Path(folder, ".tmp-1-ff"),
        Path(folder, "notes.txt"),
        Path(folder, f".once-{'cd' * 32}"),
    ):
        strange.write_bytes(b"?")
        os.utime(strange, (1000, 1000))
    names = [name for name in names_of(folder) if name != Path(named.path).name]
    gone, left = remove_left_over(folder, names, older_than_s=2000)
    assert (gone, left) == (2, [Path(young.path).name])
    assert _copies(folder) == {young.path, named.path, f"{folder}/notes.txt"}
    assert not Path(folder, f".once-{'cd' * 32}").exists()
    assert remove_left_over(folder, [*left, "ef" * 32], older_than_s=2e10) == (1, [])


def test_no_order_of_copying_and_removing_the_same_content_loses_a_copy(folder: str) -> None:
    """Four threads, three contents: whoever has a copy finds it whole until it removes it."""
    lost: list[str] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        mine: list[Copy] = []
        for _ in range(150):
            if len(mine) > 2 or (mine and chance.random() < 0.4):
                gone = mine.pop(chance.randrange(len(mine)))
                if not (
                    Path(gone.path).exists()
                    and hashlib.sha256(Path(gone.path).read_bytes()).hexdigest() == gone.sha256
                ):
                    lost.append(gone.path)
                remove([gone.path])
            else:
                mine.append(_copy(folder, b"%d" % chance.randrange(3) * 100_000))
        remove([copy.path for copy in mine])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lost == []
    assert _copies(folder) == set()
