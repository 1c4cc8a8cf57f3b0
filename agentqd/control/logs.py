"""`GET /v1/tasks/ID/logs`: a worker's output, byte for byte, while it grows.

Promises:
1. Regular files only, reached folder by folder without following a link, never waiting on a FIFO, in bounded pieces.
2. What was punched out of the middle is never given as zeros: an answer ends before the hole, the next one says where
   it goes on. A hole that appears while a piece is read makes the piece be read again.
3. `Agentq-End` is said only if the attempt's end was known before the last look at the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sqlite3
import stat
from typing import Final

import msgspec
from aiohttp import web

from agentqd.control.missing import REJECTED, missing, no_such_task
from agentqd.control.room import Room
from agentqd.control.route import Call, NoSuchAttempt, Param, Route
from agentqd.core.errors import AgentqError
from agentqd.core.lifecycle import ACTIVE_STATES
from agentqd.core.limits import MIB
from agentqd.core.task import TASK_ID
from agentqd.storage import tasks as store
from agentqd.system.fsops import OPEN_FOLDER, open_folder_at

LOG_BYTES_MAX: Final = 4 * MIB
WAIT_MAX_S: Final = 300
STREAMS: Final = ("stdout", "stderr")
_POLL_MIN_S: Final = 0.05
_POLL_MAX_S: Final = 0.25
_LOOK_AGAIN_S: Final = 2.0
_PUNCHED_TRIES: Final = 5
_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Where(msgspec.Struct, frozen=True):
    """Which attempt's file, and what the journal says of it."""

    attempt: int
    ended: bool
    truncated: bool | None  # None: not known yet


class Piece(msgspec.Struct, frozen=True):
    data: bytes
    offset: int
    size: int  # of the file when it was read
    skipped: bool

    @property
    def next_offset(self) -> int:
        return self.offset + len(self.data)


class LogUnreadable(AgentqError):
    code = "log_unreadable"
    http_status = 409


async def read_log(call: Call) -> web.StreamResponse:
    room, query = call.room, call.query
    task_id, offset = call.part("id"), query["offset"]
    if not TASK_ID.fullmatch(task_id):
        raise no_such_task(task_id)
    deadline = room.deadline(query["wait_s"])
    with room.watch.of(task_id) as changed:
        where = await _look(room, task_id, query["attempt"], query["stream"])
        path = f"{room.box.folders.tasks}/{task_id}/attempt-{where.attempt}"
        looked, pause_s = room.box.clock.monotonic_s(), _POLL_MIN_S
        while True:
            piece = await asyncio.to_thread(
                read_piece, path, query["stream"], offset, query["limit"], where.truncated
            )
            left_s = room.left_s(deadline)
            if piece.data or where.ended or left_s <= 0:
                return _answer(where, piece)
            told = await room.wait_for(changed, min(left_s, pause_s))
            pause_s = min(pause_s * 1.5, _POLL_MAX_S)
            now = room.box.clock.monotonic_s()
            if told or now - looked >= _LOOK_AGAIN_S or room.left_s(deadline) <= 0:
                looked = now
                where = await _look(room, task_id, where.attempt, query["stream"])


def _answer(where: Where, piece: Piece) -> web.Response:
    headers = {
        "Agentq-Offset": str(piece.offset),
        "Agentq-Next-Offset": str(piece.next_offset),
        "Agentq-Attempt": str(where.attempt),
    }
    if piece.skipped or where.truncated:
        headers["Agentq-Truncated"] = "true"
    if where.ended and piece.next_offset >= piece.size:
        headers["Agentq-End"] = "true"
    return web.Response(body=piece.data, headers=headers, content_type="application/octet-stream")


async def _look(room: Room, task_id: str, attempt: int | None, stream: str) -> Where:
    """Raises NoSuchTask, NoSuchAttempt."""

    def query(connection: sqlite3.Connection) -> Where:
        task = store.find(connection, task_id)
        if task is None:
            raise missing(connection, task_id)
        number = task.attempt if attempt is None else attempt
        if not 1 <= number <= task.attempt:
            there_are = f"there are {task.attempt}" if task.attempt else "none has begun yet"
            raise NoSuchAttempt(
                f"task {task_id} has no attempt {number or 1}; {there_are}", id=task_id, attempts=task.attempt
            )
        row = store.attempt_of(connection, task.seq, number)
        ended = row.ended_at is not None or number != task.attempt or task.state not in ACTIVE_STATES
        evidence = msgspec.json.decode(row.evidence) if row.evidence else None
        truncated = None
        if evidence is not None and row.result != "lost":  # of a lost one nobody has said it
            truncated = bool(evidence.get(f"{stream}_truncated"))
        return Where(number, ended, truncated)

    return await room.box.journal.read(query)


