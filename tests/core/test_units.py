"""Durations, sizes and times: as people write them, and hostile."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentqd.core.limits import DURATION_MAX_S
from agentqd.core.units import (
    Backoff,
    Duration,
    Size,
    decode_unit,
    encode_unit,
    format_duration,
    format_time,
    parse_backoff,
    parse_duration,
    parse_size,
    parse_time_us,
)  # fmt: skip

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("45m", 2700),
        ("10s", 10),
        ("500ms", 0.5),
        ("1h30m", 5400),
        ("2d", 172800),
        ("1w", 604800),
        (" 3s ", 3),
        ("1.5h", 5400),
        ("90", 90),
        (90, 90),
        (0.25, 0.25),
        (0, 0),
        ("0s", 0),
        (DURATION_MAX_S, DURATION_MAX_S),
    ],
)
def test_a_duration_is_read_as_a_person_means_it(written: object, seconds: float) -> None:
    assert parse_duration(written) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "written",
    ["", " ", "s", "1:30", "1 h", "h1", "1x", "-1s", "+1s", "1e3", "1h 30m", "1s1", "s1s", "1..5s", "1h,", pytest.param("9" * 400, id="long-text"), pytest.param("9" * 400 + "s", id="long-text-s"),
     -1, -0.001, DURATION_MAX_S + 1, pytest.param(10**400, id="long"), pytest.param(-(10**400), id="long-negative"), math.nan, math.inf, -math.inf, True, False, None, [], {}, b"1s", "1\x00s", "one"],
)  # fmt: skip
def test_what_is_no_duration_is_a_value_error(written: object) -> None:
    with pytest.raises(ValueError, match=r"duration"):
        parse_duration(written)


@given(ANY)
def test_anything_is_a_duration_within_ten_years_or_a_value_error(value: object) -> None:
    try:
        found = parse_duration(value)
    except ValueError:
        return
    assert 0 <= found <= DURATION_MAX_S


@given(st.integers(0, 86400 * 3650))
def test_hours_minutes_and_seconds_add_up(seconds: int) -> None:
    hours, rest = divmod(seconds, 3600)
    assert parse_duration(f"{hours}h{rest // 60}m{rest % 60}s") == seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0.4s"),
        (9.94, "9.9s"),
        (12, "12s"),
        (59.7, "1m00s"),
        (185, "3m05s"),
        (7800, "2h10m"),
        (4 * 86400 + 7200, "4d02h"),
    ],
)
def test_a_duration_is_shown_in_its_short_form(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.floats(0, DURATION_MAX_S))
def test_a_shown_duration_reads_back_within_its_last_unit(seconds: float) -> None:
    step = 0.051 if seconds < 10 else 0.51 if seconds < 3600 else 60.5 if seconds < 86400 else 3600.5
    assert abs(parse_duration(format_duration(seconds)) - seconds) <= step


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("64KiB", 65536),
        ("10MB", 10_000_000),
        ("512", 512),
        ("512B", 512),
        (512, 512),
        ("1k", 1000),
        ("1Ki", 1024),
        ("1.5 MiB", 1572864),
        ("2GiB", 2 * 1024**3),
        ("1T", 10**12),
        ("1TiB", 1024**4),
        (0, 0),
    ],
)
def test_a_size_is_read_as_a_person_means_it(written: object, size: int) -> None:
    assert parse_size(written) == size


@pytest.mark.parametrize(
    "written", ["", "B", "1XB", "-1", "1e9", "KiB", pytest.param("9" * 400, id="long-text"), "9" * 30 + "TB", pytest.param(10**400, id="long"), 2**63, -1, 1.5, True, None, [], math.inf, b"1"]
)  # fmt: skip
def test_what_is_no_size_is_a_value_error(written: object) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(written)


@given(ANY)
def test_anything_is_a_size_that_sqlite_can_hold_or_a_value_error(value: object) -> None:
    try:
        found = parse_size(value)
    except ValueError:
        return
    assert 0 <= found < 2**63


@given(ANY)
def test_anything_is_a_backoff_or_a_value_error(value: object) -> None:
    try:
        found = parse_backoff(value)
    except ValueError:
        return
    assert found.steps_s
    assert all(0 <= step <= DURATION_MAX_S for step in found.steps_s)
    assert parse_backoff(encode_unit(found)) == found


def test_a_backoff_of_one_step_doubles_and_a_list_is_a_schedule() -> None:
    assert parse_backoff("1s") == Backoff((1.0,), doubles=True)
    assert parse_backoff(["1s", 2, "1m"]) == Backoff((1.0, 2.0, 60.0), doubles=False)
    assert parse_backoff(["1s"]) != parse_backoff("1s")
    assert len({parse_backoff(["1s"]), parse_backoff([1]), parse_backoff("1s")}) == 2


@pytest.mark.parametrize("written", [[], ["1s"] * 101, ["1s", "x"], [["1s"]], {}, "soon"])
def test_what_is_no_backoff_is_a_value_error(written: object) -> None:
    with pytest.raises(ValueError, match=r"duration"):
        parse_backoff(written)


def test_units_go_through_the_decoder_hooks_and_back() -> None:
    for wanted, written, plain in ((Duration, "45m", 2700.0), (Size, "1KiB", 1024), (Backoff, ["1s"], [1.0])):
        found = decode_unit(wanted, written)
        assert isinstance(found, wanted)
        assert encode_unit(found) == plain
        assert type(encode_unit(found)) is type(plain)
    with pytest.raises(NotImplementedError):
        decode_unit(str, "x")
    with pytest.raises(NotImplementedError):
        encode_unit(object())


@pytest.mark.parametrize(
    ("written", "us"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T01:00:00+01:00", 0),
        ("1970-01-01T00:00:00.000001Z", 1),
        ("1969-12-31T23:59:59.999999Z", -1),
        ("2026-04-07T18:30:00Z", 1775586600000000),
    ],
)
def test_a_time_is_read_to_the_microsecond(written: str, us: int) -> None:
    assert parse_time_us(written) == us


@pytest.mark.parametrize(
    "written",
    ["", "now", "2026-04-07", "2026-04-07T18:30:00", "18:30:00Z", "2026-13-01T00:00:00Z", "2026-02-30T00:00:00Z", "2026-04-07T25:00:00Z",
     "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "99999-01-01T00:00:00Z", "x" * 10_000, "\ud800"],
)  # fmt: skip
def test_what_is_no_time_with_a_zone_is_a_value_error(written: str) -> None:
    with pytest.raises(ValueError, match="time") as caught:
        parse_time_us(written)
    assert len(str(caught.value)) < 200
    str(caught.value).encode()


NAIVE = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30))  # noqa: DTZ001 - the zone is drawn beside it


@given(NAIVE, st.integers(-23 * 60, 23 * 60))
def test_a_time_in_any_zone_reads_back_exactly(moment: datetime, minutes: int) -> None:
    utc = moment.replace(tzinfo=UTC)
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    us = (utc - epoch) // timedelta(microseconds=1)
    offset = timedelta(minutes=minutes)
    there = (moment + offset).isoformat()
    sign = "-" if minutes < 0 else "+"
    assert parse_time_us(f"{there}{sign}{abs(minutes) // 60:02d}:{abs(minutes) % 60:02d}") == us


@given(st.integers(-60_000_000_000_000_000, 250_000_000_000_000_000))
def test_a_shown_time_reads_back_to_the_millisecond(us: int) -> None:
    shown = format_time(us)
    assert shown is not None
    assert parse_time_us(shown) == us // 1000 * 1000
    assert format_time(parse_time_us(shown)) == shown


@given(st.text(max_size=40) | st.from_regex(r"[0-9T:+Z.-]{1,30}", fullmatch=True))
def test_any_text_is_a_time_that_can_be_shown_or_a_value_error(text: str) -> None:
    try:
        us = parse_time_us(text)
    except ValueError:
        return
    assert (format_time(us) or "").endswith("Z")


def test_no_time_is_shown_as_none() -> None:
    assert format_time(None) is None
    assert format_time(1_775_586_600_123_999) == "2026-04-07T18:30:00.123Z"
