"""The page that `agentqctl show` draws: the facts, the attempts, and one timeline."""

from __future__ import annotations

from typing import Any

from agentqd.cli.outcome import RESULT_STYLES, STATE_STYLES, in_the_way, outcome, outcome_style
from agentqd.cli.output import Cell, Column, Output, Row
from agentqd.cli.text import duration, local_time, moment, size

DATA_CHARS_MAX = 400


def draw_task(out: Output, task: dict[str, Any]) -> None:
    """The whole page."""
    _draw_facts(out, task)
    _draw_attempts(out, task)
    _draw_outbox(out, task)
    _draw_timeline(out, task)


def _draw_facts(out: Output, task: dict[str, Any]) -> None:
    out.lines(f"{task.get('id')}  {task.get('task') or ''}", "strong", hang="  ")
    out.lines(outcome(task), outcome_style(task), indent="state     ", hang=" " * 10)
    waiting = task.get("waiting_for")
    if isinstance(waiting, dict):
        until = f" (until {local_time(waiting['until'])})" if waiting.get("until") else ""
        _fact(out, "waiting", f"{waiting.get('text') or waiting.get('reason') or ''}{until}")
    if not isinstance(waiting, dict) or task.get("detail") != waiting.get("text"):
        _fact(out, "detail", task.get("detail"))
    for line in in_the_way(task.get("conflicts")):
        _fact(out, "conflict", line)
    by = f"queue {task.get('queue')}, runner {task.get('runner')}, priority {task.get('priority', 0)}"
    run = f", run {task['run']}" if isinstance(task.get("run"), int) and task["run"] > 1 else ""
    _fact(out, "runs", by + run)
    labels = task.get("labels")
    _fact(out, "labels", ", ".join(map(str, labels)) if isinstance(labels, list) else labels)
    _draw_declared(out, task.get("declared"))
    _fact(out, "came from", source_text(task.get("source")))
    _fact(out, "folder", task.get("folder"))


def _draw_declared(out: Output, declared: Any) -> None:
    """What its line asked for."""
    if not isinstance(declared, dict):
        return
    for name, label in (("writes_to", "writes to"), ("after", "after")):
        items = declared.get(name)
        _fact(out, label, ", ".join(map(str, items)) if isinstance(items, list) else items)
    for name, label in (("not_before", "starts at"), ("expires_at", "expires")):
        _fact(out, label, local_time(declared.get(name)))


def source_text(source: Any) -> str:
    """Where the task came in: its line's file and bytes, or the socket."""
    if not isinstance(source, dict):
        return ""
    if source.get("kind") == "file":
        return f"{source.get('file')} at byte {source.get('offset')} ({source.get('length')} bytes)"
    return "a laptop's spool" if source.get("kind") == "spool" else f"the control {source.get('kind')}"


def _fact(out: Output, name: str, value: Any) -> None:
    if value:
        out.lines(str(value), indent=f"{name:<9} ", hang=" " * 10)


def _draw_attempts(out: Output, task: dict[str, Any]) -> None:
    columns = (
        Column("ATTEMPT", right=True), Column("RESULT", flex=True), Column("EXIT", right=True), Column("PID", right=True, drop=4),
        Column("STARTED", drop=1), Column("TOOK", right=True), Column("STDOUT", right=True, drop=2), Column("STDERR", right=True, drop=3),
    )  # fmt: skip
    rows: list[Row] = []
    for attempt in _dicts(task.get("attempts")):
        running = not attempt.get("ended_at")
        text = "running" if running else outcome(attempt)
        ended = attempt.get("exit_code")
        rows.append(
            [
                str(attempt.get("attempt")),
                Cell(text, "busy" if running else RESULT_STYLES.get(str(attempt.get("result")), "bad")),
                f"signal {attempt['signal']}"
                if attempt.get("signal")
                else ""
                if ended is None
                else str(ended),
                str(attempt.get("pid") or ""),
                local_time(attempt.get("started_at")),
                duration(attempt.get("duration_s")),
                size(attempt.get("stdout_bytes")),
                size(attempt.get("stderr_bytes")),
            ]
        )
    if rows:
        out.line()
        out.table(columns, rows)


def _draw_outbox(out: Output, task: dict[str, Any]) -> None:
    rows = [outbox_row(row) for row in _dicts(task.get("outbox"))]
    if rows:
        out.line()
        out.table(OUTBOX_COLUMNS, rows)


OUTBOX_COLUMNS = (
    Column("DELIVERY"),
    Column("TYPE", flex=True, drop=4),
    Column("SINK", flex=True),
    Column("STATE"),
    Column("TRIES", right=True, drop=2),
    Column("DELIVERED / ERROR", flex=True, drop=1),
)


def outbox_row(row: dict[str, Any]) -> list[Cell | str]:
    """A row of `OUTBOX_COLUMNS`."""
    state = str(row.get("state"))
    kind = str(row.get("type") or "").removeprefix("agentq.")
    return [
        str(row.get("delivery_id")),
        f"{kind} {row['key']}" if row.get("key") and kind == "task.entry" else kind,
        str(row.get("sink")) if row.get("sink_in_config", True) else f"{row.get('sink')} (not in the config)",
        Cell(state, STATE_STYLES.get(state, "")),
        str(row.get("attempts", "")),
        local_time(row.get("delivered_at")) if state == "delivered" else str(row.get("last_error") or ""),
    ]


def _draw_timeline(out: Output, task: dict[str, Any]) -> None:
    entries = timeline(task)
    if not entries:
        return
    out.line()
    out.heading("Timeline")
    before = None
    for at, what in entries:
        found = moment(at)
        since = (
            f"+{duration((found - before).total_seconds())}" if found and before and found >= before else ""
        )
        before = found or before
        out.lines(what, indent=f"{local_time(at):<19} {since:>8}  ", hang=" " * 30)


def timeline(task: dict[str, Any]) -> list[tuple[str, str]]:
    """(time, what happened), in order: the line, every event, every delivery."""
    entries: list[tuple[str, str]] = []
    source = source_text(task.get("source"))
    if task.get("submitted_at"):
        entries.append((task["submitted_at"], "submitted"))
    if task.get("accepted_at") and source:
        entries.append((task["accepted_at"], f"came in by {source}"))
    entries += [(str(event.get("at") or ""), _event_text(event)) for event in _dicts(task.get("events"))]
    told = {_delivered_id(event) for event in _dicts(task.get("events"))}
    entries += [
        (row["delivered_at"], f"delivered to {row.get('sink')}: {row.get('type')} {row.get('delivery_id')}")
        for row in _dicts(task.get("outbox"))
        if row.get("delivered_at") and (row.get("delivery_id"), row.get("sink")) not in told
    ]
    return sorted(entries, key=lambda entry: _seconds(entry[0]))


def _delivered_id(event: dict[str, Any]) -> tuple[Any, Any] | None:
    """Which row an event says to be delivered: not to be told twice."""
    data = event.get("data")
    if event.get("event") != "delivered" or not isinstance(data, dict):
        return None
    return data.get("delivery_id"), data.get("sink")


def _event_text(event: dict[str, Any]) -> str:
    data = event.get("data")
    text = str(event.get("event"))
    if isinstance(data, dict) and data:
        text += "  " + " ".join(
            f"{name}={_short(value)}" for name, value in data.items() if value is not None
        )
    elif data:
        text += f"  {data}"
    return text if len(text) <= DATA_CHARS_MAX else text[: DATA_CHARS_MAX - 1] + "…"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _seconds(text: Any) -> float:
    found = moment(text)
    return found.timestamp() if found else 0.0


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
