"""Envelopes appended to a file that a person names, one line each. Delivered means: appended and on the disk.

The file is made if it is missing, its folder is not. It may be rotated or replaced by others at any time. The position
is the offset of the line's end. A torn last line is cut only where it begins like an envelope; anything else that is
found there is somebody's and is closed with a newline.
"""

from __future__ import annotations

from typing import Final

import msgspec

from agentqd.core.errors import ConfigError
from agentqd.sinks.appendsink import AppendSink
from agentqd.sinks.base import Context, Delivery

_BEGINNING: Final = b'{"specversion":"1.0","id":"d'


class _Head(msgspec.Struct):
    specversion: str
    id: str


_decode_head: Final = msgspec.json.Decoder(_Head).decode


class EnvelopeLines:
    numbered = False

    def line(self, delivery: Delivery, position: int) -> bytes:  # noqa: ARG002  (a Lines method)
        payload = delivery.payload
        if payload[:1] != b"{" or payload[-1:] != b"}" or b"\n" in payload:
            raise ValueError("it is not a JSON object on one line")
        return payload + b"\n"

    def identify(self, line: bytes) -> tuple[str, int] | None:
        try:
            return _decode_head(line).id, 0
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None

    def ours(self, fragment: bytes) -> bool:
        return fragment.startswith(_BEGINNING) or _BEGINNING.startswith(fragment)


class FileSink(AppendSink):
    def __init__(self, context: Context) -> None:
        if not context.settings.path:
            raise ConfigError(f"the sink {context.name} is of type file and needs a path")
        super().__init__(context, context.settings.path, EnvelopeLines())
