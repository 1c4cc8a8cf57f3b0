"""`agentqctl version`: of this program (the daemon's stands in `status`)."""

from __future__ import annotations

import agentqd
from agentqd.cli.verb import Call, verb


@verb("version")
def command(call: Call) -> int:
    """The version of this program."""
    if call.as_json:
        call.out.json({"version": agentqd.__version__})
    else:
        call.out.line(f"agentqctl {agentqd.__version__}")
    return 0
