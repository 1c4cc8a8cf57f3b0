"""A dead, a slow and a flooded sink delay no healthy one. Coarse: `python -m benchmarks --only isolation` measures it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agentqd.core.settings import Settings, Sink
from agentqd.loops import sinkrunner
from agentqd.loops.delivery import DeliveryLoop
from agentqd.sinks.base import Context, Deferred, Delivery
from agentqd.sinks.base import Sink as Plug
from agentqd.sinks.registry import make_sink
from agentqd.system.clock import SystemClock

from .harness import Bench
from .test_delivery import Script, _put
from .test_sinkrunner import many

FLOOD = 20_000
SAMPLES = 60
SLOWER_MAX = 6
SLOWER_MAX_S = 0.4  # beside: a machine that is busy with other tests


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    command = Sink(type="command", command=["x"])
    return Settings(
        sinks={
            "healthy": Sink(type="file", path=str(tmp_path / "healthy.jsonl")),
            "flooded": Sink(type="file", path=str(tmp_path / "flooded.jsonl")),
            "dead": command,
            "slow": command,
        }
    )


@pytest.fixture
async def bench(tmp_path: Path, settings: Settings) -> AsyncIterator[Bench]:
    made = Bench(tmp_path, settings)
    made.clock = SystemClock()  # type: ignore[assignment]
    async with made:
        yield made


async def delivery_s(bench: Bench, path: Path, name: str) -> float:
    """From the entry's commit to its line at the receiver."""
    size = path.stat().st_size if path.exists() else 0
    await _put(bench, name, sinks=["healthy"])
    began = time.perf_counter()
    async with asyncio.timeout(30):
        while not path.exists() or path.stat().st_size == size:
            await asyncio.sleep(0.0005)
    return time.perf_counter() - began


@pytest.mark.slow
async def test_a_dead_a_slow_and_a_flooded_sink_delay_no_healthy_one(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, slow, path = Script(), Script(), tmp_path / "healthy.jsonl"
    slow.gate.clear()

    def refused(batch: Sequence[Delivery]) -> Any:
        return [Deferred("connection refused", connection=True)] * len(batch)

    def made(context: Context, most: int) -> Plug:
        return {"dead": dead, "slow": slow}.get(context.name) or make_sink(context, most)

    dead.answers = [refused] * 100
    monkeypatch.setattr(sinkrunner, "make_sink", made)
    loop = DeliveryLoop(bench.box, None)  # type: ignore[arg-type]
    bench.hooks.append(loop.before_commit)
    task = asyncio.create_task(loop.run())
    try:
        await delivery_s(bench, path, "first")
        quiet = sorted([await delivery_s(bench, path, f"quiet{n}") for n in range(SAMPLES)])
        await _put(bench, *(f"dead{n}" for n in range(500)), sinks=["dead"])
        await _put(bench, *(f"slow{n}" for n in range(500)), sinks=["slow"])
        flood = asyncio.create_task(many(bench, FLOOD, ["flooded"], start=100_000))
        loud = sorted([await delivery_s(bench, path, f"loud{n}") for n in range(SAMPLES)])
        await flood
        assert slow.under_way > 0
        assert dead.seen
        most = max(quiet[-2] * SLOWER_MAX, SLOWER_MAX_S)
        assert loud[-2] <= most, f"{loud[-2]:.3f} s, quiet {quiet[-2]:.3f} s"
        await bench.until(lambda: loop.runners["flooded"].backlog.only_fresh == 0)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
