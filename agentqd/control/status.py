"""`GET /v1/status`: one look at everything, whatever is waiting: sums kept by the journal, index seeks, and what is in memory."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections import Counter
from typing import Any, Final

import msgspec
from aiohttp import web

from agentqd.control import alerts, queries, sinks
from agentqd.control.alerts import Told, grouped
from agentqd.control.attention import Journaled, attention
from agentqd.control.queries import AlertSeen, Counts, DeadSeen
from agentqd.control.reasons import reasons_by_queue
from agentqd.control.room import Room
from agentqd.control.route import Call, Route, answer
from agentqd.control.sinks import SinksSeen, names_of, sink_view
from agentqd.control.views import deadline_us
from agentqd.core.lifecycle import WAITING_STATES, Result, State
from agentqd.core.outbox import RowState
from agentqd.core.routing import REJECTED
from agentqd.core.task import TaskRequest, read_task
from agentqd.core.units import format_time
from agentqd.storage import runner_limits
from agentqd.storage import tasks as store
from agentqd.storage.runner_limits import RunnerLimit
from agentqd.storage.tasks import TaskRow

US: Final = 1_000_000
ALERTS_OF_US: Final = 24 * 3600 * US
_WAITING: Final = frozenset(state.value for state in WAITING_STATES)


class Seen(msgspec.Struct):
    """What one read of the journal has found for the status."""

    counts: Counts
    active: list[TaskRow]
    requests: dict[int, TaskRequest]  # by seq, of active tasks
    pids: dict[int, tuple[int | None, int | None]]  # by seq: pid and start of the active attempt
    stopping_since: dict[str, int]
    oldest_ready: dict[str, int | None]
    sinks: SinksSeen
    told: list[Told]
    dead: DeadSeen
    sources: list[tuple[str, int, int, int, str]]
    limits: dict[str, RunnerLimit]
    limited: dict[str, str]  # by runner: a task that waits for its limit

    @property
    def alerts(self) -> list[AlertSeen]:
        return grouped(self.told)


def look(connection: sqlite3.Connection, now_us: int) -> Seen:
    counts = queries.counts(connection)
    active = queries.active(connection, 2**62, queries.ACTIVE_SEEN_MAX)
    pids = {}
    stopping_since = {}
    for task in active:
        sql = "SELECT pid, started_at FROM attempts WHERE task_seq = ? AND attempt = ?"
        pids[task.seq] = connection.execute(sql, (task.seq, task.attempt)).fetchone() or (None, None)
        if task.state is State.STOPPING and (
            row := connection.execute(queries.STOP_BEGUN, (task.id,)).fetchone()
        ):
            stopping_since[task.id] = row[0]
    ready = {queue for queue, state, _, _ in counts.tasks if state == State.QUEUED}
    limits = runner_limits.all_closed(connection, now_us)
    return Seen(
        counts=counts,
        active=active,
        requests={task.seq: read_task(store.spec_of(connection, task.seq)[0]) for task in active},
        pids=pids,
        stopping_since=stopping_since,
        oldest_ready={queue: queries.oldest_ready(connection, queue) for queue in ready},
        sinks=sinks.look(connection),
        told=alerts.look(connection, now_us - ALERTS_OF_US),
        dead=queries.dead_seen(connection),
        sources=connection.execute(queries.SOURCES).fetchall(),
        limits=limits,
        limited={
            runner: found
            for runner in limits
            if (found := queries.waits_for_limit(connection, runner, ready)) is not None
        },
    )


async def status_view(room: Room) -> dict[str, Any]:
    """The status object."""
    now = room.box.clock.now_us()
    seen = await room.box.journal.read(lambda c: look(c, now))
    reasons = await room.box.journal.read(lambda c: reasons_by_queue(room, c, seen.counts.tasks))
    view: dict[str, Any] = {
        "box": room.box.name,
        "daemon": _daemon(room),
        "supervisor": _supervisor(room),
        "tasks": _sums(seen.counts, 1, tuple(state.value for state in State if state is not State.NEW)),
        "results": _sums(seen.counts, 2, tuple(result.value for result in Result)),
        "waiting": dict(sorted(sum((Counter(each) for each in reasons.values()), Counter()).items())),
        "queues": _queues(room, seen, reasons, now),
        "runner_limits": {
            name: {
                "since": format_time(limit.since),
                "until": format_time(limit.until),
                "known": limit.known,
                "task_id": limit.task_id,
                "waiting_task_id": seen.limited.get(name),
            }
            for name, limit in sorted(seen.limits.items())
        },
        "outbox": _outbox(room, seen),
        "sinks": _sinks(room, seen, now),
        "alerts": [_alert(alert) for alert in seen.alerts],
        "running": [_running(room, seen, task, now) for task in seen.active],
        "intake": _intake(room, seen),
        "disk": _disk(room),
    }
    view["attention"] = attention(room, view, Journaled(seen.stopping_since, seen.told, seen.dead), now)
    return view


async def show_status(call: Call) -> web.StreamResponse:
    return answer(await status_view(call.room))


def _daemon(room: Room) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "version": room.parts.version,
        "uptime_s": round(room.box.clock.monotonic_s() - room.parts.started_monotonic_s, 3),
        "epoch": room.box.journal.epoch,
        "rss_bytes": rss_bytes(),
        "draining": room.box.draining,
        "draining_since": format_time(room.box.draining_since_us),
        "state_dir": room.box.folders.state,
        "config": room.config_path,
    }


def rss_bytes() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def workers(room: Room) -> int:
    return sum(live.running is not None for live in room.parts.supervision.live.values())


def _supervisor(room: Room) -> dict[str, Any] | None:
    welcome = room.parts.supervision.link.welcome
    if welcome is None:
        return None
    return {
        "pid": welcome.pid,
        "version": welcome.version,
        "instance": welcome.instance,
        "connected": True,
        "silent_s": room.parts.supervision.link.silent_s,
        "workers": workers(room),
    }


def _sums(counts: Counts, column: int, names: tuple[str, ...]) -> dict[str, int]:
    """Every name, those without any as 0."""
    sums = dict.fromkeys(names, 0)
    for row in counts.tasks:
        if row[column]:
            sums[str(row[column])] = sums.get(str(row[column]), 0) + row[3]
    return sums


def _queues(room: Room, seen: Seen, reasons: dict[str, dict[str, int]], now: int) -> dict[str, Any]:
    running: dict[str, int] = {}
    waiting: dict[str, int] = {}
    for queue, state, _, n in seen.counts.tasks:
        if state in _WAITING:
            waiting[queue] = waiting.get(queue, 0) + n
        elif state != State.FINISHED:
            running[queue] = running.get(queue, 0) + n
    names = {"default", *room.box.settings.queues, *waiting, *running}
    paused = room.paused
    return {
        name: {
            "running": running.get(name, 0),
            "waiting": waiting.get(name, 0),
            "concurrency": room.box.concurrency(name),
            "paused": name in paused,
            "oldest_waiting_s": _age_s(seen.oldest_ready.get(name), now),
            "reasons": reasons.get(name, {}),
        }
        for name in sorted(names)
    }


def _age_s(since: int | None, now: int) -> float | None:
    return None if since is None else round(max(0, now - since) / US, 3)


def _outbox(room: Room, seen: Seen) -> dict[str, int]:
    """Rows in flight are `pending` or `retryable` in the journal; they are shown as what they are."""
    sums = dict.fromkeys((state.value for state in RowState), 0)
    for sink, state, n in seen.counts.outbox:
        if sink != REJECTED:  # the daemon's own file of rejected lines, shown under `intake`
            sums[state] = sums.get(state, 0) + n
    runners = room.parts.delivery.runners
    flying = sum(len(runner.in_flight) for name, runner in runners.items() if name != REJECTED)
    for state in (RowState.PENDING, RowState.RETRYABLE):
        taken = min(flying, sums[state])
        sums[state] -= taken
        sums[RowState.DELIVERING] += taken
        flying -= taken
    return sums


def _sinks(room: Room, seen: Seen, now: int) -> dict[str, Any]:
    return {name: sink_view(room, name, seen.sinks, now) for name in names_of(room, seen.sinks)}


def _alert(alert: AlertSeen) -> dict[str, Any]:
    return {
        "at": format_time(alert.at),
        "type": alert.type,
        "sink": alert.sink,
        "task_id": alert.data.get("task_id"),
        "message": alert.data.get("message"),
        "count": alert.count,
        "delivery_id": alert.delivery_id,
    }


def _running(room: Room, seen: Seen, task: TaskRow, now: int) -> dict[str, Any]:
    live = room.parts.supervision.live.get(task.id)
    known = live.running if live is not None and live.task.attempt == task.attempt else None
    pid, started = (known.pid, known.started_at) if known is not None else seen.pids[task.seq]
    deadline = deadline_us(room, task, seen.requests[task.seq], started)
    return {
        "id": task.id,
        "task": task.name,
        "state": task.state.value,
        "pid": pid,
        "attempt": task.attempt,
        "started_at": format_time(started or task.started_at),
        "running_s": _age_s(started, now),
        "deadline_in_s": None if deadline is None else round((deadline - now) / US, 3),
        "queue": task.queue,
    }


def _intake(room: Room, seen: Seen) -> dict[str, Any]:
    intake = room.parts.intake
    kept = sum(n for sink, _, n in seen.counts.outbox if sink == REJECTED)
    return {
        "offset": next((offset for _, _, _, offset, role in seen.sources if role == "live"), 0),
        "bytes_waiting": bytes_waiting(room, seen.sources),
        "rejected": max(intake.rejected, kept),
        "last_line_at": format_time(intake.last_line_at),
    }


def bytes_waiting(room: Room, sources: list[tuple[str, int, int, int, str]]) -> int:
    """What stands in the queue's files beyond the committed positions."""
    waiting = 0
    known = {(dev, ino): offset for _, dev, ino, offset, _ in sources}
    for name in {os.path.basename(room.box.folders.queue_file), *(source[0] for source in sources)}:
        with contextlib.suppress(OSError):
            found = os.stat(
                os.path.join(room.box.folders.queue, os.path.basename(name)), follow_symlinks=False
            )
            waiting += max(0, found.st_size - known.get((found.st_dev, found.st_ino), 0))
    return waiting


def _disk(room: Room) -> dict[str, Any]:
    free = None
    with contextlib.suppress(OSError):
        found = os.statvfs(room.box.folders.state)
        free = found.f_bavail * found.f_frsize
    return {"free_bytes": free, "intake_stopped": room.box.disk_low}


ROUTES: Final = (
    Route(
        "GET", "/v1/status", "The box at a glance; what needs attention stands in `attention`.", show_status
    ),
)
