from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable

import pytest
from aiohttp import web

from agentqd.client.errors import AnswerLost
from agentqd.client.patience import Patience
from agentqd.client.tasks import exit_code_of

from .conftest import Ctl
from .standin import StandIn, a_task, hang_up


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("result", "code", "exit_code"),
    [("success", 0, 0), ("failed", 3, 3), ("failed", None, 125), ("failed", 0, 125), ("timeout", None, 124), ("cancelled", None, 125), ("lost", None, 125), ("no_work", 0, 125), ("spawn_failed", None, 125)],
)  # fmt: skip
def test_wait_exits_as_the_design_says(result: str, code: int | None, exit_code: int) -> None:
    assert exit_code_of({"finished": True, "result": result, "exit_code": code}) == exit_code


def test_wait_for_several_exits_as_the_first_that_did_not_succeed(ctl: Ctl, daemon: StandIn) -> None:
    daemon.tasks = {
        "a": a_task("a"),
        "b": a_task("b", result="timeout", reason="run_timeout"),
        "c": a_task("c", result="lost"),
    }
    done = ctl("wait", "a", "b", "c", "--json")
    assert (done.code, [end["result"] for end in done.json]) == (124, ["success", "timeout", "lost"])
    assert ctl("wait", "a").out == "a  success\n"
    assert ctl("wait", "nope").code == 66


def test_wait_for_several_looks_at_all_before_it_waits_for_the_first(ctl: Ctl, daemon: StandIn) -> None:
    daemon.tasks["long"] = a_task("long", state="running", result=None)
    done = ctl("wait", "long", "nope")
    assert (done.code, done.out) == (66, "")
    assert "nope" in done.err
    done = ctl("wait", "long", "nope", "--timeout", "20s", "--json")
    assert (done.code, done.json["error"]) == (66, "no_such_task")


def test_wait_gives_up_after_its_timeout_and_the_task_goes_on(ctl: Ctl, daemon: StandIn) -> None:
    daemon.tasks["a"] = a_task("a", state="running", result=None)
    done = ctl("wait", "a", "--timeout", "300ms", "--json")
    assert (done.code, done.json["finished"], done.json["state"]) == (124, False, "running")
    assert ctl("wait", "a", "--timeout", "soon").code == 2


def test_wait_outlasts_a_restart_of_the_daemon(ctl: Ctl, daemon: StandIn) -> None:
    async def sit_on_it(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(3600)  # the restart comes in the middle of a question
        return web.Response()

    daemon.answers[("GET", "/v1/tasks/a/wait")] = sit_on_it
    with ctl.popen("wait", "a", "--json") as process:
        wait_until(lambda: bool(daemon.requests("GET", "/v1/tasks/a/wait")))
        daemon.stop()
        again = StandIn(ctl.socket)
        again.tasks["a"] = a_task("a")
        again.start()
        out, _ = process.communicate(timeout=20)
        again.stop()
    assert (process.returncode, json.loads(out)["result"]) == (0, "success")


def test_patience_bears_failures_for_its_limit_and_starts_anew_after_a_success() -> None:
    now = [0.0]
    patience = Patience(
        60.0, clock=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + max(seconds, 0.001))
    )
    lost = AnswerLost("gone")
    while now[0] < 50:
        patience.bear(lost)
    patience.succeeded()
    started = now[0]
    with contextlib.suppress(AnswerLost):
        while now[0] - started < 100:
            patience.bear(lost)
    assert 60 <= now[0] - started < 62


def test_logs_are_the_workers_bytes_unchanged(ctl: Ctl, daemon: StandIn) -> None:
    daemon.tasks["a"] = a_task("a")
    daemon.output[1] = bytes(range(256)) + b"\r\n\x1b[31m"
    with ctl.popen("logs", "a") as process:
        assert process.communicate(timeout=20)[0] == daemon.output[1]
    ctl("logs", "a", "--stderr", "--attempt", "1")
    assert {query["stream"] for query, _ in daemon.requests("GET", "/v1/tasks/a/logs")} == {
        "stdout",
        "stderr",
    }


def test_logs_f_follows_over_attempts_until_the_task_is_finished(ctl: Ctl, daemon: StandIn) -> None:
    first = a_task()["attempts"][0]
    daemon.tasks["a"] = a_task("a", state="queued", result=None, attempts=[])
    with ctl.popen("logs", "a", "-f") as process:
        wait_until(lambda: bool(daemon.requests("GET", "/v1/tasks/a")))
        daemon.output[1] = b"first attempt\n"
        daemon.tasks["a"] |= {"state": "retryable", "attempts": [first]}
        wait_until(lambda: bool(daemon.requests("GET", "/v1/tasks/a/logs")))
        daemon.output[2] = b"second attempt\n"
        daemon.tasks["a"] |= {
            "state": "finished",
            "result": "success",
            "attempts": [first, {**first, "attempt": 2}],
        }
        out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, b"first attempt\nsecond attempt\n")


