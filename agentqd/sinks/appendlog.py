"""A file of lines that this program appends to: the machinery of the sinks `completions`, `rejected` and `file`. Blocking.

Invariants:
1. A delivery is answered `Delivered` only after its whole line was written, `fdatasync` has said yes (and `fsync` of
   the folder, where the file was made), and the path still names the file that holds it.
2. A whole line is never changed, moved or cut: a reader may have seen it. Only a torn part is cut, and only while
   nobody has appended behind it; otherwise a newline closes it.
3. After anything went wrong the file is unknown: it is opened and read anew from its tail. Lines found there that
   nobody was answered for are written once more, the same bytes in the same place, and synced: after a failed
   fdatasync the kernel may hold lost pages as clean, and a second fdatasync alone would prove nothing.
4. Such lines, and those of a batch whose asker was cancelled, are remembered: sent again, they are not doubled.
5. A position, once in a line that a reader may have seen, is never given to another.

Weakness: between the look for a foreign append and the cut of our torn part lies an instant in which a foreign line
could be cut too. Nobody else is meant to write here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Final

from agentqd.core.limits import COMPLETIONS_BATCH_MAX, MIB
from agentqd.sinks.base import Deferred, Delivered, Delivery, Found, Outcome, Rejected
from agentqd.sinks.lines import POSITION_MAX, Lines
from agentqd.sinks.reason import bounded
from agentqd.sinks.tail import last_line_end, lines_backwards
from agentqd.system.failpoints import failpoint

_FRAGMENT_BYTES_MAX: Final = 16 * MIB
_NOTICES_MAX: Final = 100
_OPEN: Final = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class AppendLog:
    """One such file. Used from one thread at a time. Raises OSError only from `open`."""

    def __init__(
        self, path: str, lines: Lines, *, mode: int = 0o600, rotate_bytes: int | None = None
    ) -> None:
        self._path = path
        self._folder, self._name = os.path.split(os.path.abspath(path))
        self._lines = lines
        self._mode = mode
        self._rotate_bytes = rotate_bytes
        self._notices: list[str] = []
        self._noticed = ""  # the one before: a trouble that stays is told once
        self._fd = (
            -1
        )  # the file last written, kept open so that its inode number cannot come back as another file
        self._end = 0  # its size as we left it
        self._sure = (
            False  # the file ends at _end, after a whole line, and everything before it was synced or read
        )
        self._looked = False  # its tail was read once since this program began
        self._floor = 0  # the highest position that is durable and answered for
        self._last = 0  # the highest position ever given (numbered)
        self._known: dict[str, int] = {}  # durable lines that nobody was answered for
        self._folder_synced = True

    def take_notices(self) -> list[str]:
        """What happened to the file that a person should hear; each is told once."""
        taken, self._notices = self._notices, []
        return taken

    def open(self, last_position: int) -> list[Found]:
        """The deliveries in the file beyond `last_position`; durable when this returns. The torn tail is cut."""
        self._last = max(self._last, last_position)
        self._floor = max(self._floor, last_position)
        found = self._found_in_rotated(last_position)
        try:
            fd = os.open(self._path, _OPEN)
        except FileNotFoundError:
            if 0 < last_position > max(found.values(), default=0):
                self._notice(f"is gone; it held lines up to position {last_position}; a new one is begun")
            return _as_found(found)
        self._hold(fd)
        found.update(self._look())
        return _as_found(found)

    def append(self, batch: Sequence[Delivery]) -> list[Outcome]:
        """One outcome each, in order."""
        try:
            self._take_hold()
            return self._append(batch)
        except OSError as problem:
            self._sure = False
            return [Deferred(self._why(problem))] * len(batch)

    def remember(self, batch: Sequence[Delivery], outcomes: Sequence[Outcome]) -> None:
        """Nobody heard these outcomes (none: it was never begun): what was delivered is not written again when asked for."""
        for delivery, outcome in zip(batch, outcomes, strict=False):
            if isinstance(outcome, Delivered) and outcome.position is not None:
                self._known[delivery.delivery_id] = outcome.position

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._sure = False

    # Getting hold of the file: by path, for each batch.

    def _take_hold(self) -> None:
        """Afterwards `_fd` is what the path names, and `_end` is its end, just after a whole line."""
        try:
            fd = os.open(self._path, _OPEN)
        except FileNotFoundError:
            if self._fd >= 0:
                self._notice("has vanished while in use; a new one is begun")
            fd = self._create()
            self._forget_content()
        else:
            self._compare(fd)
        self._hold(fd)
        if not self._sure:
            self._known.update(self._look())
        if self._rotate_bytes is not None and self._end > self._rotate_bytes:
            self._rotate()

    def _create(self) -> int:
        self._folder_synced = False
        try:
            fd = os.open(self._path, _OPEN | os.O_CREAT | os.O_EXCL, self._mode)
        except FileNotFoundError:
            raise FileNotFoundError(
                errno.ENOENT, f"the folder {self._folder} does not exist (it is not made here)", self._path
            ) from None
        os.fchmod(fd, self._mode)  # whatever the umask
        return fd

    def _compare(self, fd: int) -> None:
        """Is it the file that we left, as we left it? If not, somebody hears of it and its content is unknown."""
        if self._fd < 0:
            self._sure = False
            return
        now = os.fstat(fd)
        if not os.path.samestat(os.fstat(self._fd), now):
            self._notice("was replaced while in use; appending goes on in the new file")
            self._forget_content()
        elif now.st_size < self._end:
            self._notice(f"was cut from {self._end} to {now.st_size} bytes by somebody else")
            self._forget_content()
        elif now.st_size > self._end:
            if self._sure:
                self._notice(f"grew by {now.st_size - self._end} bytes that are not ours")
            self._sure = False

    def _forget_content(self) -> None:
        self._sure = False
        self._known.clear()
        self._folder_synced = False
        if not self._lines.numbered:
            self._floor = (
                POSITION_MAX  # offsets of another file say nothing about this one: nothing is read back
            )

    def _hold(self, fd: int) -> None:
        """Keeps `fd` in place of the one before. Closes it if it is no regular file."""
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "is not a regular file", self._path)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd

    # Reading back.

    def _look(self) -> dict[str, int]:
        """Mends the tail and reads back the lines beyond the floor, made durable: {delivery id: position}."""
        size = os.fstat(self._fd).st_size
        end = last_line_end(self._fd, size)
        if end < size:
            end = self._mend_tail(end, size)
        found, start = self._read_back(self._fd, end, self._floor)
        if found:
            self._write_again(start, end)
            self._folder_synced = False  # it may have been made just before a crash
            self._sync_folder()
        self._floor = max([self._floor, *found.values()]) if self._lines.numbered else end
        self._last = max(self._last, self._floor)
        self._end, self._sure, self._looked = end, True, True
        return found

    def _read_back(self, fd: int, end: int, floor: int) -> tuple[dict[str, int], int]:
        """The lines beyond the floor, and the offset of the first of them. Walks back from the end only so far."""
        numbered, lines_max = self._lines.numbered, -1
        if not numbered and not self._looked and not _ends_line(fd, end, floor):
            floor, lines_max = (
                0,
                COMPLETIONS_BATCH_MAX,
            )  # another file than the journal's: its last batch at most
        found: dict[str, int] = {}
        start = end
        for offset, line in lines_backwards(fd, end):
            position = offset + len(line) + 1
            if lines_max == 0 or (not numbered and position <= floor):
                break
            lines_max -= 1
            who = self._lines.identify(line)
            if who is None:
                continue
            if numbered:
                position = who[1]
                if position <= floor:
                    break
            start = offset
            found.setdefault(who[0], position)
        return dict(reversed(found.items())), start

    def _mend_tail(self, end: int, size: int) -> int:
        """The last line lacks its newline. Returns where the last whole line ends afterwards."""
        fragment = os.pread(self._fd, min(size - end, _FRAGMENT_BYTES_MAX), end)
        whole = self._lines.identify(fragment) is not None
        cut = not self._looked and not whole and self._lines.ours(fragment)
        if cut and os.fstat(self._fd).st_size == size:
            os.ftruncate(self._fd, end)
            self._notice(
                f"ended in the middle of a line: {size - end} bytes were cut; their delivery is sent again"
            )
            return end
        os.write(self._fd, b"\n")
        self._notice(f"ended without a newline: its last line ({size - end} bytes) was closed")
        return os.lseek(self._fd, 0, os.SEEK_CUR)

    def _write_again(self, start: int, end: int) -> None:
        """The same bytes in the same place, then fdatasync (invariant 3)."""
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_APPEND)  # with it, pwrite would append
        try:
            while start < end:
                block = os.pread(self._fd, min(MIB, end - start), start)
                if not block:
                    raise OSError(errno.EIO, "was cut while it was read", self._path)
                start += os.pwrite(self._fd, block, start)
        finally:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)
        os.fdatasync(self._fd)

    # Writing.

    def _append(self, batch: Sequence[Delivery]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        lines: list[bytes] = []
        waiting: list[int] = []  # which outcome each line will be
        known, make = self._known, self._lines.line
        first = self._last + 1
        for delivery in batch:
            if delivery.delivery_id in known:
                outcomes.append(Delivered(position=known.pop(delivery.delivery_id)))
                continue
            try:
                lines.append(make(delivery, first + len(lines)))
                waiting.append(len(outcomes))
                outcomes.append(_NOT_WRITTEN)
            except ValueError as problem:  # it can never be a line: set aside, it holds up nothing else
                outcomes.append(Rejected(bounded(f"the payload cannot be a line: {problem}")))
        if lines:
            for index, outcome in zip(waiting, self._write(lines, first), strict=True):
                outcomes[index] = outcome
        return outcomes

    def _write(self, lines: Sequence[bytes], first: int) -> Iterable[Outcome]:
        """One write; then what is whole is synced. An OSError of write or of a sync is a deferred outcome for all."""
        self._sure = False
        ends = list(accumulate(map(len, lines)))
        try:
            written = os.write(self._fd, b"".join(lines))
            end = os.lseek(self._fd, 0, os.SEEK_CUR)  # exact, even if somebody else appended just before
            start = end - written
            whole = bisect_right(ends, written)
            self._last = max(self._last, first + whole - 1) if self._lines.numbered else self._last
            mended = whole == len(lines) or self._cut_torn(start + (ends[whole - 1] if whole else 0), end)
            if whole:
                failpoint("lines_written")
                os.fdatasync(self._fd)  # before any answer (crash state 22)
                self._sync_folder()
            self._check_still_there()
        except OSError as problem:
            return [Deferred(self._why(problem))] * len(lines)
        self._end = start + (ends[whole - 1] if whole else 0)
        if whole:
            self._floor = self._last if self._lines.numbered else self._end
        self._sure = mended
        positions = (
            range(first, first + whole) if self._lines.numbered else [start + at for at in ends[:whole]]
        )
        rest = Deferred(
            bounded(f"{self._path}: only {written} of {ends[-1]} bytes could be written (disk full?)")
        )
        return [*(Delivered(position=position) for position in positions), *[rest] * (len(lines) - whole)]

    def _cut_torn(self, keep: int, end: int) -> bool:
        """After a short write: cut what is not a whole line, if it still is the end; else a newline closes it."""
        if keep == end:
            return True
        if os.fstat(self._fd).st_size == end:
            os.ftruncate(self._fd, keep)
            return True
        os.write(self._fd, b"\n")
        self._last += 1  # part of a line with that number stays to be seen
        return False

    def _check_still_there(self) -> None:
        """The path may have been moved or replaced between open and now: then readers of the path have nothing."""
        try:
            there = os.stat(self._path, follow_symlinks=False)
        except FileNotFoundError:
            there = None
        if there is None or not os.path.samestat(there, os.fstat(self._fd)):
            raise OSError(errno.ESTALE, "was moved or replaced while it was written", self._path)

    def _sync_folder(self) -> None:
        if self._folder_synced:
            return
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        self._folder_synced = True

    # Rotation.

    def _rotate(self) -> None:
        """The full file gets its last seq's name; everything in it is durable by now. A failure is told, and the file
        goes on growing."""
        last = next(
            (
                who[1]
                for _, line in lines_backwards(self._fd, self._end)
                if (who := self._lines.identify(line))
            ),
            0,
        )
        stem, extension = os.path.splitext(self._name)
        target = os.path.join(self._folder, f"{stem}-{last or self._last}{extension}")
        try:
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "is there already", target)
            os.rename(self._path, target)
        except OSError as problem:
            self._notice(f"could not be rotated to {target}: {problem.strerror}")
            return
        self.close()
        self._folder_synced = False  # the rename; synced before the next answer
        self._hold(self._create())
        self._end, self._sure = 0, True

    def _found_in_rotated(self, last_position: int) -> dict[str, int]:
        """A file may have been rotated between an append and its mark."""
        if self._rotate_bytes is None:
            return {}
        stem, extension = os.path.splitext(self._name)
        name = re.compile(re.escape(stem) + r"-([1-9][0-9]{0,15})" + re.escape(extension))
        numbers = [int(match[1]) for entry in os.listdir(self._folder) if (match := name.fullmatch(entry))]
        found: dict[str, int] = {}
        for number in sorted(number for number in numbers if last_position < number <= POSITION_MAX):
            self._last = max(self._last, number)
            path = os.path.join(self._folder, f"{stem}-{number}{extension}")
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    end = last_line_end(fd, os.fstat(fd).st_size)
                    found.update(self._read_back(fd, end, last_position)[0])
            finally:
                os.close(fd)
        self._last = max([self._last, *found.values()])
        return found

    def _notice(self, what: str) -> None:
        if what != self._noticed and len(self._notices) < _NOTICES_MAX:
            self._notices.append(f"{self._path} {what}")
        self._noticed = what

    def _why(self, problem: OSError) -> str:
        return bounded(f"{self._path}: {problem.strerror or problem}")


_NOT_WRITTEN: Final = Deferred("not written")


def _ends_line(fd: int, end: int, offset: int) -> bool:
    return offset == 0 or (offset <= end and os.pread(fd, 1, offset - 1) == b"\n")


def _as_found(found: dict[str, int]) -> list[Found]:
    return [Found(delivery_id, position) for delivery_id, position in found.items()]
