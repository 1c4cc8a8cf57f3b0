"""The folder of one attempt: made all or nothing, and entered into exactly once.

States of tasks/ID/attempt-N, and the operation that moves from one to the next:
1. absent; perhaps a `.attempt-N.tmp-XXXX` of a crash beside it, which is removed when the task's folder is next used
2. whole, without `started`       after rename(2) of the temporary folder; nothing was ever run in it: it is made anew
3. with `started`                 after renameat2(NOREPLACE) of `.started`; from now on it may have been run and never runs again
4. with `exit.json`               after rename(2) of the temporary file; the whole tree is gone

`started` is a file that was there before under another name because a new inode is the dearest thing between a line and its
worker (measured on ext4 from idle: 0.75 ms, a rename 0.07 ms); RENAME_NOREPLACE is as exclusive as O_EXCL.
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
    open_folder_at,
    read_file_at,
    remove_tree_at,
    rename_new_at,
    write_all,
)

_TASK: Final = re.compile(rf"[A-Za-z0-9_-]{{1,{TASK_ID_CHARS_MAX}}}")
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_NOT_YET_STARTED: Final = ".started"
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
    """The open descriptors of one attempt's folder. `close` is safe to call twice. `prompt_fd` and `started_fd` are open
    until their files have their content."""

    __slots__ = ("fd", "prompt_fd", "started_fd", "stderr_fd", "stdout_fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.prompt_fd = self.started_fd = self.stdout_fd = self.stderr_fd = -1

    def close(self) -> None:
        for fd in (self.fd, self.prompt_fd, self.started_fd, self.stdout_fd, self.stderr_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.prompt_fd = self.started_fd = self.stdout_fd = self.stderr_fd = -1


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
            folder = fill(task_fd, temporary, with_prompt=prompt is not None)
            try:
                write_prompt(folder, prompt)
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


def write_started(folder: AttemptFolder, started: Started) -> None:
    """Its content, still under the other name: nothing may be run yet. Once for a folder."""
    write_all(folder.started_fd, msgspec.json.encode(started) + b"\n")
    os.close(folder.started_fd)
    folder.started_fd = -1


def mark_started(folder: AttemptFolder) -> None:
    """State 2 -> state 3. Raises FileExistsError if someone else did it first: then it must not be run."""
    rename_new_at(_NOT_YET_STARTED, "started", folder.fd)


def write_prompt(folder: AttemptFolder, prompt: str | None) -> None:
    """The prompt file, or none. Once for a folder, before it stands in its place."""
    if folder.prompt_fd < 0:
        assert prompt is None, "a folder without a prompt file for a task with a prompt"
        return
    if prompt is not None:
        write_all(folder.prompt_fd, prompt.encode(errors="surrogatepass"))
    else:
        os.unlink("prompt", dir_fd=folder.fd)
    os.close(folder.prompt_fd)
    folder.prompt_fd = -1


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


def fill(task_fd: int, temporary: str, *, with_prompt: bool) -> AttemptFolder:
    """A whole attempt folder under a name of its own, with files still empty. Raises OSError, leaving what it made."""
    os.mkdir(temporary, 0o700, dir_fd=task_fd)
    folder = AttemptFolder(open_folder_at(temporary, task_fd))
    try:
        os.mkdir("outbox", 0o700, dir_fd=folder.fd)
        os.mkdir("work", 0o700, dir_fd=folder.fd)
        if with_prompt:
            folder.prompt_fd = os.open("prompt", _NEW, 0o600, dir_fd=folder.fd)
        folder.started_fd = os.open(_NOT_YET_STARTED, _NEW, 0o600, dir_fd=folder.fd)
        folder.stdout_fd = os.open("stdout", _NEW | os.O_APPEND, 0o600, dir_fd=folder.fd)
        folder.stderr_fd = os.open("stderr", _NEW | os.O_APPEND, 0o600, dir_fd=folder.fd)
    except BaseException:
        folder.close()
        raise
    return folder
