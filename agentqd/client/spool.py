"""What was said while a box could not be reached: one file a submission or cancellation, on the laptop's disk.

Invariants:
1. An entry is whole under its final name: draft, fsync, rename, fsync of the folder. Only then `put` returns.
2. Entries go in the order of their names. Whoever sends or removes holds `sending`; whoever adds a new one need not.
3. An entry that its maker attends to is the maker's to send or remove, and nothing behind it overtakes it.
4. What is no entry (damaged, foreign, a link, a pipe) is moved to `damaged/`, told once, and blocks nothing.
5. Nothing here is unbounded.

An entry is two lines: a head (JSON), then the body as it is sent. `refused/` keeps what the box would not take.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple

from agentqd.client import spoolfolder
from agentqd.client.boxname import check_box_name
from agentqd.client.connection import encode_json
from agentqd.client.durable import fsync_folder, make_private_folder
from agentqd.client.errors import NoSuchBox
from agentqd.client.ids import new_task_id, now_text
from agentqd.client.spoolfirst import SETTLED, may_wait
from agentqd.core.errors import AgentqError, RefusedForNow, StateFolderError
from agentqd.core.limits import CONTROL_BODY_BYTES_MAX, MIB, SPOOL_BYTES_MAX, SPOOL_ENTRIES_MAX

Kind = Literal["submit", "cancel"]
ADD_WAIT_S = 5.0
POLL_S = 0.01
HEAD_BYTES_MAX = 64 * 1024
ENTRY_BYTES_MAX = CONTROL_BODY_BYTES_MAX + MIB
DRAFT_AGE_MAX_S = 3600.0
_NO_FILE = (
    errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EIO, errno.EOPNOTSUPP, errno.ENODEV,
)  # fmt: skip
_NAME = re.compile(r"([0-9]{12})-([A-Za-z0-9_-]{1,64})\.json")


class Entry(NamedTuple):
    """One file of the spool; they sort as they are to be sent."""

    seq: int
    id: str

    @property
    def file(self) -> str:
        return f"{self.seq:012d}-{self.id}.json"


class Head(NamedTuple):
    """What an entry says of itself."""

    kind: Kind
    id: str
    name: str  # of the task, for people
    at: str
    key: str  # names this entry to the box, so that a refusal is recorded there once
    unsent: bool = (
        False  # a cancellation of a submission that was still spooled: the box may know nothing of it
    )
    error: Mapping[str, Any] | None = None  # in `refused/`: the box's word


class Damaged(Exception):
    """What lies under an entry's name is none. The message says what is wrong with it."""


class Kept:
    """An entry that its maker attends to, until `release`."""

    def __init__(self, entry: Entry, head: Head, fd: int, *, adopted: bool = False) -> None:
        self.adopted = adopted  # it was there before
        self.entry = entry
        self.head = head
        self._fd = fd

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)  # its lock goes with it
            self._fd = -1


