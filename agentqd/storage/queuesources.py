"""The files in the queue folder that are read, and what became of them: found by inode, whatever their names.

Invariants:
1. A file is its device, inode and birth time. A renamed file goes on where it was.
2. What is decided here (rotated, replaced, read from 0 again) can be found again from the files and the committed
   positions: a crash before the commit costs nothing.
3. In doubt a line is read twice rather than never: ids dedupe.
4. Nothing but a regular file is ever opened under the live name, and no open ever waits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from agentqd.core import limits
from agentqd.storage.files import create_empty, kind_of, make_folder, regular_files
from agentqd.storage.queuefile import (
    SCAN_BYTES_MAX,
    Level,
    Notice,
    Position,
    Role,
    Source,
    Trace,
    is_newer_than_end_of,
    matching_tail,
    open_source,
    skip_common,
)

LIVE_NAME: Final = "tasks.jsonl"
OWN_NAME: Final = re.compile(r"tasks-\d{8}T\d{6}Z-\d+\.jsonl")  # what the daemon calls a file that it rotates
ROTATED_AGE_US: Final = 3600 * 1_000_000
LET_GO_MAX: Final = 1024
LOOKS_MAX: Final = 4  # the live name may change hands while it is looked at


class QueueSources:
    """All sources of one folder. `changed`: they may differ from what the journal has. `notices`: not yet told."""

    def __init__(
        self, path: str, now_us: Callable[[], int], group: int | None, file_mode: int | None
    ) -> None:
        self.path = path
        self.live_path = os.path.join(path, LIVE_NAME)
        self.all: list[Source] = []
        self.live: Source | None = None
        self.notices: list[Notice] = []
        self.changed = True
        self._now_us = now_us
        self._group = group
        self._file_mode = file_mode if file_mode is not None else 0o600 if group is None else 0o660
        self._number = 0
        self._let_go: deque[tuple[int, int]] = deque(
            maxlen=LET_GO_MAX
        )  # inode and birth time of files that stay
        self._obstacle = ""  # what stands in the live file's place, as told
        self._made_live = False  # the file that `look` is about to find is our own, new and empty

    # -- the start and the end

    def begin(self, positions: Sequence[Position]) -> None:
        """Find the sources of these positions again; everything else in the folder is new, or none of our business."""
        self._number = max((position.source for position in positions), default=0)
        self.changed = True
        self._make_folder()
        names = regular_files(self.path, LIVE_NAME)
        ordered = sorted(positions, key=lambda each: each.source)
        missing = [position for position in ordered if not self._find_again(position, names)]
        for position in missing:
            self._find_copy(position)
        for source in self.all:
            if source.role == "live" and source is not self.live:
                source.role = "rotated"
        self.look()

    def close(self) -> None:
        for source in self.all:
            os.close(source.fd)
        self.all = []
        self.live = None

    def drop(self, source: Source) -> None:
        """This source is done with."""
        self.all.remove(source)
        if not source.deleted:  # the number of a deleted file is used again at once
            self._let_go.append((source.ino, source.btime_ns))
        os.close(source.fd)
        self.changed = True

    def tell(self, code: str, message: str, level: Level = "alert", **fields: Any) -> None:
        self.notices.append(Notice(code, message, fields, level))

    def tell_changed(self, source: Source, code: str) -> None:
        what = (
            "is shorter than what was read of it"
            if code == "truncated"
            else "was changed before the position"
        )
        message = f"{source.name} {what}; it is read from its start again"
        self.tell(code, message, name=source.name, offset=source.offset)

    # -- at every read

    def look(self) -> int | None:
        """Bring `live` in line with the folder. Returns its size, or None where there is none or it must be asked."""
        for _ in range(LOOKS_MAX):
            try:
                found = os.lstat(self.live_path)
            except FileNotFoundError:
                if not self._make_live():
                    return None
                continue
            except OSError as problem:
                self._block(f"lstat {problem.errno}", "unreadable", f"{self.live_path}: {problem.strerror}")
                return None
            live = self.live
            if live is not None and found.st_ino == live.ino and found.st_dev == live.dev:
                self._obstacle = ""
                return found.st_size
            if not self._take_live(found):
                return None
        return None

    def create_live(self, mode: int | None = None, group: int | None = None) -> None:
        """A new empty live file. Raises OSError; FileExistsError: a writer was faster, and its file is the live one."""
        create_empty(
            self.live_path, self._file_mode if mode is None else mode, self._group if group is None else group
        )

    # -- the live name

    def _take_live(self, found: os.stat_result) -> bool:
        """Another inode has the live name. False: it cannot be read, and a notice says why."""
        old, new = self.live, None
        known = self._known(found.st_dev, found.st_ino)
        if known is not None:  # a rotated file was renamed back
            known.role, known.name, known.since_us, known.deleted = "live", LIVE_NAME, self._now_us(), False
            self.changed = True
        elif stat.S_ISREG(found.st_mode):
            new = self._open(LIVE_NAME, "live")
            if new is not None and self._known(new.dev, new.ino) is not None:
                os.close(new.fd)  # it changed hands since; look again
                return True
        else:
            kind = kind_of(found.st_mode)
            code = "symlink" if stat.S_ISLNK(found.st_mode) else "not_a_file"
            message = f"{self.live_path} is {kind}; it is not read: put a regular file there"
            self._block(f"{kind} {found.st_ino}", code, message, kind=kind)
        self.live = known
        if new is not None:
            self.all.append(new)  # known from here on, also if it is renamed at this moment
        if old is not None:
            self._displace(old, new)
        self._made_live = False
        if new is not None:
            self._count(new)  # after those that had the name before it
            self.live = new
            self._widen(new)
        return self.live is not None

    def _displace(self, old: Source, new: Source | None) -> None:
        """The live file is live no longer: renamed (rotation), or gone (deletion, replacement)."""
        old.role, old.since_us, self.changed = "rotated", self._now_us(), True
        trace = old.trace()
        new_btime_ns = new.btime_ns if new is not None else 0
        name = regular_files(self.path, LIVE_NAME).get((old.dev, old.ino))
        if name is not None:
            old.name = name
            self.tell(
                "rotated", f"{LIVE_NAME} was renamed to {name}; it is read to its end", "info", name=name
            )
            self._adopt_between(trace, new_btime_ns, old, backup_of=old)
            return
        old.deleted, old.name = True, f"{LIVE_NAME} (deleted)"  # whoever has the name next is another file
        unread = old.size() - old.offset
        facts: dict[str, Any] = {"offset": trace.offset, "unread_bytes": unread}
        heir = new if new is not None and not self._made_live and self._goes_on_in(trace, new, old) else None
        heir = self._adopt_between(trace, new_btime_ns, old, backup_of=heir) or heir
        if heir is not None:
            skip_common(old, heir, limits.INTAKE_CHUNK_BYTES, whole_lines=False)
            message = (
                f"{LIVE_NAME} was replaced by a file with the same content; it goes on at byte {trace.offset}"
            )
            self.tell("replaced", message, "info", **facts)
        elif new is None or self._made_live or is_newer_than_end_of(trace, new.btime_ns):
            message = (
                f"{LIVE_NAME} was deleted; {unread} unread bytes of it are read through the open descriptor"
            )
            self.tell("vanished", message, **facts)
        else:
            message = f"{LIVE_NAME} was replaced by another file, which is read from its start"
            self.tell("replaced", message, "alert" if trace.offset or unread else "info", **facts)

    def _goes_on_in(self, trace: Trace, new: Source, old: Source | None) -> bool:
        """Put `new` at the position of a file that is gone, if it holds the bytes that were consumed.

        Where nothing was consumed, the bytes that were about to be (of `old`, if it is still open) must be the same.
        """
        if is_newer_than_end_of(trace, new.btime_ns):
            return False
        if not trace.offset:
            return old is not None and (_has_same_head(old, new) or _has_same_head(new, old))
        tail = matching_tail(new.fd, trace.offset, trace.digest)
        if tail is None:
            return False
        new.move_to(trace.offset, tail)
        return True

    def _adopt_between(
        self, trace: Trace, new_btime_ns: int, old: Source | None = None, backup_of: Source | None = None
    ) -> Source | None:
        """Files that had the live name between two looks: born after the old one, before the new one, named tasks*.

        `old` is the old live file if it is still open; `backup_of` the file that hands out its lines, if that is
        settled: a copy of it is read from where it differs. If it is not settled, the first file that holds the
        consumed bytes goes on there, and is returned.
        """
        if not trace.btime_ns or not new_btime_ns:
            return None
        heir = None
        opened = [self._open(name, "rotated") for name in self._unknown_names() if name != LIVE_NAME]
        for source in sorted((each for each in opened if each is not None), key=lambda each: each.btime_ns):
            is_between = trace.btime_ns <= source.btime_ns <= new_btime_ns
            if not is_between or (source.ino, source.btime_ns) in self._let_go:
                os.close(source.fd)
                continue
            self.all.append(source)
            self._count(source)
            is_heir = backup_of is None and self._goes_on_in(trace, source, old)
            if is_heir:
                heir = backup_of = source
            elif backup_of is not None and backup_of.is_unchanged():
                skip_common(source, backup_of, limits.INTAKE_CHUNK_BYTES, whole_lines=True)
            elif (
                old is not None and old.is_unchanged()
            ):  # it is gone: what was not read of it may be lost in a crash
                skip_common(source, old, min(old.offset, SCAN_BYTES_MAX), whole_lines=True, once=True)
            message = f"{source.name} was {LIVE_NAME} for a moment; it is read too, from byte {source.offset}"
            self.tell("rotated", message, "info", name=source.name, offset=source.offset)
        return heir

    def _make_live(self) -> bool:
        """The live file is missing: a new one, and the folder too if need be. False if that failed."""
        try:
            if not os.path.isdir(self.path):
                self._make_folder()
                self.tell("folder_vanished", f"{self.path} was deleted; it is there again", folder=self.path)
            self.create_live()
            self._made_live = True
        except FileExistsError:
            return True
        except OSError as problem:
            message = f"{self.live_path} cannot be made: {problem.strerror}"
            self._block(f"create {problem.errno}", "unreadable", message)
            old, self.live = self.live, None
            if old is not None:
                self._displace(old, None)
            return False
        return True

    def _widen(self, live: Source) -> None:
        """A live file that a writer made: with a control group, its members must be able to append."""
        if self._group is None:
            return
        found = os.fstat(live.fd)
        if found.st_gid == self._group and stat.S_IMODE(found.st_mode) == self._file_mode:
            return
        with contextlib.suppress(PermissionError):
            os.fchown(live.fd, -1, self._group)
            os.fchmod(live.fd, self._file_mode)

    # -- positions of the journal

    def _find_again(self, position: Position, names: dict[tuple[int, int], str]) -> bool:
        """The same inode, whatever its name is now. A birth time that does not fit: the number was used again."""
        name = names.get((position.dev, position.ino))
        if name is None or self._known(position.dev, position.ino) is not None:
            return False
        source = self._open(name, position.role, position)
        if source is None:
            return False
        if position.btime_ns and source.btime_ns and position.btime_ns != source.btime_ns:
            os.close(source.fd)
            return False
        self._take(source)
        tail = matching_tail(source.fd, position.offset, position.digest)
        if tail is not None:
            source.move_to(position.offset, tail)
        else:
            is_shorter = source.size() < position.offset
            source.offset = position.offset  # for the notice
            self.tell_changed(source, "truncated" if is_shorter else "changed_in_place")
            source.start_over()
        return True

    def _find_copy(self, position: Position) -> None:
        """The inode is gone: a restored backup or a replacement under the same name, or a moved replacement."""
        trace = Trace(position.btime_ns, position.offset, position.digest, None)
        for name in self._names_for_copy(position):
            source = self._open(name, position.role, position)
            if source is not None and self._goes_on_in(trace, source, None):
                message = (
                    f"{name} is another file with the same content; it goes on at byte {position.offset}"
                )
                self.tell("replaced", message, "info", name=name, offset=position.offset)
                self._take(source)
                return
            if source is not None:
                os.close(source.fd)
        heir = self._adopt_between(trace, self._birth_of_live()) if position.role == "live" else None
        is_retired = (
            bool(OWN_NAME.fullmatch(position.name)) and self._now_us() - position.since_us >= ROTATED_AGE_US
        )
        if position.offset and heir is None and not is_retired:  # retired: unlinked just before a crash
            message = (
                f"{position.name} is gone, or replaced by other content, since agentqd was here last; "
                "lines that were not read by then are lost"
            )
            self.tell("vanished", message, name=position.name, offset=position.offset)

    def _names_for_copy(self, position: Position) -> Iterable[str]:
        """Its own name first; the live file may also have been replaced and then renamed."""
        if not position.offset:
            return  # nothing was consumed: any file would fit
        unknown = self._unknown_names()
        if position.name in unknown:
            yield position.name
        if position.role == "live":
            yield from (name for name in unknown if name != position.name)

    def _birth_of_live(self) -> int:
        source = self._open(LIVE_NAME, "live")
        if source is None:
            return 0
        os.close(source.fd)
        return source.btime_ns

    # -- small steps

    def _known(self, dev: int, ino: int) -> Source | None:
        return next((each for each in self.all if each.ino == ino and each.dev == dev), None)

    def _take(self, source: Source) -> None:
        self.all.append(source)
        if source.role == "live":
            self.live = source  # until `look` has seen whose name it is
        self.changed = True

    def _count(self, source: Source) -> None:
        self._number += 1
        source.number = self._number
        self.changed = True

    def _open(self, name: str, role: Role, position: Position | None = None) -> Source | None:
        number, since_us = (0, self._now_us()) if position is None else (position.source, position.since_us)
        try:
            return open_source(os.path.join(self.path, name), number, name, role, since_us)
        except FileNotFoundError:
            return None
        except OSError as problem:
            if name == LIVE_NAME and problem.errno not in (errno.EINVAL, errno.ELOOP):
                message = f"{self.live_path} cannot be opened: {problem.strerror}"
                self._block(f"open {problem.errno}", "unreadable", message)
            return None

    def _unknown_names(self) -> list[str]:
        """Regular files that are no source, whatever name a rotation gave them; our own rejected.jsonl is none."""
        known = {(source.dev, source.ino) for source in self.all}
        return [
            name
            for key, name in regular_files(self.path, LIVE_NAME).items()
            if key not in known and not name.startswith(("rejected", "."))
        ]

    def _make_folder(self) -> None:
        make_folder(self.path, 0o700 if self._group is None else 0o770, self._group)

    def _block(self, obstacle: str, code: str, message: str, **fields: Any) -> None:
        """Told once, until something else stands there."""
        if obstacle != self._obstacle:
            self._obstacle = obstacle
            self.tell(code, message, **fields)


def _has_same_head(source: Source, other: Source) -> bool:
    """Whether `other` begins like `source` (its first 4 KiB, or all of it)."""
    head = os.pread(source.fd, limits.POSITION_DIGEST_BYTES, 0)
    return bool(head) and os.pread(other.fd, len(head), 0) == head
