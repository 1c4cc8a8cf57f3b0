"""What a person should see first: worked out of the status object, each with the command that mends it where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from shlex import quote
from typing import Any, Final, NamedTuple

from agentqd.control.alerts import PREFIX, Told, grouped, is_over
from agentqd.control.queries import DeadSeen
from agentqd.control.room import Room
from agentqd.core.routing import COMPLETIONS, REJECTED
from agentqd.core.units import format_duration
from agentqd.loops.link import silence_advice
from agentqd.loops.notices import open_secrets

US: Final = 1_000_000
UNDELIVERED_S: Final = 300.0
STUCK_S: Final = 60.0
TEXT_CHARS_MAX: Final = 400
_ERRORS: Final = frozenset(
    {"lost", "stuck", "dead_letter", "disk_low", "stalled_loop", "undelivered", "bad_config"}
)
Item = dict[str, Any]


class Journaled(NamedTuple):
    """What the journal knows besides the status object."""

    stopping_since: dict[str, int]
    alerts: list[Told]
    dead: DeadSeen


def attention(room: Room, status: dict[str, Any], known: Journaled, now_us: int) -> list[Item]:
    """Errors first. Whatever has mended itself is left out."""
    found = [
        *_supervisor(room, status),
        *_disk(room, status),
        *_config(room),
        *_sinks(status, known.dead),
        *_secrets(room),
        *_set_aside(known.dead),
        *_stuck(status, known.stopping_since, now_us),
        *_queues(room, status),
        *_limits(status),
        *_alerts(room, status, known.alerts, now_us),
    ]
    return sorted(found, key=lambda item: item["level"] != "error")


def _item(level: str, text: str, fix: str | None = None) -> Item:
    short = text if len(text) <= TEXT_CHARS_MAX else text[: TEXT_CHARS_MAX - 1] + "…"
    return {"level": level, "text": short, "fix": fix}


def under_systemd() -> bool:
    return "NOTIFY_SOCKET" in os.environ or "INVOCATION_ID" in os.environ


def _supervisor(room: Room, status: dict[str, Any]) -> Iterator[Item]:
    link, shown = room.parts.supervision.link, status["supervisor"]
    if shown is None:
        fix = "systemctl start agentqd-supervisor" if under_systemd() else None
        said = f": {link.refusal}" if link.refusal else ""
        yield _item("error", f"no supervisor is connected, nothing can start{said}", fix)
    elif shown["version"] != room.parts.version:
        text = f"the supervisor runs version {shown['version']}, this daemon {room.parts.version}"
        yield _item("warning", text, "systemctl restart agentqd-supervisor" if under_systemd() else None)
    if shown is not None and shown["silent_s"]:
        text = f"the supervisor (pid {shown['pid']}) has not answered for {format_duration(shown['silent_s'])}; {silence_advice(shown['pid'])}"
        yield _item("error", text)
    if status["daemon"]["draining"]:
        since = f" since {status['daemon']['draining_since']}" if status["daemon"]["draining_since"] else ""
        text = f"draining{since}: nothing new is accepted over the socket or started, until a person ends it"
        yield _item("warning", text, "agentqctl drain --off")


def _disk(room: Room, status: dict[str, Any]) -> Iterator[Item]:
    if status["disk"]["intake_stopped"]:
        free, state = status["disk"]["free_bytes"] or 0, room.box.folders.state
        fix = f"du -xh --max-depth=2 {quote(state)} | sort -h | tail"
        yield _item("error", f"intake has stopped: only {free // 2**20} MiB are free in {state}", fix)


def _config(room: Room) -> Iterator[Item]:
    error = room.parts.reload.last_error
    if error is not None:
        fix = f"agentqctl config check {quote(room.parts.reload.path)}"
        yield _item("error", f"the last config edit is not applied: {error.message}", fix)


def _sinks(status: dict[str, Any], seen: DeadSeen) -> Iterator[Item]:
    for name, sink in status["sinks"].items():
        why = f": {sink['last_error']}" if sink["last_error"] else ""
        dead = sink["dead"] - seen.aside_rows.get(name, 0)
        if dead > 0:
            reason = seen.reasons.get(name)
            because = f": {reason}" if reason else why
            text = f"{_many(dead, 'delivery', 'deliveries')} to {name} gave up and will not be sent again by itself{because}"
            yield _item("error", text, f"agentqctl outbox list --sink {quote(name)} --state dead")
        if sink["breaker"] == "disabled":
            by_person = sink.get("disabled_by") == "person"
            text = (
                f"{name} was disabled {sink['disabled']}; {_many(sink['held'], 'delivery is', 'deliveries are')} held"
                if by_person
                else f"{name} is disabled, its deliveries are held: {sink['disabled']}"
            )
            yield _item("warning" if by_person else "error", text, f"agentqctl sink enable {quote(name)}")
        elif not sink["in_config"] and sink["pending"] + sink["held"]:
            waiting = _many(sink["pending"] + sink["held"], "delivery waits", "deliveries wait")
            text = f"{name} is not in the config, {waiting} for it to return, or for another name"
            yield _item("warning", text, f"agentqctl outbox move ALL --from {quote(name)} --to SINK")
            continue
        elif sink["breaker"] == "open":
            text = f"{name} cannot be reached and is left alone until {sink['next_probe_at']}{why}"
            yield _item("warning", text, _send_now(name, sink))
        oldest = sink["oldest_pending_s"]
        if oldest is not None and oldest > UNDELIVERED_S:
            text = f"{_many(sink['pending'], 'delivery', 'deliveries')} to {name} not delivered, the oldest for {format_duration(oldest)}{why}"
            if sink.get("left_alone_until"):
                text += f"; it asked to be left alone until {sink['left_alone_until']}"
            yield _item("warning", text, _send_now(name, sink))


def _send_now(name: str, sink: dict[str, Any]) -> str:
    """A test that arrives ends the rest of a sink; rows that have been tried are sent again at a person's word."""
    if name in {COMPLETIONS, REJECTED} or sink.get("rate_limited") or sink.get("left_alone_until"):
        return f"agentqctl outbox list --sink {quote(name)}"
    if sink["breaker"] in {"open", "half_open"}:
        return f"agentqctl sink test {quote(name)}"
    return f"agentqctl outbox retry ALL --sink {quote(name)} --state retryable"


