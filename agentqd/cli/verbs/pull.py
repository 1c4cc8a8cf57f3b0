"""`agentqctl pull`: results off the completion queue, acknowledged once they are safe."""

from __future__ import annotations

from typing import Any

import click

from agentqd.cli.outcome import RESULT_STYLES
from agentqd.cli.output import Cell, Column
from agentqd.cli.text import age, duration
from agentqd.cli.verb import Call, verb
from agentqd.client.completions import pull

COLUMNS = (
    Column("SEQ", right=True),
    Column("AGE", right=True, drop=2),
    Column("STATUS", flex=True),
    Column("TOOK", drop=3, right=True),
    Column("NAME", flex=True),
    Column("TASK"),
)


@verb("pull", all_boxes="lines")
@click.option("--consumer", metavar="NAME", help="Whose position; otherwise `default`.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many.")
@click.option("--follow", is_flag=True, help="Go on as they come, until interrupted.")
@click.option("--no-ack", is_flag=True, help="Only look: nothing is acknowledged.")
def command(call: Call, consumer: str | None, limit: int | None, follow: bool, no_ack: bool) -> int:
    """Print what has been completed since the last pull, oldest first: one JSON object a line, a table on a terminal.

    Rows are acknowledged after they were printed (fsynced, where stdout is a file); whatever fails before that, they
    come again.
    """
    first = True

    def put_away(rows: list[dict[str, Any]]) -> None:
        nonlocal first
        if call.as_json or not call.out.is_terminal:
            for row in rows:
                call.out.json_line(row)
        else:
            call.out.table(COLUMNS, [_row(row) for row in rows], header=first)
            first = False
        call.out.make_durable()

    count = pull(
        call.box,
        consumer or call.box.consumer,
        limit=limit,
        follow=follow,
        acknowledge=not no_ack,
        put_away=put_away,
    )
    if not count and call.out.is_terminal and not call.as_json:
        call.out.note("nothing new")
    return 0


def _row(row: dict[str, Any]) -> list[Cell | str]:
    status = str(row.get("status") or row.get("type") or "?")
    reason = row.get("reason")
    style = "" if "status" not in row else RESULT_STYLES.get(status, "bad")
    return [
        str(row.get("seq", "")),
        age(row.get("completed_at")),
        Cell(f"{status} ({reason})" if reason and status != "success" else status, style),
        duration(row.get("duration_s")),
        str(row.get("name") or ""),
        str(row.get("task_id") or row.get("submitted_id") or "-"),
    ]
