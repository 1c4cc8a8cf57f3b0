"""Submitting a task and waiting for it, across lost answers and restarts of the daemon."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from agentqd.client.box import Box, is_absent
from agentqd.client.connection import LONG_POLL_S, encode_json, take
from agentqd.client.errors import AnswerLost
from agentqd.client.patience import Patience, may_come_back
from agentqd.client.queuefile import Queue
from agentqd.core import errors
from agentqd.core.errors import AgentqError, Unreachable

KEPT_IN = "queue_file"
RESENDS_MAX = 3
RESEND_WAIT_S = 0.2
POLL_MIN_S = 0.05
UNREAD_S = 60.0


def submit_task(
    box: Box, fields: dict[str, Any], sleep: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """The task in the daemon's hands, or in its queue file. `fields` must carry an id.

    A lost answer leaves the outcome unknown: the same bytes with the same id are sent again, and the daemon calls the
    second one a duplicate of the first. When it does not come back, the queue file takes them: the id dedupes there too.
    """
    assert fields.get("id"), "an id comes before the first send"
    body = encode_json(fields)
    for again in range(1 + RESENDS_MAX):
        try:
            answer = box.connection.post_raw("tasks", body=body)
        except AnswerLost:
            if again < RESENDS_MAX:
                sleep(RESEND_WAIT_S)
        except Unreachable as error:
            if not is_absent(error):
                raise
            break
        else:
            return answer
    return keep_task(box, fields)


def keep_task(box: Box, fields: dict[str, Any]) -> dict[str, Any]:
    """The task checked here (nobody else can say so now) and appended to the queue file. Raises AgentqError."""
    from agentqd.core.task import read_task

    queue = box.queue()
    line = encode_json(fields)
    read_task(line)
    return put_line(queue, fields, line)


def put_line(queue: Queue, fields: dict[str, Any], line: bytes) -> dict[str, Any]:
    """`line` (it says `fields`) in the queue file, its prompt beside it where it is too long. Raises AgentqError."""
    if len(line) > queue.line_bytes_max and isinstance(fields.get("prompt"), str):
        rest = {name: value for name, value in fields.items() if name != "prompt"}
        line = encode_json({**rest, "prompt_ref": queue.put_prompt(fields["id"], fields["prompt"].encode())})
    queue.append([line])
    return {
        "task_id": fields["id"],
        "state": None,
        "result": None,
        "duplicate": None,
        "where": KEPT_IN,
        "queue_file": queue.path,
    }


def wait_for(
    box: Box,
    task_id: str,
    *,
    timeout_s: float | None = None,
    may_be_unread: bool = False,
    submitted_at: str | None = None,
    only_look: bool = False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """The end of a task: `{"id", "state", "result", "reason", "detail", "conflicts", "exit_code", "finished"}`; `finished` is false only after
    `timeout_s`. `may_be_unread`: the line stands in the queue file, so "no such task" is "not yet" for a while, and so is the
    rejection of an older line with this id: `submitted_at` is that of ours. `only_look`: the first answer is enough. Raises AgentqError: ours was rejected."""
    until = None if timeout_s is None else clock() + timeout_s
    patience = Patience(box.reconnect_s, clock)
    unread = unread_patience(box, clock)
    last: dict[str, Any] = {
        "id": task_id,
        "state": None,
        "result": None,
        "reason": None,
        "detail": None,
        "conflicts": [],
        "exit_code": None,
        "finished": False,
    }
    while True:
        asked = clock()
        most_s = 0.0 if only_look else LONG_POLL_S
        left_s = most_s if until is None else max(0.0, min(most_s, until - clock()))
        try:
            last = box.connection.get(
                "tasks", task_id, "wait", query={"timeout_s": f"{left_s:.3f}"}, extra_s=left_s
            )
        except AgentqError as error:
            if may_be_unread and is_unread(error, submitted_at):
                unread.bear(error, until)
            elif may_come_back(error):
                unread.succeeded()  # the daemon has been away: its next "no such task" is its first
                patience.bear(error, until)
            else:
                raise
        else:
            patience.succeeded()
            may_be_unread = False
            if only_look:
                return last
        if take(last, "finished", bool) or (until is not None and clock() >= until):
            return last
        if clock() - asked < POLL_MIN_S:
            sleep(POLL_MIN_S)  # a daemon that does not sit on the question must not be asked without pause


def is_rejection(error: AgentqError) -> bool:
    """There is no such task, because the box has rejected what was submitted under its id (docs/api.md)."""
    return "rejected_at" in error.fields


def is_unread(error: AgentqError, submitted_at: str | None) -> bool:
    """The daemon may not have read the line yet: it knows nothing of its id, or only an older rejection."""
    older = is_rejection(error) and submitted_at not in (None, error.fields.get("submitted_at"))
    return error.code == "no_such_task" or older


def unread_patience(box: Box, clock: Callable[[], float] = time.monotonic) -> Patience:
    """How long a running daemon may not know a line of its queue file: one that it has refused never becomes a task."""
    return Patience(min(box.reconnect_s, UNREAD_S), clock)


def exit_code_of(end: dict[str, Any]) -> int:
    """What `wait` ends with: 0 success, the worker's own code, 124 timeout (of the task or of the waiting), 125 else."""
    result = end.get("result")
    if not end["finished"] or result == "timeout":
        return errors.EXIT_TIMEOUT
    if result == "success":
        return errors.EXIT_OK
    code = end.get("exit_code")
    if result == "failed" and isinstance(code, int) and 0 < code < 256:
        return code
    return errors.EXIT_OTHER_END
