"""A copy in blobs/ is never removed while an entry names it, and never left once nobody does: every order of a hand-over and a
removal of the same content, and a crash after each step of it."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any, Final

import pytest

from agentqd.core.limits import ENTRY_INLINE_BYTES_MAX
from agentqd.core.task import read_task
from agentqd.loops import dropfolder
from agentqd.loops.dropfolder import Handed
from agentqd.loops.retention import Retention
from agentqd.storage import blobs
from agentqd.storage import tasks as store
from agentqd.storage.transaction import Transaction

from .harness import Bench

CONTENT: Final = b"the same content " * (ENTRY_INLINE_BYTES_MAX // 10)
DAY: Final = 86400.0
HANDED, REMOVED = ("copied", "recorded"), ("forgotten", "unlinked")
ORDERS: Final = sorted(
    {order for order in itertools.permutations(HANDED + REMOVED) if order.index("copied") < order.index("recorded") and order.index("forgotten") < order.index("unlinked")}
)  # fmt: skip


class _World:
    """Task `old` has handed over CONTENT, large and as an attachment, and is old enough to go; task `new` does it again."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.blobs = f"{bench.folders.state}/blobs"
        self.retention = Retention(bench.box)
        self.found: list[Handed] = []
        self.spare: list[str] = []
        self.gone: Any = None

    async def begin(self) -> None:
        await self.bench.connect()
        for task_id in ("old", "new"):
            await self.bench.add(id=task_id)
            drop = Path(self.bench.folders.attempt(task_id, 1), "outbox")
            drop.mkdir(parents=True)
            (drop / "large.bin").write_bytes(CONTENT)
            (drop / ".attached").write_bytes(CONTENT)
            mail = {"to": "a@b.c", "body": "x", "attachments": [".attached"]}
            (drop / "mail.json").write_text(json.dumps(mail))
        await self.copied("old")
        await self.recorded("old")
        await self.bench.end("old")
        await self.bench.deliver_all()
        self.bench.clock.advance(31 * DAY)

    async def copied(self, task_id: str = "new") -> None:
        folder = f"{self.bench.folders.attempt(task_id, 1)}/outbox"
        self.found = dropfolder.scan(folder, self.blobs, {}, "alive", 10**9).handed
        assert sum(len(item.copies) for item in self.found) == 2

    async def recorded(self, task_id: str = "new") -> None:
        def unit(tx: Transaction) -> list[str]:
            task = store.find(tx, task_id)
            assert task is not None
            request = read_task(store.spec_of(tx, task.seq)[0])
            dropfolder.record(tx, self.bench.box, task, request, 1, self.found)
            return dropfolder.unnamed(tx, task.seq, self.found)

        blobs.remove(await self.bench.do(unit))

    async def forgotten(self) -> None:
        """Retention's commit."""
        self.gone = await self.bench.do(lambda tx: self.retention._remove_tasks(tx, [1]))

    async def unlinked(self) -> None:
        """What retention does after it."""
        blobs.remove(self.gone.copies)

    async def restarted(self) -> None:
        """As after a crash, much later: nothing is known but the journal and the disk."""
        for name in os.listdir(self.blobs):
            os.utime(f"{self.blobs}/{name}", (1, 1))
        retention = Retention(self.bench.box)
        await retention.look()
        await retention._remove_left_over()

    async def named(self) -> set[str]:
        sql = "SELECT blob FROM entries WHERE blob IS NOT NULL UNION SELECT blob FROM attachments"
        return {path for (path,) in await self.bench.rows(sql)}

    async def check(self) -> None:
        """Whatever an entry names is there and whole."""
        for path in await self.named():
            assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == hashlib.sha256(CONTENT).hexdigest()

    async def check_nothing_left_over(self) -> None:
        assert {f"{self.blobs}/{name}" for name in os.listdir(self.blobs) if not name.startswith(".once-")} == await self.named()  # fmt: skip


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("crash_after", [None, 0, 1, 2, 3])
async def test_the_same_content_handed_over_while_it_is_removed_is_kept(bench: Bench, order: tuple[str, ...], crash_after: int | None) -> None:  # fmt: skip
    world = _World(bench)
    await world.begin()
    for n, step in enumerate(order):
        await getattr(world, step)()
        await world.check()
        if n == crash_after:
            break
    if crash_after is not None:
        await world.restarted()
        await world.check()
        await world.check_nothing_left_over()
        await world.copied()  # the hand-over is made again
        await world.recorded()
    await world.check()
    await world.check_nothing_left_over()
    new = await bench.entries("entry")
    assert {data["key"] for data in new if data["task_id"] == "new"} == {"large.bin", "mail.json"}


