"""`/v1/tasks/ID/attempts/N/files`: what an attempt left behind, listed, and read byte for byte once it has ended.

Promises:
1. A file is addressed by its place in the record (`stdout`, `stderr`, `a0`, `a1`, ..., `e` + delivery id), never by a path.
2. A body has the announced length, or the connection breaks. It is read and sent in pieces; nothing is held whole.
3. The listing says of each file whether it can be had; one that is gone, changed or hidden behind a link is told.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import re
import sqlite3
from typing import Any, Final

import msgspec
from aiohttp import web

from agentqd.control import queries
from agentqd.control.missing import no_such_task
from agentqd.control.outputfiles import (
    CHUNK_BYTES,
    FileChanged,
    FileGone,
    OpenFile,
    Recorded,
    open_recorded,
    unreadable,
)
from agentqd.control.route import Call, NoSuchAttempt, Param, Route, answer
from agentqd.control.tasks import task_id_of
from agentqd.core.envelope import data_of
from agentqd.core.errors import AgentqError, InvalidRequest
from agentqd.core.lifecycle import ACTIVE_STATES
from agentqd.core.limits import ARTIFACTS_MAX, ENTRIES_PER_ATTEMPT_MAX
from agentqd.core.resolve import resolve
from agentqd.core.task import read_task
from agentqd.loops.box import Box
from agentqd.storage import tasks as store
from agentqd.storage.paths import expand_workdir

STREAMS: Final = ("stdout", "stderr")
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,8}")
_RANGE: Final = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})")
_ENDED_ONLY: Final = "its attempt has not ended; GET .../logs follows it"


class AttemptRunning(AgentqError):
    code = "attempt_running"
    http_status = 409


class BadRange(AgentqError):
    code = "bad_range"
    http_status = 416


class _Artifact(msgspec.Struct):
    path: str
    bytes: int
    sha256: str | None


class _Result(msgspec.Struct):
    """What matters here of a result's data."""

    artifacts: list[_Artifact] = []
    artifacts_truncated: bool = False


class _Entry(msgspec.Struct):
    key: str
    bytes: int
    sha256: str
    path: str | None = None


class Attempt(msgspec.Struct, frozen=True):
    """What the journal says of one attempt. Files of the attempt itself may only be read once it has `ended`."""

    task_id: str
    number: int
    ended: bool
    truncated: bool
    files: list[Recorded]


async def list_files(call: Call) -> web.StreamResponse:
    attempt = await _look(call, None)
    files = await asyncio.to_thread(lambda: [_described(item, attempt) for item in attempt.files])
    return answer({
        "task_id": attempt.task_id,
        "attempt": attempt.number,
        "ended": attempt.ended,
        "artifacts_truncated": attempt.truncated,
        "files": files,
    })  # fmt: skip


def _described(item: Recorded, attempt: Attempt) -> dict[str, Any]:
    shown = {
        "file": item.file,
        "kind": item.kind,
        "name": item.name,
        "bytes": item.bytes,
        "sha256": item.sha256,
    }
    try:
        opened = open_recorded(item)
    except FileGone as error:
        if item.may_be_missing:
            return {**shown, "bytes": 0}
        return {**shown, "problem": error.code, "message": error.message}
    except AgentqError as error:
        return {**shown, "problem": error.code, "message": error.message}
    opened.close()
    shown["bytes"] = opened.size
    if opened.left_out_bytes:
        shown |= {"left_out_at": opened.left_out_at, "left_out_bytes": opened.left_out_bytes}
    if item.kind != "entry" and not attempt.ended:
        shown |= {"problem": AttemptRunning.code, "message": f"{item.name}: {_ENDED_ONLY}"}
    return shown


