"""The event chain: read, streamed, verified."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentqd.control import events
from agentqd.core.errors import StateFolderError
from agentqd.storage import audit
from agentqd.storage.lock import take_lock

from .harness import Daemon


async def test_events_come_in_order_with_their_hashes(daemon: Daemon) -> None:
    task_id = await daemon.run_to_end()
    found = await daemon.get("/v1/audit/events", limit="3")
    assert [event["seq"] for event in found["events"]] == [1, 2, 3]
    assert (found["more"], found["events"][0]["task_id"], len(found["events"][0]["hash"])) == (
        True,
        task_id,
        64,
    )
    assert not (await daemon.get("/v1/audit/events", after="3"))["more"]
    await daemon.fails("GET", "/v1/audit/events?after=x", 400, "invalid_request")


async def test_a_whole_chain_verifies_in_steps(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "STEP_EVENTS", 2)
    await daemon.admit_many(20)
    found = await daemon.get("/v1/audit/verify")
    assert found == {
        **found,
        "ok": True,
        "events": 20,
        "first_seq": 1,
        "last_seq": 20,
        "broken_at": None,
        "reason": None,
    }


@pytest.mark.parametrize(
    ("damage", "broken_at"),
    [
        ("UPDATE events SET data = '{}' WHERE seq = 7", 7),
        ("UPDATE events SET at = at + 1 WHERE seq = 1", 1),
        ("UPDATE events SET task = 'other' WHERE seq = 5", 5),
        ("DELETE FROM events WHERE seq = 4", 4),
        ("DELETE FROM events WHERE seq < 4", 1),
        ("UPDATE events SET hash = zeroblob(32) WHERE seq = 9", 9),
    ],
)
async def test_a_changed_chain_says_where_it_broke(daemon: Daemon, damage: str, broken_at: int) -> None:
    await daemon.admit_many(10)
    await daemon.journal.commit(lambda tx: tx.execute(damage))
    found = await daemon.get("/v1/audit/verify")
    assert (found["ok"], found["broken_at"]) == (False, broken_at)
    assert str(broken_at) in found["reason"]


async def test_a_removed_prefix_with_its_checkpoint_is_whole(daemon: Daemon) -> None:
    await daemon.admit_many(10)

    def unit(tx: Any) -> None:
        kept = tx.one("SELECT hash FROM events WHERE seq = 6")[0]
        tx.execute(
            "INSERT INTO meta VALUES ('chain_checkpoint_seq', 6), ('chain_checkpoint_hash', ?)", (kept,)
        )
        tx.execute("DELETE FROM events WHERE seq <= 6")

    await daemon.journal.commit(unit)
    found = await daemon.get("/v1/audit/verify")
    assert (found["ok"], found["first_seq"], found["events"]) == (True, 7, 4)


async def test_offline_verify_holds_the_lock_and_finds_the_same(daemon: Daemon, root: Path) -> None:
    await daemon.admit_many(10)
    found = await daemon.get("/v1/audit/verify")
    copy = root / "copy"
    copy.mkdir()
    for name in ("journal.db", "journal.db-wal"):
        shutil.copy(f"{daemon.folders.state}/{name}", copy / name)
    assert audit.verify_offline(str(copy)) == found
    with closing(sqlite3.connect(copy / "journal.db", isolation_level=None)) as connection:
        connection.execute("UPDATE events SET event = 'x' WHERE seq = 3")
    connection.close()
    assert audit.verify_offline(str(copy))["broken_at"] == 3
    take_lock(str(copy / "agentqd.lock"), "agentqd")
    with pytest.raises(StateFolderError, match="already serves"):
        audit.verify_offline(str(copy))
    with pytest.raises(StateFolderError, match="no journal"):
        audit.verify_offline(str(root))


async def test_the_stream_goes_on_after_a_seq_and_brings_what_comes(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "EMPTY_LINE_S", 0.2)
    monkeypatch.setattr(events, "PAGE_EVENTS", 2)
    await daemon.admit_many(5)
    async with daemon.session.get("http://box/v1/events?after=1") as response:
        assert response.content_type == "application/jsonl"
        old = [json.loads(await response.content.readline())["seq"] for _ in range(4)]
        task_id = await daemon.submit()
        line = await response.content.readline()
        while line == b"\n":
            line = await response.content.readline()
        assert old == [2, 3, 4, 5]
        assert (json.loads(line)["event"], json.loads(line)["task_id"]) == ("accepted", task_id)
        assert await asyncio.wait_for(response.content.readline(), 5) == b"\n"


async def test_without_after_the_stream_begins_now_and_ends_with_the_server(daemon: Daemon) -> None:
    await daemon.admit_many(3)
    async with daemon.session.get("http://box/v1/events") as response:
        await daemon.submit()
        assert json.loads(await response.content.readline())["seq"] == 4
        daemon.server._room.closing.set()
        assert await asyncio.wait_for(response.content.read(), 5) == b""
    await daemon.fails("GET", "/v1/events?after=x", 400, "invalid_request")
