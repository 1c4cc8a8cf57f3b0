"""What is wrong in a config, and the words that more than one rule uses. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

import msgspec


class Problem(msgspec.Struct, frozen=True):
    """`key` is the path of names in the file: ("queues", "default", "concurrency")."""

    key: tuple[str | int, ...]
    message: str


def at_least_one(key: tuple[str | int, ...], value: int | None) -> Iterator[Problem]:
    if value is not None and value < 1:
        yield Problem(key, "must be at least 1")


def nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there is {', '.join(sorted(known))}"
