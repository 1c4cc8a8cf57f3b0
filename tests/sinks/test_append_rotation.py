"""The completion queue rotated, read while it is written, and what a batch costs."""

from __future__ import annotations

import asyncio
import json
import threading

from agentqd.core.settings import Sink as SinkSettings
from agentqd.sinks.base import Context, Outcome
from agentqd.sinks.completions import Completions

from .adapters import AppendAdapter, CompletionsAdapter, FaultyDisk, appending, positions
from .conformance import Condition, delivery, ids, some


def small(appender: AppendAdapter, bytes_max: int) -> Completions:
    context = Context(
        "completions", SinkSettings(type="completions"), str(appender.base), appender.exec, lambda: 0
    )
    return Completions(context, bytes_max)


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


async def test_a_batch_costs_one_write_and_one_fdatasync(appender: AppendAdapter) -> None:
    sink = appending(appender)
    await sink.open(0)
    await sink.deliver(some(1))
    appender.become(Condition.GOOD)
    appender.disk.calls.clear()
    await sink.deliver(some(sink.batch_max, start=2))
    assert appender.disk.calls == ["write", "fdatasync"]
    await sink.close()


async def test_a_slow_disk_does_not_hold_up_the_loop(appender: AppendAdapter) -> None:
    sink = appending(appender)
    await sink.open(0)
    appender.become(Condition.HANGING)
    task = asyncio.ensure_future(sink.deliver(some(1)))
    async with asyncio.timeout(10):
        while "fdatasync" not in appender.disk.calls:
            await asyncio.sleep(0.001)
    assert not task.done()
    appender.release()
    outcomes: list[Outcome] = list(await task)
    positions(outcomes)
    assert isinstance(appender.disk, FaultyDisk)
    await sink.close()
