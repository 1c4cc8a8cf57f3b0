from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator

import pytest
from places import SHORT_TMP

from .harness import Box, Daemon


@pytest.fixture
def empty_box() -> Iterator[Box]:
    root = tempfile.mkdtemp(prefix="agentqd-", dir=SHORT_TMP)
    box = Box(root)
    try:
        yield box
    finally:
        box.clean()
        shutil.rmtree(root)


@pytest.fixture
def box(empty_box: Box) -> Box:
    empty_box.start()
    return empty_box


@pytest.fixture
def daemon(box: Box) -> Daemon:
    return box.daemon()
