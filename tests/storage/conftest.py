from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agentqd.storage.journal import Journal
from agentqd.system.clock import ManualClock


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
