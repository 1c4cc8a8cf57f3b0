"""Samples, percentiles, and what a row of the table is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Row:
    """One line of the table. Without `limit` it is shown beside the others and has nothing to reach."""

    what: str
    floor: float | None  # None: the limit is an absolute one
    ours: float
    unit: str
    limit: float | None = None
    better: Literal["lower", "higher"] = "lower"
    judged: Literal["ratio", "difference", "value"] = (
        "ratio"  # the limit is for ours / floor, ours - floor, ours
    )
    note: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        return None if self.floor is None else self.ours / self.floor

    @property
    def difference(self) -> float | None:
        return None if self.floor is None else self.ours - self.floor

    @property
    def met(self) -> bool | None:
        value = {"ratio": self.ratio, "difference": self.difference, "value": self.ours}[self.judged]
        if self.limit is None or value is None:
            return None
        return value <= self.limit if self.better == "lower" else value >= self.limit

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "met": self.met}


def percentile(samples: Sequence[float], share: float) -> float:
    """Nearest rank: percentile(xs, 0.99) of 1,000 samples is the 990th."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * share - 1e-9) - 1)]


def interleaved(
    blocks: int, samples: int, *sides: Callable[[int], Sequence[float]]
) -> tuple[list[float], ...]:
    """`samples` of each side, taken in turns of one block each, so that all sides see the same machine.

    A side gets the number of samples wanted and returns as many.
    """
    taken: tuple[list[float], ...] = tuple([] for _ in sides)
    sizes = [samples // blocks + (n < samples % blocks) for n in range(blocks)]
    for size in sizes:
        for side, collected in zip(sides, taken, strict=True):
            collected.extend(side(size))
    return taken


def summary(samples: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """For the JSON."""
    return {
        "samples": len(samples),
        "min": round(min(samples) * scale, 3),
        "p50": round(percentile(samples, 0.5) * scale, 3),
        "p90": round(percentile(samples, 0.9) * scale, 3),
        "p99": round(percentile(samples, 0.99) * scale, 3),
        "max": round(max(samples) * scale, 3),
        "mean": round(statistics.fmean(samples) * scale, 3),
    }
