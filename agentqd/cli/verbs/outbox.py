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
SINCE = "Entries made since then: RFC 3339, or how long ago (2h)."
UNTIL = "Entries made before then."
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
@click.option("--since", metavar="TIME", help=SINCE)
@click.option("--until", metavar="TIME", help=UNTIL)
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


def _picking(function: Callable[..., Any]) -> Callable[..., Any]:
    """What retry, hold, release, drop and move share."""
    options = (
        click.argument("ids", nargs=-1, required=True, metavar="DELIVERY...|ALL"),
        click.option("--state", metavar="STATE[,STATE]...", help="With ALL: rows in these states."),
        click.option("--since", metavar="TIME", help=f"With ALL. {SINCE}"),
        click.option("--until", metavar="TIME", help=f"With ALL. {UNTIL}"),
        click.option("--dry-run", is_flag=True, help="Change nothing, say how many it would be."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _change(action: str, text: str) -> None:
    state = STATE_OF_ALL[action]

    @_outbox_verb(action)
    @_picking
    @click.option("--sink", metavar="NAME", help="Only its rows to that sink.")
    def change(call: Call, ids: tuple[str, ...], sink: str | None, **picked: Any) -> int:
        body = _body(ids, STATE_OF_ALL[action], **picked)
        return _post(call, action, ids, {**body, "sink": sink} if sink else body)

    change.help = (
        f"{text} ALL takes every row that is {state} (or --state), of one sink and time if they are given."
    )


@_outbox_verb("move")
@_picking
@click.option(
    "--from",
    "source",
    metavar="SINK",
    required=True,
    help="Whose rows; it need not be in the config any more.",
)
@click.option("--to", metavar="SINK", required=True, help="Under whose name they go on.")
def move(call: Call, ids: tuple[str, ...], source: str, to: str, **picked: Any) -> int:
    """Let rows of one sink go on under another's name (it was renamed, or has gone), with their delivery ids. ALL takes what
    is pending, retryable, held or dead; what a person holds stays held. Never doubled: an entry that the other sink has a row
    of stays where it is."""
    return _post(call, "move", ids, {**_body(ids, None, **picked), "from": source, "to": to})


def _body(
    ids: tuple[str, ...],
    state_of_all: str | None,
    *,
    state: str | None,
    since: str | None,
    until: str | None,
    dry_run: bool,
) -> dict[str, Any]:
    if ALL in ids and len(ids) > 1:
        raise click.UsageError("ALL or delivery ids, not both")
    for option, value in (("--state", state), ("--since", since), ("--until", until)):
        if value and ALL not in ids:
            raise click.UsageError(f"{option} goes with ALL")
    body: dict[str, Any] = {"all": True} if ALL in ids else {"delivery_ids": list(ids)}
    if ALL in ids and (state or state_of_all):
        body["state"] = state or state_of_all
    given: dict[str, Any] = {"since": since, "until": until, "dry_run": dry_run}
    return body | {name: value for name, value in given.items() if value}


def _post(call: Call, action: str, ids: tuple[str, ...], body: dict[str, Any]) -> int:
    answer = call.box.connection.post("outbox", action, body=body)
    would, changed, kept = answer.get("would_change"), answer.get("changed", 0), answer.get("kept", 0)
    if would is None and not changed and not kept and ALL not in ids:
        raise AgentqError(
            f"no row could take {action}; see: agentqctl outbox show {ids[0]}",
            code="nothing_changed",
            changed=0,
        )
    if call.as_json:
        call.out.json(answer)
    elif would is not None:
        call.out.line(f"{_rows(would)} would change")
    else:
        call.out.line(f"{_rows(changed)} {'moved' if action == 'move' else 'changed'}")
        if kept:
            call.out.note(
                f"{_rows(kept)} kept: {body.get('to')} has the same entry already (see: agentqctl outbox list --sink {body.get('from')})"
            )
    return 0


def _rows(count: Any) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


_change("retry", "Send again, now; the delivery id stays.")
_change("hold", "Keep rows from being sent.")
_change("release", "Let held rows go on.")
_change("drop", "Never send these. They are kept as `dropped`.")
