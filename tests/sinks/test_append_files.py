"""The append sinks and what can happen to their file: torn, replaced, removed, rotated, full, read while written."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentqd.core.settings import Sink as SinkSettings
from agentqd.sinks.appendsink import AppendSink
from agentqd.sinks.base import Context, Deferred, Delivered, Outcome
from agentqd.sinks.completions import CompletionLines, Completions

from .adapters import APPENDING, AppendAdapter, CompletionsAdapter, FaultyDisk, FileAdapter
from .conformance import Condition, delivery, ids, some


@pytest.fixture(params=APPENDING, ids=lambda adapter: adapter.type)
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AppendAdapter]:
    (tmp_path / "base").mkdir()
    made = request.param(tmp_path / "base")
    yield made
    made.release()


@pytest.fixture
def completions(tmp_path: Path) -> Iterator[CompletionsAdapter]:
    (tmp_path / "base").mkdir()
    made = CompletionsAdapter(tmp_path / "base")
    yield made
    made.release()


def small(adapter: AppendAdapter, bytes_max: int) -> Completions:
    context = Context(
        "completions", SinkSettings(type="completions"), str(adapter.base), adapter.exec, lambda: 0
    )
    return Completions(context, bytes_max)


def appending(adapter: AppendAdapter) -> AppendSink:
    sink = adapter.make()
    assert isinstance(sink, AppendSink)
    return sink


def positions(outcomes: object) -> list[int | None]:
    assert isinstance(outcomes, list)
    assert all(isinstance(outcome, Delivered) for outcome in outcomes), outcomes
    return [outcome.position for outcome in outcomes]


# Torn tails.


async def test_a_torn_tail_of_any_length_is_cut_and_its_delivery_sent_once_more(
    adapter: AppendAdapter,
) -> None:
    sink = appending(adapter)
    await sink.open(0)
    marked = positions(await sink.deliver(some(2)))
    before = adapter.path.stat().st_size
    await sink.deliver(some(1, start=3))
    await sink.close()
    whole = adapter.path.read_bytes()
    for size in range(before, len(whole) + 1):
        adapter.path.write_bytes(whole[:size])
        again = appending(adapter)
        found = await again.open(marked[-1] or 0)
        told = [one.delivery_id for one in found]
        assert told == (ids(some(1, start=3)) if size >= len(whole) - 1 else []), size
        if not told:
            assert positions(await again.deliver(some(1, start=3)))
        assert adapter.path.read_bytes() == whole, size
        await again.close()


async def test_a_strangers_unfinished_line_in_a_persons_file_is_closed_and_not_cut(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    adapter = FileAdapter(tmp_path / "base")
    adapter.path.write_bytes(b"a line\nhalf a li")
    sink = appending(adapter)
    assert await sink.open(0) == []
    positions(await sink.deliver(some(1)))
    assert adapter.path.read_bytes() == b"a line\nhalf a li\n" + some(1)[0].payload + b"\n"
    await sink.close()


async def test_the_tail_alone_is_read_back_from_a_large_file(completions: CompletionsAdapter) -> None:
    filler = CompletionLines().line(delivery(1, padding=60_000), 5)
    completions.path.write_bytes(filler * 1000)
    begun = time.perf_counter()
    sink = completions.make()
    assert await sink.open(5) == []
    assert time.perf_counter() - begun < 0.1, "60 MB are not parsed"
    assert positions(await sink.deliver(some(1))) == [6]
    await sink.close()


# Numbers.


async def test_a_seq_is_never_used_again_though_the_file_is_gone(completions: CompletionsAdapter) -> None:
    sink = appending(completions)
    await sink.open(0)
    assert positions(await sink.deliver(some(3))) == [1, 2, 3]
    completions.path.unlink()
    assert positions(await sink.deliver(some(1, start=4))) == [4]
    await sink.close()
    completions.path.unlink()
    again = appending(completions)
    assert await again.open(4) == []
    assert any("is gone" in notice for notice in again.notices)
    assert positions(await again.deliver(some(1, start=5))) == [5]
    await again.close()


async def test_a_line_found_with_a_higher_seq_wins(completions: CompletionsAdapter) -> None:
    completions.path.write_bytes(CompletionLines().line(delivery(1), 41) + b"garbage\n")
    sink = completions.make()
    (found,) = await sink.open(7)
    assert (found.delivery_id, found.position) == (delivery(1).delivery_id, 41)
    assert positions(await sink.deliver(some(1, start=2))) == [42]
    await sink.close()


async def test_a_seq_in_a_batch_that_was_not_synced_is_never_given_to_another(
    completions: CompletionsAdapter,
) -> None:
    sink = completions.make()
    await sink.open(0)
    completions.become(Condition.AMBIGUOUS)
    assert all(isinstance(outcome, Deferred) for outcome in await sink.deliver(some(2)))
    completions.become(Condition.GOOD)
    assert positions(await sink.deliver([delivery(9), *some(2)])) == [3, 1, 2]
    assert [json.loads(line)["seq"] for line in completions.lines()] == [1, 2, 3]
    await sink.close()


# The file is replaced, removed, grown, cut by others.


async def test_a_replaced_file_is_noticed_and_loses_nothing(adapter: AppendAdapter) -> None:
    sink = appending(adapter)
    await sink.open(0)
    await sink.deliver(some(2))
    adapter.path.rename(adapter.path.with_suffix(".old"))
    adapter.path.write_bytes(b'{"foreign": true}\n')
    assert all(isinstance(outcome, Delivered) for outcome in await sink.deliver(some(2, start=3)))
    assert [notice for notice in sink.notices if "was replaced" in notice]
    assert len(adapter.path.read_bytes().splitlines()) == 3
    assert len(adapter.path.with_suffix(".old").read_bytes().splitlines()) == 2
    await sink.close()


async def test_a_vanished_file_is_noticed_and_begun_anew(adapter: AppendAdapter) -> None:
    sink = appending(adapter)
    await sink.open(0)
    await sink.deliver(some(2))
    adapter.path.unlink()
    positions(await sink.deliver(some(1, start=3)))
    assert [notice for notice in sink.notices if "vanished" in notice]
    assert adapter.received() == ids(some(1, start=3))
    assert adapter.path.stat().st_mode & 0o777 == 0o600
    await sink.close()


async def test_a_file_moved_away_between_write_and_answer_is_no_delivery(adapter: AppendAdapter) -> None:
    sink = appending(adapter)
    await sink.open(0)
    await sink.deliver(some(1))
    adapter.become(Condition.GOOD)
    adapter.disk.faults["fdatasync"] = lambda: os.replace(adapter.path, adapter.path.with_suffix(".old"))
    (outcome,) = await sink.deliver(some(1, start=2))
    assert isinstance(outcome, Deferred)
    adapter.disk.faults.clear()
    positions(await sink.deliver(some(1, start=2)))
    assert adapter.received() == ids(some(1, start=2))
    await sink.close()


async def test_foreign_lines_and_a_foreign_torn_tail_are_noticed_and_left_as_they_are(
    adapter: AppendAdapter,
) -> None:
    sink = appending(adapter)
    await sink.open(0)
    await sink.deliver(some(1))
    with adapter.path.open("ab") as file:
        file.write(b"foreign\nforeign and torn")
    before = adapter.path.read_bytes()
    positions(await sink.deliver(some(1, start=2)))
    assert adapter.path.read_bytes().startswith(before + b"\n{")
    assert [notice for notice in sink.notices if "not ours" in notice]
    await sink.close()


async def test_a_file_cut_by_others_is_noticed_and_appending_goes_on(adapter: AppendAdapter) -> None:
    sink = appending(adapter)
    await sink.open(0)
    await sink.deliver(some(2))
    os.truncate(adapter.path, 0)
    positions(await sink.deliver(some(1, start=3)))
    assert adapter.received() == ids(some(1, start=3))
    assert [notice for notice in sink.notices if "was cut" in notice]
    await sink.close()


@pytest.mark.parametrize("thing", ["symlink", "fifo", "folder"])
async def test_only_a_regular_file_is_written(adapter: AppendAdapter, thing: str, tmp_path: Path) -> None:
    sink = appending(adapter)
    await sink.open(0)
    target = tmp_path / "target"
    target.write_bytes(b"")
    {"symlink": lambda: adapter.path.symlink_to(target), "fifo": lambda: os.mkfifo(adapter.path)}.get(
        thing, adapter.path.mkdir
    )()
    (outcome,) = await sink.deliver(some(1))
    assert isinstance(outcome, Deferred)
    assert str(adapter.path) in outcome.reason
    assert target.read_bytes() == b""
    with pytest.raises(OSError, match=str(adapter.path)):
        await sink.open(0)
    await sink.close()


async def test_a_missing_folder_is_deferred_with_a_clear_reason_and_not_made(adapter: AppendAdapter) -> None:
    adapter.path.parent.rmdir() if adapter.path.parent != adapter.base else adapter.base.rename(
        adapter.base / "../x"
    )
    sink = appending(adapter)
    if adapter.type == "file":
        assert await sink.open(0) == []
    sink._worker.start()
    (outcome,) = await sink.deliver(some(1))
    assert isinstance(outcome, Deferred)
    assert f"the folder {adapter.path.parent} does not exist" in outcome.reason
    assert not adapter.path.parent.exists()
    adapter.path.parent.mkdir(parents=True)
    positions(await sink.deliver(some(1)))
    await sink.close()


# Short writes.


async def test_a_short_write_keeps_whole_lines_cuts_the_torn_one_and_defers_the_rest(
    adapter: AppendAdapter,
) -> None:
    """A real one: RLIMIT_FSIZE in the middle of the batch."""
    sink = appending(adapter)
    await sink.open(0)
    await sink.deliver(some(1))
    size = adapter.path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * 3 + size // 2, before[1]))
    try:
        outcomes = await sink.deliver(some(4, start=2))
        (full,) = await sink.deliver([delivery(9, padding=4000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [type(outcome) for outcome in outcomes] == [Delivered, Delivered, Deferred, Deferred]
    assert isinstance(full, Deferred)
    assert adapter.received() == ids(some(3))
    positions(await sink.deliver(some(2, start=4)))
    assert adapter.received() == ids(some(5))
    await sink.close()


async def test_a_torn_part_behind_which_a_stranger_appended_is_closed_and_not_cut(
    completions: CompletionsAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = completions.make()
    await sink.open(0)
    await sink.deliver(some(1))
    disk = completions.disk

    def short_write(fd: int, content: bytes) -> int:
        written = os.write(fd, content[:-20])
        with completions.path.open("ab") as stranger:
            stranger.write(b" stranger")
        os.lseek(fd, -9, os.SEEK_END)
        return written

    completions.become(Condition.GOOD)
    writes = [os.write, short_write]
    monkeypatch.setattr(
        disk,
        "write",
        lambda fd, content: (writes.pop() if len(writes) > 1 else os.write)(fd, content),
        raising=False,
    )
    (outcome,) = await sink.deliver(some(1, start=2))
    assert isinstance(outcome, Deferred)
    assert positions(await sink.deliver(some(1, start=2))) == [3], "2 stays to be seen in the torn line"
    first, torn, last = completions.path.read_bytes().splitlines()
    assert torn.endswith(b" stranger")
    assert [json.loads(line)["seq"] for line in (first, last)] == [1, 3]
    await sink.close()


# Rotation.


async def test_a_large_file_is_rotated_under_its_last_seq_and_a_reader_of_the_old_one_misses_nothing(
    completions: CompletionsAdapter,
) -> None:
    sink = small(completions, 500)
    await sink.open(0)
    await sink.deliver(some(3))
    with completions.path.open("rb") as reader:
        old = reader.read()
        assert positions(await sink.deliver(some(1, start=4))) == [4]
        assert reader.read() == b"", "nothing is written behind a rotation"
    assert (completions.base / "completions-3.jsonl").read_bytes() == old
    assert completions.received() == ids(some(1, start=4))
    assert sink.notices == []
    await sink.close()


async def test_a_rotation_between_append_and_mark_is_read_back_from_both_files(
    completions: CompletionsAdapter,
) -> None:
    sink = small(completions, 500)
    await sink.open(0)
    await sink.deliver(some(3))
    await sink.deliver(some(1, start=4))
    await sink.close()
    again = small(completions, 500)
    assert [one.position for one in await again.open(1)] == [2, 3, 4]
    await again.close()
    completions.path.unlink()
    third = small(completions, 500)
    assert [one.position for one in await third.open(2)] == [3]
    assert positions(await third.deliver(some(1, start=7))) == [4]
    await third.close()


async def test_a_rotation_that_cannot_be_done_is_told_and_the_file_grows_on(
    completions: CompletionsAdapter,
) -> None:
    sink = small(completions, 500)
    await sink.open(0)
    await sink.deliver(some(3))
    (completions.base / "completions-3.jsonl").write_bytes(b"taken\n")
    positions(await sink.deliver(some(1, start=4)))
    assert [notice for notice in sink.notices if "could not be rotated" in notice]
    assert len(completions.lines()) == 4
    positions(await sink.deliver(some(1, start=5)))
    assert (completions.base / "completions-4.jsonl").exists()
    assert (completions.base / "completions-3.jsonl").read_bytes() == b"taken\n"
    await sink.close()


# Readers and cost.


async def test_two_readers_that_poll_while_it_is_written_see_only_whole_lines_each_once(
    completions: CompletionsAdapter,
) -> None:
    sink = small(completions, 64 * 1024 * 1024)
    await sink.open(0)
    await sink.deliver(some(1))
    stop = threading.Event()
    seen: list[list[int]] = [[], []]

    def read(mine: list[int]) -> None:
        """Takes what a newline ends: ext4 shows a large write page by page, also to a reader in between."""
        with completions.path.open("rb", buffering=0) as file:
            text = b""
            while True:
                last = stop.is_set()
                text += file.read() or b""
                whole, newline, text = text.rpartition(b"\n")
                mine += [json.loads(line)["seq"] for line in (whole + newline).splitlines()]
                if last:
                    assert text == b""
                    return

    readers = [threading.Thread(target=read, args=(mine,)) for mine in seen]
    for reader in readers:
        reader.start()
    for start in range(2, 602, 60):
        await sink.deliver(
            [delivery(number, padding=number % 7 * 1000) for number in range(start, start + 60)]
        )
    stop.set()
    for reader in readers:
        await asyncio.to_thread(reader.join)
    assert seen[0] == seen[1] == list(range(1, 602))
    await sink.close()


async def test_a_batch_costs_one_write_and_one_fdatasync(adapter: AppendAdapter) -> None:
    sink = appending(adapter)
    await sink.open(0)
    await sink.deliver(some(1))
    adapter.become(Condition.GOOD)
    adapter.disk.calls.clear()
    await sink.deliver(some(sink.batch_max, start=2))
    assert adapter.disk.calls == ["write", "fdatasync"]
    await sink.close()


async def test_a_slow_disk_does_not_hold_up_the_loop(adapter: AppendAdapter) -> None:
    sink = appending(adapter)
    await sink.open(0)
    adapter.become(Condition.HANGING)
    task = asyncio.ensure_future(sink.deliver(some(1)))
    async with asyncio.timeout(10):
        while "fdatasync" not in adapter.disk.calls:
            await asyncio.sleep(0.001)
    assert not task.done()
    adapter.release()
    outcomes: list[Outcome] = list(await task)
    positions(outcomes)
    assert isinstance(adapter.disk, FaultyDisk)
    await sink.close()
