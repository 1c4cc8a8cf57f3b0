"""The append sinks and what can happen to their file: torn, replaced, removed, rotated, full, read while written."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

import pytest

from agentqd.sinks.base import Deferred, Delivered
from agentqd.sinks.completions import CompletionLines

from .adapters import AppendAdapter, CompletionsAdapter, FileAdapter, appending, positions
from .conformance import Condition, delivery, ids, some

# Torn tails.


async def test_a_torn_tail_of_any_length_is_cut_and_its_delivery_sent_once_more(
    appender: AppendAdapter,
) -> None:
    sink = appending(appender)
    await sink.open(0)
    marked = positions(await sink.deliver(some(2)))
    before = appender.path.stat().st_size
    await sink.deliver(some(1, start=3))
    await sink.close()
    whole = appender.path.read_bytes()
    for size in range(before, len(whole) + 1):
        appender.path.write_bytes(whole[:size])
        again = appending(appender)
        found = await again.open(marked[-1] or 0)
        told = [one.delivery_id for one in found]
        assert told == (ids(some(1, start=3)) if size >= len(whole) - 1 else []), size
        if not told:
            assert positions(await again.deliver(some(1, start=3)))
        assert appender.path.read_bytes() == whole, size
        await again.close()


async def test_a_strangers_unfinished_line_in_a_persons_file_is_closed_and_not_cut(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    appender = FileAdapter(tmp_path / "base")
    appender.path.write_bytes(b"a line\nhalf a li")
    sink = appending(appender)
    assert await sink.open(0) == []
    positions(await sink.deliver(some(1)))
    assert appender.path.read_bytes() == b"a line\nhalf a li\n" + some(1)[0].payload + b"\n"
    await sink.close()


async def test_the_tail_alone_is_read_back_from_a_large_file(completions: CompletionsAdapter) -> None:
    filler = CompletionLines().line(delivery(1, padding=60_000), 5)
    completions.path.write_bytes(filler * 1000)
    begun = time.process_time()
    sink = completions.make()
    assert await sink.open(5) == []
    assert time.process_time() - begun < 0.1, "60 MB are not parsed"
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


async def test_a_replaced_file_is_noticed_and_loses_nothing(appender: AppendAdapter) -> None:
    sink = appending(appender)
    await sink.open(0)
    await sink.deliver(some(2))
    appender.path.rename(appender.path.with_suffix(".old"))
    appender.path.write_bytes(b'{"foreign": true}\n')
    assert all(isinstance(outcome, Delivered) for outcome in await sink.deliver(some(2, start=3)))
    assert [notice for notice in sink.notices if "was replaced" in notice]
    assert len(appender.path.read_bytes().splitlines()) == 3
    assert len(appender.path.with_suffix(".old").read_bytes().splitlines()) == 2
    await sink.close()


async def test_a_vanished_file_is_noticed_and_begun_anew(appender: AppendAdapter) -> None:
    sink = appending(appender)
    await sink.open(0)
    await sink.deliver(some(2))
    appender.path.unlink()
    positions(await sink.deliver(some(1, start=3)))
    assert [notice for notice in sink.notices if "vanished" in notice]
    assert appender.received() == ids(some(1, start=3))
    assert appender.path.stat().st_mode & 0o777 == 0o600
    await sink.close()


async def test_a_file_moved_away_between_write_and_answer_is_no_delivery(appender: AppendAdapter) -> None:
    sink = appending(appender)
    await sink.open(0)
    await sink.deliver(some(1))
    appender.become(Condition.GOOD)
    appender.disk.faults["fdatasync"] = lambda: os.replace(appender.path, appender.path.with_suffix(".old"))
    (outcome,) = await sink.deliver(some(1, start=2))
    assert isinstance(outcome, Deferred)
    appender.disk.faults.clear()
    positions(await sink.deliver(some(1, start=2)))
    assert appender.received() == ids(some(1, start=2))
    await sink.close()


async def test_foreign_lines_and_a_foreign_torn_tail_are_noticed_and_left_as_they_are(
    appender: AppendAdapter,
) -> None:
    sink = appending(appender)
    await sink.open(0)
    await sink.deliver(some(1))
    with appender.path.open("ab") as file:
        file.write(b"foreign\nforeign and torn")
    before = appender.path.read_bytes()
    positions(await sink.deliver(some(1, start=2)))
    assert appender.path.read_bytes().startswith(before + b"\n{")
    assert [notice for notice in sink.notices if "not ours" in notice]
    await sink.close()


async def test_a_file_cut_by_others_is_noticed_and_appending_goes_on(appender: AppendAdapter) -> None:
    sink = appending(appender)
    await sink.open(0)
    await sink.deliver(some(2))
    os.truncate(appender.path, 0)
    positions(await sink.deliver(some(1, start=3)))
    assert appender.received() == ids(some(1, start=3))
    assert [notice for notice in sink.notices if "was cut" in notice]
    await sink.close()


@pytest.mark.parametrize("thing", ["symlink", "fifo", "folder"])
async def test_only_a_regular_file_is_written(appender: AppendAdapter, thing: str, tmp_path: Path) -> None:
    sink = appending(appender)
    await sink.open(0)
    target = tmp_path / "target"
    target.write_bytes(b"")
    {"symlink": lambda: appender.path.symlink_to(target), "fifo": lambda: os.mkfifo(appender.path)}.get(
        thing, appender.path.mkdir
    )()
    (outcome,) = await sink.deliver(some(1))
    assert isinstance(outcome, Deferred)
    assert str(appender.path) in outcome.reason
    assert target.read_bytes() == b""
    with pytest.raises(OSError, match=str(appender.path)):
        await sink.open(0)
    await sink.close()


async def test_a_missing_folder_is_deferred_with_a_clear_reason_and_not_made(appender: AppendAdapter) -> None:
    appender.path.parent.rmdir() if appender.path.parent != appender.base else appender.base.rename(
        appender.base / "../x"
    )
    sink = appending(appender)
    if appender.type == "file":
        assert await sink.open(0) == []
    sink._worker.start()
    (outcome,) = await sink.deliver(some(1))
    assert isinstance(outcome, Deferred)
    assert f"the folder {appender.path.parent} does not exist" in outcome.reason
    assert not appender.path.parent.exists()
    appender.path.parent.mkdir(parents=True)
    positions(await sink.deliver(some(1)))
    await sink.close()


# Short writes.


async def test_a_short_write_keeps_whole_lines_cuts_the_torn_one_and_defers_the_rest(
    appender: AppendAdapter,
) -> None:
    """A real one: RLIMIT_FSIZE in the middle of the batch."""
    sink = appending(appender)
    await sink.open(0)
    await sink.deliver(some(1))
    size = appender.path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * 3 + size // 2, before[1]))
    try:
        outcomes = await sink.deliver(some(4, start=2))
        (full,) = await sink.deliver([delivery(9, padding=4000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [type(outcome) for outcome in outcomes] == [Delivered, Delivered, Deferred, Deferred]
    assert isinstance(full, Deferred)
    assert appender.received() == ids(some(3))
    positions(await sink.deliver(some(2, start=4)))
    assert appender.received() == ids(some(5))
    await sink.close()


async def test_a_torn_part_behind_which_a_stranger_appended_is_closed_and_not_cut(
    completions: CompletionsAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = completions.make()
    await sink.open(0)
    await sink.deliver(some(1))
    strangers = [b" stranger"]

    def write(fd: int, content: bytes) -> int:
        if not strangers:
            return os.write(fd, content)
        written = os.write(fd, content[:-20])
        end = os.lseek(fd, 0, os.SEEK_CUR)
        with completions.path.open("ab") as file:
            file.write(strangers.pop())
        assert os.lseek(fd, 0, os.SEEK_CUR) == end
        return written

    completions.become(Condition.GOOD)
    monkeypatch.setattr(completions.disk, "write", write, raising=False)
    (outcome,) = await sink.deliver(some(1, start=2))
    assert isinstance(outcome, Deferred)
    assert positions(await sink.deliver(some(1, start=2))) == [3], "2 stays to be seen in the torn line"
    first, torn, last = completions.path.read_bytes().splitlines()
    assert torn.endswith(b" stranger")
    assert [json.loads(line)["seq"] for line in (first, last)] == [1, 3]
    await sink.close()
