from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest
from aiohttp import web

from agentqd.client.channel import UnixTransport
from agentqd.core.errors import NotPermitted
from agentqd.core.task import read_task

from .conftest import Ctl
from .standin import StandIn, a_task, error, hang_up

SUBMIT = ("POST", "/v1/tasks")


def sent(daemon: StandIn) -> dict[str, Any]:
    """The one task that was sent."""
    ((_, body),) = daemon.requests(*SUBMIT)
    return dict(body)


def queued(ctl: Ctl) -> list[dict[str, Any]]:
    with open(ctl.queue_file, "rb") as file:
        return [json.loads(line) for line in file.read().split(b"\n") if line]


def test_submit_sends_an_id_a_time_and_a_name_made_of_the_first_words(ctl: Ctl, daemon: StandIn) -> None:
    done = ctl(
        "submit",
        "Fix the parser.\nThen run all of the tests again, please, and write down what failed",
        "--json",
    )
    assert done.code == 0
    body = sent(daemon)
    assert re.fullmatch(r"[0-9a-z]{20}", body["id"])
    assert body["task"] == "Fix the parser. Then run all of the"
    assert body["submitted_at"].endswith("Z")
    assert done.json == {
        "task_id": body["id"],
        "state": "queued",
        "result": None,
        "duplicate": False,
        "where": "accepted",
    }


def test_every_option_reaches_the_task_that_the_daemon_would_accept(ctl: Ctl, daemon: StandIn) -> None:
    options = (
        "--task n --id my-id --runner r --queue q --priority 5 --label a --label b --env K=V=1 --timeout 45m --total-timeout 2h "
        "--queue-timeout 1h --silence-timeout 5m --first-output-timeout 1m --kill-grace 3s --max-attempts 3 --backoff 1s,5s "
        "--on-lost requeue --on-conflict queue --intent-ttl 30m --not-before 2030-01-01T00:00:00Z --expires-at 2031-01-01T00:00:00Z --after x "
        "--after y --after-policy any --deliver-to hook --deliver-within 10m --dedup-ttl 1d --expect-file out.txt --allow-no-work"
    )
    assert ctl("submit", *options.split(), "do it").code == 0
    body = sent(daemon)
    read_task(json.dumps(body).encode())
    del body["submitted_at"]
    assert body == {
        "task": "n", "id": "my-id", "prompt": "do it", "runner": "r", "queue": "q", "priority": 5, "labels": ["a", "b"],
        "env": {"K": "V=1"}, "run_timeout": "45m", "total_timeout": "2h", "queue_timeout": "1h", "silence_timeout": "5m",
        "first_output_timeout": "1m", "kill_grace": "3s", "max_attempts": 3, "backoff": ["1s", "5s"], "on_lost": "requeue",
        "on_conflict": "queue", "intent_ttl": "30m", "not_before": "2030-01-01T00:00:00Z", "expires_at": "2031-01-01T00:00:00Z", "after": ["x", "y"],
        "after_policy": "any", "deliver_to": ["hook"], "deliver_within": "10m", "dedup_ttl": "1d",
        "expect": {"files": ["out.txt"], "allow_no_work": True},
    }  # fmt: skip


def test_paths_are_made_absolute_from_the_callers_folder_but_writes_below_a_workdir_stay_as_typed(
    ctl: Ctl, daemon: StandIn
) -> None:
    ctl("submit", "--workdir", "repo", "--writes", "src", "--writes", "/etc/x", "p")
    ctl("submit", "--writes", "src/*.py", "p")
    first, second = (body for _, body in daemon.requests(*SUBMIT))
    assert first["workdir"] == f"{ctl.root}/repo"
    assert first["writes_to"] == ["src", "/etc/x"]  # as typed: the box takes it from the workdir
    assert "workdir" not in second
    assert second["writes_to"] == [f"{ctl.root}/src/*.py"]


