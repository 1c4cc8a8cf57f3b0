"""What a worker hands over: files in `$AGENTQ_OUTBOX` become outbox entries, whatever becomes of the worker.

Rules (design, "What a worker hands over before it ends"):
1. Regular files without a leading dot; opened with O_NOFOLLOW; the name is the key; the first accepted content wins.
2. A file that somebody may still be writing (a read lease says so) is not taken, unless the attempt has exited by itself.
3. After a death by signal a file not yet taken counts only if it is a `.json` that parses; others are `incomplete`.
4. A `.json` that does not parse, is addressed in no way that can be read or reaches outside its folders is `malformed`: set
   aside, told. A sink that is not there or not allowed costs only its own row (`addressing`).
5. The content is in our own storage, durable, before the entry is committed.

`scan` is blocking file work (evidence thread); `record` is a journal unit's part.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from agentqd.core import limits
from agentqd.core.envelope import delivery_id, seal
from agentqd.core.task import TaskRequest
from agentqd.loops.addressing import address_of, names_problem, own_sinks, tell_refused
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.storage import outbox
from agentqd.storage.files import fsync_folder, printable_name
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction
from agentqd.system.leases import has_writer

How = Literal["alive", "exited", "killed"]  # the attempt: still running, ended by itself, ended by a signal
RESULT_KEY: Final = "result.json"
_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_CHUNK: Final = 1024 * 1024
Identity = tuple[int, int, int]  # inode, size, mtime


class Handed(msgspec.Struct, frozen=True):
    """One file, read."""

    key: str
    identity: Identity
    sha256: str
    size: int
    content: bytes | None  # None: large, see blob
    blob: str | None = None  # path of our own durable copy
    broken: str | None = None  # incomplete, malformed: ..., too_large


class Scan(msgspec.Struct, frozen=True):
    handed: list[Handed]
    waiting: int  # files that somebody is still writing
    problems: list[str]


def scan(folder: str, blobs: str, taken: Mapping[str, Identity], how: How, entry_bytes_max: int) -> Scan:
    """Read every file of the drop folder that may be taken now and has not been. Raises OSError where copying a large one fails."""
    handed: list[Handed] = []
    waiting, problems = 0, []
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        if how != "alive":
            return Scan([], 0, [])
        return Scan([], 0, [f"outbox/: {error.strerror}"])
    if len(names) > limits.ENTRIES_PER_TASK_MAX:
        problems.append(
            f"outbox/ holds {len(names)} files; only the first {limits.ENTRIES_PER_TASK_MAX} are taken"
        )
    for name in names[: limits.ENTRIES_PER_TASK_MAX]:
        try:
            descriptor = os.open(f"{folder}/{name}", _OPEN)
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(f"outbox/{name!r}: {error.strerror}")
            continue
        try:
            status = os.fstat(descriptor)
            identity = (status.st_ino, status.st_size, status.st_mtime_ns)
            if taken.get(printable_name(name)) == identity:
                continue
            if not stat.S_ISREG(status.st_mode):
                problems.append(f"outbox/{name!r}: not a regular file")
                continue
            if how != "exited" and has_writer(descriptor):
                waiting += 1
                if how == "alive":
                    continue
            handed.append(_read(descriptor, printable_name(name), identity, blobs, how, entry_bytes_max))
        finally:
            os.close(descriptor)
    return Scan(handed, waiting, problems)


def _read(
    descriptor: int, name: str, identity: Identity, blobs: str, how: How, entry_bytes_max: int
) -> Handed:
    size = identity[1]
    if size > entry_bytes_max:
        return Handed(
            name,
            identity,
            "",
            size,
            b"",
            broken=f"too_large: {size} bytes (limits.entry_bytes_max is {entry_bytes_max})",
        )
    if size > limits.ENTRY_INLINE_BYTES_MAX:
        digest, blob = _copy(descriptor, size, blobs)
        broken = "incomplete" if how == "killed" and not _parses(name, blob, size) else None
        return Handed(name, identity, digest, size, None, blob=blob, broken=broken)
    content = os.pread(descriptor, size + 1, 0)
    digest = hashlib.sha256(content).hexdigest()
    broken = None
    if name.endswith(".json"):
        try:
            msgspec.json.decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            broken = "incomplete" if how == "killed" else f"malformed: {error}"[: limits.SINK_ERROR_CHARS_MAX]
    elif how == "killed":
        broken = "incomplete"
    return Handed(name, identity, digest, len(content), content, broken=broken)


def _parses(name: str, blob: str, size: int) -> bool:
    """Is this large file, after a kill, a `.json` that parses? Beyond the limit it is not read, and counts as incomplete."""
    if not name.endswith(".json") or size > limits.JSON_CHECK_BYTES_MAX:
        return False
    with open(blob, "rb") as file:
        try:
            msgspec.json.decode(file.read())
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
    return True


def _copy(descriptor: int, size: int, blobs: str) -> tuple[str, str]:
    """Into blobs/ under its digest, durably; hashed while copied."""
    os.makedirs(blobs, mode=0o700, exist_ok=True)
    temporary = f"{blobs}/.tmp-{os.getpid()}-{os.urandom(6).hex()}"
    digest = hashlib.sha256()
    out = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        offset = 0
        while offset < size and (chunk := os.pread(descriptor, min(_CHUNK, size - offset), offset)):
            digest.update(chunk)
            os.write(out, chunk)
            offset += len(chunk)
        os.fsync(out)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(out)
    path = f"{blobs}/{digest.hexdigest()}"
    os.rename(temporary, path)
    fsync_folder(blobs)
    return digest.hexdigest(), path


def record(
    tx: Transaction, box: Box, task: TaskRow, request: TaskRequest, attempt: int, found: list[Handed]
) -> set[str]:
    """Write the entries that are new; tell of those that are not as they should be. Returns the sound keys, repeats too."""
    sound: set[str] = set()
    for item in found:
        broken = item.broken or _self_address_problem(item, box, task, attempt)
        if broken is not None:
            _set_aside(tx, box, task, request, attempt, item, broken)
            continue
        entry_id = delivery_id(box.state_id, task.id, task.run, "entry", item.key)
        sound.add(item.key)
        known = tx.one("SELECT seq, blob, payload FROM entries WHERE delivery_id = ?", (entry_id,))
        if known is not None:
            _compare(tx, box, task, attempt, item, bytes(known[2]))
            continue
        _write(tx, box, task, request, attempt, item, entry_id, None)
        tx.event(
            task.id, "entry_handed_over", key=item.key, attempt=attempt, bytes=item.size, delivery_id=entry_id
        )
    return sound


def _write(
    tx: Transaction,
    box: Box,
    task: TaskRow,
    request: TaskRequest,
    attempt: int,
    item: Handed,
    entry_id: str,
    dead: str | None,
) -> None:
    type_ = "agentq.task.entry"
    data: dict[str, Any] = {
        "task_id": task.id,
        "name": task.name,
        "attempt": attempt,
        "key": item.key,
        "bytes": item.size,
        "sha256": item.sha256,
        **_content(item),
    }
    address = address_of(tx, box, task, request, own_sinks(_addressed(item)))
    outbox.add_entry(
        tx,
        outbox.NewEntry(
            delivery_id=entry_id,
            task_seq=task.seq,
            run=task.run,
            attempt=attempt,
            kind="entry" if dead is None else "broken",
            key=item.key,
            type=type_,
            payload=seal(entry_id, type_, box.name, task.id, tx.now_us, data),
            task_id=task.id,
            sinks=address.sinks,
            blob=item.blob,
            dead_reason=dead,
            dead_sinks=address.refused,
        ),
    )
    if dead is None:
        tell_refused(tx, box, task, item.key, entry_id, address)


def _content(item: Handed) -> dict[str, Any]:
    """`content` as JSON or text, `content_base64` where it is neither, `path` when it is large."""
    if item.content is None:
        return {"path": item.blob}
    if item.key.endswith(".json") and item.broken is None:
        return {"content": msgspec.Raw(msgspec.json.format(item.content, indent=-1))}
    try:
        return {"content": item.content.decode("utf-8")}
    except UnicodeDecodeError:
        return {"content_base64": base64.b64encode(item.content).decode("ascii")}


def _addressed(item: Handed) -> dict[str, Any] | None:
    if item.content is None or not item.key.endswith(".json") or item.broken is not None:
        return None
    value = msgspec.json.decode(item.content)
    return value if isinstance(value, dict) else None


def _self_address_problem(item: Handed, box: Box, task: TaskRow, attempt: int) -> str | None:
    """Why a self-addressed entry cannot be taken as it is, or None."""
    fields = _addressed(item)
    if fields is None:
        return None
    if (problem := names_problem(fields)) is not None:
        return problem
    attachments = fields.get("attachments")
    if attachments is not None and "deliver_to" in fields:
        if not (isinstance(attachments, list) and all(isinstance(path, str) for path in attachments)):
            return "malformed: attachments is not a list of paths"
        folder = os.path.realpath(box.folders.attempt(task.id, attempt))
        for path in attachments:
            real = "" if "\0" in path else os.path.realpath(os.path.join(f"{folder}/outbox", path))
            if not real.startswith((f"{folder}/outbox/", f"{folder}/work/")):
                return f"malformed: the attachment {path[:120]!r} lies outside the drop and output folders"
    return None


def _set_aside(
    tx: Transaction, box: Box, task: TaskRow, request: TaskRequest, attempt: int, item: Handed, broken: str
) -> None:
    """Dead at once, with an alert; its key stays free for the next attempt."""
    reason = broken.split(":", maxsplit=1)[0]
    entry_id = delivery_id(
        box.state_id, task.id, task.run, "entry", f"{item.key}\x00{reason}\x00{attempt}\x00{item.sha256}"
    )
    if outbox.entry_exists(tx, entry_id) is not None:
        return
    safe = msgspec.structs.replace(item, broken=broken)
    _write(tx, box, task, request, attempt, safe, entry_id, broken)
    tx.event(task.id, "entry_set_aside", key=item.key, attempt=attempt, reason=broken, delivery_id=entry_id)
    alert(
        tx,
        box,
        f"entry_{reason}",
        f"what task {task.id} ({task.name}) handed over as {item.key!r} is not sent: {broken}",
        task=task,
        group="handed_over",
        key=f"{item.key}:{attempt}",
        entry_key=item.key,
        delivery_id=entry_id,
    )


def _compare(tx: Transaction, box: Box, task: TaskRow, attempt: int, item: Handed, payload: bytes) -> None:
    """The key is taken: the same content is a repeat, another one is told and not sent."""
    if f'"sha256":"{item.sha256}"'.encode() in payload:
        return
    tx.event(task.id, "entry_conflict", key=item.key, attempt=attempt, sha256=item.sha256)
    alert(
        tx,
        box,
        "entry_conflict",
        f"task {task.id} ({task.name}) handed over {item.key!r} again with other content; the first one stands",
        task=task,
        group="handed_over",
        key=f"{item.key}:{item.sha256[:16]}",
        entry_key=item.key,
    )
