"""One line a log record on stderr: a JSON object, or readable text on a terminal. Never prompts, env or arguments."""

from __future__ import annotations

import contextlib
import os
import traceback
from typing import Protocol

import msgspec

from agentqd.core.units import format_time
from agentqd.system.clock import Clock

Field = str | int | float | bool | None | list[int] | list[str]


class Log(Protocol):
    """`event` is a stable machine-readable name; fields say what and where."""

    def __call__(self, level: str, event: str, **fields: Field) -> None: ...


class StderrLog:
    """Writes with one write(2) a line, and swallows a stderr that is gone or full: workers matter more."""

    def __init__(self, clock: Clock, fd: int = 2) -> None:
        self._clock = clock
        self._fd = fd
        self._readable = os.isatty(fd)

    def __call__(self, level: str, event: str, **fields: Field) -> None:
        at = format_time(self._clock.now_us())
        if self._readable:
            shown = " ".join(f"{name}={value}" for name, value in fields.items())
            line = f"{at} {level:7} {event} {shown}\n".encode(errors="replace")
        else:
            record = {"at": at, "level": level, "event": event, "program": "agentqd-supervisor", **fields}
            try:
                line = msgspec.json.encode(record) + b"\n"
            except UnicodeEncodeError:  # a path that is no UTF-8
                line = msgspec.json.encode(
                    {**record, **{name: ascii(value) for name, value in fields.items()}}
                )
                line += b"\n"
        with contextlib.suppress(OSError):
            os.write(self._fd, line)


def traceback_text(problem: BaseException) -> str:
    """For an unexpected exception's log record. Holds code lines and the message, no values of variables."""
    return "".join(traceback.format_exception(problem))[-4000:]
