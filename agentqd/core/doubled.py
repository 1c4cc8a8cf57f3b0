"""A key that stands twice in one JSON object: ambiguous input, which JSON readers settle in silence, each in its own way. Pure.

msgspec cannot tell, so the bytes are read once more: 2 microseconds for a usual line, 2 milliseconds for one of 1 MiB. (A hunt
for suspicious bytes first was measured: half of that for short lines, several times as much for long ones.)
"""

from __future__ import annotations

import json
from typing import Any, Final


class DoubledKey(ValueError):
    """Raised by `only_once`."""

    def __init__(self, name: str) -> None:
        self.name = name[:80].encode("utf-8", "backslashreplace").decode()  # JSON can name a lone surrogate
        super().__init__(f"the key {self.name!r} stands twice in one object")


def only_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook` of `json`. Raises DoubledKey."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise DoubledKey(name)
            seen.add(name)
    return found


_decoder: Final = json.JSONDecoder(object_pairs_hook=only_once, parse_int=str, parse_float=str)


def refuse_doubled_keys(raw: bytes) -> None:
    """Raises DoubledKey for the first one, at any depth and however it is escaped, in what a decoder has taken as JSON before."""
    try:
        _decoder.decode(raw.decode("utf-8", "replace"))
    except DoubledKey:
        raise
    except (ValueError, RecursionError):
        return  # not JSON after all, or deeper than anything that has a meaning: its decoder's business
