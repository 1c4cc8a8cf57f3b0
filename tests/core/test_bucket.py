"""A sink's rate and its counts: pure, so time is the test's."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentqd.core.bucket import Bucket, BucketMemory
from agentqd.core.tally import Tally
from agentqd.core.units import Rate, decode_unit, encode_unit, parse_moment_us, parse_rate, parse_time_us

RATES = st.builds(Rate, st.integers(1, 2000), st.sampled_from("smhd"))
STEPS = st.lists(st.tuples(st.floats(0, 5), st.integers(0, 30), st.booleans()), max_size=60)


@given(RATES, STEPS)
def test_in_no_span_of_time_are_there_more_sends_than_the_burst_and_the_rate(
    rate: Rate, steps: list[tuple[float, int, bool]]
) -> None:
    """Over restarts too: what was stored is taken up, whatever the time between."""
    now = 1000.0
    bucket = Bucket(rate, now)
    sent: list[tuple[float, int]] = []
    for wait_s, wanted, restarts in steps:
        if restarts:
            kept = bucket.memory(now, int(now * 1e6))
            now += wait_s
            bucket = Bucket(rate, now)
            bucket.resume(kept, now, int(now * 1e6))
        else:
            now += wait_s
        count = min(wanted, bucket.tokens(now))
        bucket.take(count, now)
        sent.append((now, count))
    for first in range(len(sent)):
        total = 0
        for at, count in sent[first:]:
            total += count
            assert total <= bucket.burst + bucket.per_s * (at - sent[first][0]) + 1e-3


@given(RATES, st.lists(st.integers(0, 50), max_size=20))
def test_whoever_waits_for_its_token_gets_it_then(rate: Rate, takes: list[int]) -> None:
    now = 0.0
    bucket = Bucket(rate, now)
    for wanted in takes:
        bucket.take(min(wanted, bucket.tokens(now)), now)
        wait_s = bucket.wait_s(now)
        assert 0.0 <= wait_s <= 1 / bucket.per_s
        now += wait_s
        assert bucket.tokens(now) >= 1


@given(RATES, st.builds(BucketMemory, st.integers(-(2**62), 2**62), st.floats()), st.integers(0, 2**62))
def test_whatever_was_stored_is_at_least_nothing_and_at_most_one_bucket(
    rate: Rate, kept: BucketMemory, now_us: int
) -> None:
    bucket = Bucket(rate, 5.0)
    bucket.resume(kept, 5.0, now_us)
    assert 0 <= bucket.tokens(5.0) <= bucket.burst + 1e-3
    assert math.isfinite(bucket.wait_s(5.0))


def test_a_clock_that_goes_back_gives_nothing_and_takes_nothing() -> None:
    bucket = Bucket(Rate(1, "s"), 100.0)
    bucket.take(1, 100.0)
    assert bucket.tokens(50.0) == 0
    assert bucket.wait_s(50.0) == 1.0
    assert bucket.tokens(101.0) == 1


@pytest.mark.parametrize(
    ("written", "rate", "burst"),
    [
        ("10/s", 10.0, 10.0),
        ("100/m", 100 / 60, 100 / 60),
        ("1000 / h", 1000 / 3600, 1.0),
        ("5/d", 5 / 86400, 1.0),
    ],
)
def test_a_rate_is_read_as_people_write_it(written: str, rate: float, burst: float) -> None:
    read = decode_unit(Rate, written)
    assert read.per_s == pytest.approx(rate)
    assert Bucket(read, 0.0).burst == pytest.approx(burst)
    assert decode_unit(Rate, encode_unit(read)) == read


@pytest.mark.parametrize(
    "wrong", ["", "10", "0/s", "10/w", "-1/s", "1.5/s", "10/s/s", "9999999/s", 10, None, ["1/s"]]
)
def test_what_is_no_rate_is_an_error_that_says_how_one_looks(wrong: object) -> None:
    with pytest.raises(ValueError, match="a rate is like 10/s"):
        parse_rate(wrong)


def test_a_moment_is_a_time_or_how_long_ago() -> None:
    now = parse_time_us("2026-04-07T18:30:00Z")
    assert parse_moment_us("2h", now) == parse_time_us("2026-04-07T16:30:00Z")
    assert parse_moment_us(" 2026-04-07T18:00:00+02:00 ", now) == parse_time_us("2026-04-07T16:00:00Z")
    for wrong in ("", "yesterday", "2026-04-07", "2026-04-07T18:00:00", "-2h", "1e99"):
        with pytest.raises(ValueError, match="time"):
            parse_moment_us(wrong, now)


def test_a_tally_counts_the_last_minutes_and_forgets_after_an_hour() -> None:
    tally = Tally()
    for at, count in ((0.0, 1), (3500.0, 10), (3595.0, 100)):
        tally.add(at, count)
    assert tally.sums(3599.0) == {"1m": 100, "5m": 110, "1h": 111}
    assert tally.sums(3700.0) == {"1m": 0, "5m": 110, "1h": 110}
    assert tally.sums(10**6) == {"1m": 0, "5m": 0, "1h": 0}
    for second in range(100_000):
        tally.add(10**6 + second)
    assert len(tally._steps) <= 361