async def read_file(call: Call) -> web.StreamResponse:
    attempt = await _look(call, call.part("file"))
    (item,) = attempt.files
    if item.kind != "entry" and not attempt.ended:
        raise AttemptRunning(f"{item.name}: {_ENDED_ONLY}", file=item.file)
    try:
        opened = await _opened(item)
    except FileGone:
        if not item.may_be_missing:
            raise
        opened = OpenFile(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), [(0, 0)], 0)
    try:
        return await _send(call, item, opened)
    finally:
        opened.close()


async def _opened(item: Recorded) -> OpenFile:
    """Opened on a thread; closed there too if nobody waits for it any more."""
    opening = asyncio.ensure_future(asyncio.to_thread(open_recorded, item))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_unwanted)
        raise


def _close_unwanted(opening: asyncio.Future[OpenFile]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


async def _send(call: Call, item: Recorded, opened: OpenFile) -> web.StreamResponse:
    first, end, partial = _wanted(call.request, opened.size)
    headers = {"Accept-Ranges": "bytes"}
    if partial:
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{opened.size}"
    try:
        if "sha-256" in call.request.headers.get("Want-Repr-Digest", ""):
            headers["Repr-Digest"] = f"sha-256=:{base64.b64encode(await _digest(opened)).decode()}:"
        # Before the head goes out: a disk that cannot be read here is an error, not a cut that is tried again for ever.
        data = await asyncio.to_thread(opened.read, first, min(CHUNK_BYTES, end - first))
    except EOFError:
        raise FileChanged(f"{item.name}: it was cut while it was read", file=item.file) from None
    except OSError as error:
        raise unreadable(item, error) from error
    response = web.StreamResponse(status=206 if partial else 200, headers=headers)
    response.content_type = "application/octet-stream"
    response.content_length = end - first
    await response.prepare(call.request)
    try:
        while data:
            await response.write(data)
            first += len(data)
            data = (
                b""
                if first == end
                else await asyncio.to_thread(opened.read, first, min(CHUNK_BYTES, end - first))
            )
    except (EOFError, OSError) as error:
        if not isinstance(error, ConnectionError):
            call.room.box.log.warning("output_unreadable", file=item.name, error=str(error))
            if call.request.transport is not None:
                call.request.transport.abort()  # never shorter than announced, never filled up
        raise ConnectionResetError("the body ends here") from error
    await response.write_eof()
    return response


async def _digest(opened: OpenFile) -> bytes:
    """Step by step, so that one who has gone is not worked for."""
    digest, offset = hashlib.sha256(), 0
    while offset < opened.size:
        offset = await asyncio.to_thread(opened.hash_step, digest, offset)
    return digest.digest()


def _wanted(request: web.Request, size: int) -> tuple[int, int, bool]:
    """(first, end, whether a part is asked for). Raises BadRange."""
    text = request.headers.get("Range")
    if text is None:
        return 0, size, False
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        raise BadRange(f"Range: only bytes=FIRST- or bytes=FIRST-LAST, not {text[:60]!r}", bytes=size)
    first = int(match[1])
    end = min(size, int(match[2]) + 1) if match[2] else size
    if first >= end:
        raise BadRange(f"Range: {text[:60]!r} lies outside of {size} bytes", bytes=size)
    return first, end, True


async def _look(call: Call, file: str | None) -> Attempt:
    """The attempt with all its files, or with the one that `file` names. Raises NoSuchTask, NoSuchAttempt, FileGone."""
    task_id, number, box = task_id_of(call), call.part("n"), call.room.box
    if not _NUMBER.fullmatch(number):
        raise InvalidRequest(f"an attempt is a number from 1, not {number[:20]!r}", field="n")
    return await box.journal.read(lambda c: _attempt(c, box, task_id, int(number), file))


def _attempt(
    connection: sqlite3.Connection, box: Box, task_id: str, number: int, file: str | None
) -> Attempt:
    task = store.find(connection, task_id)
    if task is None:
        raise no_such_task(task_id)
    if number > task.attempt:
        raise NoSuchAttempt(
            f"task {task_id} has no attempt {number}; there are {task.attempt}",
            id=task_id,
            attempts=task.attempt,
        )
    row = store.attempt_of(connection, task.seq, number)
    ended = row.ended_at is not None or number != task.attempt or task.state not in ACTIVE_STATES
    folder = (task_id, f"attempt-{number}")
    evidence = msgspec.json.decode(row.evidence) if row.evidence and row.result != "lost" else None
    files: list[Recorded] = []
    for name in STREAMS:
        punched = evidence is None or bool(evidence.get(f"{name}_truncated"))
        wrote = evidence is not None and bool(evidence.get(f"{name}_bytes"))
        files.append(
            Recorded(
                name, "stream", name, None, None, box.folders.tasks, folder, punched, may_be_missing=not wrote
            )
        )
    result = _result_of(connection, task.seq, number)
    if result.artifacts and (file is None or file.startswith("a")):
        workdir = _workdir(connection, box, task)
        base, inner = (workdir, ()) if workdir else (box.folders.tasks, (*folder, "work"))
        files += [
            Recorded(f"a{n}", "artifact", item.path, item.bytes, item.sha256, base, inner)
            for n, item in enumerate(result.artifacts[: ARTIFACTS_MAX * 2])
        ]
    files += _entries(connection, task.seq, number, file)
    if file is not None:
        files = [item for item in files if item.file == file]
        if not files:
            raise FileGone(f"attempt {number} of task {task_id} has no file {file[:80]!r}", file=file[:80])
    return Attempt(task_id, number, ended, result.artifacts_truncated, files)


def _result_of(connection: sqlite3.Connection, task_seq: int, number: int) -> _Result:
    row = connection.execute(queries.RESULT_OF_ATTEMPT, (task_seq, number)).fetchone()
    return _Result() if row is None else msgspec.json.decode(data_of(bytes(row[0])), type=_Result)


def _workdir(connection: sqlite3.Connection, box: Box, task: store.TaskRow) -> str | None:
    request = read_task(store.spec_of(connection, task.seq)[0])
    return expand_workdir(resolve(request, task.queue, task.runner, box.settings).workdir)


def _entries(connection: sqlite3.Connection, task_seq: int, number: int, file: str | None) -> list[Recorded]:
    """What was handed over and is too large for a line."""
    if file is None:
        rows = connection.execute(
            queries.LARGE_ENTRIES_OF_ATTEMPT, (task_seq, number, ENTRIES_PER_ATTEMPT_MAX)
        ).fetchall()
    elif file.startswith("e"):
        rows = connection.execute(queries.LARGE_ENTRY, (file[1:], task_seq, number)).fetchall()
    else:
        return []
    found = []
    for delivery_id, payload in rows:
        entry = msgspec.json.decode(data_of(bytes(payload)), type=_Entry)
        if entry.path is not None:
            base, name = os.path.split(entry.path)
            found.append(
                Recorded(f"e{delivery_id}", "entry", entry.key, entry.bytes, entry.sha256, base, (name,))
            )
    return found


ROUTES: Final = (
    Route(
        "GET",
        "/v1/tasks/{id}/attempts/{n}/files",
        "What an attempt left behind: its streams, its recorded artifacts, entries too large for a line.",
        list_files,
        more_statuses={404: "no_such_task, no_such_attempt"},
    ),
    Route(
        "GET",
        "/v1/tasks/{id}/attempts/{n}/files/{file}",
        "The bytes of one of them, or of a range; `file` is as in the listing.",
        read_file,
        headers=(
            Param("Range", "bytes=FIRST- or bytes=FIRST-LAST"),
            Param(
                "Want-Repr-Digest", "sha-256=1: the answer has Repr-Digest, of the whole file as it is now"
            ),
        ),
        answer="application/octet-stream",
        more_statuses={
            206: "a part",
            404: "no_such_task, no_such_attempt, file_gone",
            409: "file_changed, file_unreadable, attempt_running",
            416: "bad_range",
        },
    ),
)
