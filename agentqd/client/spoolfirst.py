"""The way to a box that first sends what was spooled for it.

Small and quick to import, because every verb with `--box` loads it: the spool itself is loaded only when something waits.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from agentqd.client.channel import Channel, Transport

SETTLED = ("refused", "damaged")  # folders beside the entries; names with a dot are locks and drafts


def may_wait(folder: str) -> bool:
    """Whether anything lies there that is to be sent or set aside: one listdir."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return any(not name.startswith(".") and name not in SETTLED for name in names)


class SpoolFirst:
    """Costs one listdir a contact when nothing waits. `send` raises when the box cannot be reached: then nothing of the
    request itself is sent either, and there is no second wait to learn the same."""

    def __init__(self, inner: Transport, folder: str, send: Callable[[], None]) -> None:
        self.inner = inner
        self._folder = folder
        self._send = send

    @property
    def name(self) -> str:
        return self.inner.name

    def open(self) -> Channel:
        if may_wait(self._folder):
            self._send()
        return self.inner.open()
