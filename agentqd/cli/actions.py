"""Verbs that change something and say what became of it: one id or many, the first failure decides the exit code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from agentqd.cli.outcome import outcome
from agentqd.cli.verb import Call
from agentqd.core.errors import AgentqError, Unreachable


def for_each(call: Call, names: Sequence[str], act: Callable[[str], dict[str, Any]]) -> int:
    """Acts on each name and says how it went. JSON: the answer for one name, a list for several. Raises only for one
    name, or where going on makes no sense (nobody answers)."""
    answers: list[dict[str, Any]] = []
    exit_code = 0
    for name in names:
        try:
            answer = act(name)
        except AgentqError as error:
            if len(names) == 1 or isinstance(error, Unreachable):
                raise
            exit_code = exit_code or error.exit_code
            answers.append({"id": name, **error.as_json()})
            if not call.as_json:
                call.out.note(f"agentqctl: {name}: {error.message}")
            continue
        answers.append(answer)
        if not call.as_json:
            call.out.line(f"{name}  {outcome(answer)}{_waits(answer)}{_opened(answer)}")
    if call.as_json:
        call.out.json(answers[0] if len(names) == 1 else answers)
    return exit_code


def _waits(answer: dict[str, Any]) -> str:
    """What a task that was to run again waits for."""
    return f": {answer['message']}" if answer.get("state") == "blocked" and answer.get("message") else ""


def _opened(answer: dict[str, Any]) -> str:
    """A word for one task that lifts a usage limit lifts it for all."""
    runner = answer.get("runner_opened")
    return f"; runner {runner} is open again, its tasks start in their order" if runner else ""


def act_on_tasks(call: Call, ids: Sequence[str], action: str, body: dict[str, Any] | None = None) -> int:
    """`POST /v1/tasks/ID/ACTION` for each."""
    return for_each(call, ids, lambda task_id: call.box.connection.post("tasks", task_id, action, body=body))


def act_on_queue(call: Call, queue: str, action: str) -> int:
    """Pause or resume."""
    answer = call.box.connection.post("queues", queue, action)
    if call.as_json:
        call.out.json(answer)
    else:
        removed = "" if answer.get("in_config", True) else " (not in the config: nothing of it starts)"
        call.out.line(f"{queue}  {'paused' if answer.get('paused') else 'running'}{removed}")
    return 0
