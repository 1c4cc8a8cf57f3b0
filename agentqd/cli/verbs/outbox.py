"""`agentqctl outbox`: what is on its way to whom, and a person's word about it."""

from __future__ import annotations

from collections.abc import Callable
from shlex import quote
from typing import Any

import click

from agentqd.cli.output import Cell, Column
from agentqd.cli.paging import collect
from agentqd.cli.taskpage import OUTBOX_COLUMNS, outbox_row
from agentqd.cli.text import local_time, size
from agentqd.cli.verb import Call, Family, verb
from agentqd.core.errors import EXIT_NO_SUCH_TASK, AgentqError, NoSuchDelivery

ALL = "ALL"
STATE_OF_ALL = {"retry": "dead", "drop": "dead", "hold": "pending,retryable", "release": "held"}
SINCE = "Entries made since then: RFC 3339, or how long ago (2h)."
UNTIL = "Entries made before then."
LIST_COLUMNS = (*OUTBOX_COLUMNS[:1], Column("TASK", flex=True), *OUTBOX_COLUMNS[1:])
MORE_OF = {
    "retry": " With --state retryable: what waits for its next try, now. ALL leaves alone what cannot be sent as it is"
    " (not_allowed, no_such_sink, malformed, incomplete, too_large, not_a_file, unreadable, too_many): that goes by its id only."
    " By an id, what is delivered is sent again only if all of that entry is, or if --sink or --state says so."
}

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
        _show_row(call, row)
    if entry.get("envelope") is not None:
        call.out.line()
        call.out.heading("Envelope")
        call.out.pretty(entry["envelope"])
    return 0


def _show_row(call: Call, row: dict[str, Any]) -> None:
    """Reasons are wrapped, never cut: they are what is looked for here."""
    call.out.line()
    delivered = row.get("state") == "delivered"
    call.out.table(
        OUTBOX_COLUMNS[2 : None if delivered else -1], [outbox_row(row)[2 : None if delivered else -1]]
    )
    if row.get("last_error") and not delivered:
        call.out.lines(f"error: {row['last_error']}", indent="  ", hang="    ")
    if row.get("next_try_at"):
        call.out.lines(f"next try {local_time(row['next_try_at'])}", indent="  ")
    for item in row.get("tries") or ():
        said = f"{local_time(item.get('at'))}  {item.get('outcome')}  {item.get('reason') or ''}"
        call.out.lines(said.rstrip(), indent="  ", hang="    ")


def _picking(function: Callable[..., Any]) -> Callable[..., Any]:
    """What retry, hold, release, drop and move share."""
    options = (
        click.argument("ids", nargs=-1, required=True, metavar="DELIVERY...|ALL"),
        click.option("--state", metavar="STATE[,STATE]...", help="Only rows in these states."),
        click.option("--since", metavar="TIME", help=f"With ALL. {SINCE}"),
        click.option("--until", metavar="TIME", help=f"With ALL. {UNTIL}"),
        click.option("--dry-run", is_flag=True, help="Change nothing, say how many it would be."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _change(action: str, text: str) -> None:
    states = STATE_OF_ALL[action].replace(",", " or ")

    @_outbox_verb(action)
    @_picking
    @click.option("--sink", metavar="NAME", help="Only its rows to that sink.")
    def change(call: Call, ids: tuple[str, ...], sink: str | None, **picked: Any) -> int:
        body = _body(ids, STATE_OF_ALL[action], **picked)
        return _post(call, action, ids, {**body, "sink": sink} if sink else body)

    change.help = (
        f"{text} ALL takes every row that is {states} (or --state), of one sink and time if they are given."
        + MORE_OF.get(action, "")
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
    for option, value in (("--since", since), ("--until", until)):
        if value and ALL not in ids:
            raise click.UsageError(f"{option} goes with ALL")
    if ALL not in ids and (word := next((each for each in ids if each.upper() == ALL), None)):
        raise NoSuchDelivery(f"there is no delivery {word!r}; all of them are {ALL}, in capitals")
    body: dict[str, Any] = {"all": True} if ALL in ids else {"delivery_ids": list(ids)}
    if state or (ALL in ids and state_of_all):
        body["state"] = state or state_of_all
    given: dict[str, Any] = {"since": since, "until": until, "dry_run": dry_run}
    return body | {name: value for name, value in given.items() if value}


def _post(call: Call, action: str, ids: tuple[str, ...], body: dict[str, Any]) -> int:
    answer = call.box.connection.post("outbox", action, body=body)
    would, changed, kept = answer.get("would_change"), answer.get("changed", 0), answer.get("kept", 0)
    notes = _notes(answer, body)
    if would is None and not changed and not kept and ALL not in ids:
        why = "; ".join(notes) or _no_row(call, action, ids[0], body.get("sink"))
        raise AgentqError(why, code="nothing_changed", changed=0)
    unknown = answer.get("unknown")
    code = EXIT_NO_SUCH_TASK if unknown else 0
    if call.as_json:
        call.out.json(answer)
        return code
    if would is not None:
        call.out.line(f"{_rows(would)} would change")
    else:
        call.out.line(f"{_rows(changed)} {'moved' if action == 'move' else 'changed'}")
    if kept:
        notes.append(
            f"{_rows(kept)} kept: {body.get('to')} has the same entry already (see: agentqctl outbox list --sink {body.get('from')})"
        )
    if unknown:
        notes.append(f"there is no delivery {', '.join(map(repr, unknown))}")
    for note in notes:
        call.out.note(note)
    return code


def _notes(answer: dict[str, Any], body: dict[str, Any]) -> list[str]:
    """What the answer says of rows that were not taken."""
    of = f" --sink {quote(body['sink'])}" if body.get("sink") else ""
    held, waiting = answer.get("stay_held") or {}, answer.get("waiting") or {}
    notes = [
        f"{sink} is disabled: {_rows(n)} stay{'s' if n == 1 else ''} held; agentqctl sink enable {quote(sink)}"
        for sink, n in held.items()
    ]
    if left := answer.get("left"):
        notes.append(
            f"{_rows(left)} left: what cannot be sent as it is goes only by its id (see: agentqctl outbox list{of} --state dead)"
        )
    if n := waiting.get("retryable"):
        notes.append(
            f"none is dead; of {_rows(n)} that wait{'s' if n == 1 else ''} for the next try: agentqctl outbox retry ALL{of} --state retryable"
        )
    if n := waiting.get("held"):
        notes.append(f"{_rows(n)} held (see: agentqctl outbox list{of} --state held; agentqctl sink)")
    return notes


def _no_row(call: Call, action: str, delivery_id: str, sink: str | None) -> str:
    """Why none of its rows could take it. Raises NoSuchDelivery."""
    rows = call.box.connection.get("outbox", delivery_id).get("rows") or ()
    states = [f"{row.get('sink')} {row.get('state')}" for row in rows if sink in (None, row.get("sink"))]
    what = ", ".join(states) or f"it has no row to {sink}"
    again = "; what is delivered is sent again with --sink NAME" if action == "retry" and sink is None else ""
    return f"no row of {delivery_id} could take {action}: {what}{again}; see: agentqctl outbox show {delivery_id}"


def _rows(count: Any) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


_change("retry", "Send again, now; the delivery id stays.")
_change("hold", "Keep rows from being sent.")
_change("release", "Let held rows go on.")
_change("drop", "Never send these. They are kept as `dropped`.")
