"""Alerts as `status` shows them: those of a day, what has become since of what each is about, and which are over.

An alert that stands for something that lasts is over when that is: nobody is sent to look for what is no longer there. One that
tells what has happened (a line rejected, a file replaced, entries in conflict, results removed) has no such end, and is
shown for a day.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import msgspec

from agentqd.control import queries
from agentqd.control.queries import AlertSeen
from agentqd.control.room import Room
from agentqd.core.lifecycle import ACTIVE_STATES, WAITING_STATES, Result, State
from agentqd.core.units import parse_time_us
from agentqd.loops.lifesigns import last_sign_us
from agentqd.loops.liveness import stalled

PREFIX: Final = "agentq.alert."
_MILLISECOND_US: Final = 1000  # what times in an alert are cut to


class TaskNow(NamedTuple):
    state: str
    result: str | None
    attempt: int


class Told(msgspec.Struct, frozen=True):
    """One alert, and what has become of its task and its delivery (None: there is none, or it is not asked for)."""

    type: str
    sink: str | None
    at: int
    delivery_id: str
    data: dict[str, Any]
    task: TaskNow | None = None
    row: str | None = None  # the state of the outbox row that it is about

    @property
    def kind(self) -> str:
        return self.type.removeprefix(PREFIX)


def look(connection: sqlite3.Connection, since_us: int) -> list[Told]:
    """Newest first; of very many only the newest."""
    tasks: dict[str, TaskNow | None] = {}
    found = []
    for each in queries.alerts_since(connection, since_us):
        kind, task_id = each.type.removeprefix(PREFIX), each.data.get("task_id")
        task = row = None
        if kind in _OF_TASK and isinstance(task_id, str):
            if task_id not in tasks:
                now = connection.execute(queries.TASK_NOW, (task_id,)).fetchone()
                tasks[task_id] = None if now is None else TaskNow(*now)
            task = tasks[task_id]
        if kind in _OF_ROW:
            now = connection.execute(queries.ROW_NOW, (each.data.get("delivery_id"), each.sink)).fetchone()
            row = None if now is None else now[0]
        found.append(Told(each.type, each.sink, each.at, each.delivery_id, each.data, task, row))
    return found


def grouped(told: Iterable[Told]) -> list[AlertSeen]:
    """By type and sink, the newest and how many; newest first, as they come."""
    newest: dict[tuple[str, str | None], Told] = {}
    seen: dict[tuple[str, str | None], int] = {}
    for each in told:
        about = (each.type, each.sink)
        newest.setdefault(about, each)
        seen[about] = seen.get(about, 0) + 1
    return [
        AlertSeen(each.type, each.sink, each.at, each.delivery_id, seen[about], each.data)
        for about, each in newest.items()
    ]


def is_over(room: Room, status: dict[str, Any], told: Told) -> bool:
    """Whether it need not be looked at: what it says is said elsewhere in `attention` as long as it is so, or is no longer so."""
    kind = told.kind
    if kind in SAID_ELSEWHERE or (kind.startswith("entry_") and kind != "entry_conflict"):
        return True
    if kind in _OF_TASK:
        return _OF_TASK[kind](room, told)
    if kind in _OF_SINK:
        return told.sink is not None and _OF_SINK[kind](room, status["sinks"].get(told.sink), told)
    if kind == "stalled_loop":
        now = stalled(room.box)
        return told.data["loop"] not in now if "loop" in told.data else not now
    return kind in _OF_QUEUE_FILE and _is_readable(room.box.folders.queue_file)


# What its task does now.


def _not_active(_: Room, told: Told) -> bool:
    return told.task is None or told.task.state not in ACTIVE_STATES


def _not_silent(room: Room, told: Told) -> bool:
    """It has ended, is in another attempt, or has shown a sign of life since."""
    if told.task is None or _not_active(room, told):
        return True
    if told.task.attempt != told.data.get("attempt", told.task.attempt):
        return True
    try:
        then = parse_time_us(str(told.data.get("last_sign_at")))
    except ValueError:
        return False
    folder = room.box.folders.attempt(str(told.data["task_id"]), told.task.attempt)
    return last_sign_us(folder, 0, room.box.clock.now_us()) > then + _MILLISECOND_US


def _not_ready(_: Room, told: Told) -> bool:
    return told.task is None or told.task.state != State.QUEUED


def _not_waiting(_: Room, told: Told) -> bool:
    return told.task is None or told.task.state not in WAITING_STATES


def _not_refused(_: Room, told: Told) -> bool:
    """A person has had it run again since. (A claim that only warns has no such end.)"""
    refused = told.kind != "write_conflict" or told.data.get("policy") == "refuse"
    return refused and told.task is not None and told.task.result != Result.REFUSED


def _made_good(_: Room, told: Told) -> bool:
    """A later attempt has succeeded."""
    return told.task is not None and told.task.result == Result.SUCCESS


_OF_TASK: Final[dict[str, Callable[[Room, Told], bool]]] = {
    "stuck": _not_active,
    "claim_expired": _not_silent,
    "oldest_queued": _not_ready,
    "queue_timeout": _not_waiting,
    "prompt_missing": _not_refused,
    "write_conflict": _not_refused,
    "lost": _made_good,
    "no_work": _made_good,
}


# What its sink or its row does now. `sink`: as in the status object; None: neither in the config nor with rows.


def _arrived(_: Room, sink: dict[str, Any] | None, told: Told) -> bool:
    """Delivered, dead, dropped or held: the last three are named by themselves."""
    return sink is None or not sink["in_config"] or told.row not in {"pending", "delivering", "retryable"}


def _sent_by_a_person(_: Room, __: dict[str, Any] | None, told: Told) -> bool:
    """It was dead at once; a row that is not there was left out, and stays so."""
    return told.row is not None and told.row != "dead"


def _can_send(room: Room, sink: dict[str, Any] | None, told: Told) -> bool:
    if sink is None or not sink["in_config"]:
        return True  # what waits there is named by itself
    if sink["pending"] + sink["held"] == 0 and not sink["last_error"]:
        return True
    runner = room.parts.delivery.runners.get(str(told.sink))
    return runner is not None and runner.delivered_us is not None and runner.delivered_us > told.at


_OF_SINK: Final[dict[str, Callable[[Room, dict[str, Any] | None, Told], bool]]] = {
    "undelivered": _arrived,
    "sink_refused": _sent_by_a_person,
    "webhook_secret": _can_send,
    "email_setup": _can_send,
    "host_key": _can_send,
}
_OF_ROW: Final = frozenset({"undelivered", "sink_refused"})


# The queue file, and what is said elsewhere.


def _is_readable(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode) and os.access(path, os.R_OK)
    except OSError:
        return False


_OF_QUEUE_FILE: Final = frozenset({"queue_symlink", "queue_not_a_file", "queue_unreadable"})
# The config's error, the disk, a sink's dead rows, that it is disabled, its secret files, a runner's limit, a silent supervisor.
SAID_ELSEWHERE: Final = frozenset(
    {
        "bad_config",
        "sink_disabled",
        "dead_letter",
        "disk_low",
        "secret_file",
        "usage_limit",
        "supervisor_silent",
    }
)
