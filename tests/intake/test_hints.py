"""inotify tells at once, says when it lost something, and may go away."""

import asyncio
import errno
import os
import pathlib
import time

import pytest

from agentqd.system import inotify
from agentqd.system.inotify import FOLDER_MASK, OVERFLOW, Hint, Inotify, InotifyUnavailable, NoInotify


@pytest.fixture
def watcher():
    made = Inotify()
    yield made
    made.close()


async def test_an_append_is_told_within_milliseconds(watcher, tmp_path):
    watcher.add(str(tmp_path), FOLDER_MASK, "queue")
    waiting = asyncio.create_task(watcher.wait(10))
    await asyncio.sleep(0)
    start = time.monotonic()
    with (tmp_path / "tasks.jsonl").open("ab") as file:
        file.write(b"{}\n")
    hints = await waiting
    assert time.monotonic() - start < 5  # a millisecond on a quiet machine; without a hint it is ten seconds
    assert {(hint.label, hint.name) for hint in hints} == {("queue", "tasks.jsonl")}


async def test_what_happened_before_the_wait_is_told_at_once_and_only_once(watcher, tmp_path):
    watcher.add(str(tmp_path), FOLDER_MASK, "queue")
    (tmp_path / "a").write_bytes(b"x")
    assert [hint.name for hint in await watcher.wait(5)] == ["a"]
    assert await watcher.wait(0.01) == frozenset()


async def test_each_watch_has_its_own_label_and_can_be_taken_back(watcher, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        watcher.add(str(tmp_path / name), FOLDER_MASK, name)
    (tmp_path / "a" / "x").touch()
    (tmp_path / "b" / "y").touch()
    assert {(hint.label, hint.name) for hint in await watcher.wait(5)} == {("a", "x"), ("b", "y")}
    watcher.remove("a")
    watcher.remove("a")
    (tmp_path / "a" / "z").touch()
    assert await watcher.wait(0.01) == frozenset()


async def test_a_label_added_again_watches_the_new_folder(watcher, tmp_path):
    folder = tmp_path / "queue"
    folder.mkdir()
    watcher.add(str(folder), FOLDER_MASK, "queue")
    folder.rename(tmp_path / "away")
    hints = await watcher.wait(5)
    assert any(hint.gone for hint in hints)
    folder.mkdir()
    watcher.add(str(folder), FOLDER_MASK, "queue")
    (tmp_path / "away" / "old").touch()
    (folder / "new").touch()
    assert [hint.name for hint in await watcher.wait(5)] == ["new"]


async def test_a_deleted_folder_is_told(watcher, tmp_path):
    (tmp_path / "queue").mkdir()
    watcher.add(str(tmp_path / "queue"), FOLDER_MASK, "queue")
    (tmp_path / "queue").rmdir()
    assert any(hint.gone for hint in await watcher.wait(5))
    watcher.remove("queue")


async def test_more_events_than_the_kernel_keeps_are_an_overflow_and_then_hints_come_again(watcher, tmp_path):
    watcher.add(str(tmp_path), FOLDER_MASK, "queue")
    kept = int(pathlib.Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    files = [
        (tmp_path / name).open("ab", buffering=0) for name in ("a", "b")
    ]  # in turns: like events are merged
    if kept > 100_000:
        watcher._inotify.read = lambda timeout: iter([inotify.inotify_simple.Event(-1, 0x4000, 0, "")])
    else:
        for turn in range(max(20_000, kept + 1000)):
            files[turn % 2].write(b"\n")
    assert await watcher.wait(5) is OVERFLOW
    if kept > 100_000:
        del watcher._inotify.read
        await watcher.wait(0)
    files[0].write(b"\n")
    assert [hint.name for hint in await watcher.wait(5)] == ["a"]
    for file in files:
        file.close()


async def test_a_burst_is_merged_to_one_hint_a_file(watcher, tmp_path):
    watcher.add(str(tmp_path), FOLDER_MASK, "queue")
    for turn in range(1000):
        (tmp_path / f"{turn % 3}").write_bytes(b"x")
    assert len(await watcher.wait(5)) == 3


@pytest.mark.parametrize(
    ("number", "sysctl"),
    [(errno.EMFILE, "fs.inotify.max_user_instances"), (errno.ENOSPC, "fs.inotify.max_user_watches")],
)
async def test_a_limit_that_was_reached_is_named(monkeypatch, watcher, tmp_path, number, sysctl):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(inotify.inotify_simple, "_libc_call", refuse)
    with pytest.raises(InotifyUnavailable, match=sysctl):
        watcher.add(str(tmp_path), FOLDER_MASK, "queue")
    with pytest.raises(InotifyUnavailable, match=sysctl) as told:
        Inotify()
    assert told.value.as_json()["sysctl"] == sysctl


async def test_a_path_that_is_not_there_is_a_plain_error(watcher, tmp_path):
    with pytest.raises(FileNotFoundError):
        watcher.add(str(tmp_path / "nowhere"), FOLDER_MASK, "x")


async def test_inotify_taken_away_in_mid_run_means_rescans_and_no_crash(watcher, tmp_path):
    watcher.add(str(tmp_path), FOLDER_MASK, "queue")
    os.close(watcher._inotify.fileno())
    assert await watcher.wait(0.01) is OVERFLOW
    assert not watcher.available
    assert await watcher.wait(0.01) == frozenset()
    watcher.add(str(tmp_path), FOLDER_MASK, "queue")


async def test_without_inotify_there_are_no_hints(tmp_path):
    none = NoInotify()
    none.add(str(tmp_path), FOLDER_MASK, "queue")
    assert await none.wait(0.01) == frozenset()
    none.remove("queue")
    none.close()


def test_a_hint_about_a_file_never_means_that_the_folder_is_gone():
    assert not Hint("queue", "tasks.jsonl", 0x400 | 0x800).gone
    assert Hint("queue", "", 0x800).gone


async def test_a_cancelled_wait_leaves_nothing_behind(watcher, tmp_path):
    watcher.add(str(tmp_path), FOLDER_MASK, "queue")
    waiting = asyncio.create_task(watcher.wait(None))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    (tmp_path / "a").touch()
    assert [hint.name for hint in await watcher.wait(5)] == ["a"]
