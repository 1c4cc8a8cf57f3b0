"""Exactly-once effects: the answer is lost before and after the receiver's commit, a hundred times, and a receiver that dedupes
by id sees one effect each. The real delivery loop, journal and plugs; the receivers are those of the conformance suite, so that
a plug with an adapter is shown here without a line more.

`CRASHING` is the loss before the commit, `AMBIGUOUS` the one after it.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from loops.harness import Bench

from agentqd.core.routing import COMPLETIONS, REJECTED
from agentqd.core.settings import Settings
from agentqd.loops.delivery import DeliveryLoop
from agentqd.loops.sinkrunner import SinkRunner
from agentqd.sinks.base import Delivery
from agentqd.storage import outbox
from agentqd.storage.outbox import NewEntry
from agentqd.storage.transaction import Transaction

from .adapters import ADAPTERS
from .conformance import Adapter, Condition, some
from .conftest import SSH

pytestmark = pytest.mark.slow


TIMES = {"rejected": 20}  # of the others a hundred; it is the same plug as completions
AT_ONCE = 4  # fewer losses in a row than open the breaker
SSH_TIMES = int(
    os.environ.get("AGENTQD_EFFECTS", "4")
)  # a loss is two or three logins there, and CI has an end
HOUR_S = 3601.0  # longer than any backoff
LOSSES = {"before": Condition.CRASHING, "after": Condition.AMBIGUOUS}


@asynccontextmanager
async def delivering(bench: Bench, adapter: Adapter, sink: str) -> AsyncIterator[SinkRunner]:
    """The delivery loop with this one sink, as the daemon runs it."""
    loop = DeliveryLoop(bench.box, adapter.exec, lambda: 0.0)
    bench.hooks.append(loop.before_commit)
    task = asyncio.create_task(loop.run())
    try:
        await bench.until(lambda: sink in loop.runners)
        yield loop.runners[sink]
        if task.done():
            task.result()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def put(bench: Bench, sink: str, items: Sequence[Delivery]) -> None:
    def unit(tx: Transaction) -> None:
        for each in items:
            entry = NewEntry(each.delivery_id, None, 0, 0, "entry", each.key, each.type, each.payload, [sink])
            outbox.add_entry(tx, entry)

    await bench.do(unit)


async def until_all_are(bench: Bench, sink: str, state: str, count: int) -> int:
    """Wait until so many of its rows are so, and none is what it should never be; all their attempts."""
    async with asyncio.timeout(60):
        while True:
            found = {
                row[0]: row[1:]
                for row in await bench.rows(
                    "SELECT state, count(*), sum(attempts) FROM outbox WHERE sink = ? GROUP BY 1", sink
                )
            }
            assert set(found) <= {"pending", "retryable", "delivered"}, found
            if found.get(state, (0,))[0] == count:
                return sum(attempts for _, attempts in found.values())
            await asyncio.sleep(0.004)


@pytest.mark.parametrize("loss", LOSSES)
# What has a receiver of its own (email, webhook) is shown so beside that receiver.
@pytest.mark.parametrize(
    "made", [*(pytest.param(each, id=each.type) for each in ADAPTERS if each.needs is None), *SSH]
)
async def test_an_answer_that_is_lost_a_hundred_times_leaves_one_effect_each(
    request: pytest.FixtureRequest, tmp_path: Path, made: type[Adapter], loss: str
) -> None:
    if made.type == "ssh":
        request.getfixturevalue("between")
    state = tmp_path / "box" / "state"  # an append sink's file lies where the daemon has it
    state.mkdir(parents=True)
    adapter = made(state)
    sink = made.type if made.type in {COMPLETIONS, REJECTED} else "s"
    settings = Settings(sinks={} if sink != "s" else {sink: adapter.settings()})
    items = some(SSH_TIMES if made.type == "ssh" else TIMES.get(made.type, 100))
    try:
        async with Bench(tmp_path / "box", settings) as bench, delivering(bench, adapter, sink) as runner:
            for first in range(0, len(items), AT_ONCE):
                adapter.become(LOSSES[loss])
                await put(bench, sink, items[first : first + AT_ONCE])
                lost = await until_all_are(bench, sink, "retryable", AT_ONCE)
                adapter.become(Condition.GOOD)
                bench.clock.advance(HOUR_S)
                runner.kick.set()
                assert await until_all_are(bench, sink, "delivered", first + AT_ONCE) == lost + AT_ONCE
        sent = Counter(adapter.received())
        assert set(sent) == {item.delivery_id for item in items}, "one effect each, and nothing else"
        doubled = loss == "after" and adapter.doubles_after_ambiguity
        assert set(sent.values()) == {2 if doubled else 1}, "the answer was really lost"
        assert all(adapter.holds(item) for item in items)
    finally:
        adapter.release()
