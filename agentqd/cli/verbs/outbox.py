"""`agentqctl outbox`: what is on its way to whom, and a person's word about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from agentqd.cli.output import Cell, Column
from agentqd.cli.paging import collect
from agentqd.cli.taskpage import OUTBOX_COLUMNS, outbox_row
from agentqd.cli.text import local_time, size
from agentqd.cli.verb import Call, Family, verb
from agentqd.core.errors import AgentqError

ALL = "ALL"
STATE_OF_ALL = {"retry": "dead", "drop": "dead", "hold": "pending", "release": "held"}
LIST_COLUMNS = (*OUTBOX_COLUMNS[:1], Column("TASK", flex=True), *OUTBOX_COLUMNS[1:])
TRY_COLUMNS = (Column("AT"), Column("OUTCOME"), Column("REASON", flex=True))

command = Family(
    "outbox", default="list", help="What is on its way to whom. Rows are a delivery id and a sink."
)


def _outbox_verb(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    def register(function: Callable[..., Any]) -> click.Command:
        made = verb(name)(function)
        command.add_command(made)
        return made

    return register


@_outbox_verb("list")
@click.option(
    "--state",
    metavar="STATE[,STATE]...",
    help="pending, delivering, retryable, held, delivered, dead, dropped",
)
@click.option("--sink", metavar="NAME")
@click.option("--task", metavar="ID")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--all", "everything", is_flag=True, help="No limit.")
def list_rows(call: Call, limit: int, everything: bool, **filters: str | None) -> int:
    """Outbox rows, newest first."""
    rows, more = collect(call.box.connection, "outbox", "rows", filters, None if everything else limit)
    if call.as_json:
        call.out.json(rows)
        return 0
    call.out.rows(
        LIST_COLUMNS,
        [_list_row(row) for row in rows],
        empty="no rows" + (" like that" if any(filters.values()) else ""),
    )
    if more:
        call.out.flush()
        call.out.note(f"the newest {len(rows)}; more with --limit or --all")
    return 0


def _list_row(row: dict[str, Any]) -> list[Cell | str]:
    first, *others = outbox_row(row)
    return [first, str(row.get("name") or row.get("task_id") or ""), *others]


@_outbox_verb("show")
@click.argument("delivery_id", metavar="DELIVERY")
def show(call: Call, delivery_id: str) -> int:
    """One entry, its envelope, and every try at every sink."""
    entry = call.box.connection.get("outbox", delivery_id)
    if call.as_json:
        call.out.json(entry)
        return 0
    call.out.lines(f"{entry.get('delivery_id')}  {entry.get('type')}", "strong")
    task = f"{entry.get('task_id') or '-'}  {entry.get('name') or ''}  attempt {entry.get('attempt') or '-'}"
    call.out.lines(task, indent="task     ", hang=" " * 9)
    call.out.lines(
        f"{size(entry.get('bytes'))}, sha256 {entry.get('sha256')}", indent="payload  ", hang=" " * 9
    )
    call.out.lines(local_time(entry.get("created_at")), indent="created  ")
    for row in entry.get("rows") or ():
        call.out.line()
        call.out.table(OUTBOX_COLUMNS[2:], [outbox_row(row)[2:]])
        if row.get("next_try_at"):
            call.out.lines(f"next try {local_time(row['next_try_at'])}", indent="  ")
        tries = [
            [local_time(item.get("at")), str(item.get("outcome")), str(item.get("reason") or "")]
            for item in row.get("tries") or ()
        ]
        if tries:
            call.out.table(TRY_COLUMNS, tries, indent="  ")
    if entry.get("envelope") is not None:
        call.out.line()
        call.out.heading("Envelope")
        call.out.pretty(entry["envelope"])
    return 0


def _change(action: str, text: str) -> None:
    state = STATE_OF_ALL[action]

    @_outbox_verb(action)
    @click.argument("ids", nargs=-1, required=True, metavar="DELIVERY...|ALL")
    @click.option("--sink", metavar="NAME", help="Only its rows to that sink.")
    @click.option("--state", metavar="STATE", help=f"With ALL: rows in that state (default {state}).")
    def change(call: Call, ids: tuple[str, ...], sink: str | None, state: str | None) -> int:
        return _post(call, action, ids, sink, state)

    change.help = f"{text} ALL takes every row that is {state} (or --state)."


def _post(call: Call, action: str, ids: tuple[str, ...], sink: str | None, state: str | None) -> int:
    if ALL in ids and len(ids) > 1:
        raise click.UsageError("ALL or delivery ids, not both")
    if state and ALL not in ids:
        raise click.UsageError("--state goes with ALL")
    body: dict[str, Any] = (
        {"all": True, "state": state or STATE_OF_ALL[action]} if ALL in ids else {"delivery_ids": list(ids)}
    )
    if sink:
        body["sink"] = sink
    answer = call.box.connection.post("outbox", action, body=body)
    changed = answer.get("changed", 0)
    if not changed and ALL not in ids:
        raise AgentqError(
            f"no row could take {action}; see: agentqctl outbox show {ids[0]}",
            code="nothing_changed",
            changed=0,
        )
    if call.as_json:
        call.out.json(answer)
    else:
        call.out.line(f"{changed} row{'' if changed == 1 else 's'} changed")
    return 0


_change("retry", "Send again, now; the delivery id stays.")
_change("hold", "Keep rows from being sent.")
_change("release", "Let held rows go on.")
_change("drop", "Never send these. They are kept as `dropped`.")
