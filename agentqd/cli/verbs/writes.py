"""`agentqctl writes`: who claims to write where, and what stomps on what."""

from __future__ import annotations

from typing import Any

import click

from agentqd.cli.output import Cell, Column
from agentqd.cli.text import age
from agentqd.cli.verb import Call, Family, verb
from agentqd.client.connection import take

CLAIM_COLUMNS = (
    Column("PATH", flex=True),
    Column("TASK"),
    Column("NAME", flex=True, drop=2),
    Column("STATE", drop=1),
    Column("FOR", right=True, drop=3),
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


def _add(made: click.Command) -> click.Command:
    command.add_command(made)
    return made


@_add
@verb("list")
def list_claims(call: Call) -> int:
    """Claims held now."""
    claims = take(call.box.connection.get("writes"), "claims", list)
    if call.as_json:
        call.out.json(claims)
    else:
        call.out.rows(CLAIM_COLUMNS, [_claim(item) for item in claims], empty="no claims")
    return 0


@_add
@verb("conflicts")
def list_conflicts(call: Call) -> int:
    """Conflicts seen, by pair of tasks, with counts."""
    conflicts = take(call.box.connection.get("writes", "conflicts"), "conflicts", list)
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
        str(item.get("state") or ""),
        age(item.get("since")),
    ]


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
