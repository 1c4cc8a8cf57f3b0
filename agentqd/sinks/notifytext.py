"""What a notification says of an entry: a title and a few readable lines, the delivery id at their end. Pure.

Everything in an entry is hostile: what is not printable becomes a space, lines stay lines, both parts are bounded.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from agentqd.core.envelope import TEST_TYPE
from agentqd.core.units import format_duration

Mood = Literal["info", "success", "warning", "failure"]
TITLE_CHARS_MAX: Final = 120
BODY_CHARS_MAX: Final = 3000
BODY_CHARS_MIN: Final = 80  # the last line always fits
_TAIL_LINES: Final = 12
_CUT: Final = "…"


class Message(msgspec.Struct, frozen=True):
    title: str
    lines: str
    footer: str  # ends with the delivery id: a receiver that counts can dedupe by it
    mood: Mood

    def body(self, chars_max: int = BODY_CHARS_MAX) -> str:
        """The lines, cut so that with the footer they fit."""
        room = max(BODY_CHARS_MIN, min(chars_max, BODY_CHARS_MAX)) - len(self.footer) - 2
        lines = _cut(self.lines, max(0, room))
        return f"{lines}\n\n{self.footer}" if lines else self.footer


def message_of(payload: bytes, delivery_id: str, type_: str) -> Message:
    """Raises ValueError for what is no envelope."""
    try:
        envelope = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("the payload is no JSON") from None
    data = envelope.get("data") if isinstance(envelope, dict) else None
    if not isinstance(data, dict):
        raise ValueError("the payload is no envelope")
    box = str(envelope.get("source", "")).removeprefix("/agentqd/")
    footer = _line(f"{box} {delivery_id}", BODY_CHARS_MIN // 2 + len(delivery_id))
    title, lines, mood = _parts(data, type_)
    return Message(_line(title, TITLE_CHARS_MAX) or "agentqd", _clean(lines).strip(), footer, mood)


def _parts(data: dict[str, Any], type_: str) -> tuple[str, str, Mood]:
    if type_.startswith("agentq.alert."):
        return f"alert: {data.get('alert', type_[13:])}", str(data.get("message", "")), "warning"
    if type_ == TEST_TYPE:
        return f"test of the sink {data.get('sink', '')}", str(data.get("message", "")), "info"
    if "status" in data:
        return _result(data)
    if type_ == "agentq.task.entry":
        return _entry(data)
    return type_, str(data.get("message", data.get("reason", ""))), "info"


def _result(data: dict[str, Any]) -> tuple[str, str, Mood]:
    status = str(data["status"])
    lines = [f"task {data.get('task_id') or data.get('submitted_id') or '?'}: {status}{_why(data)}"]
    took = data.get("duration_s")
    if isinstance(took, int | float):
        lines.append(f"attempt {data.get('attempt', 1)}, {format_duration(round(float(took), 1))}")
    if data.get("output_dir"):
        lines.append(f"in {data['output_dir']}")
    tail = str(data.get("stdout_tail") or "").rstrip().splitlines()
    if tail:
        lines += ["", *tail[-_TAIL_LINES:]]
    return f"{data.get('name') or 'task'}: {status}", "\n".join(lines), "success" if status == "success" else "failure"  # fmt: skip


def _why(data: dict[str, Any]) -> str:
    reason = data.get("reason")
    if not reason:
        return ""
    code = data.get("exit_code") if reason == "exit_code" else data.get("signal")
    return f" ({reason} {code})" if code is not None else f" ({reason})"


def _entry(data: dict[str, Any]) -> tuple[str, str, Mood]:
    """Its own subject and body, if it addresses itself; else its content; of a large one where it lies."""
    content = data.get("content")
    title = f"{data.get('name') or 'task'}: {data.get('key') or 'entry'}"
    if isinstance(content, dict) and ("subject" in content or "body" in content):
        return str(content.get("subject") or title), _text(content.get("body", "")), "info"
    if content is not None:
        return title, _text(content), "info"
    where = f", at {data['path']}" if data.get("path") else ""
    return title, f"{data.get('bytes', '?')} bytes{where}", "info"


def _text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _clean(text: str) -> str:
    """Line ends stay, a tab is a space, what else is not printable (control, bidi) too."""
    head = text[: 2 * BODY_CHARS_MAX]
    return "".join(char if char.isprintable() or char == "\n" else " " for char in head)


def _line(text: str, chars_max: int) -> str:
    return _cut(_clean(text).replace("\n", " ").strip(), chars_max)


def _cut(text: str, chars_max: int) -> str:
    return text if len(text) <= chars_max else text[: max(0, chars_max - 1)].rstrip() + _CUT[:chars_max]