async def test_an_attachment_that_changes_between_two_captures_leaves_no_copy_behind(bench: Bench) -> None:
    """The first capture is lost with the daemon before its commit; the mail is taken again, with what the file is now."""
    world = _World(bench)
    await world.begin()
    await world.copied()
    lost = {path for item in world.found for path in item.copies}
    attached = Path(bench.folders.attempt("new", 1), "outbox", ".attached")
    attached.write_bytes(b"changed")
    await world.restarted()
    assert not any(map(os.path.exists, lost))
    found = dropfolder.scan(str(attached.parent), world.blobs, {}, "alive", 10**9).handed
    world.found = found
    await world.recorded()
    await world.check_nothing_left_over()
    (mail,) = [data for data in await bench.entries("entry") if data["task_id"] == "new" and data["key"] == "mail.json"]  # fmt: skip
    assert Path(mail["attachments"][0]["path"]).read_bytes() == b"changed"


@pytest.mark.parametrize("how", ["again", "other content", "attachment changed"])
async def test_what_is_handed_over_twice_keeps_the_first_copies_only(bench: Bench, how: str) -> None:
    world = _World(bench)
    await world.begin()
    await world.copied()
    await world.recorded()
    first = await world.named()
    drop = Path(bench.folders.attempt("new", 1), "outbox")
    if how == "other content":
        (drop / "large.bin").write_bytes(CONTENT[::-1])
    elif how == "attachment changed":
        (drop / ".attached").write_bytes(b"changed")
    await world.copied()
    await world.recorded()
    assert await world.named() == first
    await world.check_nothing_left_over()


async def test_a_scan_that_fails_or_has_to_wait_leaves_no_copies(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    world = _World(bench)
    await world.begin()
    before = set(os.listdir(world.blobs))
    calls: list[Any] = []

    def capture(*_: object, **__: object) -> Any:
        calls.append(1)
        raise OSError(28, "No space left on device") if len(calls) == 1 else dropfolder.BeingWritten

    monkeypatch.setattr(dropfolder, "capture", capture)
    with pytest.raises(OSError, match="No space"):
        await world.copied()
    assert set(os.listdir(world.blobs)) == before
    drop = Path(bench.folders.attempt("new", 1), "outbox")
    (drop / "mail.json").write_bytes(b'{"to": "a@b.c", "attachments": [".attached"], "pad": "%s"}' % CONTENT)
    (drop / "large.bin").unlink()
    found = dropfolder.scan(str(drop), world.blobs, {}, "alive", 10**9)
    assert (found.handed, found.waiting) == ([], 1)
    assert set(os.listdir(world.blobs)) == before


async def test_a_state_folder_that_was_moved_keeps_its_content(bench: Bench) -> None:
    """Entries name the place where it was; the name alone counts."""
    world = _World(bench)
    await world.begin()
    await bench.do(lambda tx: tx.execute("UPDATE entries SET blob = '/elsewhere/blobs' || substr(blob, -82)"))
    await bench.do(
        lambda tx: tx.execute("UPDATE attachments SET blob = '/elsewhere/blobs' || substr(blob, -82)")
    )
    assert {Path(path).parent for path in await world.named()} == {Path("/elsewhere/blobs")}
    before = set(os.listdir(world.blobs))
    await world.restarted()
    assert set(os.listdir(world.blobs)) == before


async def test_a_copy_that_nobody_names_is_kept_for_a_day(bench: Bench) -> None:
    world = _World(bench)
    await world.begin()
    await world.copied()
    retention = Retention(bench.box)
    await retention.look()
    for age_s, there in ((0.9 * DAY, True), (1.1 * DAY, False)):
        at = bench.clock.now_us() / 1e6 - age_s
        for item in world.found:
            for path in item.copies:
                os.utime(path, (at, at))
        await retention._remove_left_over()
        assert all(os.path.exists(path) is there for item in world.found for path in item.copies)
    assert ("blobs_left_over_removed", {"count": 2}) in bench.log.lines
    await world.check()
