from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agentqd.storage import connection as module
from agentqd.storage.journal import Journal
from agentqd.system.clock import ManualClock


@pytest.fixture(autouse=True)
def cold_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Growing the log by 8 MiB at each start makes commits fast for days; here it only costs."""
    monkeypatch.setattr(module, "_WAL_WARM_BYTES", 4096)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "journal.db")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def journal(path: str, clock: ManualClock) -> AsyncIterator[Journal]:
    made = Journal(path, clock.now_us)
    await made.open()
    yield made
    await made.close()
