"""Has an agent said that its usage limit is reached, and until when? Pure: text in, a `Limit` or None out.

Rules:
1. Only asked about what failed, about the last few KiB (limits.USAGE_LIMIT_TAIL_BYTES) of its output, line by line.
2. A sign is a plain text that a line must contain, whatever the case; `*` in it stands for anything within the line. No regular
   expression of a person's is ever run over a worker's output: nothing there can be made to take long.
3. Of output in JSON lines only records that tell of an error count: an agent that works on "rate limits" talks of them, too.
4. A time is looked for where the sign stands and in the few lines after it. One without a zone is the box's local time, one
   without a date its next occurrence. What is past, or further ahead than a week, is not believed: the time is unknown then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, Final

import msgspec

from agentqd.core.limits import (
    USAGE_LIMIT_AHEAD_MAX_S,
    USAGE_LIMIT_LINE_CHARS_MAX,
    USAGE_LIMIT_TEXT_CHARS_MAX,
)

US: Final = 1_000_000
FALLBACK_S: Final = 900.0  # the time is unknown: so long, then twice that, and so on
FALLBACK_MAX_S: Final = 3600.0
JUST_PASSED_S: Final = 3600.0  # a time of day that passed so lately is over, not tomorrow's
REJECTED: Final = "rate_limit_event"  # the sign for claude's own record of it
_JSON_LINES: Final = frozenset({"claude-json", "claude-stream-json", "codex-jsonl", "opencode-jsonl"})
_ERROR_TYPES: Final = frozenset({"error", "turn.failed"})
_LINES_AFTER: Final = 12  # a message that is wrapped, or JSON that is spread over lines


class Limit(msgspec.Struct, frozen=True):
    """`until_us`: when the agent says that it works again; None: it does not say, or nothing that can be."""

    text: str
    until_us: int | None


def find_limit(
    signs: Sequence[str],
    result_format: str,
    stdout: str,
    stderr: str,
    now_us: int,
    *,
    exited_zero: bool = False,
    zone: tzinfo | None = None,
) -> Limit | None:
    """The newest sign in the tails of a failed attempt's output. `zone`: the box's (None: this process's).

    `exited_zero`: it did not fail by its exit code; then only a final record that says `is_error` can tell of a limit.
    """
    as_json = result_format in _JSON_LINES
    if not signs or (exited_zero and not as_json):
        return None
    parts = [[piece for piece in sign.lower().split("*") if piece] for sign in signs]
    streams = [stdout] if exited_zero else [stdout, stderr]
    for stream in streams:
        lines = _lines(stream, as_json=as_json, records_only=exited_zero)
        for at in range(len(lines) - 1, -1, -1):
            if any(_says(lines[at], sign) for sign in parts):
                until = _time_us(lines[at : at + 1 + _LINES_AFTER], now_us, zone)
                return Limit(_plain(lines[at])[:USAGE_LIMIT_TEXT_CHARS_MAX], until)
    return None


def fallback_s(strikes: int) -> float:
    """How long to wait where nobody says: the `strikes`-th time in a row (1 is the first)."""
    return min(FALLBACK_S * 2.0 ** min(strikes - 1, 10), FALLBACK_MAX_S)


def _says(line: str, sign: list[str]) -> bool:
    low, at = line.lower(), 0
    for piece in sign:
        found = low.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    return bool(sign)


def _plain(line: str) -> str:
    """For people: what the worker wrote, without anything that moves a terminal."""
    return " ".join("".join(char if char.isprintable() else " " for char in line).split())


def _lines(stream: str, *, as_json: bool, records_only: bool) -> list[str]:
    lines: list[str] = []
    for line in stream.splitlines():
        if as_json and line.lstrip().startswith("{"):
            lines += _told_by(line, last_word_only=records_only)
        elif not records_only and line.strip():
            lines.append(line[:USAGE_LIMIT_LINE_CHARS_MAX])
    return lines


def _told_by(line: str, *, last_word_only: bool) -> list[str]:
    """What a record says of an error; nothing where it says none, or is cut."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return []
    if not isinstance(record, dict):
        return []
    kind = record.get("type")
    if kind == "result":
        told = " ".join(str(record.get(name) or "") for name in ("subtype", "result", "errors"))
        return [told[:USAGE_LIMIT_LINE_CHARS_MAX]] if record.get("is_error") is True else []
    if last_word_only and kind != "turn.failed":
        return []
    info = record.get("rate_limit_info")
    if kind == REJECTED:
        rejected = isinstance(info, dict) and info.get("status") == "rejected"
        return [line[:USAGE_LIMIT_LINE_CHARS_MAX]] if rejected else []
    if kind in _ERROR_TYPES or record.get("error"):
        return [_flat(record)[:USAGE_LIMIT_LINE_CHARS_MAX]]
    return []


def _flat(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)


# Times. Every pattern is bounded in each of its repeats; each is searched in a bounded text.

_UNITS: Final = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_EPOCH: Final = re.compile(r'(?:\||resets?_?at"? ?[:=] ?"?)(\d{10}|\d{13})\b', re.IGNORECASE)
_SECONDS: Final = re.compile(
    r'(?:resets_in_seconds|retry[_-]after(?:_seconds)?|retrydelay)"? ?[:=] ?"?(\d{1,9}(?:\.\d{1,9})?)s?\b',
    re.IGNORECASE,
)
_RFC3339: Final = re.compile(
    r"\b(\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d)?)(?:\.\d{1,9})? ?(Z|UTC|[+-]\d\d:\d\d)?", re.IGNORECASE
)
_PIECE: Final = r"\d{1,6}(?:\.\d{1,3})? ?(?:days?|d|hours?|hrs?|h|minutes?|mins?|m|seconds?|secs?|s)\b"
_AFTER: Final = re.compile(
    rf"\b(?:in|after|for) ((?:{_PIECE}|[hms\d]{{2,20}}\b)(?:,? (?:and )?{_PIECE}){{0,4}})", re.IGNORECASE
)
_AMOUNT: Final = re.compile(r"(\d{1,6}(?:\.\d{1,3})?) ?([dhms])", re.IGNORECASE)
_CLOCK: Final = r"(\d{1,2})(?::(\d\d))?(?::\d\d)? ?(am|pm)?\b"
_DATE: Final = re.compile(
    rf"\b({'|'.join(_MONTHS)})[a-z]{{0,6}}\.? (\d{{1,2}})(?:st|nd|rd|th)?,?(?: (\d{{4}}))?,?(?: at)? {_CLOCK}",
    re.IGNORECASE,
)
_OF_DAY: Final = re.compile(
    rf"\b(?:until|till|resets?|reset at|again|at|after)(?: at)? {_CLOCK}", re.IGNORECASE
)
_ZONE: Final = re.compile(r"\(?\b(UTC|GMT|[A-Z][A-Za-z_]{1,30}/[A-Za-z_+-]{1,30}(?:/[A-Za-z_]{1,30})?)\b\)?")


def _time_us(lines: list[str], now_us: int, zone: tzinfo | None) -> int | None:
    """The first time that can be: in the sign's own line, then in those after it as one text."""
    own = (
        " ".join(lines[:2]) if lines[0][-1:].isdigit() else lines[0]
    )  # wrapped within "3 hours 20 / minutes"
    for text in (own, " ".join(lines)):
        bounded = " ".join(text[: 2 * USAGE_LIMIT_LINE_CHARS_MAX].split())
        for at in _times_us(bounded, now_us, zone):
            if now_us < at <= now_us + int(USAGE_LIMIT_AHEAD_MAX_S * US):
                return at
    return None


def _times_us(text: str, now_us: int, zone: tzinfo | None) -> Iterator[int]:
    """What may be meant, the surest first."""
    if found := _EPOCH.search(text):
        yield int(found[1]) * (US if len(found[1]) == 10 else 1000)
    if found := _SECONDS.search(text):
        yield now_us + int(float(found[1]) * US)
    if found := _AFTER.search(text):
        wait_s = sum(float(n) * _UNITS[unit.lower()] for n, unit in _AMOUNT.findall(found[1]))
        if wait_s > 0:
            yield now_us + int(wait_s * US)
    try:
        yield from _clocks_us(text, now_us, zone)
    except (ValueError, OverflowError, OSError):  # the 31st of February; a zone that this box does not know
        return


def _clocks_us(text: str, now_us: int, zone: tzinfo | None) -> Iterator[int]:
    if found := _RFC3339.search(text):
        moment = datetime.fromisoformat(found[1].replace(" ", "T"))
        written = (found[2] or "").upper()
        own = (
            UTC if written in {"Z", "UTC"} else datetime.fromisoformat(f"2000-01-01T00:00:00{written}").tzinfo
        )
        yield _us(moment, own or _zone_of(text, zone))
    where = _zone_of(text, zone)
    now = _local(now_us, where)
    if found := _DATE.search(text):
        hour, minute = _hour_minute(found[4], found[5], found[6])
        month = _MONTHS.index(found[1][:3].lower()) + 1
        moment = datetime(int(found[3] or now.year), month, int(found[2]), hour, minute)  # noqa: DTZ001 - its zone comes now
        if not found[3] and moment < now - timedelta(days=180):
            moment = moment.replace(year=now.year + 1)  # "Jan 2", said in December
        yield _us(moment, where)
    elif found := _OF_DAY.search(text):
        if found[2] is None and found[3] is None:
            return  # "again at 5": five what?
        hour, minute = _hour_minute(found[1], found[2], found[3])
        moment = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
        if moment <= now - timedelta(seconds=JUST_PASSED_S):
            moment += timedelta(days=1)
        yield _us(moment, where)


def _hour_minute(hour: str, minute: str | None, half: str | None) -> tuple[int, int]:
    """Raises ValueError for what no clock shows."""
    h, m = int(hour), int(minute or 0)
    if half:
        if not 1 <= h <= 12:
            raise ValueError(hour)
        h = h % 12 + (12 if half.lower() == "pm" else 0)
    if not (h <= 23 and m <= 59):
        raise ValueError(f"{hour}:{minute}")
    return h, m


def _zone_of(text: str, zone: tzinfo | None) -> tzinfo | None:
    """The zone that is named, else the box's. Raises ValueError for one that this box does not know."""
    found = _ZONE.search(text)
    if found is None:
        return zone
    if found[1] in {"UTC", "GMT"}:
        return UTC
    import zoneinfo  # only here: a daemon that never meets a limit need not load it

    try:
        return zoneinfo.ZoneInfo(found[1])
    except (zoneinfo.ZoneInfoNotFoundError, OSError) as error:
        raise ValueError(found[1]) from error


def _local(now_us: int, zone: tzinfo | None) -> datetime:
    """Now, as a clock in that zone shows it (naive)."""
    return datetime.fromtimestamp(now_us / US, zone).replace(tzinfo=None)


def _us(moment: datetime, zone: tzinfo | None) -> int:
    return int((moment if zone is None else moment.replace(tzinfo=zone)).timestamp() * US)
