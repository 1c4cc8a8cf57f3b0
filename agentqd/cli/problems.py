"""What is wrong in a config file, a line for each problem, as compilers say it."""

from __future__ import annotations

from agentqd.cli.output import write_error
from agentqd.cli.text import safe
from agentqd.cli.verb import Call
from agentqd.core.errors import AgentqError


def say_problems(call: Call, error: AgentqError) -> None:
    """`PATH:LINE: KEY: MESSAGE` on stderr for each, or the message where there are none."""
    problems = [item for item in error.fields.get("problems") or () if isinstance(item, dict)]
    if not problems:
        call.out.error(error)
        return
    for item in problems:
        place = ":".join(str(item[name]) for name in ("path", "line") if item.get(name) is not None)
        parts = [place, str(item.get("key") or ""), str(item.get("message") or "")]
        write_error(safe(": ".join(part for part in parts if part)) + "\n")
