"""Results, alerts and the like as a person reads them in a mail: a subject and a plain text. Pure."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from agentqd.sinks.message import one_line

_FILES_SHOWN: Final = 30
_VALUE_CHARS_MAX: Final = 1000


def of_result(data: dict[str, Any]) -> tuple[str, str]:
    name, status, reason = _word(data, "name"), _word(data, "status"), _word(data, "reason")
    headline = f"{name}: {status}{f' ({reason})' if reason and reason != status else ''}"
    pairs = [
        ("task", f"{name} ({_word(data, 'task_id')})"),
        ("result", status),
        ("reason", ": ".join(filter(None, (reason, _word(data, "detail"))))),
        ("exit", _exit(data)),
        ("attempt", _word(data, "attempt")),
        ("submitted", _word(data, "submitted_at")),
        ("started", _word(data, "started_at")),
        ("completed", _word(data, "completed_at")),
        ("took", f"{_word(data, 'duration_s')} s" if data.get("started_at") else ""),
        ("folder", _word(data, "output_dir")),
    ]
    parts = [headline, _table(pairs)]
    tail = data.get("stdout_tail")
    if isinstance(tail, str) and tail.strip():
        parts.append("The end of its output:\n\n" + _indented(tail.strip("\n")))
    artifacts = data.get("artifacts")
    if isinstance(artifacts, list) and artifacts:
        parts.append(_files(artifacts, truncated=bool(data.get("artifacts_truncated"))))
    task_id = _word(data, "task_id")
    parts.append(f"More, on the box:\n\n    agentqctl show {task_id}\n    agentqctl logs {task_id}")
    return f"[agentqd] {headline}", "\n\n".join(parts)


def of_alert(data: dict[str, Any], box: str) -> tuple[str, str]:
    kind, name = _word(data, "alert"), _word(data, "name")
    told = {"alert", "message", "at", "task_id", "name"}
    pairs = [("alert", kind), ("box", box), ("at", _word(data, "at"))]
    if name:
        pairs.append(("task", f"{name} ({_word(data, 'task_id')})"))
    pairs += [(key, _shown(value)) for key, value in data.items() if key not in told]
    more = f"agentqctl show {_word(data, 'task_id')}" if name else "agentqctl status"
    text = "\n\n".join([_word(data, "message"), _table(pairs), f"More, on the box:\n\n    {more}"])
    return f"[agentqd] alert: {kind}{f' ({name})' if name else ''}", text


def of_test(data: dict[str, Any], box: str) -> tuple[str, str]:
    pairs = [("box", box), ("at", _word(data, "at"))]
    return (
        f"[agentqd] test of the sink {_word(data, 'sink')}",
        f"{_word(data, 'message')}\n\n{_table(pairs)}",
    )


def of_other(type_: str, data: dict[str, Any], box: str) -> tuple[str, str]:
    """A rejection, or what a later version has more."""
    pairs = [("type", type_), ("box", box), *((key, _shown(value)) for key, value in data.items())]
    return f"[agentqd] {type_}", _table(pairs)


def _exit(data: dict[str, Any]) -> str:
    if data.get("signal") is not None:
        return f"signal {_word(data, 'signal')}"
    return _word(data, "exit_code")


def _files(artifacts: list[Any], *, truncated: bool) -> str:
    rows = [
        f"    {_word(each, 'bytes'):>12}  {_word(each, 'path')}"
        for each in artifacts[:_FILES_SHOWN]
        if isinstance(each, dict)
    ]
    more = len(artifacts) - _FILES_SHOWN
    if more > 0 or truncated:
        rows.append(f"    and {more if more > 0 else 'yet'} more")
    return "Its files (bytes, path):\n\n" + "\n".join(rows)


def _table(pairs: list[tuple[str, str]]) -> str:
    shown = [(key, value) for key, value in pairs if value]
    width = max((len(key) for key, _ in shown), default=0) + 1
    return "\n".join(f"{key + ':':<{width}} {value}" for key, value in shown)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.split("\n"))


def _word(data: dict[str, Any], key: str) -> str:
    value = data.get(key)
    return "" if value is None else one_line(str(value), _VALUE_CHARS_MAX)


def _shown(value: object) -> str:
    if value is None:
        return ""
    return one_line(
        value if isinstance(value, str) else msgspec.json.encode(value).decode(), _VALUE_CHARS_MAX
    )
