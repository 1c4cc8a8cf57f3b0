"""A queue folder on a real disk, with a journal that is a dict."""

from __future__ import annotations

import json
import os
import pathlib
import time

from agentqd.storage.queuefile import Chunk, Notice, Position
from agentqd.storage.queuefolder import QueueFolder
from agentqd.system.clock import ManualClock

LINE_BYTES_MAX = 64 * 1024


class Reader:
    """The daemon's side: a QueueFolder, what it handed out, and what the journal has."""

    def __init__(self, folder: pathlib.Path, line_bytes_max: int = LINE_BYTES_MAX, **options: int) -> None:
        self.folder = folder
        self.live = folder / "tasks.jsonl"
        self.clock = ManualClock(now_us=time.time_ns() // 1000)
        self.line_bytes_max = line_bytes_max
        self.options = options
        self.journal: dict[int, Position] = {}
        self.lines: list[bytes] = []
        self.rejected: list[bytes] = []
        self.notices: list[Notice] = []
        self.queue = self._open()

    def _open(self) -> QueueFolder:
        positions = list(self.journal.values())
        return QueueFolder(
            str(self.folder), positions, self.line_bytes_max, self.clock.now_us, **self.options
        )

    def restart(self) -> None:
        """SIGKILL and a new start: only the journal is left."""
        self.queue.close()
        self.queue = self._open()

    def commit(self, chunk: Chunk) -> None:
        for position in chunk.positions:
            self.journal[position.source] = position
        for number in chunk.dropped:
            self.journal.pop(number, None)
        for line in chunk.lines:
            (self.rejected if line.too_long or line.unfinished else self.lines).append(line.raw)
        self.notices += chunk.notices
        self.queue.committed(chunk)

    def step(self, **limits: int) -> Chunk | None:
        chunk = self.queue.read(**limits)
        if chunk is not None:
            self.commit(chunk)
        return chunk

    def drain(self, **limits: int) -> list[bytes]:
        """Read until there is nothing new; what came."""
        before = len(self.lines)
        while self.step(**limits) is not None:
            pass
        return self.lines[before:]

    def maintain(self, rotate_bytes_max: int = 0) -> Chunk | None:
        chunk = self.queue.maintain(self.clock.now_us(), rotate_bytes_max)
        if chunk is not None:
            self.commit(chunk)
        return chunk

    def append(self, *lines: bytes) -> None:
        with self.live.open("ab") as file:
            file.write(b"".join(line + b"\n" for line in lines))

    def codes(self, level: str = "alert") -> list[str]:
        return [notice.code for notice in self.notices if notice.level == level]

    def names(self) -> list[str]:
        return sorted(os.listdir(self.folder))


def task(number: int, size: int = 3) -> bytes:
    """A good line, without its newline."""
    return json.dumps({"task": f"t{number}", "prompt": "p" * size}).encode()
