"""`agentqctl submit`: one task, from a prompt or an argv."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from agentqd.cli.ends import follow_to_the_end, say_end
from agentqd.cli.outcome import outcome
from agentqd.cli.verb import Call, verb
from agentqd.client.errors import BoxUnreachable
from agentqd.client.ids import check_text, new_task_id, now_text
from agentqd.client.taskname import name_from, name_from_argv
from agentqd.client.tasks import exit_code_of, submit_task, wait_for
from agentqd.core.errors import AgentqError, InvalidTask
from agentqd.core.limits import MIB

PROMPT_BYTES_MAX = 48 * MIB  # a request of the control socket is at most 64 MiB, and JSON makes text longer

# Options that go into the task's field of the same name, as they were written: the daemon knows what they mean.
PLAIN_FIELDS = (
    "runner", "queue", "priority", "not_before", "expires_at", "after_policy", "run_timeout", "total_timeout",
    "queue_timeout", "first_output_timeout", "silence_timeout", "kill_grace", "max_attempts", "on_lost", "on_conflict",
    "intent_ttl", "deliver_within", "dedup_ttl",
)  # fmt: skip


Function = Callable[..., Any]


def _option(name: str, metavar: str, text: str, **settings: Any) -> Callable[[Function], Function]:
    return click.option(name, metavar=metavar, help=text, **settings)


@verb("submit", context_settings={"ignore_unknown_options": False})
@click.argument("words", nargs=-1, metavar="[PROMPT | --command -- ARGV...]", type=click.UNPROCESSED)
@_option("--prompt-file", "FILE|-", "The prompt from a file, or from stdin.")
@click.option("--command", "is_command", is_flag=True, help="What follows -- is an argv, run as it stands.")
@_option(
    "--task",
    "NAME",
    "Its name; otherwise the first words that look like no secret. Names are logged, and stand in alerts and mails.",
)
@_option("--id", "ID", "Its dedup key; otherwise a new one.", default=None)
@_option(
    "--writes", "PATH", "What it will write, from --workdir, else from here; again for more.", multiple=True
)
@_option("--runner", "NAME", "Who runs it.")
@_option("--queue", "NAME", "Where it waits.")
@_option("--priority", "N", "Higher goes first.", type=int)
@_option("--label", "TEXT", "Again for more.", multiple=True)
@_option("--workdir", "DIR", "The worker's current folder.")
@_option("--env", "NAME=VALUE", "Again for more.", multiple=True)
@_option("--timeout", "TIME", "Of one attempt: 45m, 10s (also --run-timeout).")
@click.option("--run-timeout", hidden=True)
@_option("--total-timeout", "TIME", "Of everything, from acceptance.")
@_option("--queue-timeout", "TIME", "Waiting longer alerts.")
@_option("--silence-timeout", "TIME", "Without output for so long, it is ended.")
@_option("--first-output-timeout", "TIME", "The same, for the first output.")
@_option("--kill-grace", "TIME", "From SIGTERM to SIGKILL.")
@_option("--max-attempts", "N", "Attempts in all.", type=int)
@_option("--backoff", "TIME[,TIME]...", "Between attempts: one doubles, several are the schedule.")
@_option(
    "--on-lost",
    "fail|requeue|hold",
    "When its worker is lost.",
    type=click.Choice(["fail", "requeue", "hold"]),
)
@_option(
    "--on-conflict",
    "refuse|queue|warn",
    "When --writes overlap.",
    type=click.Choice(["refuse", "queue", "warn"]),
)
@_option("--intent-ttl", "TIME", "Silent for so long, its --writes claim may lapse; 0: never.")
@_option("--not-before", "TIME", "Start time, RFC 3339.")
@_option("--expires-at", "TIME", "Not started by then: expired.")
@_option("--after", "ID", "Waits for that task; again for more.", multiple=True)
@_option(
    "--after-policy",
    "success|any|failure",
    "How it must have ended.",
    type=click.Choice(["success", "any", "failure"]),
)
@_option("--deliver-to", "SINK", "Again for more.", multiple=True)
@_option("--deliver-within", "TIME", "Not delivered by then: an alert.")
@_option("--dedup-ttl", "TIME", "How long its id stays taken after its end.")
@_option("--expect-file", "PATH", "Must be there at the end; again for more.", multiple=True)
@click.option("--allow-no-work", is_flag=True, help="Nothing to show is a success too.")
@click.option("--wait", "wait", is_flag=True, help="Wait for its end; exit as it did.")
@click.option("--follow", is_flag=True, help="The same, with its output on stdout.")
@click.option(
    "--require-box", is_flag=True, help="With --box: 69 if it cannot be reached; nothing is kept here."
)
def command(call: Call, wait: bool, follow: bool, require_box: bool, **said: Any) -> int:
    """Hand over a task. Returns once it is durable.

    Without a daemon it is appended to the queue file, and read when the daemon starts. For a box (--box) that cannot be
    reached it is kept on this machine, and sent by the next contact or by `agentqctl flush`. What is taken and can never run (its
    --after has failed, its --expires-at is past) is a task that has ended: that is said on stderr, and --wait exits as it did.
    """
    if follow and call.as_json:
        raise click.UsageError("--follow prints the worker's output; it does not go with --json")
    fields = task_fields(said, call.on_the_box)
    answer = _submit(call, fields, require_box=require_box)
    unread = answer.get("where") != "accepted"
    if not call.as_json:
        _say(call, answer, to_stderr=follow, tells_end=not (wait or follow))
    if follow:
        call.out.flush()
        _until_sent(call, answer)
        at = fields["submitted_at"]
        return follow_to_the_end(call, fields["id"], may_be_unread=unread, submitted_at=at)
    if not wait:
        if call.as_json:
            call.out.json(answer)
        return 0
    call.out.flush()
    try:
        end = _wait(call, str(answer.get("task_id")), fields["submitted_at"], may_be_unread=unread)
    except AgentqError as error:  # the task itself is in safe hands: say which one it is
        error.fields |= {"task_id": answer.get("task_id"), "where": answer.get("where")}
        raise
    if call.as_json:
        call.out.json({**answer, **{name: value for name, value in end.items() if name != "id"}})
    else:
        say_end(call, end)
    return exit_code_of(end)


def _submit(call: Call, fields: dict[str, Any], *, require_box: bool) -> dict[str, Any]:
    spool = call.spool
    if spool is None:
        return submit_task(call.box, fields)
    from agentqd.cli.spooled import tell_report
    from agentqd.client.spooling import submit_required, submit_spooled

    if require_box:
        return submit_required(call.box, fields)
    try:
        return submit_spooled(call.bare_box, spool, fields, lambda report: tell_report(call, spool, report))
    except KeyboardInterrupt:
        if spool.find(fields["id"]) is not None:
            call.out.note(f"{fields['id']} is spooled here; to take it back: agentqctl cancel {fields['id']}")
        raise


def _until_sent(call: Call, answer: dict[str, Any]) -> None:
    if call.spool is not None and answer.get("where") == "spool":
        from agentqd.cli.spooled import until_sent

        until_sent(call, call.spool, str(answer["task_id"]), None)


def _wait(call: Call, task_id: str, submitted_at: str, *, may_be_unread: bool) -> dict[str, Any]:
    if call.spool is None:
        return wait_for(call.box, task_id, may_be_unread=may_be_unread, submitted_at=submitted_at)
    from agentqd.cli.spooled import wait_for_end

    return wait_for_end(call, task_id, may_be_unread=may_be_unread, submitted_at=submitted_at)


def task_fields(said: dict[str, Any], on_the_box: Callable[..., str]) -> dict[str, Any]:
    """The task object from the command line; it always has an id, a name and a time. Raises UsageError, InvalidTask."""
    fields: dict[str, Any] = {}
    words = [check_text("prompt", word) for word in said["words"]]
    if said["is_command"]:
        if said["prompt_file"]:
            raise click.UsageError("--command and --prompt-file: give one")
        if not words:
            raise click.UsageError("--command needs an argv: agentqctl submit --command -- make test")
        fields["command"] = words
    else:
        fields["prompt"] = _prompt(words, said["prompt_file"])
    name = name_from_argv(words) if said["is_command"] else name_from(fields["prompt"])
    fields["task"] = check_text("task", said["task"] or name)
    fields["id"] = said["id"] if said["id"] is not None else new_task_id()
    fields["submitted_at"] = now_text()
    if said["timeout"] and said["run_timeout"] and said["timeout"] != said["run_timeout"]:
        raise click.UsageError("--timeout is another name of --run-timeout; give one")
    said = {**said, "run_timeout": said["timeout"] or said["run_timeout"]}
    fields |= {name: said[name] for name in PLAIN_FIELDS if said[name] is not None}
    fields |= _places(said, on_the_box)
    fields |= _lists(said)
    return fields


def _prompt(words: list[str], prompt_file: str | None) -> str:
    if prompt_file and words:
        raise click.UsageError("a prompt and --prompt-file: give one")
    if len(words) > 1:
        raise click.UsageError(
            "the prompt is one argument: put it in quotes (an argv goes after --command --)"
        )
    if prompt_file is None and not words:
        raise click.UsageError(
            "nothing to do: give a PROMPT, --prompt-file FILE (- for stdin), or --command -- ARGV"
        )
    source = prompt_file or ("-" if words == ["-"] else None)
    return words[0] if source is None else _read_prompt(source)


def _read_prompt(source: str) -> str:
    try:
        if source == "-":
            raw = sys.stdin.buffer.read(PROMPT_BYTES_MAX + 1)
        else:
            with open(source, "rb") as file:
                raw = file.read(PROMPT_BYTES_MAX + 1)
    except OSError as error:
        raise InvalidTask(
            f"--prompt-file {source}: {error.strerror}", code="prompt_missing", field="prompt"
        ) from None
    if len(raw) > PROMPT_BYTES_MAX:
        raise InvalidTask(
            f"the prompt is larger than {PROMPT_BYTES_MAX} bytes", code="too_large", field="prompt"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidTask(
            f"the prompt is not UTF-8 at byte {error.start}", code="invalid_utf8", field="prompt"
        ) from None


def _places(said: dict[str, Any], on_the_box: Callable[..., str]) -> dict[str, Any]:
    """Paths, made absolute from the caller's folder. What it writes, where there is a workdir, as it was typed: the box takes it from there."""
    found: dict[str, Any] = {}
    base = None
    if said["workdir"]:
        base = found["workdir"] = check_text("workdir", on_the_box("--workdir", said["workdir"]))
    if said["writes"]:
        found["writes_to"] = [
            check_text("writes", path if _is_from(base, path) else on_the_box("--writes", path, base))
            for path in said["writes"]
        ]
    return found