def test_an_argv_goes_through_untouched(ctl: Ctl, daemon: StandIn) -> None:
    ctl("submit", "--command", "--", "sh", "-c", "echo --json 'a  b'", "--wait")
    body = sent(daemon)
    assert body["command"] == ["sh", "-c", "echo --json 'a  b'", "--wait"]
    assert body["task"] == "sh -c echo --json 'a b' --wait"


def test_the_prompt_comes_from_a_file_or_from_stdin_byte_for_byte(ctl: Ctl, daemon: StandIn) -> None:
    text = "line one\n\tünï — 日本\r\n"
    with open(f"{ctl.root}/p.md", "wb") as file:
        file.write(text.encode())
    ctl("submit", "--prompt-file", "p.md")
    ctl("submit", "--prompt-file", "-", stdin=text.encode())
    assert [body["prompt"] for _, body in daemon.requests(*SUBMIT)] == [text, text]


def test_a_prompt_that_is_not_utf8_is_refused_before_anything_is_sent(ctl: Ctl, daemon: StandIn) -> None:
    done = ctl("submit", "--prompt-file", "-", "--json", stdin=b"abc\xff")
    assert (done.code, done.json["error"]) == (65, "invalid_utf8")
    assert not daemon.seen


@pytest.mark.parametrize("args", [[], ["two", "words"], ["--command"], ["--prompt-file", "x", "y"], ["--env", "novalue", "p"], ["--bogus", "p"], ["--follow", "--json", "p"]])  # fmt: skip
def test_wrong_usage_exits_2_and_sends_nothing(ctl: Ctl, daemon: StandIn, args: list[str]) -> None:
    done = ctl("submit", *args)
    assert done.code == 2
    assert (done.out == "") == ("--json" not in args)
    assert not daemon.seen


def test_a_lost_answer_sends_the_same_bytes_with_the_same_id_again(ctl: Ctl, daemon: StandIn) -> None:
    async def take_and_hang_up(request: web.Request) -> web.StreamResponse:
        del daemon.answers[SUBMIT]
        body = await request.json()
        daemon.tasks[body["id"]] = a_task(body["id"], state="running", result=None)
        return await hang_up(request)

    daemon.answers[SUBMIT] = take_and_hang_up
    done = ctl("submit", "p", "--json")
    first, second = (body for _, body in daemon.requests(*SUBMIT))
    assert first == second
    assert (done.code, done.json["task_id"], done.json["duplicate"]) == (0, first["id"], True)
    assert not os.path.exists(ctl.queue_file)


def test_a_daemon_that_never_answers_leaves_the_task_in_the_queue_file_with_the_same_id(
    ctl: Ctl, daemon: StandIn
) -> None:
    daemon.answers[SUBMIT] = hang_up
    done = ctl("submit", "p", "--json")
    assert (done.code, done.json["where"]) == (0, "queue_file")
    bodies = [body for _, body in daemon.requests(*SUBMIT)]
    assert len(bodies) > 1
    assert all(body == bodies[0] for body in bodies)
    assert queued(ctl) == [bodies[0]]


@pytest.mark.parametrize("stale", [False, True])
def test_without_a_daemon_the_task_goes_into_the_queue_file_and_it_says_so(
    ctl: Ctl, daemon: StandIn, stale: bool
) -> None:
    daemon.stop()
    if stale:  # a daemon that was killed leaves its socket behind
        import socket

        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(ctl.socket)
    done = ctl("submit", "p", "--json")
    (line,) = queued(ctl)
    assert done.code == 0
    assert done.json["task_id"] == line["id"]
    assert (done.json["where"], done.json["state"], done.json["result"]) == ("queue_file", None, None)
    said = ctl("submit", "p")
    assert said.out.strip() == queued(ctl)[1]["id"]
    assert ctl.queue_file in said.err


