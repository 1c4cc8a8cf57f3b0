"""The keys of a webhook's secret files: looked at before a try, ten times a second at most, and read when they have changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final

from agentqd.core.errors import ConfigError
from agentqd.sinks.secretfile import place, secret_lines
from agentqd.sinks.signing import read_keys

_SETTLED_NS: Final = (
    2_000_000_000  # a file changed so shortly before may change again within one tick of its clock
)
_LOOK_EVERY_US: Final = 100_000  # under load a look gives the interpreter's lock away, and waits for it
_Identity = tuple[int, ...]


class SigningKeys:
    """Invariant: what `now` returns is what a reading of all files would have given within the last 100 ms."""

    def __init__(self, files: Sequence[str], now_us: Callable[[], int]) -> None:
        self._files = list(files)
        self._now_us = now_us
        self._identity: list[_Identity] = []
        self._keys: list[bytes] = []
        self._looked_us = 0

    def now(self) -> list[bytes]:
        """Of all files, in their order; none without a file. Raises ConfigError, which names the file and no secret."""
        if not self._files:
            return []
        now_us = self._now_us()
        if self._identity and 0 <= now_us - self._looked_us < _LOOK_EVERY_US:
            return self._keys
        self._looked_us = now_us
        identity = [_identity(path) for path in self._files]
        if identity == self._identity:
            return self._keys
        self._identity = []
        keys: list[bytes] = []
        for path in self._files:
            keys += read_keys(secret_lines(path), path)
        settled = now_us * 1000 - _SETTLED_NS
        if all(each[-1] < settled for each in identity) and identity == [
            _identity(path) for path in self._files
        ]:
            self._identity, self._keys = identity, keys
        return keys


def _identity(path: str) -> _Identity:
    """Changes with the content, the owner and the mode of the file that the path leads to; its time of change comes last."""
    try:
        found = os.stat(place(path))
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(f"the secret file {path} cannot be read: {why}") from error
    return (
        found.st_dev,
        found.st_ino,
        found.st_mode,
        found.st_uid,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
    )
