"""`GET /v1/tasks/ID/wait`: a long poll until a task is finished. The journal decides; being woken is only a hint."""

from __future__ import annotations

import sqlite3
from typing import Any, Final

from aiohttp import web

from agentqd.control import queries
from agentqd.control.route import Call, Param, Route, answer
from agentqd.control.tasks import no_such_task, task_id_of
from agentqd.core.lifecycle import State
from agentqd.storage import tasks as store

WAIT_MAX_S: Final = 3600
_LOOK_AGAIN_S: Final = 5.0


async def wait_for_task(call: Call) -> web.StreamResponse:
    room, task_id = call.room, task_id_of(call)
    deadline = room.deadline(call.query["timeout_s"])
    with room.watch.of(task_id) as changed:
        while True:
            end = await room.box.journal.read(lambda c: _end_of(c, task_id))
            if end is None:
                raise no_such_task(task_id)
            left_s = room.left_s(deadline)
            if end["finished"] or left_s <= 0:
                return answer(end)
            await room.wait_for(changed, min(left_s, _LOOK_AGAIN_S))


def _end_of(connection: sqlite3.Connection, task_id: str) -> dict[str, Any] | None:
    task = store.find(connection, task_id)
    if task is None:
        return None
    finished = task.state is State.FINISHED
    code = None
    if finished and task.attempt:
        attempt = store.attempt_of(connection, task.seq, task.attempt)
        code = attempt.exit_code if attempt.run == task.run else None  # not of the run before
    return {
        "id": task.id,
        "state": task.state.value,
        "result": task.result,
        "reason": task.reason,
        "detail": task.detail,
        "conflicts": queries.conflicts_met(connection, task),
        "exit_code": code,
        "finished": finished,
    }


ROUTES: Final = (
    Route(
        "GET",
        "/v1/tasks/{id}/wait",
        "Answers when the task is finished or the time is over.",
        wait_for_task,
        query=(Param("timeout_s", "wait so long at most", "number", 30.0, 0, WAIT_MAX_S),),
        more_statuses={404: "no_such_task"},
    ),
)
