"""Standard Webhooks signatures (symmetric, v1): HMAC-SHA256 over `id.timestamp.body`. Pure.

Several keys give several signatures, separated by spaces: while a secret is exchanged, a receiver with the old one and
one with the new one can both verify.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

from agentqd.core.errors import ConfigError

PREFIX: Final = "whsec_"
KEYS_MAX: Final = 8  # every one of them costs a pass over every body


def read_keys(lines: Sequence[str], where: str) -> list[bytes]:
    """The keys of `whsec_BASE64` lines. Raises ConfigError, which names the line's number and never its content."""
    if len(lines) > KEYS_MAX:
        raise ConfigError(f"{where}: {len(lines)} secrets; at most {KEYS_MAX} sign at once")
    return [_key(line, f"{where}: secret {number}") for number, line in enumerate(lines, 1)]


def _key(line: str, where: str) -> bytes:
    if not line.startswith(PREFIX):
        raise ConfigError(f"{where} does not begin with {PREFIX} (Standard Webhooks)")
    try:
        key = base64.b64decode(line[len(PREFIX) :], validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError(f"{where} is not base64 after {PREFIX}") from None  # the cause might show it
    if not key:
        raise ConfigError(f"{where} is empty after {PREFIX}")
    return key


def signature(keys: Sequence[bytes], delivery_id: str, timestamp_s: int, body: bytes) -> str:
    """The value of `webhook-signature`."""
    text = b"%s.%d.%s" % (delivery_id.encode("ascii"), timestamp_s, body)
    signed = []
    for key in keys:
        mac = _keyed(key).copy()
        mac.update(text)
        signed.append(_v1(mac.digest()))
    return " ".join(signed)


class Signer:
    """The same for a body that comes in pieces."""

    def __init__(self, keys: Sequence[bytes], delivery_id: str, timestamp_s: int) -> None:
        head = b"%s.%d." % (delivery_id.encode("ascii"), timestamp_s)
        self._macs = [_keyed(key).copy() for key in keys]
        self.update(head)

    def update(self, piece: bytes) -> None:
        for mac in self._macs:
            mac.update(piece)

    def signature(self) -> str:
        return " ".join([_v1(mac.digest()) for mac in self._macs])


@functools.lru_cache(KEYS_MAX)
def _keyed(key: bytes) -> hmac.HMAC:
    """With the key taken in: a copy of it costs half of beginning anew."""
    return hmac.new(key, digestmod=hashlib.sha256)


def _v1(digest: bytes) -> str:
    return "v1," + base64.b64encode(digest).decode("ascii")
