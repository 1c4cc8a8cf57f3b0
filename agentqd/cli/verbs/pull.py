"""`agentqctl pull`: results off the completion queue, acknowledged once they are safe."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import click

from agentqd.cli.outcome import RESULT_STYLES
from agentqd.cli.output import Cell, Column
from agentqd.cli.text import age, duration
from agentqd.cli.verb import Call, verb
from agentqd.client.completions import Rows, cut_patience, pull
from agentqd.core.errors import EXIT_OK, EXIT_OTHER

COLUMNS = (
    Column("SEQ", right=True),
    Column("AGE", right=True, drop=2),
    Column("STATUS", flex=True),
    Column("TOOK", drop=3, right=True),
    Column("NAME", flex=True),
    Column("TASK"),
)
REMARKS = ("left_out", "renamed", "artifacts_truncated")  # told, and no failure


@verb("pull", all_boxes="lines")
@click.option("--consumer", metavar="NAME", help="Whose position; otherwise `default`.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many.")
@click.option("--follow", is_flag=True, help="Go on as they come, until interrupted.")
@click.option("--no-ack", is_flag=True, help="Only look: nothing is acknowledged.")
@click.option("--to", metavar="DIR", help="Fetch each result's files into DIR/NAME-ID/ too.")
@click.option("--exec", "hook", metavar="CMD", help="Run CMD for each row (the row on stdin, AGENTQ_* set).")
def command(
    call: Call,
    consumer: str | None,
    limit: int | None,
    follow: bool,
    no_ack: bool,
    to: str | None,
    hook: str | None,
) -> int:
    """Print what has been completed since the last pull, oldest first: one JSON object a line, a table on a terminal.

    Rows are acknowledged after they were printed (fsynced, where stdout is a file); whatever fails before that, they
    come again. With --to, stdout, stderr and the artifacts are there, whole, checked and fsynced, before a row is
    printed; a cut transfer goes on where it stopped. A file that cannot be had is told on stderr and in problems.json
    (exit 1 at the end), and the row is acknowledged.

    CMD is run by /bin/sh with AGENTQ_TASK_ID, AGENTQ_NAME, AGENTQ_STATUS, AGENTQ_DELIVERY_ID and (with --to)
    AGENTQ_DIR. If it fails, that is said on stderr; the row counts as pulled.
    """
    puller = _Puller(call, consumer or call.box.consumer, to, hook, follow=follow, acknowledge=not no_ack)
    with ExitStack() as stack:
        if puller.results is not None:
            stack.enter_context(puller.results.opened())
        count = pull(
            call.box,
            puller.consumer,
            limit=limit,
            follow=follow,
            acknowledge=not no_ack,
            put_away=puller.put_away,
            acknowledged=puller.acknowledged,
            came=puller.came,
            one_by_one=bool(to or hook),
        )
    if not count and call.out.is_terminal and not call.as_json:
        call.out.note("nothing new")
    return EXIT_OTHER if puller.files_missing else EXIT_OK


class _Puller:
    """What is done with rows, in the order in which it must be done."""

    def __init__(
        self, call: Call, consumer: str, to: str | None, hook: str | None, *, follow: bool, acknowledge: bool
    ) -> None:
        self.consumer = consumer
        self.results = None
        self.files_missing = False
        self._call = call
        self._hook = hook
        self._acknowledge = acknowledge
        self._first = True
        if to is not None:
            from agentqd.cli.progress import ProgressLine
            from agentqd.client.results import Results

            patience = lambda: cut_patience(call.box, follow=follow)  # noqa: E731
            self.results = Results(call.box, to, consumer, ProgressLine(), patience)

    def came(self, rows: Rows) -> None:
        if self.results is not None:
            self.results.forget_all_but(rows)

    def put_away(self, rows: Rows) -> None:
        """Files first, then the row, then the hook: whoever sees the row finds the files."""
        if self.results is None:
            self._print(rows)
            for row in rows if self._hook is not None else ():
                self._run_hook(row, None)
            return
        for row in rows:
            kept = self.results.keep(row)
            if kept.told:
                continue
            shown = {**row, **({"dir": kept.folder} if kept.folder else {})}
            if kept.problems:
                shown["problems"] = kept.problems
            self._tell_problems(row, kept.problems)
            self._print([shown])
            self._run_hook(row, kept.folder)
            if self._acknowledge:
                self.results.mark_told(row)

    def acknowledged(self, rows: Rows) -> None:
        if self.results is not None:
            for row in rows:
                self.results.forget(row)

    def _print(self, rows: Rows) -> None:
        out = self._call.out
        if self._call.as_json or not out.is_terminal:
            for row in rows:
                out.json_line(row)
        else:
            out.table(COLUMNS, [_row(row) for row in rows], header=self._first)
            self._first = False
        out.make_durable()

    def _run_hook(self, row: dict[str, Any], folder: str | None) -> None:
        if self._hook is not None:
            from agentqd.cli.hook import run_hook

            run_hook(self._hook, row, folder)

    def _tell_problems(self, row: dict[str, Any], problems: list[dict[str, Any]]) -> None:
        for problem in problems:
            self.files_missing = self.files_missing or problem.get("reason") not in REMARKS
            path = f"{problem['path']}: " if problem.get("path") else ""
            message = str(problem.get("message")).removeprefix(path)
            self._call.out.note(f"{row.get('name')} ({row.get('task_id')}): {path}{message}")


def _row(row: dict[str, Any]) -> list[Cell | str]:
    status = str(row.get("status") or row.get("type") or "?")
    reason = row.get("reason")
    style = "" if "status" not in row else RESULT_STYLES.get(status, "bad")
    return [
        str(row.get("seq", "")),
        age(row.get("completed_at")),
        Cell(f"{status} ({reason}{_against(row)})" if reason and status != "success" else status, style),
        duration(row.get("duration_s")),
        str(row.get("name") or ""),
        str(row.get("task_id") or row.get("submitted_id") or "-"),
    ]


def _against(row: dict[str, Any]) -> str:
    """Whose claim a refused task has met."""
    met = row.get("conflicts")
    first = met[0] if isinstance(met, list) and met and isinstance(met[0], dict) else {}
    return f" with {first['task_id']}" if first.get("task_id") else ""
