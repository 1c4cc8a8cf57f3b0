"""How a task's state and result are called and coloured, everywhere the same."""

from __future__ import annotations

from typing import Any

RESULT_STYLES = {"success": "good", "cancelled": "dim", "expired": "warn", "no_work": "warn"}
STATE_STYLES = {
    "running": "busy",
    "stopping": "busy",
    "blocked": "warn",
    "held": "warn",
    "retryable": "warn",
    "delivered": "good",
    "dead": "bad",
    "dropped": "dim",
}


def outcome(task: dict[str, Any]) -> str:
    """The state of a task, or its result once it is finished, with the reason."""
    result, reason = task.get("result"), task.get("reason")
    if not result:
        return str(task.get("state") or "?")
    return f"{result} ({reason})" if reason and result != "success" else str(result)


def outcome_style(task: dict[str, Any]) -> str:
    result = task.get("result")
    if result:
        return RESULT_STYLES.get(str(result), "bad")
    return STATE_STYLES.get(str(task.get("state")), "")


def in_the_way(conflicts: Any) -> list[str]:
    """Whose claims a task has met, where there are several (of one its reason tells)."""
    found = [each for each in conflicts if isinstance(each, dict)] if isinstance(conflicts, list) else []
    return [
        f"{each.get('task_id')} ({each.get('task')}) writes {each.get('path')}"
        for each in found
        if len(found) > 1
    ]
