"""Durations, sizes and times as people write them, and as records keep them.

Durations: `45m`, `10s`, `500ms`, `1h30m`, `2d`, or a number of seconds. Sizes: `64KiB`, `10MB`, or bytes.
Times in records: RFC 3339 in UTC, whole microseconds inside the journal.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from agentqd.core.limits import DURATION_MAX_S, RATE_COUNT_MAX, SIZE_MAX

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_US: Final = timedelta(microseconds=1)
_DURATION_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)")
_DURATION_UNIT_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_RATE: Final = re.compile(r"(\d{1,7})\s*/\s*([smhd])")
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]i?B?|B)?")
_SIZE_UNIT: Final = {
    "": 1, "B": 1,
    "K": 1000, "KB": 1000, "KI": 1024, "KIB": 1024,
    "M": 1000**2, "MB": 1000**2, "MI": 1024**2, "MIB": 1024**2,
    "G": 1000**3, "GB": 1000**3, "GI": 1024**3, "GIB": 1024**3,
    "T": 1000**4, "TB": 1000**4, "TI": 1024**4, "TIB": 1024**4,
}  # fmt: skip


class Duration(float):
    """Seconds. A float with a name of its own, so that decoders know to read `45m` here."""

    __slots__ = ()


class Size(int):
    """Bytes. An int with a name of its own, so that decoders know to read `64KiB` here."""

    __slots__ = ()


class Backoff:
    """Waits before the second, third, ... attempt. `doubles`: the one step doubles each time (`backoff: 1s`)."""

    __slots__ = ("doubles", "steps_s")

    def __init__(self, steps_s: tuple[float, ...], *, doubles: bool) -> None:
        self.steps_s = steps_s
        self.doubles = doubles

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Backoff) and (self.steps_s, self.doubles) == (other.steps_s, other.doubles)

    def __hash__(self) -> int:
        return hash((self.steps_s, self.doubles))

    def __repr__(self) -> str:
        return f"Backoff({self.steps_s!r}, doubles={self.doubles!r})"


class Rate:
    """So many in so long, at most: `10/s`, `100/m`, `1000/h`, `50/d`."""

    __slots__ = ("count", "unit")

    def __init__(self, count: int, unit: str) -> None:
        self.count = count
        self.unit = unit

    @property
    def per_s(self) -> float:
        return self.count / _DURATION_UNIT_S[self.unit]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rate) and (self.count, self.unit) == (other.count, other.unit)

    def __hash__(self) -> int:
        return hash((self.count, self.unit))

    def __str__(self) -> str:
        return f"{self.count}/{self.unit}"

    def __repr__(self) -> str:
        return f"Rate({self.count!r}, {self.unit!r})"


def parse_rate(value: object) -> Rate:
    """From `10/s`, `100/m`, `1000/h` or `50/d`. Raises ValueError."""
    found = _RATE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None or not 1 <= int(found[1]) <= RATE_COUNT_MAX:
        raise ValueError(
            f"a rate is like 10/s, 100/m, 1000/h or 50/d (1 to {RATE_COUNT_MAX}), not {_shown(value)}"
        )
    return Rate(int(found[1]), found[2])


def parse_backoff(value: object) -> Backoff:
    """`1s` (doubles from it) or a list (the schedule; its last step repeats). Raises ValueError."""
    if isinstance(value, list):
        if not value or len(value) > 100:
            raise ValueError("a backoff schedule is a list of 1 to 100 durations")
        return Backoff(tuple(float(parse_duration(item)) for item in value), doubles=False)
    return Backoff((float(parse_duration(value)),), doubles=True)


def decode_unit(wanted: type, value: Any) -> Any:
    """msgspec's dec_hook for the types of this module."""
    if wanted is Duration:
        return parse_duration(value)
    if wanted is Size:
        return parse_size(value)
    if wanted is Backoff:
        return parse_backoff(value)
    if wanted is Rate:
        return parse_rate(value)
    raise NotImplementedError(f"no decoder for {wanted}")


def encode_unit(value: Any) -> Any:
    """msgspec's enc_hook for the types of this module."""
    if isinstance(value, Duration):
        return float(value)
    if isinstance(value, Size):
        return int(value)
    if isinstance(value, Backoff):
        return value.steps_s[0] if value.doubles else list(value.steps_s)
    if isinstance(value, Rate):
        return str(value)
    raise NotImplementedError(f"no encoder for {type(value)}")


def parse_duration(value: object) -> Duration:
    """Seconds from `45m`, `10s`, `500ms`, `1h30m` or a number. Raises ValueError with what was wrong."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"a duration is like 45m, 10s or a number of seconds, not {_shown(value)}")
    seconds = _duration_text(value.strip()) if isinstance(value, str) else value
    if (
        not 0 <= seconds <= DURATION_MAX_S
    ):  # NaN fails this too; an int of any length is compared before it is a float
        raise ValueError(f"a duration must be between 0 and ten years, not {_shown(value)}")
    return Duration(seconds)


def _duration_text(text: str) -> float:
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    total, end = 0.0, 0
    for part in _DURATION_PART.finditer(text):
        if part.start() != end:
            break
        total += float(part[1]) * _DURATION_UNIT_S[part[2]]
        end = part.end()
    if not text or end != len(text):
        raise ValueError(f"a duration is like 45m, 10s, 500ms or 1h30m, not {_shown(text)}")
    return total


def format_duration(seconds: float) -> str:
    """The short form for people: 0.4s, 12s, 3m05s, 2h10m, 4d02h."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def parse_size(value: object) -> Size:
    """Bytes from `64KiB`, `10MB`, `512` or a whole number. Raises ValueError with what was wrong."""
    size: float
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        size = float(match[1]) * _SIZE_UNIT[(match[2] or "").upper()]
    else:
        raise ValueError(f"a size is like 64KiB, 10MB or a number of bytes, not {_shown(value)}")
    if not 0 <= size <= SIZE_MAX:
        raise ValueError(f"a size must be between 0 and 1024 TiB, not {_shown(value)}")
    return Size(size)


def parse_time_us(value: str) -> int:
    """Microseconds since the epoch from an RFC 3339 time. Raises ValueError; a time needs its zone."""
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(f"a time is like 2026-04-07T18:30:00Z, not {_shown(value)}") from None
    if moment.tzinfo is None:
        raise ValueError(f"a time needs its zone (a Z at the end for UTC): {_shown(value)}")
    try:
        moment.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"a time must lie in the years 1 to 9999 of UTC: {_shown(value)}") from None
    return (moment - _EPOCH) // _US  # whole numbers: a float loses the last microsecond


def parse_moment_us(value: str, now_us: int) -> int:
    """A time as people say it: RFC 3339, or how long ago (`2h`, `30m`). Raises ValueError."""
    text = value.strip()
    if re.match(r"\d{4}-", text):
        return parse_time_us(text)
    try:
        ago_s = parse_duration(text)
    except ValueError:
        raise ValueError(
            f"a time is like 2026-04-07T18:30:00Z, or 2h for two hours ago, not {_shown(value)}"
        ) from None
    return now_us - int(ago_s * 1_000_000)


def format_time(us: int | None) -> str | None:
    """RFC 3339 in UTC with milliseconds, or None."""
    if us is None:
        return None
    return (_EPOCH + us * _US).isoformat(timespec="milliseconds")[:-6] + "Z"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