def _is_from(workdir: str | None, path: str) -> bool:
    """A path that the box takes from the workdir, or that is none at all. (A home is the caller's.)"""
    return not path or (workdir is not None and not path.startswith(("/", "~")))


def _lists(said: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for option, field in (("label", "labels"), ("after", "after"), ("deliver_to", "deliver_to")):
        if said[option]:
            found[field] = [check_text(field, item) for item in said[option]]
    if said["env"]:
        found["env"] = dict(_variable(item) for item in said["env"])
    if said["backoff"]:
        steps = said["backoff"].split(",")
        found["backoff"] = steps if len(steps) > 1 else steps[0]
    expect: dict[str, Any] = {}
    if said["expect_file"]:
        expect["files"] = list(said["expect_file"])
    if said["allow_no_work"]:
        expect["allow_no_work"] = True
    return {**found, "expect": expect} if expect else found


def _variable(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals or not name:
        raise click.UsageError(f"--env takes NAME=VALUE, not {item.partition('=')[0]!r}")
    return name, check_text("env", value)


def _say(call: Call, answer: dict[str, Any], *, to_stderr: bool, tells_end: bool) -> None:
    task_id = str(answer.get("task_id"))
    if to_stderr:
        call.out.note(task_id)
    else:
        call.out.line(task_id)
    if answer.get("where") == "queue_file":
        where = answer.get("queue_file")
        box = "" if call.spool is None else f"{call.spool.box}: "
        call.out.note(f"queued on disk, the daemon is down ({box}{where}); it is read when the daemon runs")
    elif answer.get("where") == "spool":
        away = answer.get("reason") == BoxUnreachable.code
        why = "the box is not reachable" if away else f"{answer.get('box')} has not taken it yet"
        call.out.note(f"spooled here, {why} ({answer.get('message')}); the next contact sends it")
    elif answer.get("duplicate"):
        call.out.note(
            f"a duplicate: this task was taken before and is {answer.get('result') or answer.get('state')}"
        )
    elif answer.get("result"):
        if tells_end:
            why = f": {answer['message']}" if answer.get("message") else ""
            call.out.note(f"it has ended at once: {outcome(answer)}{why}; see: agentqctl show {task_id}")
    elif call.out.is_terminal:
        call.out.note(f"{answer.get('state')}; see: agentqctl show {task_id}")
