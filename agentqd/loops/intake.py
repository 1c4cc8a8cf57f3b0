"""The queue file's door: lines become tasks. inotify is a hint; a rescan every few seconds is the truth.

Invariants:
1. The position moves in the transaction that makes its lines durable: no line is skipped, none is taken twice.
2. Every non-blank line ends in exactly one of: a task, a duplicate, a rejection (kept, told, alerted).
3. A line that breaks this program costs itself only: it is rejected as `internal_error`, the others go on.
"""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec

from agentqd.core.errors import InvalidTask, JournalError, WriteConflict
from agentqd.core.lines import Line, split_glued
from agentqd.loops.admission import Accepted, Outcome, admit
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.loops.preparing import Candidate, prepare
from agentqd.loops.rejection import of_line, reject
from agentqd.storage import sources
from agentqd.storage.queuefile import Chunk, Notice, Position
from agentqd.storage.queuefolder import QueueFolder
from agentqd.storage.transaction import Transaction
from agentqd.system.failpoints import failpoint
from agentqd.system.inotify import InotifyUnavailable, Overflow, Watcher

_LINES_A_TURN: Final = 1000
_MAINTAIN_EVERY: Final = 6  # rescans
_FOLDER_MASK: Final = 0x2 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800 | 0x01000000
# IN_MODIFY, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF, IN_ONLYDIR


class Read(msgspec.Struct, frozen=True):
    """One line, or one part of a glued line, and what it is."""

    line: Line
    outcome: Candidate | InvalidTask


