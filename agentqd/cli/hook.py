"""`pull --exec CMD`: told of each row. A notification, not a part of the pull: if it fails, that is said, and the pull goes on."""

from __future__ import annotations

import json
import os
from typing import Any

from agentqd.cli.output import write_error
from agentqd.cli.text import safe

SHELL = "/bin/sh"


def run_hook(command: str, row: dict[str, Any], folder: str | None) -> None:
    """Runs it to its end: the row as JSON on stdin, what it prints goes to stderr (stdout carries data only)."""
    import subprocess

    env = {**os.environ, **_variables(row, folder)}
    if folder is None:
        env.pop("AGENTQ_DIR", None)
    try:
        done = subprocess.run(
            [SHELL, "-c", command], input=json.dumps(row).encode() + b"\n", stdout=2, env=env, check=False
        )
    except OSError as error:
        write_error(f"agentqctl: --exec: {SHELL}: {error.strerror or error}\n")
        return
    if done.returncode:
        how = f"exit {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        write_error(
            f"agentqctl: --exec: {how} for {safe(row.get('name') or '')} ({safe(row.get('task_id') or '-')})\n"
        )


def _variables(row: dict[str, Any], folder: str | None) -> dict[str, str]:
    said = {
        "AGENTQ_TASK_ID": row.get("task_id") or row.get("submitted_id"),
        "AGENTQ_NAME": row.get("name"),
        "AGENTQ_STATUS": row.get("status") or row.get("type"),
        "AGENTQ_DELIVERY_ID": row.get("delivery_id"),
    }
    variables = {name: _clean(value) for name, value in said.items()}
    return variables if folder is None else {**variables, "AGENTQ_DIR": folder}


def _clean(value: object) -> str:
    """What an environment can hold."""
    text = value if isinstance(value, str) else ""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
