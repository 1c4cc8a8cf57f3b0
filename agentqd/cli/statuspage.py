"""The page that `agentqctl status` draws. Pure drawing: everything comes from the status object."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from agentqd.cli.outcome import RESULT_STYLES
from agentqd.cli.output import Cell, Column, Output, Row
from agentqd.cli.text import age, duration, local_time, size

ALERTS_SHOWN = 5
ATTENTION_SHOWN = 20
RUNNING_SHOWN = 20
STATE_ORDER = ("running", "stopping", "queued", "retryable", "blocked", "held", "scheduled", "finished")
SETTLED_ROWS = ("delivered", "dropped")


def draw_status(out: Output, status: dict[str, Any]) -> None:
    """The whole page."""
    _draw_attention(out, status)
    _draw_daemon(out, status)
    _draw_counts(out, status)
    _draw_running(out, status)
    _draw_queues(out, status)
    _draw_sinks(out, status)
    _draw_alerts(out, status)


def _draw_attention(out: Output, status: dict[str, Any]) -> None:
    items = _dicts(status.get("attention"))
    if not items:
        out.line("Nothing needs attention.", "good")
        return
    out.heading("Needs attention")
    items.sort(key=lambda item: item.get("level") != "error")
    for item in items[:ATTENTION_SHOWN]:
        is_error = item.get("level") == "error"
        out.lines(
            str(item.get("text") or ""),
            "bad" if is_error else "warn",
            indent="! " if is_error else "- ",
            hang="  ",
        )
        if item.get("fix"):
            out.lines(str(item["fix"]), "dim", indent="  fix: ", hang=" " * 7)
    if len(items) > ATTENTION_SHOWN:
        out.line(f"  and {len(items) - ATTENTION_SHOWN} more: agentqctl status --json", "dim")


def _draw_daemon(out: Output, status: dict[str, Any]) -> None:
    daemon, supervisor = _dict(status.get("daemon")), status.get("supervisor")
    box = f" on {status['box']}" if status.get("box") else ""
    parts = [
        f"agentqd {daemon.get('version') or '?'}{box}",
        f"pid {daemon.get('pid')}",
        f"up {duration(daemon.get('uptime_s'))}",
    ]
    if daemon.get("rss_bytes"):
        parts.append(size(daemon["rss_bytes"]))
    if daemon.get("draining"):
        parts.append("DRAINING")
    if isinstance(supervisor, dict):
        gone = "" if supervisor.get("connected", True) else ", not connected"
        silent_s = supervisor.get("silent_s")
        silent = f", NO ANSWER for {duration(silent_s)}" if silent_s else ""
        parts.append(f"supervisor pid {supervisor.get('pid')}{gone}{silent}")
    else:
        parts.append("no supervisor")
    out.line()
    out.lines(", ".join(parts), hang="  ")


def _draw_counts(out: Output, status: dict[str, Any]) -> None:
    tasks, results, rows = (_dict(status.get(name)) for name in ("tasks", "results", "outbox"))
    lines: list[tuple[str, str]] = [
        ("tasks", _counts(tasks, STATE_ORDER) or "none yet"),
        ("waiting", _waiting(_dict(status.get("waiting")))),
        ("results", _counts(results, tuple(RESULT_STYLES))),
        ("outbox", _counts(rows, ())),
    ]
    intake, disk = _dict(status.get("intake")), _dict(status.get("disk"))
    read = [f"{size(intake['bytes_waiting'])} not read yet"] if intake.get("bytes_waiting") else []
    if intake.get("rejected"):
        read.append(f"{intake['rejected']} line{'' if intake['rejected'] == 1 else 's'} rejected")
    lines.append(("intake", ", ".join(read)))
    if disk:
        stopped = ", INTAKE STOPPED" if disk.get("intake_stopped") else ""
        lines.append(("disk", f"{size(disk.get('free_bytes'))} free{stopped}"))
    for name, text in lines:
        if text:
            out.lines(text, indent=f"{name:<8} ", hang=" " * 9)


def _waiting(reasons: dict[str, Any]) -> str:
    """Why, the most frequent first."""
    known = sorted(
        ((n, name) for name, n in reasons.items() if isinstance(n, int)), key=lambda item: -item[0]
    )
    return ", ".join(f"{n} {name.replace('_', ' ')}" for n, name in known)


def _counts(counts: dict[str, Any], order: tuple[str, ...]) -> str:
    names = [*(name for name in order if name in counts), *(name for name in counts if name not in order)]
    return ", ".join(f"{counts[name]} {name}" for name in names if counts[name])


def _draw_running(out: Output, status: dict[str, Any]) -> None:
    running = _dicts(status.get("running"))
    columns = (
        Column("RUNNING"), Column("NAME", flex=True), Column("QUEUE", drop=3), Column("PID", right=True, drop=4),
        Column("TRY", right=True, drop=5), Column("FOR", right=True), Column("TIME LEFT", right=True, drop=1),
    )  # fmt: skip
    rows: list[Row] = [
        [
            str(task.get("id")), str(task.get("task") or ""), str(task.get("queue") or ""), str(task.get("pid") or ""),
            str(task.get("attempt") or ""), duration(task.get("running_s")), _left(task.get("deadline_in_s")),
        ]
        for task in running[:RUNNING_SHOWN]
    ]  # fmt: skip
    _section(out, columns, rows)
    if len(running) > RUNNING_SHOWN:
        out.line(f"and {len(running) - RUNNING_SHOWN} more: agentqctl list --state running,stopping", "dim")


def _left(seconds: Any) -> str | Cell:
    if not isinstance(seconds, int | float):
        return ""
    return duration(seconds) if seconds >= 0 else Cell("over", "bad")


def _draw_queues(out: Output, status: dict[str, Any]) -> None:
    columns = (
        Column("QUEUE", flex=True), Column("RUNNING", right=True), Column("WAITING", right=True),
        Column("OLDEST", right=True, drop=1), Column("", drop=2), Column("WHY", flex=True, drop=3),
    )  # fmt: skip
    rows: list[Row] = [
        [
            name,
            f"{queue.get('running', 0)} of {queue.get('concurrency', '?')}",
            str(queue.get("waiting", 0)),
            duration(queue.get("oldest_waiting_s")),
            Cell("paused", "warn") if queue.get("paused") else "",
            _waiting(_dict(queue.get("reasons"))),
        ]
        for name, queue in _items(status.get("queues"))
    ]
    _section(out, columns, rows)


def _draw_sinks(out: Output, status: dict[str, Any]) -> None:
    sinks = list(_items(status.get("sinks")))
    any_held = any(sink.get("held") for _, sink in sinks)
    columns = (
        Column("SINK", flex=True), Column("TYPE", drop=5), Column("DELIVERED", right=True, drop=4),
        Column("PENDING", right=True), *([Column("HELD", right=True)] if any_held else ()),
        Column("DEAD", right=True), Column("OLDEST", right=True, drop=3),
        Column("", drop=1), Column("LAST ERROR", flex=True, drop=2),
    )  # fmt: skip
    rows: list[Row] = []
    for name, sink in sinks:
        dead, held = sink.get("dead", 0), sink.get("held", 0)
        rows.append(
            [
                name,
                str(sink.get("type") or ""),
                str(sink.get("delivered", "")),
                str(sink.get("pending", 0)),
                *([Cell(str(held), "warn" if held else "")] if any_held else ()),
                Cell(str(dead), "bad" if dead else ""),
                duration(sink.get("oldest_pending_s")),
                _sink_word(sink),
                str(sink.get("last_error") or ""),
            ]
        )
    _section(out, columns, rows)


def _sink_word(sink: dict[str, Any]) -> str | Cell:
    """What keeps it from sending, in a word."""
    breaker = str(sink.get("breaker") or "closed")
    if breaker != "closed":
        return Cell({"open": "resting", "half_open": "probing"}.get(breaker, breaker), "warn")
    if sink.get("in_config") is False:
        return Cell("not in config", "warn")
    if sink.get("left_alone_until"):
        return Cell(f"left alone until {local_time(sink['left_alone_until'])}", "warn")
    return Cell("rate-limited", "busy") if sink.get("rate_limited") else ""


def _draw_alerts(out: Output, status: dict[str, Any]) -> None:
    alerts = _dicts(status.get("alerts"))
    if not alerts:
        return
    alerts.sort(key=lambda alert: str(alert.get("at") or ""), reverse=True)
    out.line()
    out.heading("Alerts, newest first")
    for alert in alerts[:ALERTS_SHOWN]:
        kind = str(alert.get("type") or "").removeprefix("agentq.alert.")
        times = (
            f" ({alert['count']} times)" if isinstance(alert.get("count"), int) and alert["count"] > 1 else ""
        )
        task = f" [{alert['task_id']}]" if alert.get("task_id") else ""
        when = f"{age(alert.get('at'))} ago" if age(alert.get("at")) else local_time(alert.get("at"))
        out.lines(f"{when}  {kind}: {alert.get('message') or ''}{task}{times}", hang="    ")
    if len(alerts) > ALERTS_SHOWN:
        out.line(f"and {len(alerts) - ALERTS_SHOWN} more: agentqctl status --json", "dim")


def _section(out: Output, columns: tuple[Column, ...], rows: list[Row]) -> None:
    if rows:
        out.line()
        out.table(columns, rows)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _items(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, item in _dict(value).items():
        yield str(name), _dict(item)
