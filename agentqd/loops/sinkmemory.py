"""What of a sink's state outlives the daemon: its breaker, and that it is disabled. One row of `meta` a sink, written only when it changes."""

from __future__ import annotations

import hashlib
import sqlite3
from typing import Final

import msgspec

from agentqd.core.breaker import BreakerMemory
from agentqd.core.settings import Sink as SinkSettings
from agentqd.core.units import encode_unit
from agentqd.storage.transaction import Transaction

_US: Final = 1_000_000


class SinkMemory(msgspec.Struct, frozen=True):
    digest: str = ""  # of the settings that it was written under: an edit begins anew
    at_us: int = 0
    breaker: BreakerMemory = BreakerMemory()
    disabled: str | None = None  # why

    def breaker_at(self, now_us: int) -> BreakerMemory:
        """The breaker's memory at this time; a clock that has gone back shortens nothing and lengthens nothing."""
        gone_s = max(0, now_us - self.at_us) / _US
        return BreakerMemory(self.breaker.openings, max(0.0, self.breaker.open_for_s - gone_s))


def digest_of(settings: SinkSettings) -> str:
    return hashlib.sha256(msgspec.json.encode(settings, enc_hook=encode_unit)).hexdigest()


def load(source: sqlite3.Connection | Transaction, sink: str) -> SinkMemory:
    row = source.execute("SELECT value FROM meta WHERE key = ?", (_key(sink),)).fetchone()
    if row is None:
        return SinkMemory()
    try:
        return msgspec.json.decode(row[0], type=SinkMemory)
    except msgspec.DecodeError:  # of another version: only a hint is lost
        return SinkMemory()


def save(tx: Transaction, sink: str, memory: SinkMemory) -> None:
    tx.execute(
        "INSERT OR REPLACE INTO meta VALUES (?, ?)", (_key(sink), msgspec.json.encode(memory).decode())
    )


def _key(sink: str) -> str:
    return f"sink:{sink}"