def test_logs_f_goes_on_where_it_stopped_when_the_connection_breaks(ctl: Ctl, daemon: StandIn) -> None:
    daemon.tasks["a"] = a_task("a")
    daemon.output[1] = b"0123456789abcdef"
    count = [0]
    where = ("GET", "/v1/tasks/a/logs")

    async def every_other_time(request: web.Request) -> web.StreamResponse:
        count[0] += 1
        if count[0] % 2:
            return await hang_up(request)
        return daemon._get_tasks(request, ["a", "logs"], None)

    daemon.answers[where] = every_other_time
    with ctl.popen("logs", "a", "-f") as process:
        assert process.communicate(timeout=20)[0] == b"0123456789abcdef"


def test_logs_says_where_the_middle_was_left_out(ctl: Ctl, daemon: StandIn) -> None:
    async def punched(request: web.Request) -> web.StreamResponse:
        headers = {
            "Agentq-Offset": "500",
            "Agentq-Next-Offset": "504",
            "Agentq-Truncated": "true",
            "Agentq-End": "true",
        }
        return web.Response(body=b"tail", headers=headers)

    daemon.answers[("GET", "/v1/tasks/a/logs")] = punched
    done = ctl("logs", "a")
    assert done.out == "tail"
    assert "500 bytes were left out" in done.err


def completions(count: int) -> list[dict[str, object]]:
    return [
        {"seq": seq, "task_id": f"t{seq}", "name": "n", "status": "success", "pulled": False}
        for seq in range(1, count + 1)
    ]


def test_pull_prints_every_row_in_order_and_then_acknowledges(ctl: Ctl, daemon: StandIn) -> None:
    daemon.completions = completions(2500)
    done = ctl("pull", "--consumer", "mine")
    assert [json.loads(line)["seq"] for line in done.out.splitlines()] == list(range(1, 2501))
    assert daemon.acknowledged == {"mine": 2500}
    assert ctl("pull", "--consumer", "mine").out == ""
    assert len(ctl("pull", "--limit", "3").out.splitlines()) == 3
    assert daemon.acknowledged["default"] == 3


def test_pull_no_ack_only_looks(ctl: Ctl, daemon: StandIn) -> None:
    daemon.completions = completions(1500)
    assert len(ctl("pull", "--no-ack", "--json").out.splitlines()) == 1500
    assert daemon.acknowledged == {}


def test_pull_acknowledges_nothing_that_nobody_read(ctl: Ctl, daemon: StandIn) -> None:
    daemon.completions = completions(5)
    reader, writer = os.pipe()
    os.close(reader)
    with ctl.popen("pull", stdout=writer) as process:
        os.close(writer)
        assert process.communicate(timeout=20)[1] == b""
    assert process.returncode == 141
    with open("/dev/full", "wb") as full, ctl.popen("pull", stdout=full) as process:
        process.communicate(timeout=20)
    assert process.returncode == 1
    assert daemon.acknowledged == {}


def test_pull_fsyncs_a_file_before_it_acknowledges(ctl: Ctl, daemon: StandIn) -> None:
    daemon.completions = completions(3)
    seen_at_ack: list[bytes] = []
    path = f"{ctl.root}/results.jsonl"

    async def look(request: web.Request) -> web.StreamResponse:
        with open(path, "rb") as file:
            seen_at_ack.append(file.read())
        return daemon._post_consumers(request, ["default"], await request.json())

    daemon.answers[("POST", "/v1/consumers/default/ack")] = look
    trace = f"{ctl.root}/trace"
    with open(path, "wb") as file:
        strace = ["strace", "-f", "-e", "trace=fsync,sendto", "-o", trace] if _has_strace() else []
        from .conftest import PROGRAM

        subprocess.run(
            [*strace, *PROGRAM, "pull"],
            stdout=file,
            env=ctl.environment(),
            cwd=ctl.root,
            timeout=30,
            check=True,
        )
    assert seen_at_ack[0].count(b"\n") == 3
    if strace:
        with open(trace) as lines:
            calls = [line for line in lines if "fsync" in line or "/ack" in line]
        assert "fsync" in calls[0]


