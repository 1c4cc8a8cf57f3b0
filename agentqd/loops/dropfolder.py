"""What a worker hands over: files in `$AGENTQ_OUTBOX` become outbox entries, whatever becomes of the worker.

Rules (design, "What a worker hands over before it ends"):
1. Regular files without a leading dot; opened with O_NOFOLLOW; the name is the key; the first accepted content wins.
2. A file that somebody may still be writing (a read lease says so) is not taken, unless the attempt has exited by itself.
3. After a death by signal a file not yet taken counts only if it is a `.json` that parses; others are `incomplete`.
4. A `.json` that does not parse, is addressed in no way that can be read or reaches outside its folders is `malformed`: set
   aside, told. A sink that is not there or not allowed costs only its own row (`addressing`).
5. The content, and what it brings as attachments, is in our own storage, durable, before the entry is committed.
6. A `.json` is always looked into for its address; one too large for that is set aside, never sent where it may not want to go.

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
from agentqd.loops.attachments import Attached, BeingWritten, Unfit, capture
from agentqd.loops.box import Box
from agentqd.storage import outbox
from agentqd.storage.blobs import Copies
from agentqd.storage.files import printable_name
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction
from agentqd.system.leases import has_writer

How = Literal["alive", "exited", "killed"]  # the attempt: still running, ended by itself, ended by a signal
RESULT_KEY: Final = "result.json"
_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
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
    deliver_to: list[str] | None = None  # what it says itself
    attachments: tuple[Attached, ...] = ()

    @property
    def copies(self) -> list[str]:
        """Our copies in blobs/: nobody else's, until `record` has given them to its entry."""
        return [path for path in (self.blob, *(each.path for each in self.attachments)) if path is not None]


class Scan(msgspec.Struct, frozen=True):
    handed: list[Handed]
    waiting: int  # files that somebody is still writing
    problems: list[str]


def scan(folder: str, blobs: str, taken: Mapping[str, Identity], how: How, entry_bytes_max: int) -> Scan:
    """Read every file of the drop folder that may be taken now and has not been. Raises OSError where copying a large one fails.

    The copies of what it returns are the caller's: `record` them, then let go of what `unnamed` finds.
    """
    copies = Copies(blobs)
    try:
        found = _scan(folder, copies, taken, how, entry_bytes_max)
    except BaseException:
        copies.keep_only(())
        raise
    copies.keep_only({path for item in found.handed for path in item.copies})
    return found


def _scan(folder: str, copies: Copies, taken: Mapping[str, Identity], how: How, entry_bytes_max: int) -> Scan:
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
            key = printable_name(name)
            handed.append(_read(descriptor, key, identity, folder, copies, how, entry_bytes_max))
        except BeingWritten:
            waiting += 1
        finally:
            os.close(descriptor)
    return Scan(handed, waiting, problems)


def _read(
    descriptor: int, name: str, identity: Identity, drop: str, copies: Copies, how: How, entry_bytes_max: int
) -> Handed:
    """Raises BeingWritten (an attachment), or OSError where copying fails."""
    size = identity[1]
    if size > entry_bytes_max:
        broken = f"too_large: {size} bytes (limits.entry_bytes_max is {entry_bytes_max})"
        return Handed(name, identity, "", size, b"", broken=broken)
    content: bytes | None
    if size > limits.ENTRY_INLINE_BYTES_MAX:
        copy = copies.add(descriptor, size)
        content, handed = None, Handed(name, identity, copy.sha256, copy.bytes, None, blob=copy.path)
    else:
        content = os.pread(descriptor, size + 1, 0)
        handed = Handed(name, identity, hashlib.sha256(content).hexdigest(), len(content), content)
    if not name.endswith(".json"):
        return msgspec.structs.replace(handed, broken="incomplete") if how == "killed" else handed
    try:
        fields = _fields(descriptor, content, size)
        if fields is None:
            return handed
        attached = capture(drop, fields, copies, entry_bytes_max - size, wait_for_writers=how == "alive")
        return msgspec.structs.replace(handed, deliver_to=_sinks(fields), attachments=attached)
    except Unfit as problem:
        return msgspec.structs.replace(handed, broken=str(problem)[: limits.SINK_ERROR_CHARS_MAX])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        broken = "incomplete" if how == "killed" else f"malformed: {error}"[: limits.SINK_ERROR_CHARS_MAX]
        return msgspec.structs.replace(handed, broken=broken)


