"""`agentqctl spool`: what waits on this machine for a box, and what a box would not take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import click

from agentqd.cli.output import Cell, Column
from agentqd.cli.text import age
from agentqd.cli.verb import Call, Family, verb
from agentqd.client.keeperplace import spool_root
from agentqd.client.spool import Damaged, Spool
from agentqd.client.spoolfolder import spooled_boxes
from agentqd.client.spooling import SEND_WAIT_S
from agentqd.core.errors import NoSuchTask, RefusedForNow

COLUMNS = (
    Column("BOX"),
    Column("ID"),
    Column("WHAT", flex=True),
    Column("NAME", flex=True, drop=2),
    Column("AGE", right=True, drop=1),
)

command = Family("spool", default="list", help="What waits here for a box that could not be reached.")


def _add(made: click.Command) -> click.Command:
    command.add_command(made)
    return made


@_add
@verb("list")
def list_spool(call: Call) -> int:
    """What waits, in the order in which it goes, and what was refused or damaged (until it is dropped)."""
    items = [item for spool in _spools(call) for item in _items(spool)]
    if call.as_json:
        call.out.json(items)
    else:
        call.out.rows(COLUMNS, [_row(item) for item in items], empty="nothing waits")
    return 0


@_add
@verb("drop")
@click.argument("ids", nargs=-1, metavar="[ID...]")
@click.option("--refused", is_flag=True, help="All that was refused or damaged.")
@click.option("--all", "everything", is_flag=True, help="All of it, what waits too.")
def drop(call: Call, ids: tuple[str, ...], refused: bool, everything: bool) -> int:
    """Forget what is spooled here: it is not sent any more. (A task that its box has: agentqctl cancel.)"""
    if bool(ids) + refused + everything != 1:
        raise click.UsageError("give IDs, --refused, or --all")
    dropped: list[dict[str, Any]] = []
    for spool in _spools(call):
        with spool.sending(SEND_WAIT_S) as ours:
            if not ours:
                raise RefusedForNow(f"another agentqctl is sending to {spool.box}; try again")
            for item in list(_items(spool)):
                if everything or (refused and item["state"] != "waiting") or item["id"] in ids:
                    _drop(spool, item)
                    dropped.append(item)
    missing = set(ids) - {item["id"] for item in dropped}
    if missing:
        raise NoSuchTask(
            f"nothing of {', '.join(sorted(missing))} is spooled here",
            dropped=[each["id"] for each in dropped],
        )
    if call.as_json:
        call.out.json(dropped)
    else:
        for item in dropped:
            call.out.line(f"{item['id']}  dropped ({item['state']})")
    return 0


def _spools(call: Call) -> Iterator[Spool]:
    root = spool_root(os.environ)
    for name in [call.where.box] if call.where.box else spooled_boxes(root):
        yield Spool(root, name)


def _items(spool: Spool) -> Iterator[dict[str, Any]]:
    for state, entries in (("waiting", spool.entries()), ("refused", spool.refused())):
        for entry in entries:
            item = {"box": spool.box, "id": entry.id, "state": state, "file": entry.file}
            try:
                head = spool.head(entry, refused=state == "refused")
            except FileNotFoundError:
                continue
            except Damaged as damage:
                yield {**item, "kind": None, "name": None, "at": None, "message": str(damage)}
                continue
            said = {"kind": head.kind, "name": head.name, "at": head.at}
            error = head.error or {}
            yield {**item, **said, "reason": error.get("error"), "message": error.get("message")}
    for name in spool.damaged():
        yield {
            "box": spool.box,
            "id": name,
            "state": "damaged",
            "file": name,
            "kind": None,
            "name": None,
            "at": None,
        }


def _drop(spool: Spool, item: dict[str, Any]) -> None:
    if item["state"] == "damaged":
        spool.drop_damaged(item["file"])
        return
    entries = spool.refused() if item["state"] == "refused" else spool.entries()
    for entry in entries:
        if entry.file == item["file"]:
            (spool.drop_refused if item["state"] == "refused" else spool.remove)(entry)


def _row(item: dict[str, Any]) -> list[Cell | str]:
    what = item["state"] if item.get("kind") != "cancel" else f"{item['state']}: a cancellation"
    if item.get("message"):
        what += f": {item['message']}"
    style = {"waiting": "", "refused": "warn", "damaged": "bad"}[item["state"]]
    return [item["box"], item["id"], Cell(what, style), str(item.get("name") or ""), age(item.get("at"))]