class Spool:
    """The spool of one box. A folder that is not there is an empty spool: looking at it makes nothing."""

    def __init__(self, root: str, box: str, check_known: Callable[[], object] = lambda: None) -> None:
        """`check_known` raises AgentqError for a box that nobody has told us of: nothing is kept for that."""
        self.check_known = check_known
        try:
            self.box = check_box_name(box)
        except ValueError as error:
            raise NoSuchBox(str(error)) from None
        self.folder = f"{root}/{box}"
        self.refused_folder = f"{self.folder}/refused"
        self.damaged_folder = f"{self.folder}/damaged"

    def entries(self) -> list[Entry]:
        """What is to be sent, in order."""
        return _entries(self.folder)

    def strangers(self) -> list[str]:
        """Names in the folder that are no entries of ours."""
        return [name for name in _names(self.folder) if not _is_ours(name)]

    def is_empty(self) -> bool:
        """Nothing to send and nothing to set aside: one listdir."""
        return not may_wait(self.folder)

    def refused(self) -> list[Entry]:
        return _entries(self.refused_folder)

    def damaged(self) -> list[str]:
        return sorted(_names(self.damaged_folder))

    def find(self, task_id: str, kind: Kind = "submit") -> tuple[Entry, Head] | None:
        """The newest entry of that kind for a task."""
        return self._newest(self.folder, self.entries(), task_id, kind)

    def find_refused(self, task_id: str) -> tuple[Entry, Head] | None:
        return self._newest(self.refused_folder, self.refused(), task_id, "submit")

    def _newest(
        self, folder: str, entries: list[Entry], task_id: str, kind: Kind
    ) -> tuple[Entry, Head] | None:
        for entry in reversed(entries):
            if entry.id != task_id:
                continue
            with suppress(Damaged, FileNotFoundError):
                head = _read(f"{folder}/{entry.file}", entry, whole=False)[0]
                if head.kind == kind:
                    return entry, head
        return None

    def read(self, entry: Entry) -> tuple[Head, bytes]:
        """Raises Damaged, FileNotFoundError."""
        return _read(f"{self.folder}/{entry.file}", entry, whole=True)

    def head(self, entry: Entry, *, refused: bool = False) -> Head:
        """Raises Damaged, FileNotFoundError."""
        folder = self.refused_folder if refused else self.folder
        return _read(f"{folder}/{entry.file}", entry, whole=False)[0]

    def put(self, kind: Kind, task_id: str, name: str, body: bytes, *, unsent: bool = False) -> Kept:
        """A new last entry, durable, attended to by the caller. Raises AgentqError (then there is none)."""
        head = Head(kind, task_id, name, now_text(), new_task_id(), unsent)
        try:
            make_private_folder(self.folder)
            spoolfolder.check_ours(self.folder)
            draft = f"{self.folder}/.{head.key}.draft"
            fd = spoolfolder.write_whole(draft, _written(head, body))
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                entry = self._enter(draft, task_id, len(body))
            except BaseException:
                os.close(fd)
                with suppress(FileNotFoundError):
                    os.unlink(draft)
                raise
        except OSError as error:
            raise self._explained(error) from error
        return Kept(entry, head, fd)

    def _enter(self, draft: str, task_id: str, more_bytes: int) -> Entry:
        """The draft as the last entry. One at a time: no two have one number."""
        with self._locked(".adding", ADD_WAIT_S) as ours:
            if not ours:
                raise RefusedForNow(f"another agentqctl has held {self.folder}/.adding for {ADD_WAIT_S:g} s")
            entry = Entry(self._next_seq(more_bytes), task_id)
            os.rename(draft, f"{self.folder}/{entry.file}")
            fsync_folder(self.folder)
        return entry

    def adopt(self, entry: Entry) -> Kept | None:
        """Attends to an entry that is there already. None: somebody else does, or it is gone. Raises Damaged."""
        try:
            fd = _open(f"{self.folder}/{entry.file}")
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            head = self.head(entry)
            if os.fstat(fd).st_nlink:  # else it was sent and removed before we had its lock
                return Kept(entry, head, fd, adopted=True)
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def _next_seq(self, more_bytes: int) -> int:
        """Raises RefusedForNow when the spool is full."""
        entries = self.entries()
        if not entries:
            return 1
        size = more_bytes
        for entry in entries:
            with suppress(FileNotFoundError):
                size += os.lstat(f"{self.folder}/{entry.file}").st_size
        if len(entries) >= SPOOL_ENTRIES_MAX or size > SPOOL_BYTES_MAX or entries[-1].seq >= 10**12 - 1:
            raise RefusedForNow(
                f"the spool for {self.box} is full: {len(entries)} entries, {size} bytes in {self.folder}; send them"
                f" (agentqctl flush --box {self.box}) or drop some (agentqctl spool drop)",
                reason="spool_full",
                path=self.folder,
            )
        return entries[-1].seq + 1

    @contextmanager
    def sending(self, wait_s: float = 0.0) -> Iterator[bool]:
        """Whether this process is now the one that sends and removes."""
        if not os.path.isdir(self.folder):
            yield True
            return
        try:
            spoolfolder.check_ours(self.folder)
        except OSError as error:
            raise self._explained(error) from error
        with self._locked(".sending", wait_s) as ours:
            yield ours

    def remove(self, entry: Entry) -> None:
        """Sent, or dropped. (Not fsynced: what comes back after a power cut is sent again, with its id.)"""
        with suppress(FileNotFoundError):
            os.unlink(f"{self.folder}/{entry.file}")

    def refuse(self, entry: Entry, head: Head, body: bytes, error: AgentqError) -> None:
        """Kept in `refused/` with the box's word, and no longer sent. Raises AgentqError."""
        said = error.as_json()
        told = {"at": now_text()} | {
            name: said[name] for name in ("error", "message", "conflicts") if name in said
        }
        try:
            make_private_folder(self.refused_folder)
            draft = f"{self.refused_folder}/.{head.key}.draft"
            with suppress(FileNotFoundError):
                os.unlink(draft)
            os.close(spoolfolder.write_whole(draft, _written(head._replace(error=told), body)))
            os.rename(draft, f"{self.refused_folder}/{entry.file}")
            fsync_folder(self.refused_folder)
        except OSError as failure:
            raise self._explained(failure) from failure
        self.remove(entry)
        for old in self.refused()[:-SPOOL_ENTRIES_MAX]:
            self.drop_refused(old)

    def set_aside(self, name: str) -> str:
        """Moves what is no entry to `damaged/`; where it is now. Raises AgentqError."""
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[:80]
        kept = f"{self.damaged_folder}/{new_task_id()}-{plain}"
        try:
            make_private_folder(self.damaged_folder)
            os.rename(f"{self.folder}/{name}", kept)
        except OSError as error:
            raise self._explained(error) from error
        return kept

    def drop_refused(self, entry: Entry) -> None:
        with suppress(FileNotFoundError):
            os.unlink(f"{self.refused_folder}/{entry.file}")

    def drop_damaged(self, name: str) -> None:
        """Raises AgentqError (a folder that is not empty is a person's to remove)."""
        path = f"{self.damaged_folder}/{name}"
        try:
            if stat.S_ISDIR(os.lstat(path).st_mode):
                os.rmdir(path)
            else:
                os.unlink(path)
        except OSError as error:
            raise self._explained(error) from error

    def clear_drafts(self) -> None:
        """Drafts whose maker died."""
        for folder in (self.folder, self.refused_folder):
            for name in _names(folder):
                path = f"{folder}/{name}"
                with suppress(OSError):
                    old = time.time() - os.lstat(path).st_mtime > DRAFT_AGE_MAX_S
                    if name.startswith(".") and name.endswith(".draft") and old:
                        os.unlink(path)

    @contextmanager
    def _locked(self, name: str, wait_s: float) -> Iterator[bool]:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(f"{self.folder}/{name}", flags, spoolfolder.FILE_MODE)
        except OSError as error:
            raise self._explained(error) from error
        try:
            yield _take_lock(fd, wait_s)
        finally:
            os.close(fd)

    def _explained(self, error: OSError) -> AgentqError:
        where = error.filename if isinstance(error.filename, str) else self.folder
        what = f"the spool on this machine: {where}: {error.strerror or error}"
        if error.errno in spoolfolder.FULL:
            return RefusedForNow(f"{what}; free some space", reason="disk_full", path=self.folder)
        return StateFolderError(what, path=self.folder)


