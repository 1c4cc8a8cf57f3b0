"""The command sink: what a command's end means, and what the command is given."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from agentqd.core.errors import ConfigError, SupervisorUnavailable
from agentqd.core.limits import SINK_ERROR_CHARS_MAX
from agentqd.core.settings import Sink as SinkSettings
from agentqd.core.units import Duration
from agentqd.sinks.base import Context, Deferred, Delivered, ExecResult, Outcome, Rejected
from agentqd.sinks.command import CommandSink, outcome_of

from .adapters import run_command
from .conformance import delivery


def sink_of(
    command: list[str], execute: Any = run_command, timeout_s: float | None = None, **environ: str
) -> CommandSink:
    timeout = None if timeout_s is None else Duration(timeout_s)
    settings = SinkSettings(type="command", command=command, timeout=timeout)
    return CommandSink(Context("cmd", settings, "/nowhere", execute, lambda: 0), environ or None)


@pytest.mark.parametrize(
    ("ended", "outcome"),
    [
        (ExecResult(0), Delivered()),
        (ExecResult(0, output="anything"), Delivered()),
        (ExecResult(100, output="no such user\nmore"), Rejected("exit 100: no such user")),
        (ExecResult(75, output="\n\n later \n"), Deferred("exit 75: later")),
        (ExecResult(1), Deferred("exit 1")),
        (ExecResult(111, output="\x1b[31mred\x07\u202e"), Deferred("exit 111: [31mred")),
        (ExecResult(None, signal=9), Deferred("killed by SIGKILL")),
        (ExecResult(None, signal=999), Deferred("killed by signal 999")),
        (ExecResult(0, timed_out=True), Deferred("timed out")),
        (ExecResult(None, signal=9, timed_out=True, output="x"), Deferred("timed out: x")),
        (ExecResult(None, error="no such file"), Deferred("cannot start: no such file")),
        (ExecResult(0, error="half started"), Deferred("cannot start: half started")),
        (ExecResult(None), Deferred("ended in an unknown way")),
    ],
)
def test_only_0_is_a_yes_only_100_a_no_and_all_else_is_later(ended: ExecResult, outcome: Outcome) -> None:
    assert outcome_of(ended) == outcome


def test_a_long_reason_is_cut() -> None:
    outcome = outcome_of(ExecResult(1, output="é" * 10_000))
    assert isinstance(outcome, Deferred)
    assert len(outcome.reason) == SINK_ERROR_CHARS_MAX


async def test_the_entry_is_on_stdin_and_the_ids_are_in_the_environment(tmp_path: Path) -> None:
    program = "import json,os,sys; json.dump([sys.stdin.read(), dict(os.environ)], open(sys.argv[1], 'w'))"
    sink = sink_of(
        [sys.executable, "-c", program, str(tmp_path / "got")],
        PATH="/bin",
        HOME="/h",
        SECRET="s",
        LANG="C.UTF-8",
    )
    one = delivery(1, attempts=2)
    assert await sink.deliver([one]) == [Delivered()]
    stdin, env = json.loads((tmp_path / "got").read_text())
    assert stdin.encode() == one.payload
    assert {name: value for name, value in env.items() if name.startswith("AGENTQ_")} == {
        "AGENTQ_DELIVERY_ID": one.delivery_id,
        "AGENTQ_TYPE": "agentq.task.entry",
        "AGENTQ_TASK_ID": "t1",
        "AGENTQ_KEY": "reply-1.txt",
        "AGENTQ_ATTEMPT": "3",
    }
    assert (env["PATH"], env["HOME"], env["LANG"]) == ("/bin", "/h", "C.UTF-8")
    assert "SECRET" not in env, "the daemon's environment is not handed on"


async def test_a_program_that_does_not_exist_is_deferred_with_the_reason() -> None:
    (outcome,) = await sink_of(["/nowhere/at/all"]).deliver([delivery(1)])
    assert isinstance(outcome, Deferred)
    assert "cannot start" in outcome.reason
    assert "/nowhere/at/all" in outcome.reason


async def test_a_program_that_hangs_is_ended_at_the_time_limit() -> None:
    sink = sink_of(["/bin/sleep", "1000"], timeout_s=0.1)
    assert await sink.deliver([delivery(1)]) == [Deferred("timed out")]
    assert sink.timeout_s > 0.1, "the loop waits longer than the command may take"


async def test_without_a_supervisor_it_is_deferred() -> None:
    async def away(*_: Any, **__: Any) -> ExecResult:
        raise SupervisorUnavailable("it is being replaced")

    assert await sink_of(["x"], away).deliver([delivery(1)]) == [
        Deferred("no supervisor: it is being replaced")
    ]


async def test_a_key_that_no_environment_can_hold_is_still_delivered() -> None:
    import msgspec

    odd = msgspec.structs.replace(delivery(1), key="a\0b\udcff", task_id=None)
    assert await sink_of(["/bin/true"]).deliver([odd]) == [Delivered()]


def test_without_a_command_it_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="needs a command"):
        sink_of([])
