from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from places import SHORT_TMP

from agentqd.core.settings import Settings

from .harness import Daemon


@pytest.fixture
def root() -> Iterator[Path]:
    """Short: a Unix socket's path has 107 bytes, and the client of these tests knows no way around."""
    folder = Path(tempfile.mkdtemp(prefix="agentqd-", dir=SHORT_TMP))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def settings() -> Settings:
    return Settings()


@pytest.fixture
async def daemon(root: Path, settings: Settings) -> AsyncIterator[Daemon]:
    made = Daemon(root, settings)
    await made.open()
    yield made
    await made.close()
