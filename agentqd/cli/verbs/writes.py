"""`agentqctl writes`: who claims to write where, and what stomps on what."""

from __future__ import annotations

import time
from typing import Any

import click

from agentqd.cli.output import Cell, Column
from agentqd.cli.text import age
from agentqd.cli.verb import Call, Family, verb
from agentqd.cli.verbs.writesclaim import command as claim
from agentqd.client.connection import Query, take
from agentqd.core.errors import InvalidRequest
from agentqd.core.units import format_duration, format_time, parse_moment_us, parse_time_us

CLAIM_COLUMNS = (
    Column("PATH", flex=True),
    Column("TASK"),
    Column("NAME", flex=True, drop=2),
    Column("STATE", drop=1),
    Column("FOR", right=True, drop=3),
    Column("EXPIRES", right=True, drop=4),
    Column("PID", drop=1),
)
CONFLICT_COLUMNS = (
    Column("TIMES", right=True),
    Column("PATH", flex=True),
    Column("TASK"),
    Column("AGAINST"),
    Column("POLICY", drop=1),
    Column("LAST", right=True, drop=2),
)

command = Family("writes", default="list", help="Who claims to write where. Claims are advisory.")


command.add_command(claim)


def _add(made: click.Command) -> click.Command:
    command.add_command(made)
    return made


@_add
@verb("list")
def list_claims(call: Call) -> int:
    """Claims held now, and those that wait: of tasks, and from outside (`writes claim`)."""
    claims = take(call.box.connection.get("writes"), "claims", list)
    if call.as_json:
        call.out.json(claims)
    else:
        call.out.rows(CLAIM_COLUMNS, [_claim(item) for item in claims], empty="no claims")
    return 0


@_add
@verb("conflicts")
@click.option("--since", metavar="TIME", help="Only those since then: RFC 3339, or how long ago (2h).")
def list_conflicts(call: Call, since: str | None) -> int:
    """Conflicts seen, by pair of tasks, with counts."""
    query: Query = {"since": None if since is None else _time(since)}
    conflicts = take(call.box.connection.get("writes", "conflicts", query=query), "conflicts", list)
    if call.as_json:
        call.out.json(conflicts)
    else:
        call.out.rows(CONFLICT_COLUMNS, [_conflict(item) for item in conflicts], empty="no conflicts")
    return 0


def _claim(item: dict[str, Any]) -> list[Cell | str]:
    return [
        str(item.get("path") or ""),
        str(item.get("task_id") or ""),
        str(item.get("task") or ""),
        "waits" if item.get("waiting") else str(item.get("state") or ""),
        age(item.get("since")),
        _expires(item),
        _process(item),
    ]


def _process(item: dict[str, Any]) -> str:
    """Of a claim from outside: the process whose end releases it, and its user."""
    return "" if item.get("pid") is None else f"{item['pid']} ({item.get('user') or '?'})"


def _expires(item: dict[str, Any]) -> str:
    """How long a started task may stay silent before its claim lapses. One that is over its time and still shown has been
    kept: its worker lives, or it is ready to start and nobody waits for the path."""
    expires = item.get("expires_at")
    if not isinstance(expires, str):
        return ""
    left_s = parse_time_us(expires) / 1e6 - time.time()
    if left_s > 0:
        return f"in {format_duration(round(left_s))}" if left_s >= 1 else "now"
    return "kept: alive" if item.get("state") in ("running", "stopping") else "kept"


def _time(text: str) -> str:
    """RFC 3339; a duration is so long ago."""
    try:
        return str(format_time(parse_moment_us(text, int(time.time() * 1e6))))
    except ValueError as error:
        raise InvalidRequest(f"--since: {error}", field="since") from None


def _conflict(item: dict[str, Any]) -> list[Cell | str]:
    last = age(item.get("last_at"))
    return [
        str(item.get("count") or ""),
        str(item.get("path") or ""),
        str(item.get("task_id") or ""),
        str(item.get("other_id") or ""),
        str(item.get("policy") or ""),
        f"{last} ago" if last else "",
    ]
