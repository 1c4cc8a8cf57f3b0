"""Typed errors: what went wrong, where, and what to do about it.

An `AgentqError` is an operation that failed (style: two kinds of wrong). A bug is an assertion.
`code` is machine-readable and stable; `exit_code` is what `agentqctl` ends with (sysexits where one fits).
"""

from __future__ import annotations

from typing import Any

EXIT_OK = 0
EXIT_OTHER = 1
EXIT_USAGE = 2
EXIT_INVALID = 65
EXIT_NO_SUCH_TASK = 66
EXIT_UNREACHABLE = 69
EXIT_REFUSED_FOR_NOW = 75
EXIT_NOT_PERMITTED = 77
EXIT_TIMEOUT = 124
EXIT_OTHER_END = 125


class AgentqError(Exception):
    """An operation failed. `fields` are extra machine-readable facts (JSON-able, never a secret)."""

    code = "error"
    exit_code = EXIT_OTHER
    http_status = 500

    def __init__(self, message: str, *, code: str | None = None, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        self.fields = fields

    def as_json(self) -> dict[str, Any]:
        """The error object that the control socket and `--json` print."""
        return {"error": self.code, "message": self.message, **self.fields}


class InvalidTask(AgentqError):
    """A task that can never be accepted as it is written."""

    code = "invalid_task"
    exit_code = EXIT_INVALID
    http_status = 422


class IdConflict(InvalidTask):
    """The id is taken by a task with other content."""

    code = "id_conflict"
    http_status = 409


class TaskRejected(InvalidTask):
    """What was submitted under this id was never accepted, and there is no task. `code` is the rejection's own reason;
    `rejected_at` and `submitted_at` (as the submitter wrote it) say which submission is meant."""


class InvalidRequest(AgentqError):
    """A request to the control socket that makes no sense."""

    code = "invalid_request"
    exit_code = EXIT_USAGE
    http_status = 400


class NoSuchTask(AgentqError):
    code = "no_such_task"
    exit_code = EXIT_NO_SUCH_TASK
    http_status = 404


class NoSuchDelivery(AgentqError):
    code = "no_such_delivery"
    exit_code = EXIT_NO_SUCH_TASK
    http_status = 404


class RefusedForNow(AgentqError):
    """Try again later: full, draining, disk low, write conflict."""

    code = "refused_for_now"
    exit_code = EXIT_REFUSED_FOR_NOW
    http_status = 503


class WriteConflict(RefusedForNow):
    code = "write_conflict"
    http_status = 409


class IllegalTransition(AgentqError):
    """The task is not in a state in which this can be done; nothing was changed."""

    code = "illegal_transition"
    exit_code = EXIT_OTHER
    http_status = 409


class NotPermitted(AgentqError):
    code = "not_permitted"
    exit_code = EXIT_NOT_PERMITTED
    http_status = 403


class Unreachable(AgentqError):
    code = "unreachable"
    exit_code = EXIT_UNREACHABLE
    http_status = 503


class ConfigError(AgentqError):
    """The config cannot be used. `problems` is a list of {path, line, key, message}."""

    code = "invalid_config"
    exit_code = EXIT_INVALID
    http_status = 422


class StateFolderError(AgentqError):
    """The state folder cannot be used: locked by another daemon, network file system, wrong owner."""

    code = "state_folder"


class JournalError(AgentqError):
    """The journal failed. What was being committed has an unknown outcome: nothing may be acknowledged."""

    code = "journal_failed"


class SchemaTooNew(StateFolderError):
    code = "schema_too_new"


class SupervisorUnavailable(AgentqError):
    code = "supervisor_unavailable"
    http_status = 503
