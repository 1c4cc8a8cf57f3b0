"""Why a task waits, and what would free it: for machines (`reason` and what goes with it) and for people (one sentence).

The reason is `loops.scheduling.waiting_reason`'s; here the facts are added. Reads are index seeks, each bounded: a list of
10,000 tasks asks for no more than a page of small ones.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from typing import Any, Final

import msgspec

from agentqd.control import queries
from agentqd.control.queries import Written
from agentqd.control.room import Room
from agentqd.core.lifecycle import ACTIVE_STATES, Result, State
from agentqd.core.limits import AHEAD_SEEN_MAX, DEPENDENCIES_SHOWN, WAITING_REASONS_SEEN_MAX
from agentqd.core.resolve import resolve
from agentqd.core.retry import LOST_REQUEUES_MAX
from agentqd.core.task import read_task
from agentqd.core.units import format_duration, format_time, parse_time_us
from agentqd.loops.claiming import WRITE_CONFLICT, in_line
from agentqd.loops.link import silence_advice
from agentqd.loops.scheduling import ready_reason, waiting_reason
from agentqd.loops.unblocking import DEPENDENCY
from agentqd.loops.usage_limits import USAGE_LIMIT
from agentqd.storage import runner_limits
from agentqd.storage import tasks as store
from agentqd.storage.runner_limits import RunnerLimit
from agentqd.storage.tasks import TaskRow

US: Final = 1_000_000
SUPERVISOR_SILENT: Final = "supervisor_silent"
_CONFLICTS_LOOKED_AT: Final = 20  # tasks of a list for which the claims in their way are looked up


class SeenWaiting(msgspec.Struct, frozen=True):
    """What a read of the journal has found of a waiting task."""

    active: dict[str, int] = {}  # queue: running or stopping
    limits: dict[str, RunnerLimit] = {}
    paused_at: dict[str, int] = {}
    ahead: int = 0
    depends_on: list[tuple[str, str, str | None]] = []
    conflicts: list[dict[str, str]] = []
    attempts_max: int = 1
    silent_s: int = 0  # of an active task: so long its supervisor has not answered
    lost: int | None = None  # attempts of this run that were lost, if the last one was


class Looker:
    """Looks at one task after another within one read."""

    def __init__(self, room: Room, connection: sqlite3.Connection) -> None:
        self._room = room
        self._connection = connection
        self._active = queries.active_by_queue(connection)
        self._limits = runner_limits.all_closed(connection, room.box.clock.now_us())
        self._paused_at = dict(connection.execute(queries.PAUSED).fetchall())
        self._silent_s = room.parts.supervision.link.silent_s
        self._conflicts_left = _CONFLICTS_LOOKED_AT

    def look(self, task: TaskRow) -> SeenWaiting:
        waits = task.state in {State.QUEUED, State.BLOCKED, State.RETRYABLE}
        if not waits:
            silent_s = self._silent_s if task.state in ACTIVE_STATES else 0
            return SeenWaiting(self._active, self._limits, self._paused_at, silent_s=silent_s)
        attempts_max, lost = 1, None
        if task.state is State.RETRYABLE:
            request = read_task(store.spec_of(self._connection, task.seq)[0])
            attempts_max = resolve(request, task.queue, task.runner, self._room.box.settings).max_attempts
            lost = self._lost(task)
        return SeenWaiting(
            self._active,
            self._limits,
            self._paused_at,
            ahead=self._ahead(task) if task.state is State.QUEUED else 0,
            depends_on=self._depends_on(task) if task.state is State.BLOCKED else [],
            conflicts=self._conflicts(task) if task.reason == WRITE_CONFLICT else [],
            attempts_max=attempts_max,
            lost=lost,
        )

    def _lost(self, task: TaskRow) -> int | None:
        """How often its worker was lost in this run; None: its last attempt ended otherwise."""
        if store.attempt_of(self._connection, task.seq, task.attempt).result != Result.LOST:
            return None
        return int(self._connection.execute(queries.LOST_IN_RUN, (task.seq, task.run)).fetchone()[0])

    def _ahead(self, task: TaskRow) -> int:
        """Tasks of its queue that go first, at most AHEAD_SEEN_MAX + 1."""
        most = AHEAD_SEEN_MAX + 1
        higher = self._connection.execute(queries.AHEAD_BY_PRIORITY, (task.queue, task.priority, most))
        older = self._connection.execute(
            queries.AHEAD_BY_AGE, (task.queue, task.priority, task.seq, most)
        ).fetchone()[0]
        return min(most, int(higher.fetchone()[0]) + int(older))

    def _depends_on(self, task: TaskRow) -> list[tuple[str, str, str | None]]:
        """Those that have not ended."""
        rows = self._connection.execute(queries.DEPENDS_ON, (task.seq,)).fetchall()
        return [row for row in rows if row[1] != State.FINISHED]

    def _conflicts(self, task: TaskRow) -> list[dict[str, str]]:
        if self._conflicts_left <= 0:
            return []
        self._conflicts_left -= 1
        before = in_line(self._connection, task)
        return [] if before is None else [{**before.as_json(), "own_path": before.path}]


def waiting_for(room: Room, task: TaskRow, written: Written, seen: SeenWaiting) -> dict[str, Any] | None:
    """Why a waiting task waits, or that nobody answers for one that runs; None for one that goes on."""
    box = room.box
    if task.state in ACTIVE_STATES:
        return _silence(room, seen)
    full = seen.active.get(task.queue, 0) >= box.concurrency(task.queue)
    busy = full or sum(seen.active.values()) >= box.max_workers
    reason = waiting_reason(
        task,
        box,
        paused=task.queue in room.paused,
        connected=room.parts.supervision.link.connected,
        busy=busy,
        limited=task.runner in seen.limits,
    )
    if reason is None:
        return None
    facts, text = _told(room, task, written, seen, reason)
    return {
        "reason": reason,
        "until": format_time(_until(room, task, written, seen, reason)),
        "text": text,
        **facts,
    }


def _silence(room: Room, seen: SeenWaiting) -> dict[str, Any] | None:
    """Its end would not be seen, nor does it begin if it has not begun."""
    welcome = room.parts.supervision.link.welcome
    if not seen.silent_s or welcome is None:
        return None
    since = format_time(room.box.clock.now_us() - seen.silent_s * US)
    text = (
        f"the supervisor (pid {welcome.pid}) has not answered for {format_duration(seen.silent_s)}, so nobody knows how it goes:"
        f" {silence_advice(welcome.pid)}"
    )
    return {
        "reason": SUPERVISOR_SILENT,
        "until": None,
        "text": text,
        "since": since,
        "supervisor_pid": welcome.pid,
    }


def _told(
    room: Room, task: TaskRow, written: Written, seen: SeenWaiting, reason: str
) -> tuple[dict[str, Any], str]:
    """(what goes with the reason, the sentence)."""
    if reason == "no_free_slot":
        return _no_free_slot(room, task, seen)
    if reason == "queue_paused":
        return _paused(room, task, seen)
    if reason == DEPENDENCY and seen.depends_on:
        return _dependency(seen)
    if reason == WRITE_CONFLICT:
        return {"conflicts": seen.conflicts}, task.detail or "another task claims what it writes to"
    if reason == "held":
        return _held(task)
    if reason == "backoff":
        return _backoff(task, seen)
    if reason == USAGE_LIMIT:
        limit = seen.limits.get(task.runner)
        guess = "" if limit is None or limit.known else "; it does not say until when, so it is tried then"
        text = f"the usage limit of runner {task.runner} is reached{guess}; agentqctl retry {task.id} opens it again now"
        return {"runner": task.runner, "known": limit is None or limit.known}, text
    texts = {
        "queue_removed": f"its queue {task.queue} is no longer in the config: put it back, or cancel the task",
        "draining": "the daemon is draining, nothing new starts; agentqctl drain --off ends that",
        "no_supervisor": "no supervisor is connected; agentqctl doctor says what is wrong",
        "starting": "it is about to start",
        "start_time": "its start time lies ahead",
        "prompt_missing": f"its prompt file {written.prompt_ref or ''} is not there yet; it is refused if that stays so",
        "dependency": "a task that it comes after has just ended",
    }
    return {}, texts.get(reason, reason.replace("_", " "))


def _no_free_slot(room: Room, task: TaskRow, seen: SeenWaiting) -> tuple[dict[str, Any], str]:
    slots = room.box.concurrency(task.queue)
    own = seen.active.get(task.queue, 0) >= slots
    limit, most = (
        (f"queues.{task.queue}.concurrency", slots) if own else ("max_workers", room.box.max_workers)
    )
    what = f"all {most} slots of queue {task.queue}" if own else f"all {most} workers of this box"
    many = seen.ahead > AHEAD_SEEN_MAX
    ahead = (
        "nobody of its queue goes"
        if not seen.ahead
        else f"{min(seen.ahead, AHEAD_SEEN_MAX)}{'+' if many else ''} of its queue go"
    )
    text = f"{what} are in use ({limit}), {ahead} first"
    facts = {"limit": limit, "slots": most, "ahead": min(seen.ahead, AHEAD_SEEN_MAX), "ahead_more": many}
    return facts, text


def _paused(room: Room, task: TaskRow, seen: SeenWaiting) -> tuple[dict[str, Any], str]:
    """By the config's word first: a person's resume would not help against it."""
    options = room.box.settings.queues.get(task.queue)
    if options is not None and options.paused:
        text = f"queue {task.queue} is paused by the config; set queues.{task.queue}.paused to false"
        return {"by": "config", "since": None}, text
    text = f"queue {task.queue} is paused by a person; agentqctl resume {task.queue}"
    return {"by": "person", "since": format_time(seen.paused_at.get(task.queue))}, text


def _dependency(seen: SeenWaiting) -> tuple[dict[str, Any], str]:
    named = seen.depends_on[:DEPENDENCIES_SHOWN]
    tasks = [{"id": name, "state": state} for name, state, _ in named]
    short = ", ".join(f"{name} ({state})" for name, state, _ in named[:5])
    more = len(seen.depends_on) - min(5, len(named))
    text = f"it comes after {short}{f' and {more} more' if more else ''}, not ended yet"
    return {"tasks": tasks, "tasks_count": len(seen.depends_on)}, text


def _held(task: TaskRow) -> tuple[dict[str, Any], str]:
    if task.reason in {None, "held"}:
        return {"by": "person"}, f"it is held by a person; agentqctl release {task.id}"
    cause = str(task.reason)
    text = f"its worker was lost ({cause.replace('_', ' ')}) and on_lost says hold; agentqctl release {task.id}, or cancel"
    return {"by": "on_lost", "cause": cause}, text


def _backoff(task: TaskRow, seen: SeenWaiting) -> tuple[dict[str, Any], str]:
    cause = str(task.reason or "failed")
    now = f"agentqctl retry {task.id} starts it now"
    if seen.lost is not None:
        text = f"its worker was lost ({cause.replace('_', ' ')}), requeued {seen.lost} of at most {LOST_REQUEUES_MAX}; {now}"
        return {"cause": cause, "requeues_used": seen.lost, "max_requeues": LOST_REQUEUES_MAX}, text
    used, most = task.run_attempts, max(seen.attempts_max, task.run_attempts)
    text = f"attempt {used} of {most} ended ({cause.replace('_', ' ')}), the next one backs off; {now}"
    return {"cause": cause, "attempts_used": used, "max_attempts": most}, text


def _until(room: Room, task: TaskRow, written: Written, seen: SeenWaiting, reason: str) -> int | None:
    if reason == "start_time":
        return parse_time_us(written.not_before) if written.not_before else task.wake_at
    limit = seen.limits.get(
        task.runner
    )  # a runner that is closed for longer than the task waits starts nothing
    closed_until = None if limit is None else limit.until
    if task.state is State.RETRYABLE:
        return max((at for at in (task.wake_at, closed_until) if at is not None), default=None)
    if reason == USAGE_LIMIT:
        return closed_until
    if reason == "prompt_missing":
        return task.run_at + int(room.box.settings.limits.late_prompt * US)
    return None


# Summed up, for the status.


def reasons_by_queue(
    room: Room, connection: sqlite3.Connection, counts: list[tuple[str, str, str, int]]
) -> dict[str, dict[str, int]]:
    """{queue: {reason: n}}. Of a state in which very many tasks wait, those beyond WAITING_REASONS_SEEN_MAX stand under the
    state's own name."""
    sums: dict[str, Counter[str]] = {}
    active = queries.active_by_queue(connection)
    limits = runner_limits.all_closed(connection, room.box.clock.now_us())
    for queue, state, _, n in counts:
        own = sums.setdefault(queue, Counter())
        if state == State.SCHEDULED:
            own["start_time"] += n
        elif state == State.QUEUED:
            _ready(room, connection, queue, n, active, limits, own)
        elif state in _SUMMED:
            own[state] += n
    for state, sql in _SUMMED.items():
        if any(each == state for _, each, _, _ in counts):
            for queue, reason, n in connection.execute(sql, ("", WAITING_REASONS_SEEN_MAX)):
                own = sums.setdefault(queue, Counter())
                own[state] -= n
                own[_shown(state, reason)] += n
    return {queue: {name: n for name, n in sorted(own.items()) if n > 0} for queue, own in sums.items()}


