"""What of a sink's state outlives the daemon, in rows of `meta`: its breaker, that its receiver wants nothing, a person's word, its tokens.

The runner writes what it has learned (`SinkMemory`), a person's verbs write their word (`Word`), each its own row: so neither
overwrites the other, whatever is under way.
"""

from __future__ import annotations

import hashlib
import sqlite3
from typing import Any, Final, TypeVar

import msgspec

from agentqd.core.breaker import BreakerMemory
from agentqd.core.bucket import BucketMemory
from agentqd.core.limits import SINK_REASON_CHARS_MAX
from agentqd.core.settings import Sink as SinkSettings
from agentqd.core.units import encode_unit
from agentqd.storage.transaction import Transaction

_US: Final = 1_000_000
Source = sqlite3.Connection | Transaction
T = TypeVar("T")


class SinkMemory(msgspec.Struct, frozen=True):
    digest: str = ""  # of the settings that it was written under: an edit begins anew
    at_us: int = 0
    breaker: BreakerMemory = BreakerMemory()
    disabled: str | None = None  # by its receiver: why

    def breaker_at(self, now_us: int) -> BreakerMemory:
        """The breaker's memory at this time; a clock that has gone back shortens nothing and lengthens nothing."""
        gone_s = max(0, now_us - self.at_us) / _US
        return BreakerMemory(self.breaker.openings, max(0.0, self.breaker.open_for_s - gone_s))


class Word(msgspec.Struct, frozen=True):
    """A person's. It stands over restarts and edits of the config, also while the sink is not in the config."""

    off: bool = False
    at_us: int = 0
    reason: str = ""
    uid: int | None = None  # whose word
    releasing: bool = False  # enabled, and not all rows that were held because of it are released yet

    @property
    def why(self) -> str | None:
        """Why nothing is sent, or None."""
        if not self.off:
            return None
        who = "by a person" if self.uid is None else f"by a person (uid {self.uid})"
        return f"{who}: {self.reason[:SINK_REASON_CHARS_MAX]}" if self.reason else who


class Kept(msgspec.Struct, frozen=True):
    """All of it."""

    memory: SinkMemory = SinkMemory()
    word: Word = Word()
    bucket: BucketMemory | None = None

    @property
    def why_disabled(self) -> str | None:
        return self.word.why or self.memory.disabled


def digest_of(settings: SinkSettings) -> str:
    """Of what is set: an option that a later version adds changes nothing."""
    shown: dict[str, Any] = msgspec.to_builtins(settings, enc_hook=encode_unit)
    given = {name: value for name, value in shown.items() if value is not None}
    return hashlib.sha256(msgspec.json.encode(given, order="sorted")).hexdigest()


def load(source: Source, sink: str) -> SinkMemory:
    return _load(source, f"sink:{sink}", SinkMemory) or SinkMemory()


def load_word(source: Source, sink: str) -> Word:
    return _load(source, f"sink_word:{sink}", Word) or Word()


def load_all(source: Source, sink: str) -> Kept:
    bucket = _load(source, f"sink_tokens:{sink}", BucketMemory)
    return Kept(load(source, sink), load_word(source, sink), bucket)


def disabled_names(source: Source) -> list[str]:
    """Sinks that a person has disabled, in the config or not."""
    rows = source.execute(
        "SELECT key, value FROM meta WHERE key >= 'sink_word:' AND key < 'sink_word;'"
    ).fetchall()
    return [key.partition(":")[2] for key, _ in rows if load_word(source, key.partition(":")[2]).off]


def save(tx: Transaction, sink: str, memory: SinkMemory) -> None:
    _save(tx, f"sink:{sink}", memory)


def save_word(tx: Transaction, sink: str, word: Word) -> None:
    _save(tx, f"sink_word:{sink}", word)


def save_bucket(tx: Transaction, sink: str, bucket: BucketMemory) -> None:
    _save(tx, f"sink_tokens:{sink}", bucket)


def _load(source: Source, key: str, kind: type[T]) -> T | None:
    row = source.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    if row is None:
        return None
    try:
        return msgspec.json.decode(row[0], type=kind)
    except msgspec.DecodeError:  # of another version: only a hint is lost
        return None


def _save(tx: Transaction, key: str, value: msgspec.Struct) -> None:
    tx.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, msgspec.json.encode(value).decode()))
