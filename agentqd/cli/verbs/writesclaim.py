"""`agentqctl writes claim PATH... -- COMMAND`: holds a write claim for as long as COMMAND runs. On the box only.

How the claim and COMMAND hang together: agentqctl forks; the child asks for the claim and then becomes COMMAND (exec). The
daemon ties a claim to the process that has asked for it, so the claim ends exactly when COMMAND does, whatever becomes of
agentqctl or of the daemon meanwhile. If agentqctl is killed, the kernel sends COMMAND a SIGTERM (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any, NoReturn

import click

from agentqd.cli.verb import Call, Verb
from agentqd.client.connection import LONG_POLL_S, encode_json, take
from agentqd.client.ids import check_text
from agentqd.client.patience import Patience, may_come_back
from agentqd.core.errors import EXIT_TIMEOUT, AgentqError, InvalidRequest
from agentqd.core.limits import TASK_NAME_CHARS_MAX
from agentqd.core.units import format_duration, parse_duration

EXIT_CANNOT_EXECUTE = 126
EXIT_NOT_FOUND = 127
POLL_MIN_S = 0.05
_PR_SET_PDEATHSIG = 1
_SPLIT = "agentqd.command"


class ClaimVerb(Verb):
    """Splits its arguments at the first `--` itself: click would run paths and argv together."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        ctx.meta[_SPLIT] = args[at + 1 :]
        return super().parse_args(ctx, args[:at])


@click.command("claim", cls=ClaimVerb)
@click.argument("paths", nargs=-1, required=True, metavar="PATH... -- COMMAND [ARG]...")
@click.option(
    "--on-conflict",
    metavar="refuse|queue|warn",
    help="When somebody claims one of them already; default: writes.on_conflict of the config.",
    type=click.Choice(["refuse", "queue", "warn"]),
)
@click.option("--wait", "wait", metavar="TIME", help="Queue for so long at most (exit 124).")
@click.option("--name", metavar="NAME", help="What others are told; default: the command's name.")
@click.pass_context
def command(
    ctx: click.Context,
    call: Call,
    paths: tuple[str, ...],
    on_conflict: str | None,
    wait: str | None,
    name: str | None,
) -> int:
    """Run COMMAND while holding a write claim on these paths, for editors, cron jobs and people.

    Tasks and other claims that overlap are refused, queued or warned about, as between tasks. Exits as COMMAND does (128+n
    after signal n), 75 if refused, 124 if --wait passed; then COMMAND was not run. Only COMMAND itself counts, not what it
    leaves in the background.
    """
    argv = ctx.meta[_SPLIT]
    if not argv:
        raise click.UsageError("say what to run while the claim is held: ... -- COMMAND [ARG]...")
    if call.where.box:
        raise InvalidRequest(
            "writes claim works on the box itself: paths and COMMAND are of the machine it runs on; log in there, or submit a task"
        )
    if wait is not None and on_conflict not in (None, "queue"):
        raise click.UsageError("--wait goes with --on-conflict queue")
    wish: dict[str, Any] = {
        "id": f"claim-{os.urandom(8).hex()}",
        "name": check_text("name", name or os.path.basename(argv[0]))[:TASK_NAME_CHARS_MAX],
        "paths": [check_text("path", call.on_the_box("PATH", path)) for path in paths],
    }
    if on_conflict or wait is not None:
        wish["on_conflict"] = on_conflict or "queue"
    return _supervise(call, wish, _seconds(wait), argv)


def _seconds(wait: str | None) -> float | None:
    if wait is None:
        return None
    try:
        return parse_duration(wait)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--wait") from None


def _supervise(call: Call, wish: dict[str, Any], wait_s: float | None, argv: list[str]) -> int:
    """The child claims and becomes COMMAND; the parent waits for it and ends as it did."""
    call.out.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _die_with(parent)
        return _claim_and_run(call, wish, wait_s, argv)
    for number in (signal.SIGINT, signal.SIGQUIT):  # from the keyboard COMMAND gets them too, and decides
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(
            number, lambda got, _frame: os.kill(child, got)
        )  # not reaped yet: the number is its own
    _, status = os.waitpid(child, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _die_with(parent: int) -> None:
    """SIGTERM for this process, also after its exec, when agentqctl is killed."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGTERM)


def _claim_and_run(call: Call, wish: dict[str, Any], wait_s: float | None, argv: list[str]) -> int:
    until = None if wait_s is None else time.monotonic() + wait_s
    answer = _ask(call, wish, until)
    if take(answer, "state", str) != "held":
        _say_waiting(call, answer)
        if not _wait(call, wish["id"], until):
            _let_go(call, wish["id"])
            error = AgentqError(
                f"the paths were not free within {format_duration(wait_s or 0.0)}; {argv[0]} was not run",
                code="wait_timeout",
                conflicts=answer.get("conflicts", []),
            )
            error.exit_code = EXIT_TIMEOUT
            raise error
    _become(call, argv, wish["id"])


def _ask(call: Call, wish: dict[str, Any], until: float | None) -> dict[str, Any]:
    """Raises AgentqError, also a refusal. The id makes a second asking harmless."""
    patience = Patience(call.box.reconnect_s)
    body = encode_json(wish)
    while True:
        try:
            return call.box.connection.post_raw("writes", "claims", body=body)
        except AgentqError as error:
            if not may_come_back(error) or error.code == "unreachable":
                raise
            patience.bear(error, until)


def _wait(call: Call, claim_id: str, until: float | None) -> bool:
    """Until it is held (True) or the time is over. Outlasts a restart of the daemon. Raises AgentqError."""
    patience = Patience(call.box.reconnect_s)
    while True:
        asked = time.monotonic()
        left_s = LONG_POLL_S if until is None else max(0.0, min(LONG_POLL_S, until - asked))
        try:
            answer = call.box.connection.get(
                "writes", "claims", claim_id, query={"timeout_s": f"{left_s:.3f}"}, extra_s=left_s
            )
        except AgentqError as error:
            if not may_come_back(error):
                raise
            patience.bear(error, until)
        else:
            patience.succeeded()
            if take(answer, "state", str) == "held":
                return True
        if until is not None and time.monotonic() >= until:
            return False
        if time.monotonic() - asked < POLL_MIN_S:
            time.sleep(POLL_MIN_S)


def _let_go(call: Call, claim_id: str) -> None:
    """At once; if that fails, it goes with this process."""
    try:
        call.box.connection.post("writes", "claims", claim_id, "release")
    except AgentqError:
        return


def _say_waiting(call: Call, answer: dict[str, Any]) -> None:
    for each in answer.get("conflicts", [])[:5]:
        call.out.note(
            f"waiting for {each.get('task_id')} ({each.get('task')}), which writes {each.get('path')}"
        )


def _become(call: Call, argv: list[str], claim_id: str) -> NoReturn:
    """exec. What Python has changed for itself is put back."""
    call.out.flush()
    sys.stderr.flush()
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvpe(argv[0], argv, {**os.environ, "AGENTQ_CLAIM_ID": claim_id})  # noqa: S606 - an argv, no shell
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        failed = AgentqError(f"{argv[0]}: {error.strerror}", code="spawn_failed")
        failed.exit_code = EXIT_NOT_FOUND if missing else EXIT_CANNOT_EXECUTE
        raise failed from None
