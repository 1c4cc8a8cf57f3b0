"""`agentqctl reload`: the config, now."""

from __future__ import annotations

from agentqd.cli.verb import Call, verb


@verb("reload")
def command(call: Call) -> int:
    """Read the config again now. An invalid one changes nothing and is told line by line."""
    from agentqd.cli.problems import say_problems
    from agentqd.core.errors import AgentqError

    try:
        answer = call.box.connection.post("reload")
    except AgentqError as error:
        if error.code == "invalid_config" and not call.as_json:
            say_problems(call, error)
            return error.exit_code
        raise
    if call.as_json:
        call.out.json(answer)
    else:
        call.out.line("the config was applied" if answer.get("changed") else "the config has not changed")
    return 0
