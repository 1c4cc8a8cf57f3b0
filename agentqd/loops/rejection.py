"""What is not accepted is never lost in silence: kept, told to whoever submitted it, alerted."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import msgspec

from agentqd.core.envelope import delivery_id, seal
from agentqd.core.errors import AgentqError
from agentqd.core.lines import Line
from agentqd.core.routing import COMPLETIONS, REJECTED
from agentqd.core.task import TASK_ID
from agentqd.core.units import format_time
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.storage import outbox, rejections
from agentqd.storage.queuefile import Position
from agentqd.storage.transaction import Transaction


class Rejected(msgspec.Struct, frozen=True):
    """What is not accepted: its text, and where it stood. Told once for one `place`."""

    place: str
    where: str  # for people
    raw: bytes
    too_long: bool = False
    file: str | None = None
    offset: int | None = None
    length: int | None = None


def of_line(position: Position, line: Line) -> Rejected:
    digest = hashlib.sha256(line.raw).hexdigest()[:16]
    return Rejected(
        place=f"{position.dev}:{position.ino}:{position.btime_ns}:{line.offset}:{digest}",
        where=f"{position.name} at byte {line.offset}",
        raw=line.raw,
        too_long=line.too_long,
        file=position.name,
        offset=line.offset,
        length=line.length,
    )


def reject(tx: Transaction, box: Box, at: Rejected, wrong: AgentqError) -> None:
    """Keep it (queue/rejected.jsonl), tell the submitter (completions) and alert. Once for one place."""
    place = at.place
    kept_id = delivery_id(box.state_id, "", 0, "rejection", place)
    if outbox.entry_exists(tx, kept_id) is not None:
        return
    written = _readable(at.raw)
    submitted_id = written.get("id")
    kept: dict[str, Any] = {
        "at": format_time(tx.now_us),
        "file": at.file,
        "offset": at.offset,
        "length": at.length,
        "reason": wrong.code,
        "message": wrong.message,
    }
    try:
        kept["raw"] = at.raw.decode("utf-8")
    except UnicodeDecodeError:
        kept["raw_base64"] = base64.b64encode(at.raw).decode("ascii")
    if at.too_long:
        kept["raw_truncated"] = True
    _add(tx, box, kept_id, "rejection", place, "agentq.line.rejected", kept, REJECTED)
    told_id = delivery_id(box.state_id, "", 0, "result", place)
    told = {
        "task_id": None,
        "name": written.get("task"),
        "submitted_id": submitted_id,
        "submitted_at": written.get("submitted_at"),
        "status": "refused",
        "reason": wrong.code,
        "message": wrong.message,
        "completed_at": format_time(tx.now_us),
        "output_dir": None,
        "file": at.file,
        "offset": at.offset,
    }
    told_seq = _add(tx, box, told_id, "result", place, "agentq.task.refused", told, COMPLETIONS)
    if submitted_id is not None and TASK_ID.fullmatch(submitted_id):
        rejections.remember(tx, submitted_id, told_seq)
    tx.event(None, "line_rejected", file=at.file, offset=at.offset, length=at.length, reason=wrong.code)
    alert(
        tx,
        box,
        "line_rejected",
        f"a task was not accepted ({at.where}): {wrong.message}",
        key=place,
        group="lines",
        reason=wrong.code,
    )


def _add(
    tx: Transaction, box: Box, entry_id: str, kind: Any, key: str, type_: str, data: dict[str, Any], sink: str
) -> int:
    payload = seal(entry_id, type_, box.name, None, tx.now_us, data)
    new = outbox.NewEntry(entry_id, None, 0, 0, kind, key, type_, payload, [sink])
    return outbox.add_entry(tx, new)


def _readable(raw: bytes) -> dict[str, str]:
    """What a rejected line says of itself, where that can be read (also where a byte elsewhere is not UTF-8)."""
    try:
        value = msgspec.json.decode(raw.decode("utf-8", "replace"))
    except (msgspec.DecodeError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    return {name: text for name in ("task", "id", "submitted_at") if isinstance(text := value.get(name), str)}
