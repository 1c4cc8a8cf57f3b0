"""What is answered where a request names a task that there is none of."""

from __future__ import annotations

import sqlite3
from typing import Final

from agentqd.core.errors import NoSuchTask, TaskRejected
from agentqd.storage import rejections
from agentqd.storage import tasks as store

REJECTED: Final = "the reason's code: what came under this id was rejected"


def no_such_task(task_id: str) -> NoSuchTask:
    return NoSuchTask(f"there is no task {task_id[:80]!r}", id=task_id[:80])


def missing(connection: sqlite3.Connection, task_id: str) -> NoSuchTask | TaskRejected:
    """Why there is no task of this id, for who asks about it: it was rejected, or never heard of."""
    told = rejections.find(connection, task_id)
    if told is None:
        return no_such_task(task_id)
    return TaskRejected(
        f"task {task_id} was not accepted: {told['message']}",
        code=told["reason"],
        id=task_id,
        name=told["name"],
        rejected_at=told["completed_at"],
        submitted_at=told["submitted_at"],
    )


def must_know_task(connection: sqlite3.Connection, task_id: str) -> None:
    """Raises NoSuchTask, TaskRejected."""
    if store.find(connection, task_id) is None:
        raise missing(connection, task_id)
