"""Every rule of `sinks/base.py`, over every plug. Add a plug in `adapters.py`, not here."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentqd.core.limits import SINK_ERROR_CHARS_MAX
from agentqd.sinks.base import Deferred, Delivered, Delivery, Found, Outcome, Rejected, Sink
from agentqd.sinks.registry import sink_types

from .adapters import ADAPTERS
from .conformance import SECRET, Adapter, Condition, delivery, ids, open_descriptors, some
from .conftest import SSH
from .sshadapters import SshAdapter
from .webadapter import WebhookAdapter

NO_ANSWER = [Condition.DEFERRING, Condition.CRASHING, Condition.AMBIGUOUS, Condition.HUGE_ANSWER]


@pytest.fixture(
    params=[*(pytest.param(adapter, id=adapter.type) for adapter in (*ADAPTERS, WebhookAdapter)), *SSH]
)
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Adapter]:
    if request.param.needs is not None:
        request.getfixturevalue(request.param.needs)
    base = tmp_path / "base"
    base.mkdir()
    made = request.param(base)
    yield made
    made.release()


def put(adapter: Adapter, condition: Condition) -> bool:
    """The receiver is so now; or False: this plug's cannot be, for the reason printed."""
    if condition in adapter.cannot:
        print(f"{adapter.type} cannot be {condition.value}: {adapter.cannot[condition]}")
        return False
    adapter.become(condition)
    return True


async def opened(adapter: Adapter, last_position: int = 0) -> Sink:
    sink = adapter.make()
    await sink.open(last_position)
    return sink


async def deliver_all(sink: Sink, batch: list[Delivery]) -> list[Outcome]:
    """In batches of at most `batch_max`, as the loop does."""
    outcomes: list[Outcome] = []
    for start in range(0, len(batch), sink.batch_max):
        outcomes += await sink.deliver(batch[start : start + sink.batch_max])
    return outcomes


async def reaches(adapter: Adapter) -> None:
    """Wait until the receiver has hold of the delivery and hangs."""
    async with asyncio.timeout(10):
        while not adapter_is_busy(adapter):
            await asyncio.sleep(0.005)


def adapter_is_busy(adapter: Adapter) -> bool:
    disk = getattr(adapter, "disk", None)
    if disk is not None:
        return "fdatasync" in disk.calls
    return (adapter.base / "asked").exists()


def targets(descriptors: set[str]) -> Counter[str]:
    """What is open, and how often; a socket that took the place of another counts the same."""
    return Counter(re.sub(r"(socket:).*", r"\1", entry.partition(":")[2]) for entry in descriptors)


def test_every_plug_has_an_adapter() -> None:
    assert {adapter.type for adapter in (*ADAPTERS, WebhookAdapter, SshAdapter)} == set(sink_types())


def test_what_a_receiver_cannot_be_has_a_reason() -> None:
    for adapter in (*ADAPTERS, WebhookAdapter, SshAdapter):
        assert all(len(reason) > 10 for reason in adapter.cannot.values())
        assert Condition.GOOD not in adapter.cannot


async def test_a_good_receivers_word_is_delivered_and_it_has_the_very_bytes(adapter: Adapter) -> None:
    put(adapter, Condition.GOOD)
    sink = await opened(adapter)
    batch = [*some(3), delivery(4, kind="result"), delivery(5, padding=300_000)]
    outcomes = await deliver_all(sink, batch)
    assert all(isinstance(outcome, Delivered) for outcome in outcomes), outcomes
    assert adapter.received() == ids(batch)
    assert all(adapter.holds(one) for one in batch)
    await sink.close()


async def test_there_is_one_outcome_for_each_in_order(adapter: Adapter) -> None:
    put(adapter, Condition.GOOD)
    sink = await opened(adapter)
    batch = [*some(2), adapter.malformed(), *some(2, start=3)]
    outcomes = await deliver_all(sink, batch)
    assert [type(outcome) for outcome in outcomes] == [Delivered, Delivered, Rejected, Delivered, Delivered]
    assert adapter.received() == ids(some(4)), "a malformed one is set aside and blocks nothing"
    positions = [
        outcome.position for outcome in outcomes if isinstance(outcome, Delivered) and outcome.position
    ]
    assert positions == sorted(set(positions)), "positions grow with the order"
    await sink.close()


@pytest.mark.parametrize("condition", NO_ANSWER)
async def test_whatever_is_not_a_plain_yes_is_deferred_with_a_reason(
    adapter: Adapter, condition: Condition
) -> None:
    put(adapter, Condition.GOOD)
    sink = await opened(adapter)
    if put(adapter, condition):
        (outcome,) = await sink.deliver(some(1))
        assert isinstance(outcome, Deferred)
        assert outcome.reason
        assert len(outcome.reason) <= SINK_ERROR_CHARS_MAX
        assert outcome.reason.isprintable()
        assert SECRET not in outcome.reason
    await sink.close()


@pytest.mark.parametrize("condition", NO_ANSWER)
async def test_what_was_deferred_is_delivered_under_the_same_id_once_the_receiver_is_good(
    adapter: Adapter, condition: Condition
) -> None:
    put(adapter, Condition.GOOD)
    sink = await opened(adapter)
    if put(adapter, condition):
        await sink.deliver(some(1))
        put(adapter, Condition.GOOD)
        (outcome,) = await sink.deliver([delivery(1, attempts=1)])
        assert isinstance(outcome, Delivered)
        assert set(adapter.received()) == set(ids(some(1)))
        if not adapter.doubles_after_ambiguity:
            assert adapter.received() == ids(some(1))
    await sink.close()


