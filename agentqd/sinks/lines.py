"""How the lines of an append sink look: what a plug says about its own, and what two of them share. Pure."""

from __future__ import annotations

from typing import Final, Protocol

import msgspec

from agentqd.core.envelope import data_of
from agentqd.sinks.base import Delivery

POSITION_MAX: Final = 2**53 - 1  # what every JSON reader holds exactly
quoted: Final = msgspec.json.Encoder().encode


class Lines(Protocol):
    """How one sink's lines look. Pure."""

    numbered: (
        bool  # a line says its own position (seq); otherwise the position is the offset of the line's end
    )

    def line(self, delivery: Delivery, position: int) -> bytes:
        """With its newline, and no other. Raises ValueError if the payload can never be a line."""
        ...

    def identify(self, line: bytes) -> tuple[str, int] | None:
        """(delivery id, its seq or 0), or None if this is no whole line of ours."""
        ...

    def ours(self, fragment: bytes) -> bool:
        """May a torn last line that begins like this be cut?"""
        ...


class _Mark(msgspec.Struct):
    delivery_id: str
    seq: int = 0


_decode_mark: Final = msgspec.json.Decoder(_Mark).decode


def mark_of(line: bytes) -> tuple[str, int] | None:
    """(delivery_id, seq) of a line that is an object with these members; a seq out of bounds is no line of ours."""
    try:
        mark = _decode_mark(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return (mark.delivery_id, mark.seq) if 0 <= mark.seq <= POSITION_MAX else None


def opened_data(delivery: Delivery) -> bytes:
    """The data object's bytes without the closing brace, ready for further members. Raises ValueError if it is none."""
    data = data_of(delivery.payload)
    if data[:1] != b"{" or data[-1:] != b"}" or b"\n" in data:
        raise ValueError("its data is not a JSON object on one line")
    return data[:-1] + b"," if len(data) > 2 else b"{"