def _has_strace() -> bool:
    import shutil

    return shutil.which("strace") is not None


def test_pull_follow_prints_what_comes_and_an_interrupt_is_quiet(ctl: Ctl, daemon: StandIn) -> None:
    async def late(request: web.Request) -> web.StreamResponse:
        if not daemon.completions:
            return web.json_response({"consumer": "default", "acknowledged": 0, "rows": [], "more": False})
        return daemon._get_completions(request, [], None)

    daemon.answers[("GET", "/v1/completions")] = late
    with ctl.popen("pull", "--follow") as process:
        wait_until(lambda: bool(daemon.requests("GET", "/v1/completions")))
        daemon.completions = completions(1)
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["seq"] == 1
        wait_until(lambda: daemon.acknowledged == {"default": 1})
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_an_interrupt_at_any_moment_exits_130_without_a_word(ctl: Ctl, daemon: StandIn) -> None:
    daemon.tasks["a"] = a_task("a", state="running", result=None)
    block = threading.Event()

    async def hang(request: web.Request) -> web.StreamResponse:
        while not block.is_set():
            await asyncio.sleep(0.02)
        return web.Response()

    daemon.answers[("GET", "/v1/tasks/a/wait")] = hang
    with ctl.popen("wait", "a") as process:
        wait_until(lambda: bool(daemon.requests("GET", "/v1/tasks/a/wait")))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    block.set()
    assert (process.returncode, out, err) == (130, b"", b"")


def offer_slowly(daemon: StandIn, content: bytes) -> None:
    """One result with a stdout that takes its time."""
    row = {
        "seq": 1,
        "task_id": "t",
        "name": "big \x1b[31m",
        "status": "success",
        "attempt": 1,
        "delivery_id": "d1",
    }
    daemon.completions = [row]

    async def listing(_: web.Request) -> web.StreamResponse:
        item = {
            "file": "stdout",
            "kind": "stream",
            "name": "stdout",
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        return web.json_response({"files": [item]})

    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(
            status=206, headers={"Content-Range": f"bytes 0-{len(content) - 1}/{len(content)}"}
        )
        response.content_length = len(content)
        await response.prepare(request)
        for place in range(0, len(content), 1000):
            await response.write(content[place : place + 1000])
            await asyncio.sleep(0.15)
        return response

    daemon.answers[("GET", "/v1/tasks/t/attempts/1/files")] = listing
    daemon.answers[("GET", "/v1/tasks/t/attempts/1/files/stdout")] = slow


def test_pull_to_shows_a_bar_on_a_terminal_and_none_in_a_pipe(ctl: Ctl, daemon: StandIn) -> None:
    offer_slowly(daemon, b"x" * 5000)
    shown = ctl.on_terminal("pull", "--to", "results", columns=100).out
    assert "% " in shown
    assert "4.9 KiB" in shown
    assert "big \\x1b[31m" in shown
    assert "\x1b[31m" not in shown
    daemon.acknowledged.clear()
    done = ctl("pull", "--to", "elsewhere")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["dir"] == f"{ctl.root}/elsewhere/big___31m-t"


def test_the_end_of_a_refused_task_says_what_stood_in_its_way(ctl: Ctl, daemon: StandIn) -> None:
    async def refused(_: web.Request) -> web.StreamResponse:
        return web.json_response({
            "id": "t1", "state": "finished", "result": "refused", "reason": "write_conflict", "exit_code": None,
            "detail": "it wants to write /w, which task t0 (a) has claimed as /w", "finished": True,
            "conflicts": [{"task_id": "t0", "task": "a", "path": "/w"}],
        })  # fmt: skip

    daemon.answers[("GET", "/v1/tasks/t1/wait")] = refused
    done = ctl("wait", "t1")
    assert done.code == 125
    assert done.out.splitlines()[0] == "t1  refused (write_conflict)"
    assert "which task t0 (a) has claimed as /w" in done.out
    assert ctl("wait", "t1", "--json").json["conflicts"][0]["task_id"] == "t0"


def test_pulls_table_names_the_task_that_a_refused_one_has_met(ctl: Ctl, daemon: StandIn) -> None:
    daemon.completions = [{
        "seq": 1, "task_id": "t1", "name": "n", "status": "refused", "reason": "write_conflict", "pulled": False,
        "conflicts": [{"task_id": "t0", "task": "a", "path": "/w"}],
    }]  # fmt: skip
    assert "refused (write_conflict with t0)" in ctl.on_terminal("pull", columns=120).out