async def test_a_no_for_good_is_rejected_with_a_reason(adapter: Adapter) -> None:
    sink = await opened(adapter)
    if put(adapter, Condition.REJECTING):
        (outcome,) = await sink.deliver(some(1))
        assert isinstance(outcome, Rejected)
        assert 0 < len(outcome.reason) <= SINK_ERROR_CHARS_MAX
        assert adapter.received() == []
    await sink.close()


async def test_a_receiver_that_hangs_can_be_left_and_nothing_stays_half_open(adapter: Adapter) -> None:
    put(adapter, Condition.GOOD)
    sink = await opened(adapter)
    await sink.deliver(some(1))
    before = open_descriptors()
    assert put(adapter, Condition.HANGING)
    getattr(getattr(adapter, "disk", None), "calls", []).clear()
    (adapter.base / "asked").unlink(missing_ok=True)
    task = asyncio.ensure_future(sink.deliver(some(1, start=2)))
    await reaches(adapter)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    put(adapter, Condition.GOOD)
    (outcome,) = await sink.deliver([delivery(2, attempts=1)])
    assert isinstance(outcome, Delivered)
    assert adapter.received() == ids(some(2)), (
        "it hung before it took anything, or the sink knows that it was taken"
    )
    await sink.deliver([delivery(2, attempts=2)])
    assert adapter.received() == ids([*some(2), delivery(2)]), (
        "what it knew is used up: sent again is sent again"
    )
    assert targets(open_descriptors()) == targets(before)
    await sink.close()


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8])
async def test_it_may_be_cancelled_at_any_await(adapter: Adapter, turns: int) -> None:
    put(adapter, Condition.GOOD)
    sink = await opened(adapter)
    before = open_descriptors()
    task = asyncio.ensure_future(sink.deliver(some(min(5, sink.batch_max))))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    outcomes = await deliver_all(sink, some(5))
    assert all(isinstance(outcome, Delivered) for outcome in outcomes)
    if not adapter.doubles_after_ambiguity and task.cancelled():
        assert adapter.received() == ids(some(5))
    assert set(adapter.received()) == set(ids(some(5)))
    await sink.close()
    assert len(open_descriptors()) <= len(before)


async def test_a_restart_between_send_and_mark_doubles_nothing_at_a_receiver_that_dedupes(
    adapter: Adapter,
) -> None:
    put(adapter, Condition.GOOD)
    sink = await opened(adapter)
    marked = await deliver_all(sink, some(3))
    await deliver_all(sink, some(2, start=4))  # and these marks were lost
    await sink.close()
    last = max((outcome.position or 0 for outcome in marked if isinstance(outcome, Delivered)), default=0)
    again = adapter.make()
    found = await again.open(last)
    assert all(isinstance(one, Found) and one.position > last for one in found)
    told = {one.delivery_id for one in found}
    pending = [one for one in some(2, start=4) if one.delivery_id not in told]
    outcomes = await deliver_all(again, pending)
    assert all(isinstance(outcome, Delivered) for outcome in outcomes)
    assert sorted(set(adapter.received())) == sorted(ids(some(5)))
    if not adapter.doubles_after_ambiguity:
        assert told == set(ids(some(2, start=4)))
        assert adapter.received() == ids(some(5))
    await again.close()


async def test_a_person_may_have_a_delivered_entry_sent_again(adapter: Adapter) -> None:
    put(adapter, Condition.GOOD)
    sink = await opened(adapter)
    await sink.deliver(some(1))
    (outcome,) = await sink.deliver(some(1))
    assert isinstance(outcome, Delivered)
    assert adapter.received() == ids(some(1)) * 2
    await sink.close()


async def test_nothing_is_logged_or_printed_by_a_plug(
    adapter: Adapter, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, logger="agentqd")
    sink = await opened(adapter)
    for condition in (Condition.GOOD, *NO_ANSWER):
        if condition not in adapter.cannot:
            put(adapter, condition)
            await sink.deliver(some(1))
    await sink.close()
    assert not [record for record in caplog.records if record.name.startswith("agentqd")]
    assert SECRET not in "".join(capfd.readouterr())
    assert SECRET not in "".join(getattr(sink, "notices", []))


async def test_close_leaves_no_descriptor_and_no_thread_and_may_be_called_twice(adapter: Adapter) -> None:
    put(adapter, Condition.GOOD)
    descriptors, threads = open_descriptors(), set(threading.enumerate())
    sink = await opened(adapter)
    await sink.deliver(some(1))
    await sink.close()
    await sink.close()
    mine = {thread for thread in threading.enumerate() if thread.name.startswith("sink-")}
    assert mine <= threads
    new = {entry for entry in open_descriptors() - descriptors if str(adapter.base) in entry}
    assert not new


async def test_open_may_be_tried_again(adapter: Adapter) -> None:
    put(adapter, Condition.GOOD)
    sink = await opened(adapter)
    assert await sink.open(0) == []
    (outcome,) = await sink.deliver(some(1))
    assert isinstance(outcome, Delivered)
    await sink.close()


def test_its_limits_are_sensible(adapter: Adapter) -> None:
    sink = adapter.make()
    assert sink.batch_max >= 1
    assert sink.concurrency >= 1
    assert sink.timeout_s is None or 0 < sink.timeout_s <= 3600  # None: see the test of what hangs
