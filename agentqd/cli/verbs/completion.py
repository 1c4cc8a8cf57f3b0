"""`agentqctl completion`: the script that a shell loads."""

from __future__ import annotations

import click

from agentqd.cli.main import COMPLETION_VARIABLE
from agentqd.cli.verb import Call, verb

SHELLS = ("bash", "zsh", "fish")


@verb("completion", as_json=False)
@click.argument("shell", type=click.Choice(SHELLS))
def command(call: Call, shell: str) -> int:
    """Print the completion script: eval "$(agentqctl completion bash)"."""
    from click.shell_completion import ShellComplete, get_completion_class

    from agentqd.cli.group import agentqctl

    found = get_completion_class(shell)
    assert found is not None
    script = ShellComplete.source(
        found(agentqctl, {}, "agentqctl", COMPLETION_VARIABLE)
    )  # bash's own starts a bash to see its age
    call.out.raw(script.encode("utf-8") + b"\n")
    return 0
