"""`agentqctl audit`: the chain of events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import click

from agentqd.cli.output import Cell, Column
from agentqd.cli.text import local_time
from agentqd.cli.verb import Call, Family, verb
from agentqd.client.connection import take
from agentqd.core.errors import EXIT_OTHER

PAGE_EVENTS = 1000
VERIFY_EXTRA_S = 600.0
COLUMNS = (
    Column("SEQ", right=True),
    Column("AT", drop=2),
    Column("TASK", drop=1),
    Column("EVENT"),
    Column("DATA", flex=True),
)

command = Family("audit", help="The record of events, and whether it is whole.")


@verb("show")
@click.option("--after", type=click.IntRange(min=0), default=0, metavar="SEQ", help="Only later ones.")
@click.option("--limit", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--all", "everything", is_flag=True, help="No limit.")
def show(call: Call, after: int, limit: int, everything: bool) -> int:
    """Events in order."""
    pages = _pages(call, after, None if everything else limit)
    if call.as_json:
        _print_array(call, pages)
        return 0
    for number, events in enumerate(pages):
        if call.out.is_terminal:
            call.out.table(COLUMNS, [_row(event) for event in events], header=number == 0)
        else:
            call.out.rows(COLUMNS, [_row(event) for event in events], empty="")
    return 0


def _pages(call: Call, after: int, limit: int | None) -> Iterator[list[dict[str, Any]]]:
    left = limit
    while left is None or left > 0:
        most = PAGE_EVENTS if left is None else min(PAGE_EVENTS, left)
        answer = call.box.connection.get("audit", "events", query={"after": after, "limit": most})
        events: list[dict[str, Any]] = take(answer, "events", list)
        if events:
            yield events
        if not events or not answer.get("more"):
            return
        after = take(events[-1], "seq", int)
        left = None if left is None else left - len(events)


def _print_array(call: Call, pages: Iterator[list[dict[str, Any]]]) -> None:
    """One JSON array, a line an event, without ever holding all of them; an error of the first page comes before it."""
    events = next(pages, [])
    call.out.raw(b"[")
    between = b"\n"
    while events:
        for event in events:
            call.out.raw(between)
            call.out.json_line(event, newline=False)
            between = b",\n"
        events = next(pages, [])
    call.out.raw(b"]\n")


def _row(event: dict[str, Any]) -> list[Cell | str]:
    data = event.get("data")
    return [
        str(event.get("seq")),
        local_time(event.get("at")),
        str(event.get("task_id") or ""),
        str(event.get("event")),
        json.dumps(data, ensure_ascii=False) if data else "",
    ]


@verb("verify")
@click.option(
    "--offline", is_flag=True, help="Without a daemon: reads the journal itself, under the state lock."
)
def verify(call: Call, offline: bool) -> int:
    """Check the whole chain. Exits 1 if it is broken, and says where."""
    if offline:
        # By name: the journal's reader belongs to the daemon's side, and no other verb may ever load it.
        state_dir = call.box.folders().state
        found: dict[str, Any] = import_module("agentqd.storage.audit").verify_offline(state_dir)
    else:
        found = call.box.connection.get("audit", "verify", extra_s=VERIFY_EXTRA_S)
    if call.as_json:
        call.out.json(found)
    elif found.get("ok"):
        call.out.line(
            f"whole: {found.get('events')} events, {found.get('first_seq')} to {found.get('last_seq')}",
            "good",
        )
    else:
        call.out.line(f"BROKEN at event {found.get('broken_at')}: {found.get('reason')}", "bad")
    return 0 if found.get("ok") else EXIT_OTHER


command.add_command(show)
command.add_command(verify)
