"""What can go wrong between us and a daemon."""

from __future__ import annotations

from typing import Any

from agentqd.core import errors
from agentqd.core.errors import AgentqError, NotPermitted, Unreachable


class AnswerLost(Unreachable):
    """The request was sent, at least in part, and no whole answer came: what it did is unknown."""

    code = "answer_lost"


class BadAnswer(Unreachable):
    """Something answers there, but not an agentqd."""

    code = "bad_answer"


class BoxUnreachable(Unreachable):
    """The box itself cannot be reached (no route, no sshd, no answer): nothing was sent. Not an `Unreachable` proper,
    which is a box without a daemon."""

    code = "box_unreachable"


class HostKeyRefused(NotPermitted):
    """What answers at the box's address does not prove to be the box."""

    code = "host_key_unknown"


class NoSuchBox(AgentqError):
    """`--box NAME` names none of the config."""

    code = "no_such_box"
    exit_code = errors.EXIT_USAGE


_EXIT_BY_CODE = {
    "id_conflict": errors.EXIT_INVALID,
    "write_conflict": errors.EXIT_REFUSED_FOR_NOW,
    "refused_for_now": errors.EXIT_REFUSED_FOR_NOW,
    "supervisor_unavailable": errors.EXIT_OTHER,
    "journal_failed": errors.EXIT_OTHER,
    "not_permitted": errors.EXIT_NOT_PERMITTED,
    "no_such_task": errors.EXIT_NO_SUCH_TASK,
    "illegal_transition": errors.EXIT_OTHER,
    "unreachable": errors.EXIT_UNREACHABLE,
}
_EXIT_BY_STATUS = {
    400: errors.EXIT_USAGE,
    401: errors.EXIT_NOT_PERMITTED,
    403: errors.EXIT_NOT_PERMITTED,
    404: errors.EXIT_NO_SUCH_TASK,
    422: errors.EXIT_INVALID,
    503: errors.EXIT_REFUSED_FOR_NOW,
}


def error_from_answer(status: int, body: Any) -> AgentqError:
    """The daemon's own error, with the exit code of its kind."""
    if not isinstance(body, dict) or not isinstance(body.get("error"), str):
        return BadAnswer(
            f"the daemon answered with HTTP status {status} and no error object", http_status=status
        )
    code = str(body["error"])
    fields = {name: value for name, value in body.items() if name not in ("error", "message", "code")}
    fields.pop("self", None)
    error = AgentqError(str(body.get("message") or code), code=code, **fields)
    error.exit_code = _EXIT_BY_CODE.get(code, _EXIT_BY_STATUS.get(status, errors.EXIT_OTHER))
    error.http_status = status
    return error
