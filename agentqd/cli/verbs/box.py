"""`agentqctl box`: the boxes that `--box NAME` reaches over SSH."""

from __future__ import annotations

import os
from typing import Any

import click

from agentqd.cli.output import Column
from agentqd.cli.verb import Call, Family, verb
from agentqd.cli.verbs.installsync import command as install_sync
from agentqd.client.boxname import check_box_name
from agentqd.client.boxurl import parse_box_url
from agentqd.client.keeperplace import config_file
from agentqd.client.kept import Kept
from agentqd.core.errors import EXIT_OK

COLUMNS = (Column("NAME"), Column("URL", flex=True), Column("STATE FOLDER", flex=True, drop=1))

command = Family("box", default="list", help="The boxes that --box reaches over SSH.")


@verb("add")
@click.argument("name")
@click.argument("url", metavar="ssh://[USER@]HOST[:PORT]")
@click.option("--keep", metavar="TIME", help="How long the connection outlives its last use (10m).")
@click.option("--force", is_flag=True, help="Replace a box of this name.")
def add(call: Call, name: str, url: str, keep: str | None, force: bool) -> int:
    """Write a box into the config. --state-dir and --runtime-dir say where agentqd lives there; otherwise by who logs in.

    Nothing is connected; see: agentqctl box test NAME
    """
    from agentqd.client.boxfile import add_box

    try:
        check_box_name(name)
        parse_box_url(url)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    given = {
        "url": url,
        "state_dir": call.where.state_dir,
        "runtime_dir": call.where.runtime_dir,
        "keep": keep,
    }
    path = config_file(os.environ)
    entry = add_box(path, name, {key: value for key, value in given.items() if value}, replace=force)
    if call.as_json:
        call.out.json({**entry.as_json(), "config": path})
    else:
        call.out.line(f"{name}  {entry.url}")
        call.out.note(f"written to {path}; see: agentqctl box test {name}")
    return EXIT_OK


@verb("list")
def list_boxes(call: Call) -> int:
    """The boxes of the config."""
    from agentqd.client.boxes import load_boxes

    path = config_file(os.environ)
    boxes = list(load_boxes(path).values())
    if call.as_json:
        call.out.json([entry.as_json() for entry in boxes])
        return EXIT_OK
    call.out.rows(
        COLUMNS,
        [[entry.name, entry.url, entry.state_dir or ""] for entry in boxes],
        empty=f"{path} names no box; add one: agentqctl box add NAME ssh://USER@HOST",
    )
    return EXIT_OK


@verb("remove")
@click.argument("name")
def remove(call: Call, name: str) -> int:
    """Take a box out of the config; its connection ends."""
    from agentqd.client.boxfile import remove_box

    remove_box(config_file(os.environ), name)
    _forget(name)
    if call.as_json:
        call.out.json({"name": name, "removed": True})
    else:
        call.out.line(f"{name}  removed")
    return EXIT_OK


@verb("forget-connection")
@click.argument("name")
def forget_connection(call: Call, name: str) -> int:
    """End the SSH connection that is kept to a box. The next verb makes another."""
    from agentqd.client.boxes import find_box

    find_box(config_file(os.environ), name)
    was_there = _forget(name)
    if call.as_json:
        call.out.json({"name": name, "ended": was_there})
    else:
        call.out.line(f"{name}  {'connection ended' if was_there else 'no connection was kept'}")
    return EXIT_OK


@verb("test")
@click.argument("name")
def test(call: Call, name: str) -> int:
    """What works on the way to a box, step by step, and what to do about what does not. Uses a connection of its own."""
    import asyncio

    from agentqd.client.boxes import find_box
    from agentqd.client.keeper.steps import Step, walk

    found: list[Step] = []

    def say(step: Step) -> None:
        found.append(step)
        if not call.as_json:
            mark, style = ("\u2713", "good") if step.ok else ("\u2717", "bad")
            call.out.lines(f"{mark} {step.name}: {step.message}", style, hang="    ")
            call.out.flush()

    entry = find_box(config_file(os.environ), name)
    asyncio.run(walk(entry, config_file(os.environ), say))
    failed: list[Any] = [step for step in found if not step.ok]
    if call.as_json:
        call.out.json({"ok": not failed, "box": name, "steps": [step.as_json() for step in found]})
    return failed[0].exit_code if failed else EXIT_OK


def _forget(name: str) -> bool:
    return Kept(name, os.environ, os.getuid()).leave()


for each in (list_boxes, add, test, remove, forget_connection, install_sync):
    command.add_command(each)
