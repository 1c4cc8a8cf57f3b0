"""One file from the box onto this disk: goes on at the byte where a cut has stopped it, its sha256 checked, fsynced.

Promises:
1. `fetch` returns only when the whole file is there with the recorded sum (or, without one, with the sum that the box works
   out for it now) and fsynced.
2. A file that cannot be had is a FileProblem, found after at most two transfers; only a connection that breaks is tried
   again, for as long as the caller's patience lasts, and each byte that comes renews it.
3. What is on this disk already is read and hashed, never trusted.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from agentqd.client.connection import Connection, take
from agentqd.client.durable import fsync_file
from agentqd.client.errors import BadAnswer
from agentqd.client.patience import Patience, may_come_back
from agentqd.core.errors import AgentqError
from agentqd.core.limits import MIB

DIGEST_WITH_BYTES_MAX = 32 * MIB  # up to here the sum comes with the bytes; above, it would keep them waiting
DIGEST_BYTES_PER_S = 20 * MIB  # a slow box's pace, for the timeout
HASH_BYTES = MIB
PROBLEMS = {
    "file_gone", "file_changed", "file_unreadable", "bad_range", "attempt_running", "no_such_task", "no_such_attempt",
}  # fmt: skip
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})")
_SHA256 = re.compile(r"sha-256=:([A-Za-z0-9+/=]{44}):")
_HEX = re.compile(r"[0-9a-f]{64}")


class FileProblem(AgentqError):
    """This file cannot be had, now or later; others can."""

    code = "file_changed"


class Remote(NamedTuple):
    """A file of the listing."""

    task_id: str
    attempt: int
    file: str
    kind: str
    name: str
    bytes: int
    sha256: str | None
    said: dict[str, Any]  # the listing's object: problem, message, left_out_*


class Listing(NamedTuple):
    files: list[Remote]
    artifacts_truncated: bool


T = TypeVar("T")
Progress = Callable[[int], None]  # so many more bytes are there (fewer, when a transfer begins anew)


def list_files(connection: Connection, task_id: str, attempt: int, patience: Patience) -> Listing:
    """Raises FileProblem: the box has nothing of this attempt any more."""
    answer = _patiently(lambda: connection.get("tasks", task_id, "attempts", str(attempt), "files"), patience)
    files = [_remote(item, task_id, attempt) for item in take(answer, "files", list)]
    return Listing(files, bool(answer.get("artifacts_truncated")))


def _remote(item: Any, task_id: str, attempt: int) -> Remote:
    if not isinstance(item, dict):
        raise BadAnswer("the daemon's list of files holds something that is no object")
    size, digest = item.get("bytes"), item.get("sha256")
    if not isinstance(size, int) or size < 0 or (digest is not None and not _HEX.fullmatch(str(digest))):
        raise BadAnswer(f"the daemon's list of files is not readable: {str(item)[:80]!r}")
    file, kind, name = (take(item, field, str) for field in ("file", "kind", "name"))
    return Remote(task_id, attempt, file, kind, name, size, digest, item)


def fetch(connection: Connection, remote: Remote, path: str, patience: Patience, progress: Progress) -> None:
    """`path` holds the whole file when it returns. Raises FileProblem, OSError (of this disk), or what ends patience."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        for _ in range(
            2
        ):  # once more from its first byte: what an earlier cut (of power, too) left may be spoilt
            digest = _hash_what_is_there(fd, remote.bytes, progress)
            asked = _complete(connection, remote, fd, digest, patience, progress)
            wanted = remote.sha256 or asked or _sum_at_the_box(connection, remote, patience)
            if digest.hexdigest() == wanted:
                fsync_file(fd)
                return
            progress(-os.fstat(fd).st_size)
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)
    os.unlink(path)
    raise FileProblem(
        f"{remote.name}: its content is no longer what was recorded at its task's end",
        code="file_changed",
        recorded_sha256=remote.sha256,
    )


def _hash_what_is_there(fd: int, size: int, progress: Progress) -> hashlib._Hash:
    digest = hashlib.sha256()
    if os.fstat(fd).st_size > size:
        os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    while data := os.read(fd, HASH_BYTES):
        digest.update(data)
        progress(len(data))
    return digest


def _complete(
    connection: Connection,
    remote: Remote,
    fd: int,
    digest: hashlib._Hash,
    patience: Patience,
    progress: Progress,
) -> str | None:
    """Appends what is missing. Returns the sum that came along, if one was asked for."""
    asked: str | None = None
    headers = {}
    if remote.sha256 is None and remote.bytes <= DIGEST_WITH_BYTES_MAX:
        headers["Want-Repr-Digest"] = "sha-256=1"
    have = os.lseek(fd, 0, os.SEEK_END)
    while have < remote.bytes:
        try:
            with connection.stream(*_path(remote), headers={**headers, "Range": f"bytes={have}-"}) as answer:
                if _content_range(answer.headers) != (have, remote.bytes):
                    raise FileProblem(
                        f"{remote.name}: it is no longer as large as it was", code="file_changed"
                    )
                asked = _sum_in(answer.headers) or asked
                for piece in answer.pieces():
                    _write(fd, piece)
                    digest.update(piece)
                    have += len(piece)
                    progress(len(piece))
                    patience.succeeded()
        except AgentqError as error:
            _bear(error, patience)
    return asked


def _sum_at_the_box(connection: Connection, remote: Remote, patience: Patience) -> str:
    """Worked out by the box on its whole file."""
    if remote.bytes == 0:
        return hashlib.sha256().hexdigest()

    def ask() -> str | None:
        headers = {"Range": "bytes=0-0", "Want-Repr-Digest": "sha-256=1"}
        extra_s = remote.bytes / DIGEST_BYTES_PER_S
        with connection.stream(*_path(remote), headers=headers, extra_s=extra_s) as answer:
            answer.read()
            return _sum_in(answer.headers)

    found = _patiently(ask, patience)
    if found is None:
        raise BadAnswer("the daemon gave no Repr-Digest, though it was asked for one")
    return found


def _path(remote: Remote) -> tuple[str, ...]:
    return "tasks", remote.task_id, "attempts", str(remote.attempt), "files", remote.file


def _content_range(headers: dict[str, str]) -> tuple[int, int]:
    """(first byte, size of the whole). Raises BadAnswer."""
    match = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
    if match is None:
        raise BadAnswer("the daemon's answer to a Range has no readable Content-Range")
    return int(match[1]), int(match[2])


def _sum_in(headers: dict[str, str]) -> str | None:
    match = _SHA256.search(headers.get("repr-digest", ""))
    if match is None:
        return None
    try:
        return base64.b64decode(match[1], validate=True).hex()
    except binascii.Error:
        return None


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _patiently(call: Callable[[], T], patience: Patience) -> T:
    while True:
        try:
            answer = call()
        except AgentqError as error:
            _bear(error, patience)
        else:
            patience.succeeded()
            return answer


def _bear(error: AgentqError, patience: Patience) -> None:
    """Returns when it is worth another try. Raises FileProblem for what the box says of the file."""
    if isinstance(error, FileProblem):
        raise error
    if error.code in PROBLEMS:
        code = "file_changed" if error.code == "bad_range" else error.code
        raise FileProblem(error.message, code=code, **error.fields) from error
    if not may_come_back(error):
        raise error
    patience.bear(error)
