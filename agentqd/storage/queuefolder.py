"""The reader of the queue folder: the next whole lines, in order, from positions that the journal keeps.

Invariants:
1. `read` moves nothing: a source moves only by `committed`, and the same lines come until then.
2. Every position handed out is to be committed together with the lines before it, and with the sources dropped.
3. Rotated sources come before the live one; a deleted file is read to its end through its open descriptor.
4. A file is unlinked only if the daemon itself rotated it away, it is consumed and old, and a lease shows that nobody
   has it open; its end is checked again while the lease is held.
5. The live file is never written, cut or locked by the daemon; rotation is a rename.

Synchronous and without locks of its own: one caller at a time.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

from agentqd.core import limits
from agentqd.core.lines import Line
from agentqd.storage.files import rename_to_free_name
from agentqd.storage.queuefile import Changed, Chunk, Found, Level, Mark, Position, Source, Want
from agentqd.storage.queuesources import OWN_NAME, ROTATED_AGE_US, QueueSources
from agentqd.system.leases import has_writer, sole_holder

ROTATED_AGE_WITHOUT_LEASES_US: Final = 24 * ROTATED_AGE_US
SOURCES_MAX: Final = (
    64  # from here on no own rotation, and files that others rotated are let go without waiting
)
ROTATIONS_A_SECOND_MAX: Final = 1000


class QueueFolder:
    """All that is to be read in one queue folder, which is made (0700; 0770 with a group) if it is missing.

    The live file is made too, with `file_mode` (0600; 0660 with a group). Raises OSError if the folder cannot be
    made; everything that goes wrong with files in it is a notice.
    """

    def __init__(
        self,
        path: str,
        positions: Sequence[Position],
        line_bytes_max: int,
        now_us: Callable[[], int],
        *,
        group: int | None = None,
        file_mode: int | None = None,
    ) -> None:
        self._line_bytes_max = line_bytes_max
        self._now_us = now_us
        self._files = QueueSources(path, now_us, group, file_mode)
        self._begin(positions)

    def _begin(self, positions: Sequence[Position]) -> None:
        self._journal = {position.source: position for position in positions}
        self._last = 0  # the source of the last committed lines
        self._files.begin(positions)

    # -- what the daemon calls

    def read(
        self, max_bytes: int = limits.INTAKE_CHUNK_BYTES, max_lines: int = limits.INTAKE_BATCH_LINES_MAX
    ) -> Chunk | None:
        """The next whole lines of the oldest source that has some, or None: nothing new.

        A chunk may have no lines: notices and positions only, or (`is_empty`) an endless line that was scanned
        further; read again.
        """
        want = Want(max_bytes, max_lines, self._line_bytes_max)
        live_size = self._files.look()
        live = self._files.live
        for source in self._in_order():
            found = self._read_source(source, want, live_size if source is live else None)
            if found is not None:
                return self._chunk(source, found)
        return self._news()

    def committed(self, chunk: Chunk) -> None:
        """The journal has committed this chunk: its source moves on, its notices are told."""
        for position in chunk.positions:
            self._journal[position.source] = position
        for number in chunk.dropped:
            self._journal.pop(number, None)
        if chunk.notices:
            told = {id(notice) for notice in chunk.notices}
            self._files.notices = [notice for notice in self._files.notices if id(notice) not in told]
        mark = chunk.mark
        if mark is not None:
            source = next((each for each in self._files.all if each.number == mark.source), None)
            if source is not None and (source.generation, source.offset) == (mark.generation, mark.before):
                source.move_to(mark.after, mark.tail)
                self._last = source.number
            else:
                self._files.changed = True  # the file was changed since: its next position is another one
        if self._files.changed:
            self._files.changed = bool(self._differences() or self._dropped())

    def forget(self, positions: Sequence[Position] | None = None) -> None:
        """A commit failed: what was handed out comes again.

        A failed COMMIT has an unknown outcome: give the positions of the journal as it was opened anew, and reading
        starts from those.
        """
        if positions is not None:
            self._files.close()
            self._begin(positions)

    def maintain(self, now_us: int, rotate_bytes_max: int) -> Chunk | None:
        """Rotate a consumed, large live file away; let go of rotated files that are done. What there is to commit.

        A crash before that commit: a renamed file is found again by its inode, an unlinked one was consumed.
        """
        self._files.look()
        live = self._files.live
        if live is not None and len(self._files.all) < SOURCES_MAX:
            size = live.size()
            if size > rotate_bytes_max and size == live.offset:
                self._rotate(live, now_us)
        for source in [each for each in self._files.all if each.role == "rotated" and not each.deleted]:
            self._retire(source, now_us)
        return self._news()

    def positions(self) -> list[Position]:
        """All current ones, as committed; new sources as they will be with the next chunk."""
        return [source.position() for source in self._files.all]

    def bytes_waiting(self) -> int:
        """Bytes behind the committed positions, unfinished lines included."""
        return sum(max(0, source.size() - source.offset) for source in self._files.all)

    def close(self) -> None:
        """Close every file. Nothing is lost: the positions are in the journal."""
        self._files.close()

    # -- reading

    def _in_order(self) -> list[Source]:
        """Rotated before live, older before newer; a rotated file with a busy late writer takes turns with the rest."""
        if len(self._files.all) == 1:
            return list(self._files.all)
        turns = sorted(self._files.all, key=_turn)
        first = [each for each in turns if each.role == "rotated" and not each.drained]
        rest = [each for each in turns if each not in first]
        last = next((_turn(each) for each in turns if each.number == self._last), (True, 0))
        return first + sorted(rest, key=lambda each: (_turn(each) <= last, _turn(each)))

    def _read_source(self, source: Source, want: Want, size: int | None) -> Found | None:
        try:
            if source.role == "rotated" or size is None:
                size = self._size_of_rotated(source)
            found = source.find_lines(want, size)
            if isinstance(found, Changed):
                self._files.tell_changed(source, found.code)
                source.start_over()
                self._files.changed = True
                found = source.find_lines(want, size)
                assert not isinstance(found, Changed), "nothing is before the start of a file"
            if found is None and source.role == "rotated":
                source.drained = True
                found = self._read_rest(source, want)
        except OSError as problem:
            if source.trouble != str(problem):
                source.trouble = str(problem)
                message = f"{source.name}: {problem.strerror}; it is tried again"
                self._files.tell("unreadable", message, name=source.name)
            return None
        source.trouble = ""
        return found

    def _size_of_rotated(self, source: Source) -> int:
        found = os.fstat(source.fd)
        if found.st_nlink == 0 and not source.deleted and source.role == "rotated":
            source.deleted = True
            unread = found.st_size - source.offset
            message = (
                f"{source.name} was deleted; {unread} unread bytes of it are read through the open descriptor"
            )
            level: Level = "alert" if unread else "info"
            self._files.tell("vanished", message, level, offset=source.offset, unread_bytes=unread)
        return found.st_size

    def _read_rest(self, source: Source, want: Want) -> Found | None:
        """A rotated source without whole lines: an unfinished one, if nobody can end it; or the source is done."""
        if source.deleted:
            if not self._nobody_writes(source):
                return None
        elif source.final_size != source.size():
            return None
        size = source.size()
        found = source.find_lines(want, size)  # once more, now that nobody can write
        if found is not None and not isinstance(found, Changed):
            return found
        rest = source.remainder(want, size)
        if rest is None and source.deleted:
            self._files.drop(source)
            self._files.tell("dropped", f"{source.name} was read to its end", "info", name=source.name)
        return rest

    def _nobody_writes(self, source: Source) -> bool:
        writer = has_writer(source.fd)
        if writer is None:
            return self._now_us() - source.since_us >= ROTATED_AGE_WITHOUT_LEASES_US
        return not writer

    # -- what is handed out

    def _news(self) -> Chunk | None:
        chunk = self._chunk()
        return None if chunk.is_empty else chunk

    def _chunk(self, source: Source | None = None, found: Found | None = None) -> Chunk:
        positions = self._differences() if self._files.changed else []
        position = mark = None
        lines: list[Line] = []
        if source is not None and found is not None and found.after != source.offset:
            lines = found.lines
            position = source.position_at(found.after, found.tail)
            mark = Mark(source.number, source.generation, source.offset, found.after, found.tail)
            positions = [each for each in positions if each.source != source.number] + [position]
        dropped = self._dropped() if self._files.changed else []
        return Chunk(lines, position, list(self._files.notices), positions, dropped, mark)

    def _differences(self) -> list[Position]:
        return [position for position in self.positions() if self._journal.get(position.source) != position]

    def _dropped(self) -> list[int]:
        known = {source.number for source in self._files.all}
        return [number for number in self._journal if number not in known]

    # -- rotation, and the end of a source

    def _rotate(self, live: Source, now_us: int) -> None:
        found = os.fstat(live.fd)
        stamp = datetime.fromtimestamp(now_us / 1_000_000, UTC).strftime("%Y%m%dT%H%M%SZ")
        try:
            self._rename_away(stamp)
            self._files.create_live(stat.S_IMODE(found.st_mode), found.st_gid)
        except FileExistsError:
            pass  # a writer was faster: its file is the live one
        except OSError as problem:
            path = self._files.live_path
            self._files.tell("not_rotated", f"{path}: {problem.strerror}; it is read as before", path=path)
        self._files.look()

    def _rename_away(self, stamp: str) -> None:
        for turn in range(1, ROTATIONS_A_SECOND_MAX):
            name = os.path.join(self._files.path, f"tasks-{stamp}-{turn}.jsonl")
            with contextlib.suppress(FileExistsError):
                rename_to_free_name(self._files.live_path, name)
                return
        raise FileExistsError(f"{ROTATIONS_A_SECOND_MAX} rotated files of {stamp}")

    def _retire(self, source: Source, now_us: int) -> None:
        """Let go of a rotated file that is consumed, old, and open nowhere else. Only the daemon's own are unlinked."""
        own = bool(OWN_NAME.fullmatch(source.name))
        age_us = now_us - source.since_us
        is_crowded = len(self._files.all) > SOURCES_MAX and not own
        if not source.drained or (age_us < ROTATED_AGE_US and not is_crowded):
            return
        with sole_holder(source.fd) as alone:
            if alone is False or (alone is None and age_us < ROTATED_AGE_WITHOUT_LEASES_US):
                return
            size = source.size()
            if size != source.offset or not source.is_unchanged():
                source.final_size = size  # the next read hands out what is left
                return
            if own:
                self._unlink(source)
        self._files.drop(source)

    def _unlink(self, source: Source) -> None:
        path = os.path.join(self._files.path, source.name)
        with contextlib.suppress(OSError):  # it stays, and is nobody's: the next start does not read it
            found = os.lstat(path)
            if (found.st_dev, found.st_ino) == (source.dev, source.ino):
                os.unlink(path)
                self._files.tell(
                    "removed", f"{source.name} was consumed and is removed", "info", name=source.name
                )


def _turn(source: Source) -> tuple[bool, int]:
    return source.role == "live", source.number
