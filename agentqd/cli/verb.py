"""What all verbs share: `--json`, the options that say which daemon, and the `Call` that a verb's function gets."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from agentqd.cli.output import Output
from agentqd.client.box import Box, Where, find_box
from agentqd.client.boxname import ALL_BOXES
from agentqd.core.errors import InvalidRequest

if TYPE_CHECKING:
    from agentqd.client.spool import Spool

LOCAL_OPTIONS = ("socket", "state_dir", "runtime_dir")
WHERE_OPTIONS = (*LOCAL_OPTIONS, "box")
BOX_VARIABLE = "AGENTQCTL_BOX"


class Call:
    """One run of one verb."""

    def __init__(self, where: Where, *, as_json: bool, out: Output | None = None) -> None:
        self.where = where
        self.out = out or Output(as_json=as_json)
        self.as_json = as_json
        self._bare_box: Box | None = None
        self._box: Box | None = None

    @property
    def box(self) -> Box:
        """The daemon that this command is for; made at first use, reached at the first call. What is spooled for it goes
        first."""
        if self._box is None:
            self._box = self.bare_box
            if self.where.box:
                self._box = self._spool_first(self._box, self.where.box)
        return self._box

    def _spool_first(self, bare: Box, name: str) -> Box:
        """The box, each contact with which sends what waits here first; the spool is loaded only when something does."""
        from agentqd.client.keeperplace import spool_root
        from agentqd.client.spoolfirst import SpoolFirst

        def send() -> None:
            from agentqd.cli.spooled import send_spooled

            assert self.spool is not None, "a box over SSH has one"
            send_spooled(self, self.spool)

        through = SpoolFirst(bare.connection.transport, f"{spool_root(os.environ)}/{name}", send)
        return bare._replace(connection=bare.connection.through(through))

    @property
    def bare_box(self) -> Box:
        """The same, that leaves the spool alone."""
        if self._bare_box is None:
            self._bare_box = find_box(self.where, os.environ, os.getuid(), self.out.note)
        return self._bare_box

    @property
    def spool(self) -> Spool | None:
        """What waits here for the box; none for a daemon on this machine."""
        if not self.where.box:
            return None
        from agentqd.client.keeperplace import spool_root
        from agentqd.client.spool import Spool

        return Spool(spool_root(os.environ), self.where.box, self._check_known)

    def _check_known(self) -> None:
        """Raises NoSuchBox, ConfigError. Costs reading the config: only asked before something stays on this machine."""
        from agentqd.client.boxes import find_box as entry_of
        from agentqd.client.keeperplace import config_file

        entry_of(config_file(os.environ), str(self.where.box))

    def on_the_box(self, option: str, path: str, base: str | None = None) -> str:
        """A path of the command line as the box knows it: absolute, from `base` or the caller's folder. With --box there is
        no such folder, and the home there is not known while the box is away. Raises InvalidRequest."""
        if not self.where.box:
            return os.path.join(base or os.getcwd(), os.path.expanduser(path))
        found = os.path.join(base or "", path)
        if not found.startswith("/"):
            raise InvalidRequest(
                f"{option} {path}: with --box this is a path on the box, and it must be absolute (/...)",
                field=option,
            )
        return found


class Verb(click.Command):
    """A command whose function gets a `Call` first. Its return value is the exit code (None: 0)."""

    takes_json = True

    def __init__(self, *args: Any, all_boxes: str | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._all_boxes = (
            all_boxes  # how `--box all` answers in JSON: "object" by name, "lines" with the name in each
        )
        if self.takes_json:
            self.params.append(
                click.Option(["--json", "as_json"], is_flag=True, help="JSON on stdout, errors too.")
            )
        self.params += where_options(hidden=True)

    def invoke(self, ctx: click.Context) -> Any:
        gc.enable()
        said = {name: ctx.params.pop(name) for name in WHERE_OPTIONS}
        outer = ctx.find_root().params
        where = which_box({name: said[name] or outer.get(name) for name in WHERE_OPTIONS})
        as_json = bool(ctx.params.pop("as_json", False))
        if where.box == ALL_BOXES and self._all_boxes is not None:
            from agentqd.cli.allboxes import run_on_all

            return run_on_all(super().invoke, ctx, as_json=as_json, as_lines=self._all_boxes == "lines")
        ctx.params["call"] = Call(where, as_json=as_json)
        return super().invoke(ctx)


class PlainVerb(Verb):
    """One without --json (its output is a script, or bytes)."""

    takes_json = False


def which_box(said: dict[str, str | None]) -> Where:
    """The command line beats AGENTQCTL_BOX, and a socket or folder of this machine named there means this machine."""
    here = [name for name in LOCAL_OPTIONS if said[name]]
    if said["box"] and here:
        option = "--" + here[0].replace("_", "-")
        raise click.UsageError(
            f"--box and {option}: give one ({option} is of this machine; a box's folders: box add)"
        )
    box = said["box"] if said["box"] is not None or here else os.environ.get(BOX_VARIABLE)
    return Where(**{**said, "box": box or None})


def where_options(*, hidden: bool) -> list[click.Parameter]:
    """Which daemon. Shown in the help of `agentqctl` itself, understood after every verb too."""
    return [
        click.Option(
            ["--box"],
            metavar="NAME",
            hidden=hidden,
            help="A box of `agentqctl box list`, over SSH (AGENTQCTL_BOX).",
        ),
        click.Option(
            ["--socket"], metavar="PATH", hidden=hidden, help="The daemon's control socket (AGENTQD_SOCKET)."
        ),
        click.Option(
            ["--state-dir"], metavar="DIR", hidden=hidden, help="Its state folder (AGENTQD_STATE_DIR)."
        ),
        click.Option(
            ["--runtime-dir"], metavar="DIR", hidden=hidden, help="Its runtime folder (AGENTQD_RUNTIME_DIR)."
        ),
    ]


class Family(click.Group):
    """A verb with verbs of its own (`outbox list`). Without one it runs the first, if `default` names it."""

    def __init__(self, *args: Any, default: str | None = None, **settings: Any) -> None:
        settings.setdefault("no_args_is_help", default is None)
        settings["invoke_without_command"] = default is not None
        super().__init__(*args, **settings)
        self._default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] == ["--json"] and args[1:2] and args[1] in self.commands:
            args = [args[1], args[0], *args[2:]]
        bare = not args or (args[0].startswith("-") and args[0] not in ("--help", "-h"))
        if self._default is not None and bare:
            args = [self._default, *args]
        return super().parse_args(ctx, args)


class TaskId(click.types.StringParamType):
    """A task's id; the shell completes the newest ones."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            self.fail("it is empty; a task's id is needed (agentqctl list shows them)", param, ctx)
        return super().convert(value, param, ctx)

    def shell_complete(
        self,
        ctx: click.Context,
        param: click.Parameter,  # noqa: ARG002 - click's signature
        incomplete: str,
    ) -> list[Any]:
        from click.shell_completion import CompletionItem

        outer = ctx.find_root().params
        try:
            where = which_box({name: ctx.params.get(name) or outer.get(name) for name in WHERE_OPTIONS})
            box = find_box(where, os.environ, os.getuid(), lambda _text: None)
            box.connection.timeout_s = 2.0
            tasks = box.connection.get("tasks", query={"limit": 200})["tasks"]
        except Exception:  # noqa: BLE001 - pressing Tab never fails: no daemon, no proposals
            return []
        return [
            CompletionItem(task["id"], help=task["task"])
            for task in tasks
            if task["id"].startswith(incomplete)
        ]


def verb(
    name: str, *, as_json: bool = True, **settings: Any
) -> Callable[[Callable[..., Any]], click.Command]:
    """`@verb("list")`: the command of a file in `verbs/`."""
    return click.command(name, cls=Verb if as_json else PlainVerb, **settings)
