"""Orders that have been taken back before they were read: after a stop (or a long pause) of this process, `Go` and `End` of one
attempt may both stand in the pipe. Its program is not started only to be ended at once.

Only what has arrived is seen. An `End` that stands further back than the kernel keeps ends the program when it is read.
"""

from __future__ import annotations

from typing import TypeGuard

import msgspec

from agentqd.supervisor.wire import End, Go, Request, Run, decode_request

_MARK = b'"type":"end"'


def starts_something(request: Request) -> TypeGuard[Go | Run]:
    return isinstance(request, Go) or (isinstance(request, Run) and not request.hold)


def end_ahead(request: Go | Run, ahead: bytes) -> End | None:
    """The `End` of this very attempt, to be done at once, that stands in `ahead`."""
    if _MARK not in ahead:
        return None
    for line in ahead[: ahead.rfind(b"\n") + 1].split(b"\n"):
        if _MARK in line and (found := _as_end(line)) is not None:
            same = (found.task, found.attempt) == (request.task, request.attempt)
            if same and found.after_s <= 0:
                return found
    return None


def _as_end(line: bytes) -> End | None:
    """What is no request is refused when it is read."""
    try:
        request = decode_request(line)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeError, RecursionError):
        return None
    return request if isinstance(request, End) else None
