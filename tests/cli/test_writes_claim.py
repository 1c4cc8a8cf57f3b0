"""`agentqctl writes claim`: what it asks for, what becomes of COMMAND, and how it ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from .conftest import Ctl, Process
from .standin import StandIn, error, hang_up

ASK = ("POST", "/v1/writes/claims")


def says(*states: str) -> tuple[list[str], Any]:
    """A handler that answers these states in turn (the last one for ever), and what it has answered."""
    told: list[str] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        told.append(states[min(len(told), len(states) - 1)])
        other = {"task_id": "t1", "task": "a", "path": "/srv"}
        conflicts = [other] if told[-1] == "waiting" else []
        return web.json_response({"claim_id": "claim-x", "state": told[-1], "conflicts": conflicts})

    return told, handler


@pytest.fixture
def held(daemon: StandIn) -> StandIn:
    daemon.answers[ASK] = says("held")[1]
    return daemon


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_asks_for_absolute_paths_by_the_commands_name_and_tells_nobody_its_arguments(
    ctl: Ctl, held: StandIn
) -> None:
    done = ctl("writes", "claim", "a", "/b", "--", "/bin/echo", "--json", "--", "secret")
    assert (done.code, done.out) == (0, "--json -- secret\n")
    ((_, body),) = held.requests(*ASK)
    assert re.fullmatch(r"claim-[0-9a-f]{16}", body.pop("id"))
    assert body == {"name": "echo", "paths": [f"{os.path.realpath(ctl.root)}/a", "/b"]}
    ctl("writes", "claim", "/b", "--name", "me", "--on-conflict", "warn", "--", "true")
    assert held.requests(*ASK)[1][1] | {"id": ""} == {
        "id": "",
        "name": "me",
        "paths": ["/b"],
        "on_conflict": "warn",
    }


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 7", 7),
        ("kill -TERM $$", 143),
        ("kill -PIPE $$", 141),
        ("test $AGENTQ_CLAIM_ID", 0),
        ("exit 255", 255),
    ],
)
def test_it_ends_as_its_command_does(ctl: Ctl, held: StandIn, script: str, code: int) -> None:
    assert ctl("writes", "claim", "/p", "--", "sh", "-c", script).code == code


@pytest.mark.parametrize(
    ("command", "code"), [("no-such-command", 127), ("/etc/hostname", 126), ("/etc", 126)]
)
def test_a_command_that_cannot_be_executed_is_told_as_a_shell_tells_it(
    ctl: Ctl, held: StandIn, command: str, code: int
) -> None:
    done = ctl("writes", "claim", "/p", "--", command)
    assert (done.code, command in done.err) == (code, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/p"], "say what to run"),
        (["/p", "--"], "say what to run"),
        (["--", "true"], "PATH"),
        (["/p", "--wait", "5s", "--on-conflict", "refuse", "--", "true"], "--wait goes with"),
        (["/p", "--wait", "soon", "--", "true"], "--wait"),
        (["/p", "--on-conflict", "ask", "--", "true"], "--on-conflict"),
        (["/p", "--box", "b", "--", "true"], "on the box itself"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error_and_runs_nothing(
    ctl: Ctl, held: StandIn, words: list[str], message: str
) -> None:
    done = ctl("writes", "claim", *words)
    assert (done.code, message in done.err) == (2, True), done.err
    assert held.seen == []


def test_a_refusal_names_who_stands_in_the_way_and_runs_nothing(ctl: Ctl, daemon: StandIn) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        return error(409, "write_conflict", "no", conflicts=[{"task_id": "t1", "task": "a", "path": "/srv"}])

    daemon.answers[ASK] = refuse
    done = ctl("writes", "claim", "/srv", "--", "touch", "ran")
    assert (done.code, "t1 (a) writes /srv" in done.err, os.path.exists(f"{ctl.root}/ran")) == (
        75,
        True,
        False,
    )
    assert ctl("writes", "claim", "/srv", "--json", "--", "true").json["conflicts"][0]["task_id"] == "t1"


def test_without_a_daemon_nothing_runs(ctl: Ctl) -> None:
    assert ctl("writes", "claim", "/p", "--", "touch", "ran").code == 69
    assert not os.path.exists(f"{ctl.root}/ran")


def test_a_lost_answer_is_asked_for_again_with_the_same_id(ctl: Ctl, daemon: StandIn) -> None:
    answer = says("held")[1]

    async def lose_the_first(request: web.Request) -> web.StreamResponse:
        return await (hang_up if len(daemon.requests(*ASK)) == 1 else answer)(request)

    daemon.answers[ASK] = lose_the_first
    assert ctl("writes", "claim", "/p", "--", "true").code == 0
    first, second = (body["id"] for _, body in daemon.requests(*ASK))
    assert first == second


def test_it_waits_in_the_queue_and_says_for_whom(ctl: Ctl, daemon: StandIn) -> None:
    told, answer = says("waiting", "waiting", "held")
    first = says("waiting")[1]

    async def ask(request: web.Request) -> web.StreamResponse:
        claim_id = (await request.json())["id"]
        daemon.answers[("GET", f"/v1/writes/claims/{claim_id}")] = answer
        return await first(request)

    daemon.answers[ASK] = ask
    done = ctl("writes", "claim", "/p", "--wait", "20s", "--", "echo", "mine")
    assert (done.code, done.out, done.err) == (0, "mine\n", "waiting for t1 (a), which writes /srv\n")
    assert told == ["waiting", "waiting", "held"]
    assert daemon.requests(*ASK)[0][1]["on_conflict"] == "queue"


def start(ctl: Ctl, script: str) -> Process:
    process = ctl.popen("writes", "claim", "/p", "--", "sh", "-c", script, start_new_session=True)
    until(lambda: os.path.exists(f"{ctl.root}/up"))
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_agentqctl_is_its_commands(ctl: Ctl, held: StandIn, number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    with start(ctl, f"trap 'exit 9' {name}; touch up; while :; do sleep 0.05; done") as process:
        process.send_signal(number)
        assert process.wait(20) == 9


def test_ctrl_c_is_its_commands_and_agentqctl_waits_for_what_it_makes_of_it(ctl: Ctl, held: StandIn) -> None:
    with start(ctl, "trap 'sleep 0.2; exit 4' INT; touch up; while :; do sleep 0.05; done") as process:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(20) == 4


def test_its_command_is_ended_when_agentqctl_is_killed(ctl: Ctl, held: StandIn) -> None:
    with start(
        ctl, f"trap 'touch {ctl.root}/told; exit' TERM; touch up; while :; do sleep 0.05; done"
    ) as process:
        process.kill()
        process.wait(20)
        try:
            until(lambda: os.path.exists(f"{ctl.root}/told"))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
