"""The front door without a daemon: lines appended to `queue/tasks.jsonl`.

Invariants:
1. One line, one `write()` on an O_APPEND descriptor: the kernel never mixes it with another writer's, at any size.
2. Whatever an earlier writer left torn, our line stands on a line of its own: a last byte that is not a newline gets
   one in front of ours, inside the same write.
3. A write that comes back short (disk full, a signal) leaves a torn line. It is closed with a newline, so that it
   costs only itself, and the whole line is written again; the reader rejects the torn one.
4. Nothing is reported as written before fsync has returned.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Protocol

from agentqd.client.durable import fsync_folder, make_private_folder
from agentqd.core.errors import AgentqError, NotPermitted, RefusedForNow, StateFolderError
from agentqd.core.folders import Folders
from agentqd.core.limits import MIB

FILE_MODE = 0o600
SHORT_WRITES_MAX = 5
LINE_BYTES_USUAL_MAX = 1 * MIB  # the daemon's default limits.line_bytes_max; longer prompts go to prompts/


class Queue(Protocol):
    """The front door of one box: its queue file, on this machine or over SSH. Every method raises AgentqError."""

    @property
    def path(self) -> str:
        """On the box, for people."""

    @property
    def line_bytes_max(self) -> int:
        """What a line may have; a longer prompt goes to `put_prompt`."""

    def append(self, lines: list[bytes]) -> None:
        """Each line (without its newline) on a line of its own, all of them durable."""

    def put_prompt(self, task_id: str, text: bytes) -> str:
        """A payload, durable, by a rename; its path for `prompt_ref`."""


class QueueFile:
    """The queue file of one state folder. Every method raises AgentqError with the path and what to do."""

    def __init__(self, folders: Folders) -> None:
        self.folders = folders
        self.line_bytes_max = LINE_BYTES_USUAL_MAX

    @property
    def path(self) -> str:
        return self.folders.queue_file

    def append(self, lines: list[bytes]) -> None:
        """Appends each line (without its newline) with one write, then fsyncs once: all of them are durable."""
        assert all(b"\n" not in line for line in lines)
        try:
            fd, fresh = self._open()
            try:
                for line in lines:
                    _write_line(fd, line)
                os.fsync(fd)
            finally:
                os.close(fd)
            if fresh:
                fsync_folder(self.folders.queue)
        except OSError as error:
            raise self._explained(error) from error

    def put_prompt(self, task_id: str, text: bytes) -> str:
        """Stores a payload too long for a line below prompts/ (fsync, rename); its path for `prompt_ref`."""
        name = f"{task_id}.prompt"
        try:
            make_private_folder(self.folders.prompts)
            draft = f"{self.folders.prompts}/.{name}.{os.getpid()}"
            fd = os.open(
                draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE
            )
            with os.fdopen(fd, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, f"{self.folders.prompts}/{name}")
            fsync_folder(self.folders.prompts)
        except OSError as error:
            raise self._explained(error) from error
        return name

    def _open(self) -> tuple[int, bool]:
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd, fresh = os.open(self.path, flags), False
        except FileNotFoundError:
            make_private_folder(self.folders.state)
            make_private_folder(self.folders.queue)
            fd, fresh = os.open(self.path, flags | os.O_CREAT, FILE_MODE), True
        except PermissionError:
            fd, fresh = (
                os.open(self.path, (flags & ~os.O_RDWR) | os.O_WRONLY),
                False,
            )  # append only for a group
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise StateFolderError(f"{self.path} is not a regular file; move it away")
        return fd, fresh

    def _explained(self, error: OSError) -> AgentqError:
        what = f"cannot append to {self.path}: {error.strerror or error}"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return NotPermitted(f"{what}; run as the daemon's user or join its control.group", path=self.path)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return RefusedForNow(
                f"{what}; free some space, then say it again with the same --id", path=self.path
            )
        return StateFolderError(what, path=self.path)


def _write_line(fd: int, line: bytes) -> None:
    record = line + b"\n"
    for _ in range(SHORT_WRITES_MAX):
        whole = record if _ends_a_line(fd) else b"\n" + record
        if os.write(fd, whole) == len(whole):
            return
    os.write(fd, b"\n")  # the torn part ends here, whatever follows
    raise OSError(errno.EIO, "the line was written short again and again")


def _ends_a_line(fd: int) -> bool:
    """Whether a line may start at the end of the file. Not knowing (write-only) counts as no: a blank line is harmless."""
    size = os.fstat(fd).st_size
    if size == 0:
        return True
    try:
        return os.pread(fd, 1, size - 1) in (b"\n", b"")
    except OSError:
        return False
