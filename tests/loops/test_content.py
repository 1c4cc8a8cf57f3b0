"""What the disk has damaged is never sent: payloads in the journal, large content in blobs/."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from pathlib import Path

import pytest

from agentqd.core.settings import Alerts, Settings, Sink
from agentqd.core.units import Backoff, Duration
from agentqd.sinks import content
from agentqd.sinks.base import Deferred, Delivered
from agentqd.storage import outbox
from agentqd.storage.outbox import NewEntry
from agentqd.storage.transaction import Transaction

from .harness import Bench
from .test_delivery import Script, _running, _state, _wait, plug  # noqa: F401 - the fixture

LARGE = os.urandom(3 * 1024 * 1024 + 1)


@pytest.fixture
def settings() -> Settings:
    sink = Sink(
        type="command", command=["x"], backoff=Backoff((10.0,), doubles=True), lifetime=Duration(10**6)
    )
    return Settings(sinks={"s": sink, "other": sink}, alerts=Alerts(deliver_to=["s", "other"]))


def blob(bench: Bench, data: bytes = LARGE) -> Path:
    folder = Path(bench.folders.state, "blobs")
    folder.mkdir(exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()
    path.write_bytes(data)
    return path


async def put(bench: Bench, name: str, at: Path | None = None) -> None:
    entry = NewEntry(name, None, 0, 0, "entry", name, "t", b'{"id":"%s"}' % name.encode(), ["s"], blob=None if at is None else str(at))  # fmt: skip

    def unit(tx: Transaction) -> None:
        outbox.add_entry(tx, entry)

    await bench.do(unit)


def flip_a_bit(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


async def test_a_flipped_bit_in_a_payload_is_a_dead_letter_with_an_alert_and_the_others_go_on(
    bench: Bench,
    plug: Script,  # noqa: F811
) -> None:
    plug.batch_max = 10
    for name in ("d1", "d2", "d3"):
        await put(bench, name)
    await bench.do(
        lambda tx: tx.execute('UPDATE entries SET payload = CAST(\'{"id":"d6"}\' AS BLOB) WHERE seq = 2')
    )
    async with _running(bench):
        rows = await _state(bench, "delivered", "dead", "delivered")
    assert plug.seen == [["d1", "d3"]]
    assert rows[0] == (1, None, None)
    assert "payload does not match its sha256" in rows[1][2]
    (told,) = await bench.alerts("dead_letter")
    assert told["delivery_id"] == "d2"


@pytest.mark.parametrize("at", [0, len(LARGE) // 2, len(LARGE) - 1])
async def test_a_flipped_bit_in_large_content_is_a_dead_letter_and_never_sent(
    bench: Bench,
    plug: Script,  # noqa: F811
    at: int,
) -> None:
    path = blob(bench)
    await put(bench, "large", path)
    await put(bench, "small")
    flip_a_bit(path, at)
    async with _running(bench):
        rows = await _state(bench, "dead", "delivered")
        assert plug.seen == [["small"]]
        assert "content does not match its sha256" in rows[0][2]
        (told,) = await bench.alerts("dead_letter")
        assert told["delivery_id"] == "large"
        assert told["sink"] == "s"


async def test_content_that_is_gone_has_a_reason_of_its_own(bench: Bench, plug: Script) -> None:  # noqa: F811
    path = blob(bench)
    await put(bench, "large", path)
    await put(bench, "small")
    path.unlink()
    async with _running(bench):
        rows = await _state(bench, "dead", "delivered")
    assert "gone from blobs/" in rows[0][2]
    assert len(await bench.alerts("dead_letter")) == 1


@pytest.mark.parametrize("what", ["symlink", "fifo", "folder"])
async def test_what_is_no_file_of_ours_is_not_sent_and_hangs_nobody(
    bench: Bench,
    plug: Script,  # noqa: F811
    what: str,
) -> None:
    path = blob(bench)
    await put(bench, "large", path)
    moved = path.rename(path.with_name("aside"))
    {
        "symlink": lambda: path.symlink_to(moved),
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }[what]()
    async with _running(bench):
        await _state(bench, "dead")
    assert plug.seen == []


async def test_content_is_checked_again_before_every_try(bench: Bench, plug: Script) -> None:  # noqa: F811
    path = blob(bench)
    plug.answers = [lambda batch: [Deferred("later")] * len(batch)]
    async with _running(bench) as runner:
        await put(bench, "large", path)
        await _state(bench, "retryable")
        flip_a_bit(path, 7)
        _wait(bench, runner, 20)
        await _state(bench, "dead")
    assert plug.seen == [["large"]]


async def test_content_that_cannot_be_read_now_is_tried_later(
    bench: Bench,
    plug: Script,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_descriptor(path: str) -> int:
        raise OSError(24, "Too many open files")

    path = blob(bench)
    async with _running(bench) as runner:
        with monkeypatch.context() as patch:
            patch.setattr(content, "open_content", no_descriptor)
            await put(bench, "large", path)
            ((_, _, said),) = await _state(bench, "retryable")
            assert "Too many open files" in said
        _wait(bench, runner, 20)
        await _state(bench, "delivered")


async def test_the_event_loop_goes_on_while_content_is_checked(
    bench: Bench,
    plug: Script,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, hold, reached = blob(bench), threading.Event(), threading.Event()
    real = content.open_content

    def slow(name: str) -> int:
        reached.set()
        assert hold.wait(10)
        return real(name)

    monkeypatch.setattr(content, "open_content", slow)
    async with _running(bench):
        await put(bench, "large", path)
        await bench.until(reached.is_set)
        await put(bench, "small")
        await bench.until(lambda: plug.seen == [["small"]])
        hold.set()
        await _state(bench, "delivered", "delivered")


async def test_a_damaged_row_is_no_sign_of_life_of_a_dead_receiver(bench: Bench, plug: Script) -> None:  # noqa: F811
    plug.concurrency = 1
    plug.answers = [lambda batch: [Deferred("refused", connection=True)]] * 6
    async with _running(bench) as runner:
        for n in range(5):
            await put(bench, f"d{n}")
        await _state(bench, *["retryable"] * 5)
        assert runner.health()["breaker"] == "open"
        await put(bench, "damaged")
        await bench.do(
            lambda tx: tx.execute("UPDATE entries SET payload = x'7b7d' WHERE delivery_id = 'damaged'")
        )
        runner.forget()
        await bench.do(lambda tx: tx.execute("UPDATE outbox SET due_at = 1 WHERE entry_seq = 6"))
        _wait(bench, runner, 61)
        await bench.until(lambda: len(plug.seen) == 6)
        await bench.until(lambda: runner.health()["breaker"] == "open")
        assert runner.gate.breaker._openings == 2, "the next probe has found it dead, and the rest is longer"
        await _state(bench, *["retryable"] * 5, "dead")


def test_a_plug_that_looks_for_itself_is_not_looked_at_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from agentqd.core.outbox import RowState
    from agentqd.loops import sending
    from agentqd.storage.outbox import DueRow

    class Looks(Script):
        checks_content = True

    async def never(path: str) -> None:
        raise AssertionError(path)

    monkeypatch.setattr(sending, "check_aside", never)
    row = DueRow(1, "s", RowState.PENDING, 0, 0, "d", "t", "entry", "k", None, b"{}", str(tmp_path / "none"), hashlib.sha256(b"{}").digest(), 0)  # fmt: skip

    async def run() -> None:
        assert await sending.send(Looks(), "s", [row], None) == [Delivered()]  # type: ignore[arg-type]

    asyncio.run(run())
