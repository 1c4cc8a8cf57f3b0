from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agentqd.core.settings import Settings
from agentqd.storage import connection

from .harness import Bench


@pytest.fixture(autouse=True)
def cold_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Growing the log by 8 MiB at each start makes commits fast for days; here it only costs."""
    monkeypatch.setattr(connection, "_WAL_WARM_BYTES", 4096)


@pytest.fixture
def settings() -> Settings:
    return Settings()


@pytest.fixture
async def bench(tmp_path: Path, settings: Settings) -> AsyncIterator[Bench]:
    async with Bench(tmp_path, settings) as made:
        yield made
        await made.counts_are_true()
