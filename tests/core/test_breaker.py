"""The breaker, the pace and the turns of one destination: pure, so time and chance are the test's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentqd.core.breaker import Breaker, BreakerMemory, BreakerState
from agentqd.core.limits import BREAKER_OPEN_MAX_S, CONCURRENCY_MAX
from agentqd.core.pace import Pace, Turns
from agentqd.core.retry import JITTER


def opened(now_s: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(5):
        breaker.failed(now_s, 0.0)
    return breaker


def test_five_connection_failures_in_a_row_open_it_and_four_do_not() -> None:
    breaker = Breaker()
    for _ in range(4):
        breaker.failed(0, 0.0)
    assert breaker.allows(0, 19)
    breaker.reached(0)
    for _ in range(4):
        breaker.failed(0, 0.0)
    assert breaker.state is BreakerState.CLOSED
    breaker.failed(0, 0.0)
    assert breaker.state is BreakerState.OPEN
    assert not breaker.allows(59.9, 0)


def test_seven_of_the_last_ten_tries_within_five_minutes_open_it() -> None:
    for every_s, state in ((10.0, BreakerState.OPEN), (40.0, BreakerState.CLOSED)):
        breaker = Breaker()
        for n, reached in enumerate([True, False, False, True, False, False, True, False, False, False]):
            breaker.reached(n * every_s) if reached else breaker.failed(n * every_s, 0.0)
        assert breaker.state is state, every_s


def test_one_probe_when_the_time_is_over_and_its_word_decides() -> None:
    breaker = opened()
    assert breaker.allows(60, 0)
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.allows(60, 1), "one probe at a time"
    breaker.reached(61)
    assert breaker.state is BreakerState.CLOSED
    assert breaker.allows(61, 3)


def test_it_stays_open_twice_as_long_each_time_up_to_fifteen_minutes() -> None:
    breaker, now, waits = opened(), 0.0, []
    for _ in range(7):
        waits.append(breaker.open_until_s - now)
        now = breaker.open_until_s
        assert breaker.allows(now, 0)
        breaker.failed(now, 0.0)
    assert waits == [60, 120, 240, 480, 900, 900, 900]


def test_the_doubling_is_forgotten_after_five_that_reached_it() -> None:
    breaker = opened()
    for reached, wait in ((4, 120), (5, 60)):
        breaker.allows(breaker.open_until_s, 0)
        for _ in range(reached):
            breaker.reached(1000)
        for _ in range(5):
            breaker.failed(1000, 0.0)
        assert breaker.open_until_s - 1000 == wait
        breaker = opened()


def test_chance_makes_it_longer_by_a_fifth_at_most() -> None:
    breaker = Breaker()
    for _ in range(5):
        breaker.failed(0, 0.999)
    assert 60 < breaker.open_until_s <= 60 * (1 + JITTER)


def test_a_peer_that_was_heard_of_is_probed_at_once() -> None:
    breaker = opened()
    assert breaker.heard_of(10)
    assert breaker.allows(10, 0)
    assert not breaker.allows(10, 1)
    assert not breaker.heard_of(10)
    assert not Breaker().heard_of(10)


def test_a_restart_goes_on_resting_and_no_stored_value_makes_it_rest_for_longer_than_it_may() -> None:
    again = Breaker(opened().memory(20.0), now_s=5.0)
    assert (again.state, again.open_until_s) == (BreakerState.OPEN, 45.0)
    again.allows(45, 0)
    again.failed(45, 0.0)
    assert again.open_until_s - 45 == 120, "it knows how often it has opened"
    mad = Breaker(BreakerMemory(10**9, 1e300), now_s=0.0)
    assert mad.open_until_s <= BREAKER_OPEN_MAX_S * (1 + JITTER)
    assert Breaker(Breaker().memory(0.0), 7.0).state is BreakerState.CLOSED


@given(
    st.lists(
        st.tuples(st.sampled_from(["reached", "failed", "ask", "heard"]), st.floats(0, 1000)), max_size=80
    )
)
def test_whatever_happens_at_most_one_probe_and_never_open_for_long(steps: list[tuple[str, float]]) -> None:
    breaker, now, under_way = Breaker(), 0.0, 0
    for what, after_s in steps:
        now += after_s
        if what == "ask":
            allowed = breaker.allows(now, under_way)
            if breaker.state is BreakerState.HALF_OPEN:
                assert allowed == (under_way == 0)
            under_way += allowed
        elif what == "heard":
            breaker.heard_of(now)
        elif under_way:
            under_way -= 1
            breaker.reached(now) if what == "reached" else breaker.failed(now, 0.99)
        if breaker.state is BreakerState.OPEN:
            assert breaker.open_until_s - now <= BREAKER_OPEN_MAX_S * (1 + JITTER)
    if breaker.state is not BreakerState.CLOSED:
        assert breaker.allows(now + BREAKER_OPEN_MAX_S * 2, 0), "it always comes back"


def test_the_pace_starts_at_five_and_finds_its_way_between_one_and_the_most() -> None:
    pace = Pace(CONCURRENCY_MAX)
    assert pace.limit == 5
    for _ in range(30):
        pace.succeeded()
    assert pace.limit == 20
    pace.failed()
    assert pace.limit == 19
    for _ in range(30):
        pace.failed()
    assert pace.limit == 1
    assert Pace(1).limit == 1
    assert Pace(0).limit == 1


@pytest.mark.parametrize(
    ("new", "deferred", "taken"), [(True, True, "dndn"), (True, False, "nnnn"), (False, True, "dddd")]
)
def test_new_and_deferred_come_in_turn(new: bool, deferred: bool, taken: str) -> None:
    turns = Turns()
    assert "".join("d" if turns.deferred_next(new=new, deferred=deferred) else "n" for _ in range(4)) == taken
