"""`agentqctl list`: tasks, newest first."""

from __future__ import annotations

from typing import Any

import click

from agentqd.cli.outcome import outcome, outcome_style
from agentqd.cli.output import Cell, Column
from agentqd.cli.paging import collect
from agentqd.cli.text import age, local_time
from agentqd.cli.verb import Call, verb

COLUMNS = (
    Column("ID"),
    Column("STATE", flex=True),
    Column("NAME", flex=True),
    Column("QUEUE", drop=2),
    Column("AGE", right=True, drop=1),
    Column("WAITS FOR", flex=True, drop=3),
    Column("TRIES", right=True, drop=5),
    Column("RUNNER", drop=4),
)


@verb("list", all_boxes="object")
@click.option("--state", metavar="STATE[,STATE]...", help="queued, running, finished, ...")
@click.option("--result", metavar="RESULT[,RESULT]...", help="success, failed, timeout, ...")
@click.option("--queue", metavar="NAME[,NAME]...")
@click.option("--runner", metavar="NAME")
@click.option("--name", metavar="TEXT", help="Tasks with this name.")
@click.option("--label", metavar="TEXT")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many.")
@click.option("--all", "everything", is_flag=True, help="No limit.")
def command(call: Call, limit: int, everything: bool, **filters: str | None) -> int:
    """Tasks, newest first. In a pipe: id, state, name, queue, age, what it waits for, attempts, runner, tabs between."""
    tasks, more = collect(call.box.connection, "tasks", "tasks", dict(filters), None if everything else limit)
    if call.as_json:
        call.out.json(tasks)
        return 0
    call.out.rows(
        COLUMNS,
        [_row(task) for task in tasks],
        empty="no tasks" + (" like that" if any(filters.values()) else ""),
    )
    if more:
        call.out.flush()
        call.out.note(f"the newest {len(tasks)}; more with --limit or --all")
    return 0


def _row(task: dict[str, Any]) -> list[Cell | str]:
    return [
        str(task.get("id")),
        Cell(outcome(task), outcome_style(task)),
        str(task.get("task") or ""),
        str(task.get("queue") or ""),
        age(task.get("accepted_at") or task.get("submitted_at")),
        waits_for(task.get("waiting_for")),
        str(task.get("attempt") or ""),
        str(task.get("runner") or ""),
    ]


def waits_for(waiting: Any) -> str:
    """Why a task does not run."""
    if not isinstance(waiting, dict):
        return ""
    until = f" (until {local_time(waiting['until'])})" if waiting.get("until") else ""
    return f"{waiting.get('text') or waiting.get('reason') or ''}{until}"