class Intake:
    """The loop and its numbers."""

    def __init__(self, box: Box, inotify: Watcher, positions: list[Position], group: int | None) -> None:
        self.box = box
        self.inotify = inotify
        self.folder = QueueFolder(
            box.folders.queue,
            positions,
            int(box.settings.limits.line_bytes_max),
            box.clock.now_us,
            group=group,
        )
        self.rejected = 0
        self.last_line_at: int | None = None
        self._maintained = box.clock.monotonic_s()
        self._one_at_a_time = 0
        self._watching = False

    async def run(self) -> None:
        """Until cancelled. Raises JournalError."""
        self._watch()  # before the first look: an append during start-up is seen by one of the two
        while True:
            self.box.beat("intake")
            if not self.box.disk_low:
                while await self._turn():
                    self.box.beat("intake")
            await self._maintain()
            hints = await self.inotify.wait(self.box.rescan_s)
            self.box.stir()
            if not self._watching or (not isinstance(hints, Overflow) and any(hint.gone for hint in hints)):
                self._watch()

    def _watch(self) -> None:
        try:
            self.inotify.add(self.box.folders.queue, _FOLDER_MASK, "queue")
            self._watching = True
        except (OSError, InotifyUnavailable) as error:
            self._watching = False
            self.box.log.warning("watch_failed", folder=self.box.folders.queue, error=str(error))

    async def _turn(self) -> bool:
        """Take the next lines, if there are any. False: nothing more for now."""
        chunk = self.folder.read(max_lines=1 if self._one_at_a_time else _LINES_A_TURN)
        if chunk is None:
            return False
        if chunk.is_empty:
            return True
        reads = [read for line in chunk.lines for read in self._read(chunk, line)]
        failpoint("lines_decided")
        try:
            await self.box.journal.commit(lambda tx: self._record(tx, chunk, reads))
        except JournalError:
            raise
        except Exception as error:  # noqa: BLE001 - a line that breaks us must not stop the queue
            await self._broken(chunk, error)
        else:
            self.folder.committed(chunk)
            self._one_at_a_time = max(0, self._one_at_a_time - 1)
        if chunk.lines:
            self.last_line_at = self.box.clock.now_us()
        return True

    async def _broken(self, chunk: Chunk, error: Exception) -> None:
        self.box.log.error("intake_failed", error=repr(error), lines=len(chunk.lines))
        if len(chunk.lines) > 1:
            self._one_at_a_time = len(
                chunk.lines
            )  # nothing was committed: the same lines come again, one by one
            return
        wrong = InvalidTask(
            f"agentqd failed on this line: {error!r}; please report it"[:400], code="internal_error"
        )
        reads = [Read(line, wrong) for line in chunk.lines]
        await self.box.journal.commit(lambda tx: self._record(tx, chunk, reads))
        self.folder.committed(chunk)

    def _read(self, chunk: Chunk, line: Line) -> list[Read]:
        if line.too_long:
            most = int(self.box.settings.limits.line_bytes_max)
            wrong = InvalidTask(
                f"the line has {line.length} bytes; the limit (limits.line_bytes_max) is {most}: put the prompt in a file"
                " and point to it with prompt_ref",
                code="line_too_long",
            )
            return [Read(line, wrong)]
        if line.unfinished:
            wrong = InvalidTask(
                "the line never got its newline, and its file has no writer any more", code="unfinished_line"
            )
            return [Read(line, wrong)]
        first = self._prepare(chunk, line)
        if not isinstance(first, InvalidTask) or first.code not in {"invalid_json", "invalid_utf8"}:
            return [Read(line, first)]
        glued = split_glued(line.raw)
        if glued is None:
            return [Read(line, first)]
        return self._unglue(chunk, line, *glued)

    def _unglue(self, chunk: Chunk, line: Line, prefix: bytes, suffix: bytes) -> list[Read]:
        """A torn line with a good one glued to its end: the torn part is rejected, the good one is taken."""
        shift = len(prefix)
        torn = Line(line.offset, shift, prefix)
        good = Line(line.offset + shift, line.length - shift, suffix)
        wrong = InvalidTask(
            "a torn line: its end is missing, and the next line was written right behind it", code="torn_line"
        )
        return [Read(torn, wrong), Read(good, self._prepare(chunk, good))]

    def _prepare(self, chunk: Chunk, line: Line) -> Candidate | InvalidTask:
        position = chunk.position
        assert position is not None
        source = {"kind": "file", "file": position.name, "offset": line.offset, "length": line.length}
        place = f"{position.dev}:{position.ino}:{position.btime_ns}:{line.offset}".encode()
        try:
            return prepare(line.raw, source, place, self.box)
        except InvalidTask as wrong:
            return wrong
        except Exception as error:  # noqa: BLE001 - invariant 3: it costs this line, never the queue
            self.box.log.error("line_failed", error=repr(error), offset=line.offset)
            return InvalidTask(
                f"agentqd failed on this line: {error!r}; please report it"[:400], code="internal_error"
            )

    def _record(self, tx: Transaction, chunk: Chunk, reads: list[Read]) -> None:
        outcomes = admit(tx, self.box, [read.outcome for read in reads])
        for read, outcome in zip(reads, outcomes, strict=True):
            if isinstance(outcome, InvalidTask | WriteConflict):
                assert chunk.position is not None
                reject(tx, self.box, of_line(chunk.position, read.line), outcome)
                self.rejected += 1
        sources.save(tx, chunk.positions, chunk.dropped)
        for notice in chunk.notices:
            if notice.level == "alert":
                key = hashlib.sha256(repr((notice.fields, tx.now_us // 1_000_000)).encode()).hexdigest()[:16]
                alert(tx, self.box, f"queue_{notice.code}", notice.message, key=key, **notice.fields)
            else:
                self._say_later(tx, notice)
        tx.later(lambda: self._log(outcomes))

    def _say_later(self, tx: Transaction, notice: Notice) -> None:
        tx.later(lambda: self.box.log.info("queue_notice", code=notice.code, message=notice.message))

    def _log(self, outcomes: list[Outcome]) -> None:
        if len(outcomes) <= 20:
            for outcome in outcomes:
                if isinstance(outcome, Accepted):
                    self.box.log.info(
                        "task_accepted", task=outcome.task_id, state=outcome.state.value, door="file"
                    )
        else:
            accepted = sum(isinstance(outcome, Accepted) for outcome in outcomes)
            self.box.log.info("tasks_accepted", accepted=accepted, lines=len(outcomes), door="file")

    async def _maintain(self) -> None:
        """Rotate a large, consumed file; let go of rotated ones that are done with."""
        now = self.box.clock.monotonic_s()
        if now - self._maintained < _MAINTAIN_EVERY * float(self.box.settings.limits.rescan_every):
            return
        self._maintained = now
        chunk = self.folder.maintain(
            self.box.clock.now_us(), int(self.box.settings.limits.queue_file_bytes_max)
        )
        if chunk is not None and not chunk.is_empty:
            await self.box.journal.commit(lambda tx: self._record(tx, chunk, []))
            self.folder.committed(chunk)
