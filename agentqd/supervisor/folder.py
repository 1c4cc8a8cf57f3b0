"""The folder of one attempt: made all or nothing, and entered into exactly once.

States of tasks/ID/attempt-N, and the operation that moves from one to the next:
1. absent; perhaps a `.attempt-N.tmp-XXXX` of a crash beside it, which is removed when the task's folder is next used
2. whole, without `started`       after rename(2) of the temporary folder; nothing was ever run in it: it is made anew
3. with `started`                 after open(O_EXCL); from this instant on it may have been run and never runs again
4. with `exit.json`               after rename(2) of the temporary file; the whole tree is gone
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from typing import Final

import msgspec

from agentqd.core.limits import TASK_ID_CHARS_MAX
from agentqd.system.fsops import (
    create_file_at,
    open_folder_at,
    read_file_at,
    remove_tree_at,
)

_TASK: Final = re.compile(rf"[A-Za-z0-9_-]{{1,{TASK_ID_CHARS_MAX}}}")
_APPEND: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
STARTED_BYTES_MAX: Final = 4096


class Started(msgspec.Struct, frozen=True):
    """The content of `started`, written before the fork; so it knows no pid."""

    instance: str
    boot_id: str
    at: int
    pid: int | None = None


class AlreadyStartedError(Exception):
    """The attempt's folder has `started` or `exit.json`. `folder_fd` is the caller's to close."""

    def __init__(self, folder_fd: int) -> None:
        super().__init__("this attempt was started before")
        self.folder_fd = folder_fd


class AttemptFolder:
    """The open descriptors of one attempt's folder. `close` is safe to call twice."""

    __slots__ = ("fd", "stderr_fd", "stdout_fd")

    def __init__(self, fd: int, stdout_fd: int, stderr_fd: int) -> None:
        self.fd = fd
        self.stdout_fd = stdout_fd
        self.stderr_fd = stderr_fd

    def close(self) -> None:
        for fd in (self.fd, self.stdout_fd, self.stderr_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.stdout_fd = self.stderr_fd = -1


def check_name(task: str, attempt: int, folder: str, state_folder: str) -> None:
    """Raises ValueError unless `folder` is this attempt's place in the state folder."""
    if not _TASK.fullmatch(task) or attempt < 1:
        raise ValueError(f"not a task id and attempt number: {task[:80]!r}, {attempt}")
    proper = f"tasks/{task}/attempt-{attempt}"
    if folder not in (proper, f"{state_folder}/{proper}"):
        raise ValueError(f"the folder of attempt {attempt} of {task} is {proper}, not {folder[:200]!r}")


def make_folder(tasks_fd: int, task: str, attempt: int, prompt: str | None) -> AttemptFolder:
    """State 1 or 2 -> state 2. Raises AlreadyStartedError in states 3 and 4, OSError if it cannot be made."""
    name = f"attempt-{attempt}"
    temporary = f".{name}.tmp-{os.urandom(4).hex()}"
    is_new = _make_task_folder(tasks_fd, task)
    task_fd = open_folder_at(task, tasks_fd)
    try:
        if not is_new:
            _clear_for(task_fd, name)
        try:
            folder = fill(task_fd, temporary, prompt)
            try:
                os.rename(temporary, name, src_dir_fd=task_fd, dst_dir_fd=task_fd)
            except BaseException:
                folder.close()
                raise
        except BaseException:
            with contextlib.suppress(OSError):
                remove_tree_at(temporary, task_fd)
            raise
        return folder
    finally:
        os.close(task_fd)


def mark_started(folder: AttemptFolder, started: Started) -> None:
    """State 2 -> state 3. Raises FileExistsError if someone else did it first: then it must not be run."""
    create_file_at("started", folder.fd, msgspec.json.encode(started) + b"\n")


def read_started(folder_fd: int) -> Started | None:
    """Who started this attempt; None if the file cannot be read or makes no sense."""
    try:
        return msgspec.json.decode(read_file_at("started", folder_fd, STARTED_BYTES_MAX), type=Started)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError):
        return None


def _make_task_folder(tasks_fd: int, task: str) -> bool:
    try:
        os.mkdir(task, 0o700, dir_fd=tasks_fd)
    except FileExistsError:
        return False
    return True


def _clear_for(task_fd: int, name: str) -> None:
    """Remove leftovers of a crash; refuse to touch what may have been run."""
    try:
        existing_fd = open_folder_at(name, task_fd)
    except FileNotFoundError:
        pass
    else:
        if _exists("started", existing_fd) or _exists("exit.json", existing_fd):
            raise AlreadyStartedError(existing_fd)
        os.close(existing_fd)
        remove_tree_at(name, task_fd)
    with os.scandir(task_fd) as entries:
        stale = [entry.name for entry in entries if entry.name.startswith(f".{name}.tmp-")]
    for leftover in stale:
        remove_tree_at(leftover, task_fd)


def _exists(name: str, folder_fd: int) -> bool:
    try:
        os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    except OSError as problem:
        if problem.errno != errno.ENOENT:
            raise
        return False
    return True


def fill(task_fd: int, temporary: str, prompt: str | None) -> AttemptFolder:
    """A whole attempt folder under a name of its own. Raises OSError, leaving what it made."""
    os.mkdir(temporary, 0o700, dir_fd=task_fd)
    folder = AttemptFolder(open_folder_at(temporary, task_fd), -1, -1)
    try:
        os.mkdir("outbox", 0o700, dir_fd=folder.fd)
        os.mkdir("work", 0o700, dir_fd=folder.fd)
        if prompt is not None:
            create_file_at("prompt", folder.fd, prompt.encode(errors="surrogatepass"))
        folder.stdout_fd = os.open("stdout", _APPEND, 0o600, dir_fd=folder.fd)
        folder.stderr_fd = os.open("stderr", _APPEND, 0o600, dir_fd=folder.fd)
    except BaseException:
        folder.close()
        raise
    return folder