def _take_lock(fd: int, wait_s: float) -> bool:
    give_up = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= give_up:
                return False
            time.sleep(POLL_S)
        else:
            return True


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _entries(folder: str) -> list[Entry]:
    matches = [match for name in _names(folder) if (match := _NAME.fullmatch(name))]
    return sorted(Entry(int(match[1]), match[2]) for match in matches)


def _is_ours(name: str) -> bool:
    return name.startswith(".") or name in SETTLED or _NAME.fullmatch(name) is not None


def _written(head: Head, body: bytes) -> bytes:
    facts = {name: value for name, value in head._asdict().items() if value not in (None, False)}
    sealed = {"spool": 1, **facts, "bytes": len(body), "crc32": zlib.crc32(body)}
    return encode_json(sealed) + b"\n" + body + b"\n"


def _open(path: str) -> int:
    """An entry's file, whatever may lie there in its place. Raises Damaged, FileNotFoundError, OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise Damaged(f"cannot be opened: {error.strerror}") from None
    found = os.fstat(fd)
    wrong = None
    if not stat.S_ISREG(found.st_mode):
        wrong = "not a regular file"
    elif found.st_uid != os.getuid():
        wrong = f"belongs to uid {found.st_uid}"
    elif found.st_size > ENTRY_BYTES_MAX:
        wrong = f"{found.st_size} bytes"
    if wrong is not None:
        os.close(fd)
        raise Damaged(wrong)
    return fd


def _read(path: str, entry: Entry, *, whole: bool) -> tuple[Head, bytes]:
    with os.fdopen(_open(path), "rb") as file:
        try:
            first = file.readline(HEAD_BYTES_MAX)
            body = file.read() if whole else b""
        except OSError as error:
            raise Damaged(f"cannot be read: {error.strerror}") from None
    return _head(first, entry, body if whole else None), body[:-1]


def _head(line: bytes, entry: Entry, body: bytes | None) -> Head:
    """The head, checked: against its name, and (if it was read) its body."""
    try:
        said = json.loads(line)
        head = Head(
            said["kind"], said["id"], str(said.get("name", "")), str(said["at"]), str(said["key"]),
            said.get("unsent") is True, said.get("error"),
        )  # fmt: skip
        length, crc = said["bytes"], said["crc32"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged("its first line is not that of a spooled entry") from None
    if said.get("spool") != 1 or head.kind not in ("submit", "cancel") or head.id != entry.id:
        raise Damaged("its first line says something else than its name")
    if not re.fullmatch(r"[0-9a-z]{1,64}", head.key) or not isinstance(head.error, dict | None):
        raise Damaged("its first line is not that of a spooled entry")
    if body is not None and (
        not body.endswith(b"\n") or len(body) - 1 != length or zlib.crc32(body[:-1]) != crc
    ):
        raise Damaged("its bytes are not those that were written")
    return head
