"""`GET /metrics`: Prometheus text, from the same sums as the status."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from aiohttp import web

from agentqd.control.queries import CLAIM_COUNTS, CONFLICT_COUNTS, LAST_EVENT
from agentqd.control.room import Room
from agentqd.control.route import Call, Route
from agentqd.control.status import Seen, bytes_waiting, look, rss_bytes, workers
from agentqd.core.routing import REJECTED

TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_COUNTED_MAX: Final = 100_000
Sample = tuple[dict[str, str], float]


async def show_metrics(call: Call) -> web.StreamResponse:
    room = call.room
    now = room.box.clock.now_us()
    seen = await room.box.journal.read(lambda c: look(c, now))
    last = await room.box.journal.read(lambda c: c.execute(LAST_EVENT).fetchone())
    claims = await room.box.journal.read(_look_at_claims)
    lines = [line for family in _families(room, seen, claims, now, last[0] if last else 0) for line in family]
    return web.Response(body=("\n".join(lines) + "\n").encode(), headers={"Content-Type": TYPE})


class Claims(NamedTuple):
    tasks: int
    outside: int
    tasks_waiting: int
    outside_waiting: int
    oldest_us: int | None  # since when the one that has waited longest waits
    conflicts: list[tuple[str, int]]


def _look_at_claims(connection: sqlite3.Connection) -> Claims:
    row = connection.execute(CLAIM_COUNTS, (_COUNTED_MAX, _COUNTED_MAX)).fetchone()
    oldest = min((at for at in row[4:] if at is not None), default=None)
    conflicts = connection.execute(CONFLICT_COUNTS).fetchall()
    return Claims(row[0], row[1], row[2], row[3], oldest, conflicts)


def _families(room: Room, seen: Seen, claims: Claims, now: int, last_event: int) -> Iterator[list[str]]:
    box, live = room.box, room.parts.supervision.live
    yield _family("tasks", "gauge", "Tasks kept, by state, result and queue.", [
        ({"queue": queue, "state": state, "result": result}, n) for queue, state, result, n in seen.counts.tasks
    ])  # fmt: skip
    yield _family("outbox_rows", "gauge", "Outbox rows kept, by sink and state.", [
        ({"sink": sink, "state": state}, n) for sink, state, n in seen.counts.outbox
    ])  # fmt: skip
    yield _family("delivery_lag_seconds", "gauge", "Age of the oldest row not yet delivered.", [
        ({"sink": sink}, max(0, now - since) / 1e6) for sink, since in seen.sinks.oldest.items() if since is not None
    ])  # fmt: skip
    yield _family("queue_oldest_ready_seconds", "gauge", "Age of the oldest task that is ready to start.", [
        ({"queue": queue}, max(0, now - since) / 1e6) for queue, since in seen.oldest_ready.items() if since is not None
    ])  # fmt: skip
    yield _family("alerts_24h", "gauge", "Alerts of the last 24 hours (of very many only the newest).", [
        ({"type": alert.type}, alert.count) for alert in seen.alerts
    ])  # fmt: skip
    yield _family("write_claims", "gauge", "Paths claimed (of very many, the first), by who claims.", [
        ({"by": "task"}, claims.tasks), ({"by": "outside"}, claims.outside)
    ])  # fmt: skip
    yield _family("write_claims_waiting", "gauge", "Tasks and outside claims that wait for a place to write.", [
        ({"by": "task"}, claims.tasks_waiting), ({"by": "outside"}, claims.outside_waiting)
    ])  # fmt: skip
    yield _family("write_conflicts_total", "counter", "Write conflicts ever recorded, by policy.", [
        ({"policy": policy}, n) for policy, n in claims.conflicts
    ])  # fmt: skip
    rejected = sum(n for sink, _, n in seen.counts.outbox if sink == REJECTED)
    plain: tuple[tuple[str, str, str, float | None], ...] = (
        (
            "uptime_seconds",
            "gauge",
            "Since this daemon started.",
            box.clock.monotonic_s() - room.parts.started_monotonic_s,
        ),
        ("resident_memory_bytes", "gauge", "Of the daemon.", rss_bytes()),
        ("workers_running", "gauge", "Workers that run.", workers(room)),
        ("attempts_active", "gauge", "Attempts claimed and not ended.", len(live)),
        (
            "supervisor_connected",
            "gauge",
            "1 if a supervisor is connected.",
            int(room.parts.supervision.link.connected),
        ),
        ("journal_commits_total", "counter", "Commits of this daemon.", box.journal.commits),
        ("journal_units_total", "counter", "Units in those commits.", box.journal.units),
        ("events_total", "counter", "Events ever recorded.", last_event),
        (
            "intake_bytes_waiting",
            "gauge",
            "Bytes in the queue files that are not read yet.",
            bytes_waiting(room, seen.sources),
        ),
        (
            "intake_rejected_lines",
            "gauge",
            "Rejected lines that are kept.",
            max(rejected, room.parts.intake.rejected),
        ),
        (
            "write_claim_oldest_wait_seconds",
            "gauge",
            "How long the oldest claim waits.",
            0.0 if claims.oldest_us is None else max(0, now - claims.oldest_us) / 1e6,
        ),
        ("draining", "gauge", "1 while draining.", int(box.draining)),
        ("intake_stopped", "gauge", "1 while the disk is too full.", int(box.disk_low)),
    )
    for name, kind, text, value in plain:
        if value is not None:
            yield _family(name, kind, text, [({}, value)])


def _family(name: str, kind: str, text: str, samples: list[Sample]) -> list[str]:
    full = f"agentqd_{name}"
    return [
        f"# HELP {full} {text}",
        f"# TYPE {full} {kind}",
        *(f"{full}{_labels(labels)} {value:.17g}" for labels, value in samples),
    ]


def _labels(labels: dict[str, Any]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


ROUTES: Final = (Route("GET", "/metrics", "Prometheus text.", show_metrics, answer="text/plain"),)
