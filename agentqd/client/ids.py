"""What a client adds to a task before it sends it: an id and a time."""

from __future__ import annotations

import os
import time

from agentqd.core.errors import InvalidTask
from agentqd.core.units import format_time

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: sorts as it counts, no letters to mix up
TIME_DIGITS = 9
RANDOM_DIGITS = 11


def new_task_id(now_ms: int | None = None, random: bytes | None = None) -> str:
    """20 characters that sort by time: 45 bits of milliseconds, 55 random bits."""
    moment = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    return _digits(moment, TIME_DIGITS) + _digits(
        int.from_bytes(random or os.urandom(7), "big"), RANDOM_DIGITS
    )


def _digits(value: int, count: int) -> str:
    return "".join(ALPHABET[value >> 5 * place & 31] for place in reversed(range(count)))


def now_text() -> str:
    """The time for `submitted_at`."""
    text = format_time(time.time_ns() // 1000)
    assert text is not None
    return text


def check_text(field: str, text: str) -> str:
    """The text, if it is Unicode. Raises InvalidTask for bytes that were not UTF-8 (argv keeps them as surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidTask(
            f"{field}: not UTF-8 at character {error.start}", code="invalid_utf8", field=field
        ) from None
    return text