def _secrets(room: Room) -> Iterator[Item]:
    for name, settings in room.box.settings.sinks.items():
        for path in open_secrets(settings):
            text = f"the secret file {path} of the sink {name} is open to every user of this machine"
            yield _item("warning", text, f"chmod 600 {quote(path)}")


def _set_aside(seen: DeadSeen) -> Iterator[Item]:
    if seen.aside:
        newest, n = seen.aside[0], len(seen.aside)
        whose = f" of task {newest.task_id}" if newest.task_id else ""
        text = (
            f"an entry{whose} ({newest.key!r}) was set aside and is not sent: {newest.reason}"
            if n == 1
            else f"{n} entries were set aside and are not sent, the newest{whose} ({newest.key!r}): {newest.reason}"
        )
        yield _item("error", text, f"agentqctl outbox show {newest.delivery_id}")


def _stuck(status: dict[str, Any], since: dict[str, int], now_us: int) -> Iterator[Item]:
    for task in status["running"]:
        began = since.get(task["id"])
        if began is not None and now_us - began > STUCK_S * US:
            for_s = format_duration((now_us - began) / US)
            text = f"task {task['id']} ({task['task']}) has been stopping for {for_s}: processes of it do not die"
            yield _item("error", text, f"agentqctl show {task['id']}")


def _queues(room: Room, status: dict[str, Any]) -> Iterator[Item]:
    for name, queue in status["queues"].items():
        options = room.box.settings.queues.get(name)
        if queue["paused"] and queue["waiting"]:
            by_config = options is not None and options.paused
            where = " (by the config)" if by_config else ""
            text = f"queue {name} is paused{where}, {_many(queue['waiting'], 'task waits', 'tasks wait')}"
            yield _item("warning", text, None if by_config else f"agentqctl resume {quote(name)}")
        if name != "default" and options is None and queue["waiting"]:
            text = f"queue {name} is no longer in the config, {_many(queue['waiting'], 'task waits', 'tasks wait')} in it"
            yield _item("warning", text)


def _limits(status: dict[str, Any]) -> Iterator[Item]:
    for name, limit in status["runner_limits"].items():
        waits = limit["waiting_task_id"]
        text = f"the usage limit of runner {name} is reached until {limit['until']}; no task waits for it"
        if waits is not None:
            text = f"the usage limit of runner {name} is reached; its tasks wait until {limit['until']}"
        yield _item("warning", text, None if waits is None else f"agentqctl retry {waits}")


def _alerts(room: Room, status: dict[str, Any], told: list[Told], now_us: int) -> Iterator[Item]:
    for alert in grouped([each for each in told if not is_over(room, status, each)]):
        kind, task_id = alert.type.removeprefix(PREFIX), alert.data.get("task_id")
        ago = f"{format_duration(max(0, now_us - alert.at) / US)} ago"
        when = f"{alert.count} times in 24 h, last {ago}" if alert.count > 1 else ago
        text = f"{kind}: {when}: {alert.data.get('message')}"
        fix = (
            f"agentqctl show {task_id}" if task_id else _FIXES.get(kind, "").format(room.box.folders.rejected)
        )
        yield _item("error" if kind in _ERRORS else "warning", text, fix or None)


_FIXES: Final = {
    "line_rejected": "tail {0}",
    "dead_letter": "agentqctl outbox list --state dead",
    "undelivered": "agentqctl outbox list --state pending,retryable",
}


def _many(n: int, one: str, more: str) -> str:
    return f"{n} {one if n == 1 else more}"
