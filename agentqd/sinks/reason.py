"""Reasons as rows keep them: one line, printable, bounded."""

from __future__ import annotations

from agentqd.core.limits import SINK_ERROR_CHARS_MAX


def bounded(text: str) -> str:
    """At most SINK_ERROR_CHARS_MAX characters; what is not printable (control, bidi, line ends) is a space."""
    clean = "".join(char if char.isprintable() else " " for char in text[: 2 * SINK_ERROR_CHARS_MAX]).strip()
    return clean if len(clean) <= SINK_ERROR_CHARS_MAX else clean[: SINK_ERROR_CHARS_MAX - 1] + "…"


def first_line(output: str) -> str:
    """The first line of a foreign program's output that says anything; empty if none does."""
    return next((line for line in map(bounded, output.splitlines()) if line), "")


def joined(what: str, output: str) -> str:
    """`what: first line of output`, bounded."""
    said = first_line(output)
    return bounded(f"{what}: {said}" if said else what)
