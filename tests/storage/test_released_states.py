"""A state folder of a released version stays loadable for ever after. Each was made by the script that stands beside it."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from agentqd.core.envelope import data_of
from agentqd.core.outbox import RowState
from agentqd.core.task import read_task
from agentqd.storage import audit, outbox, sources
from agentqd.storage import tasks as store
from agentqd.storage.journal import Journal
from agentqd.system.clock import ManualClock

RELEASED = Path(__file__).parent / "released"
VERSIONS = sorted(folder.name for folder in RELEASED.iterdir() if (folder / "journal.db").exists())


def test_the_first_release_is_kept() -> None:
    assert "0.1.0" in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_released_journal_loads_and_says_what_it_said(tmp_path: Path, version: str) -> None:
    shutil.copy(RELEASED / version / "journal.db", tmp_path / "journal.db")
    expected = json.loads((RELEASED / version / "expected.json").read_text())
    journal = Journal(str(tmp_path / "journal.db"), ManualClock().now_us)
    await journal.open()
    assert journal.epoch == expected["epoch"] + 1
    for task_id, (state, result, run) in expected["tasks"].items():
        task = await journal.read(lambda c, task_id=task_id: store.find(c, task_id))
        assert task is not None
        assert (task.state.value, task.result, task.run) == (state, result, run)
        spec, _ = await journal.read(lambda c, seq=task.seq: store.spec_of(c, seq))
        assert read_task(spec).task == task.name
        await journal.read(lambda c, seq=task.seq: store.attempts_of(c, seq))
    due = await journal.read(lambda c: outbox.due(c, "completions", 2**60, 100))
    assert [(row.delivery_id, json.loads(data_of(row.payload))["task_id"]) for row in due] == [tuple(each) for each in expected["due"]]  # fmt: skip
    assert all(row.state is RowState.PENDING for row in due)
    assert len(await journal.read(sources.load)) == expected["sources"]
    await journal.commit(lambda tx: tx.event(None, "loaded"))
    await journal.close()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as connection:
        progress = audit.begin(connection)
        while not progress.done:
            progress = audit.step(connection, progress)
    assert (progress.broken_at, progress.events) == (None, expected["events"] + 1)