def test_without_a_daemon_and_without_a_state_folder_one_is_made_private(ctl: Ctl) -> None:
    os.rmdir(f"{ctl.state}/queue")
    os.rmdir(ctl.state)
    assert ctl("submit", "p").code == 0
    assert [
        oct(os.stat(path).st_mode & 0o777) for path in (ctl.state, f"{ctl.state}/queue", ctl.queue_file)
    ] == ["0o700", "0o700", "0o600"]


def test_without_a_daemon_a_bad_task_is_refused_here_and_not_appended(ctl: Ctl) -> None:
    done = ctl("submit", "p", "--timeout", "soon", "--json")
    assert (done.code, done.json["field"]) == (65, "run_timeout")
    assert not os.path.exists(ctl.queue_file)


def test_without_a_daemon_a_prompt_too_long_for_a_line_goes_to_the_prompts_folder(ctl: Ctl) -> None:
    prompt = b"word " * 300_000
    done = ctl("submit", "--prompt-file", "-", "--json", stdin=prompt)
    (line,) = queued(ctl)
    assert "prompt" not in line
    with open(f"{ctl.state}/prompts/{line['prompt_ref']}", "rb") as file:
        assert file.read() == prompt
    assert done.json["task_id"] == line["id"]


def test_a_socket_of_an_unknown_daemon_never_leads_to_another_daemons_queue_file(ctl: Ctl) -> None:
    ctl.env = {"AGENTQD_STATE_DIR": "", "AGENTQD_RUNTIME_DIR": "", "XDG_STATE_HOME": f"{ctl.root}/xdg"}
    done = ctl("submit", "p", "--socket", f"{ctl.root}/elsewhere.sock", "--json")
    assert (done.code, done.json["error"]) == (69, "unreachable")
    assert "--state-dir" in done.json["message"]


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [(422, "unknown_field", 65), (409, "id_conflict", 65), (409, "write_conflict", 75), (503, "refused_for_now", 75), (403, "not_permitted", 77)],
)  # fmt: skip
def test_the_daemons_no_is_final_and_keeps_its_code(
    ctl: Ctl, daemon: StandIn, status: int, code: str, exit_code: int
) -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return error(status, code, "because", conflicts=[{"task_id": "t1", "task": "other", "path": "/srv"}])

    daemon.answers[SUBMIT] = refuse
    done = ctl("submit", "p", "--json")
    assert (done.code, done.json["error"], done.json["conflicts"][0]["task_id"]) == (exit_code, code, "t1")
    text = ctl("submit", "p")
    assert text.out == ""
    assert "because" in text.err
    assert "t1 (other) writes /srv" in text.err
    assert not os.path.exists(ctl.queue_file)


def test_a_socket_that_is_closed_to_us_exits_77_and_names_the_group(ctl: Ctl, daemon: StandIn) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to become somebody else")
    for path in (ctl.root, f"{ctl.root}/run"):
        os.chmod(path, 0o755)
    os.chmod(ctl.socket, 0o600)
    child = os.fork()  # the interpreter itself may lie where nobody else can start it
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            UnixTransport([ctl.socket]).open()
        except NotPermitted as refused:
            os._exit(refused.exit_code if "control.group" in refused.message else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77


def test_submit_wait_exits_as_the_task_did(ctl: Ctl, daemon: StandIn) -> None:
    daemon.tasks["mine"] = a_task("mine", result="failed", reason="exit_code")
    daemon.tasks["mine"]["attempts"][0]["exit_code"] = 7
    done = ctl("submit", "--id", "mine", "p", "--wait", "--json")
    assert (done.code, done.json["task_id"], done.json["result"], done.json["exit_code"]) == (
        7,
        "mine",
        "failed",
        7,
    )


def test_submit_follow_prints_the_workers_bytes_and_exits_as_it_did(ctl: Ctl, daemon: StandIn) -> None:
    daemon.tasks["mine"] = a_task("mine")
    daemon.output[1] = b"one line\nand half of another \xff"
    with ctl.popen("submit", "--id", "mine", "p", "--follow") as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, daemon.output[1])
    assert b"mine  success" in err
