"""Reasons as rows keep them: one line, printable, bounded."""

from __future__ import annotations

import os
import re
import ssl
from typing import Final

from agentqd.core.limits import SINK_ERROR_CHARS_MAX

_ERRNO: Final = re.compile(r"\[Errno (\d+)\]")


def bounded(text: str) -> str:
    """At most SINK_ERROR_CHARS_MAX characters; what is not printable (control, bidi, line ends) is a space."""
    clean = "".join(char if char.isprintable() else " " for char in text[: 2 * SINK_ERROR_CHARS_MAX]).strip()
    return clean if len(clean) <= SINK_ERROR_CHARS_MAX else clean[: SINK_ERROR_CHARS_MAX - 1] + "…"


def explained(error: BaseException) -> str:
    """The system's words for it and the file that it is about, without Python's spelling (`[Errno 111] Connect call failed (...)`)."""
    text = str(error) or type(error).__name__
    if isinstance(error, ssl.SSLError):
        return text
    if isinstance(error, OSError) and (error.errno or 0) > 0:
        words = os.strerror(error.errno)  # type: ignore[arg-type]
        return f"{error.filename}: {words}" if error.filename else words
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # a name that cannot be looked up
    numbers = dict.fromkeys(_ERRNO.findall(text))  # an error that quotes others
    return ", ".join(os.strerror(int(number)) for number in numbers) or text


def first_line(output: str) -> str:
    """The first line of a foreign program's output that says anything; empty if none does."""
    return next((line for line in map(bounded, output.splitlines()) if line), "")


def joined(what: str, output: str) -> str:
    """`what: first line of output`, bounded."""
    said = first_line(output)
    return bounded(f"{what}: {said}" if said else what)