_SUMMED: Final[dict[str, str]] = {
    State.BLOCKED.value: queries.REASONS_BLOCKED,
    State.HELD.value: queries.REASONS_HELD,
    State.RETRYABLE.value: queries.REASONS_RETRYABLE,
}


def _shown(state: str, reason: str | None) -> str:
    if state == State.HELD:
        return "held"
    if state == State.RETRYABLE:
        return USAGE_LIMIT if reason == USAGE_LIMIT else "backoff"
    return reason or "blocked"


def _ready(
    room: Room,
    connection: sqlite3.Connection,
    queue: str,
    n: int,
    active: dict[str, int],
    limits: dict[str, RunnerLimit],
    own: Counter[str],
) -> None:
    box = room.box
    reason = ready_reason(
        queue,
        box,
        paused=queue in room.paused,
        connected=room.parts.supervision.link.connected,
        busy=active.get(queue, 0) >= box.concurrency(queue) or sum(active.values()) >= box.max_workers,
        limited=False,
    )
    if reason in {"no_free_slot", "starting"}:
        for runner in limits:
            row = connection.execute(queries.READY_OF_RUNNER, (queue, runner, WAITING_REASONS_SEEN_MAX))
            limited = int(row.fetchone()[0])
            own[USAGE_LIMIT] += limited
            n -= limited
    own[reason] += n