def read_piece(folder: str, stream: str, offset: int, limit: int, truncated: bool | None) -> Piece:
    """At most `limit` bytes from `offset` on, or from the end of the hole that `offset` lies in. Blocking.

    `truncated`: True or None (not known): a hole is what was punched out; False: the file is as its worker wrote it.
    Raises LogUnreadable.
    """
    try:
        fd = _open(folder, stream)
    except FileNotFoundError:
        return Piece(b"", offset, 0, skipped=False)  # not begun yet, or its folder was cleaned up
    except OSError as error:
        raise LogUnreadable(f"{folder}/{stream}: {error.strerror}", path=f"{folder}/{stream}") from error
    try:
        for _ in range(_PUNCHED_TRIES):
            size = os.fstat(fd).st_size
            begin, end = (offset, size) if truncated is False else _data_from(fd, offset, size)
            data = os.pread(fd, max(0, min(limit, end - begin)), begin)
            if truncated is False or _still_there(fd, begin, len(data)):
                return Piece(data, begin, size, skipped=begin > offset)
        raise LogUnreadable(
            f"{folder}/{stream}: grows faster than it can be read; try again", path=f"{folder}/{stream}"
        )
    except OSError as error:
        raise LogUnreadable(f"{folder}/{stream}: {error.strerror}", path=f"{folder}/{stream}") from error
    finally:
        os.close(fd)


def _still_there(fd: int, begin: int, length: int) -> bool:
    """Nothing of what was just read has been punched out meanwhile."""
    return length == 0 or (
        _seek(fd, begin, os.SEEK_DATA) == begin and _seek(fd, begin, os.SEEK_HOLE) >= begin + length
    )


def _data_from(fd: int, offset: int, size: int) -> tuple[int, int]:
    """(where bytes begin at or after `offset`, where the next hole or the end is)."""
    if offset >= size:
        return offset, offset
    begin = _seek(fd, offset, os.SEEK_DATA)
    if begin < 0:
        return offset, size  # nothing but a hole up to the end: not ours (a tail is never punched out)
    return begin, max(begin, min(size, _seek(fd, begin, os.SEEK_HOLE)))


def _seek(fd: int, offset: int, whence: int) -> int:
    """-1: nothing there."""
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return -1
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system without holes
            return offset if whence == os.SEEK_DATA else os.fstat(fd).st_size
        raise


def _open(folder: str, name: str) -> int:
    """A regular file, its last two folders (the task's, the attempt's) entered without following a link."""
    tasks, task, attempt = folder.rsplit("/", 2)
    with contextlib.ExitStack() as opened:
        outer = os.open(tasks, OPEN_FOLDER)
        opened.callback(os.close, outer)
        middle = open_folder_at(task, outer)
        opened.callback(os.close, middle)
        inner = open_folder_at(attempt, middle)
        opened.callback(os.close, inner)
        fd = os.open(name, _OPEN, dir_fd=inner)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", f"{folder}/{name}")
    return fd


def size_of(folder: str, stream: str) -> int | None:
    """How much a running attempt has written so far; None where that cannot be seen."""
    try:
        found = os.stat(f"{folder}/{stream}", follow_symlinks=False)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


ROUTES: Final = (
    Route(
        "GET",
        "/v1/tasks/{id}/logs",
        "The bytes of one stream of one attempt from `offset`; with `wait_s`, waits for more.",
        read_log,
        query=(
            Param("stream", "which output", default="stdout", one_of=STREAMS),
            Param("attempt", "its number; the newest if not given", "integer", None, 1, 2**31),
            Param("offset", "from this byte on", "integer", 0, 0, 2**62),
            Param(
                "limit",
                f"at most so many bytes (never more than {LOG_BYTES_MAX})",
                "integer",
                MIB,
                1,
                LOG_BYTES_MAX,
            ),
            Param("wait_s", "wait so long for more bytes", "number", 0.0, 0, WAIT_MAX_S),
        ),
        answer="application/octet-stream",
        more_statuses={404: "no_such_task, no_such_attempt", 409: "log_unreadable", 422: REJECTED},
    ),
)