def _fields(descriptor: int, content: bytes | None, size: int) -> dict[str, Any] | None:
    """The object's fields (of a large one, only what addresses it has its value); None: it is no object.

    Raises Unfit for what is too large to be looked into: it might say where it goes, and would go elsewhere.
    """
    if content is not None:
        value = msgspec.json.decode(content)
        return value if isinstance(value, dict) else None
    if size > limits.JSON_CHECK_BYTES_MAX:
        most = limits.JSON_CHECK_BYTES_MAX
        raise Unfit(
            f"too_large: a .json of {size} bytes is not read for its address (at most {most}); give data another name"
        )
    whole = os.pread(descriptor, size, 0)
    if whole.lstrip()[:1] != b"{":
        msgspec.json.decode(whole, type=msgspec.Raw)
        return None
    raw = msgspec.json.decode(whole, type=dict[str, msgspec.Raw])
    return {
        name: msgspec.json.decode(raw[name]) if name in {"deliver_to", "attachments"} else None
        for name in raw
    }


def _sinks(fields: dict[str, Any]) -> list[str] | None:
    """Its own deliver_to; None: it has none. Raises Unfit."""
    problem = names_problem(fields)
    if problem is not None:
        raise Unfit(problem)
    return own_sinks(fields)


def record(
    tx: Transaction, box: Box, task: TaskRow, request: TaskRequest, attempt: int, found: list[Handed]
) -> set[str]:
    """Write the entries that are new; tell of those that are not as they should be. Returns the sound keys, repeats too."""
    sound: set[str] = set()
    for item in found:
        entry_id = delivery_id(box.state_id, task.id, task.run, "entry", item.key)
        known = tx.one("SELECT seq, blob, payload FROM entries WHERE delivery_id = ?", (entry_id,))
        if known is not None and _is_same(item, bytes(known[2])):  # its attachments may be gone by now
            sound.add(item.key)
            continue
        if item.broken is not None:
            _set_aside(tx, box, task, request, attempt, item, item.broken)
            continue
        sound.add(item.key)
        if known is not None:
            _tell_conflict(tx, box, task, attempt, item)
            continue
        _write(tx, box, task, request, attempt, item, entry_id, None)
        tx.event(
            task.id, "entry_handed_over", key=item.key, attempt=attempt, bytes=item.size, delivery_id=entry_id
        )
    return sound


def unnamed(tx: Transaction, task_seq: int, found: list[Handed]) -> list[str]:
    """The copies that no entry of the task names: of what it has handed over before, or is not taken. `record` comes first."""
    copies = {path for item in found for path in item.copies}
    return sorted(copies - set(outbox.blobs_of_task(tx, task_seq))) if copies else []


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
    if item.attachments:
        data["attachments"] = [msgspec.structs.asdict(each) for each in item.attachments]
    address = address_of(tx, box, task, request, item.deliver_to if item.broken is None else None)
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
            attachments=[each.path for each in item.attachments],
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
    _write(tx, box, task, request, attempt, item, entry_id, broken)
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


def _is_same(item: Handed, payload: bytes) -> bool:
    """Has the entry that was taken under this key the same content?"""
    return bool(item.sha256) and f'"bytes":{item.size},"sha256":"{item.sha256}"'.encode() in payload


def _tell_conflict(tx: Transaction, box: Box, task: TaskRow, attempt: int, item: Handed) -> None:
    """The key is taken by other content: that is told and not sent."""
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
