"""Readers that are closed at the end."""

import pathlib
from collections.abc import Callable, Iterator

import pytest

from .reader import LINE_BYTES_MAX, Reader


@pytest.fixture
def make_reader(tmp_path: pathlib.Path) -> Iterator[Callable[..., Reader]]:
    made: list[Reader] = []

    def make(line_bytes_max: int = LINE_BYTES_MAX, **options: int) -> Reader:
        made.append(Reader(tmp_path / "queue", line_bytes_max, **options))
        return made[-1]

    yield make
    for each in made:
        each.queue.close()


@pytest.fixture
def reader(make_reader: Callable[..., Reader]) -> Reader:
    return make_reader()
