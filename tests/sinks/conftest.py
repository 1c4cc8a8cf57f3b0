"""Fixtures of the append sinks' own tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .adapters import APPENDING, AppendAdapter, CompletionsAdapter


@pytest.fixture(params=APPENDING, ids=lambda adapter: adapter.type)
def appender(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AppendAdapter]:
    (tmp_path / "base").mkdir()
    made = request.param(tmp_path / "base")
    yield made
    made.release()


@pytest.fixture
def completions(tmp_path: Path) -> Iterator[CompletionsAdapter]:
    (tmp_path / "base").mkdir()
    made = CompletionsAdapter(tmp_path / "base")
    yield made
    made.release()
