from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agentqd.core.settings import Settings

from .harness import Bench


@pytest.fixture
def settings() -> Settings:
    return Settings()


@pytest.fixture
async def bench(tmp_path: Path, settings: Settings) -> AsyncIterator[Bench]:
    async with Bench(tmp_path, settings) as made:
        yield made
        await made.counts_are_true()
