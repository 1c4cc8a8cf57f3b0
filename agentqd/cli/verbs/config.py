"""`agentqctl config`: check a file before it counts, show what counts now."""

from __future__ import annotations

import os

import click

from agentqd.cli.configfile import check_config, default_config
from agentqd.cli.problems import say_problems
from agentqd.cli.text import local_time
from agentqd.cli.verb import Call, Family, verb
from agentqd.core.errors import EXIT_INVALID, ConfigError

command = Family("config", help="Check and show the config.")


@verb("check")
@click.argument("file", required=False)
def check(call: Call, file: str | None) -> int:
    """Check a config file; no daemon is needed. Exits 65 and names path, line and nearest key for each problem."""
    if call.where.box and file is None:
        raise click.UsageError(
            f"the config of box {call.where.box} lies there: see `config show`, or name a FILE of this machine"
        )
    path = os.path.abspath(file or default_config(os.environ, os.geteuid()))
    if file is None and "AGENTQD_CONFIG" not in os.environ and not os.path.exists(path):
        if call.as_json:
            call.out.json({"ok": True, "path": None})
        else:
            call.out.line(f"{path} is not there: the defaults serve")
        return 0
    if not os.path.exists(path):
        raise ConfigError(f"{path}: no such file", problems=[])
    try:
        check_config(path)
    except ConfigError as error:
        if call.as_json:
            raise
        say_problems(call, error)
        return EXIT_INVALID
    if call.as_json:
        call.out.json({"ok": True, "path": path})
    else:
        call.out.line(f"{path}: valid")
    return 0


@verb("show")
def show(call: Call) -> int:
    """What the running daemon uses; secrets and values of env are hidden."""
    config = call.box.connection.get("config")
    if call.as_json:
        call.out.json(config)
        return 0
    applied = local_time(config.get("applied_at"))
    call.out.lines(
        f"# {config.get('path') or 'no config file: the defaults'}"
        + (f", applied {applied}" if applied else ""),
        "dim",
        hang="# ",
    )
    bad = config.get("error")
    if bad:
        message = bad.get("message") if isinstance(bad, dict) else bad
        call.out.lines(f"# the last edit was not applied: {message}", "bad", hang="# ")
    call.out.pretty(config.get("settings"))
    return 0


@verb("schema")
def schema(call: Call) -> int:
    """The JSON schema of the config file; no daemon is needed."""
    from agentqd.core.config_schema import config_schema

    call.out.pretty(config_schema())
    return 0


command.add_command(check)
command.add_command(show)
command.add_command(schema)
