"""`agentqctl` itself: the verbs by name, each imported only when it is run."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

import agentqd
from agentqd.cli.verb import where_options

# Verb: what the list of verbs says. Its code is the file of its name in `verbs/`.
VERBS: dict[str, str] = {
    "submit": "Hand over a task.",
    "flush": "Send what waits in this machine's spool.",
    "spool": "What waits here for a box that could not be reached.",
    "enqueue": "Append lines from stdin to the queue file; works with the daemon down.",
    "status": "What needs attention, what runs, what waits.",
    "list": "Tasks, newest first.",
    "show": "One task from its line to its delivery.",
    "logs": "What a worker wrote.",
    "wait": "Wait for tasks to end; exits as they did.",
    "cancel": "End tasks, running or not.",
    "hold": "Keep waiting tasks from starting.",
    "release": "Let held tasks go on.",
    "retry": "Run finished tasks again.",
    "pause": "Start nothing more from a queue.",
    "resume": "Let a paused queue go on.",
    "drain": "Accept and start nothing more, until drain --off.",
    "pull": "Take results off the completion queue.",
    "outbox": "What is on its way to whom.",
    "sink": "Where deliveries go, and whether they arrive.",
    "writes": "Who claims to write where.",
    "audit": "The record of events, and whether it is whole.",
    "config": "Check and show the config.",
    "reload": "Read the config again now.",
    "doctor": "What is wrong with this box, and the command that mends it.",
    "box": "The boxes that --box reaches over SSH.",
    "completion": "The shell's completion script.",
    "version": "The version of this program.",
}


class LazyGroup(click.Group):
    """Loads the file of a verb when that verb is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"agentqd.cli.verbs.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            ctx.fail(f"no such verb {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The list of verbs without loading one."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return [
            CompletionItem(name, help=text) for name, text in VERBS.items() if name.startswith(incomplete)
        ]


agentqctl = LazyGroup(
    "agentqctl",
    params=[
        *where_options(hidden=False),
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=lambda ctx, _param, value: _say_version(ctx) if value else None,
            help="The version of this program.",
        ),
    ],
    callback=lambda **_options: None,
    help="Hand tasks to agentqd, watch them, take their results.\n\nExit codes: 0 done; 1 other; 2 usage; 65 invalid task; "
    "66 no such task; 69 daemon or box unreachable; 75 refused for now; 77 not permitted.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    subcommand_metavar="VERB [ARGS]...",
)


def _say_version(ctx: click.Context) -> None:
    click.echo(f"agentqctl {agentqd.__version__}")
    ctx.exit()
