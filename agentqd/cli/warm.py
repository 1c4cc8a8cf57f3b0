"""The keeper of `--box` started before click is imported: it connects while we load the rest."""

from __future__ import annotations

import os
from collections.abc import Mapping

WITHOUT_A_BOX = ("box", "completion", "spool", "version")
WITH_VALUE = ("--socket", "--state-dir", "--runtime-dir")


def warm_up(argv: list[str], env: Mapping[str, str]) -> None:
    """Never fails and never waits: the verb itself says what is wrong."""
    name = box_of(argv, env)
    if not name:
        return
    from agentqd.client.boxname import check_box_name
    from agentqd.client.kept import Kept
    from agentqd.core.errors import AgentqError

    try:
        Kept(check_box_name(name), env, os.getuid()).warm()
    except (AgentqError, ValueError, OSError):
        return


def box_of(argv: list[str], env: Mapping[str, str]) -> str | None:
    """The one box that these arguments are for, as far as can be seen without understanding them all."""
    words = argv[: argv.index("--")] if "--" in argv else argv
    if any(word in ("--help", "-h", "--version") or word.partition("=")[0] in WITH_VALUE for word in words):
        return None
    name = env.get("AGENTQCTL_BOX")
    verb = None
    skip = False
    for at, word in enumerate(words):
        if skip:
            skip = False
        elif word == "--box":
            name = words[at + 1] if at + 1 < len(words) else None
            skip = True
        elif word.startswith("--box="):
            name = word.removeprefix("--box=")
        elif verb is None and not word.startswith("-"):
            verb = word
    return None if verb is None or verb in WITHOUT_A_BOX else name
