"""A sink with a backlog is slowed down while others need the box, and never stopped."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agentqd.core.giveway import CROWD_ROWS, OTHERS_S, SEND_GAP_S, GiveWay

MANY = CROWD_ROWS + 1


def test_with_nobody_else_it_sends_as_fast_as_it_can() -> None:
    way = GiveWay()
    for _ in range(5):
        way.heard(0, 1.0)
        assert way.wait_s("hook", 10**6, SEND_GAP_S, 1.0) == 0.0
        way.begun("hook", 10**6, 1.0)


def test_with_others_its_sends_have_a_gap() -> None:
    way = GiveWay()
    way.heard(1, 1.0)
    assert way.wait_s("hook", MANY, 0.003, 1.0) == 0.0  # the first
    way.begun("hook", MANY, 1.0)
    assert abs(way.wait_s("hook", MANY, 0.003, 1.001) - 0.002) < 1e-9
    assert way.wait_s("hook", MANY, 0.003, 1.0031) == 0.0


def test_what_few_rows_wait_for_never_gives_way() -> None:
    way = GiveWay()
    way.heard(1, 1.0)
    way.begun("hook", CROWD_ROWS, 1.0)
    assert way.wait_s("hook", CROWD_ROWS, 0.003, 1.0) == 0.0
    assert not way.must(CROWD_ROWS, 1.0)
    assert way.must(MANY, 1.0)


def test_it_ends_a_moment_after_the_last_of_the_others() -> None:
    way = GiveWay()
    way.heard(1, 1.0)
    way.heard(1, 1.04)  # nothing new
    assert way.must(MANY, 1.0 + OTHERS_S - 0.001)
    assert not way.must(MANY, 1.0 + OTHERS_S)
    way.heard(2, 2.0)
    assert way.must(MANY, 2.0)


def test_several_share_what_is_left_to_them() -> None:
    way = GiveWay()
    way.heard(1, 1.0)
    for name in ("a", "b", "c"):
        way.begun(name, MANY, 1.0)
    way.begun("light", 3, 1.0)
    assert abs(way.wait_s("a", MANY, 0.003, 1.0) - 0.009) < 1e-9
    way.begun("b", 3, 1.0)  # its backlog is gone
    way.forget("c")
    assert abs(way.wait_s("a", MANY, 0.003, 1.0) - 0.003) < 1e-9


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.0, 0.02), st.booleans()), max_size=60),
)
def test_nobody_waits_longer_than_the_gaps_of_all(steps: list[tuple[str, float, bool]]) -> None:
    way, now, asked = GiveWay(), 1.0, 0
    for name, after, other in steps:
        now += after
        asked += other
        way.heard(asked, now)
        wait = way.wait_s(name, MANY, 0.003, now)
        assert 0.0 <= wait <= 0.009 + 1e-9
        now += wait
        assert way.wait_s(name, MANY, 0.003, now + 1e-9) == 0.0
        way.begun(name, MANY, now)
