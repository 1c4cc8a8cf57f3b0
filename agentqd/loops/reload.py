"""Config edits apply while the daemon runs: a saved file (inotify, and a slow look behind it), SIGHUP, or a request.

Valid → applied within a second, to running tasks' clocks too. Invalid → the old settings stay, an alert says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from typing import Final

from agentqd.core.errors import ConfigError
from agentqd.core.settings import Settings
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.storage.configfile import Loaded, load_settings
from agentqd.system.inotify import InotifyUnavailable, Overflow, Watcher

_LOOK_EVERY_S: Final = 5.0
_SETTLE_S: Final = 0.05  # an editor that writes in several steps
_MASK: Final = (
    0x8 | 0x80 | 0x100 | 0x200 | 0x40 | 0x01000000
)  # CLOSE_WRITE, MOVED_TO, CREATE, DELETE, MOVED_FROM, ONLYDIR


class Reload:
    """The loop, and `now` for whoever asks."""

    def __init__(self, box: Box, inotify: Watcher, path: str, needed: bool, sha256: str) -> None:
        self.box = box
        self.path = path
        self._needed = needed  # named by a person: it must not vanish
        self.sha256 = sha256
        self.applied_at = box.clock.now_us()
        self.last_error: ConfigError | None = None
        self._inotify = inotify
        self._seen = sha256
        self._lock = asyncio.Lock()

    async def run(self) -> None:
        """Until cancelled. Raises JournalError."""
        with contextlib.suppress(OSError, InotifyUnavailable):
            self._inotify.add(os.path.dirname(self.path), _MASK, "config")
        look = True  # at once: an edit during start-up is seen here or by the watch
        while True:
            self.box.beat("reload")
            if look:
                await asyncio.sleep(_SETTLE_S)
                if self._digest() != self._seen:
                    with contextlib.suppress(ConfigError):
                        await self.now()
            hints = await self._inotify.wait(_LOOK_EVERY_S)
            name = os.path.basename(self.path)
            look = isinstance(hints, Overflow) or not hints or any(hint.name == name for hint in hints)

    def _digest(self) -> str:
        try:
            with open(self.path, "rb") as file:
                return hashlib.sha256(file.read(2 * 1024 * 1024)).hexdigest()
        except FileNotFoundError:
            return ""
        except OSError as error:
            return str(error)

    async def now(self) -> bool:
        """Read the file and apply it; True if anything changed. Raises ConfigError (told, alerted; the old settings stay)."""
        async with self._lock:
            self._seen = self._digest()
            try:
                loaded = self._load()
            except ConfigError as error:
                await self._refuse(error)
                raise
            changed = loaded.settings != self.box.settings
            recovered, self.last_error = self.last_error is not None, None
            self.sha256 = loaded.sha256
            if changed:
                await self._apply(loaded.settings)
            elif recovered:
                self.box.log.info("config_unchanged", path=self.path)
            return changed

    def _load(self) -> Loaded:
        if not self._seen and (self._needed or self.sha256):
            raise ConfigError(
                f"{self.path}: the config file is gone; the settings stay as they were", problems=[]
            )
        return load_settings(self.path if self._seen else None, self.box.folders.state)

    async def _apply(self, settings: Settings) -> None:
        self.applied_at = self.box.clock.now_us()
        self.box.apply(settings)
        self.box.log.info("config_applied", path=self.path, sha256=self.sha256[:16])
        sha256 = self.sha256
        await self.box.journal.commit(lambda tx: tx.event(None, "config_applied", sha256=sha256))

    async def _refuse(self, error: ConfigError) -> None:
        self.last_error = error
        self.box.log.error("config_refused", path=self.path, error=error.message)
        key = self._seen[:32]
        message = f"the edited config is not applied, the old one stays: {error.message}"[:2000]
        await self.box.journal.commit(
            lambda tx: alert(tx, self.box, "bad_config", message, key=key, path=self.path)
        )
