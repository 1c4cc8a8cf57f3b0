"""The CloudEvents 1.0 envelope of an outbox entry, and its stable id.

Promises:
1. The delivery id depends on (state folder, task, run, kind, key) only: sent again, it is the same id. It has no dot.
   A worker's entry leaves the run out, so that a new run never sends a delivered key again.
2. The bytes are made once and stored; `data` stands last, so that `data_of` gives the very bytes of the data object.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final, Literal

import msgspec

from agentqd.core.units import format_time

Kind = Literal["result", "entry", "broken", "alert", "rejection"]  # broken: an entry that was set aside
TEST_TYPE: Final = "agentq.test"  # a person's test of a sink
_DATA: Final = b',"data":'
_encode = msgspec.json.Encoder().encode


def delivery_id(state_id: str, task: str, run: int, kind: Kind, key: str) -> str:
    parts = (state_id, task, "" if kind == "entry" else str(run), kind, key)
    text = "\x00".join(parts).encode("utf-8", "surrogatepass")
    return "d" + hashlib.sha256(text).hexdigest()[:31]


def seal(entry_id: str, type_: str, box: str, subject: str | None, at_us: int, data: dict[str, Any]) -> bytes:
    """The envelope's bytes."""
    head: dict[str, Any] = {"specversion": "1.0", "id": entry_id, "source": f"/agentqd/{box}", "type": type_}
    if subject is not None:
        head["subject"] = subject
    head["time"] = format_time(at_us)
    head["datacontenttype"] = "application/json"
    return _encode(head)[:-1] + _DATA + _encode(data) + b"}"


def data_of(envelope: bytes) -> bytes:
    """The data object's bytes out of a sealed envelope."""
    return envelope[envelope.index(_DATA) + len(_DATA) : -1]
