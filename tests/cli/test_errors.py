from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from aiohttp import web
from budget import tries
from hypothesis import given, settings
from hypothesis import strategies as st

from agentqd.client.errors import AnswerLost, BadAnswer
from agentqd.client.http import exchange, make_target

from .conftest import PROGRAM, Ctl
from .standin import StandIn, a_task

GARBAGE = {
    "nothing": b"",
    "ssh": b"SSH-2.0-OpenSSH_9.9\r\n",
    "noise": bytes(range(256)) * 300,
    "html": b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>",
    "no length": b"HTTP/1.1 200 OK\r\n\r\n{}",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "both": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    "short": b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n{}",
    "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "chunk too long": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{}\r\n0\r\n\r\n",
    "huge head": b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 200_000,
    "negative": b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}",
    "huge": b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999999\r\n\r\n{}",
    "half a head": b"HTTP/1.1 200",
    "a list": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
    "an error without an object": b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nno",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_from_the_socket_is_one_clear_line_and_exit_69(
    ctl: Ctl, says: Callable[[bytes], None], name: str
) -> None:
    says(GARBAGE[name])
    done = ctl("status", "--json")
    assert done.code == 69
    assert done.json["error"] in ("bad_answer", "answer_lost")
    assert done.err == ""


@pytest.mark.parametrize("name", ["ssh", "html", "a list"])
def test_submit_to_something_that_is_not_agentqd_never_falls_back_in_silence(
    ctl: Ctl, says: Callable[[bytes], None], name: str
) -> None:
    says(GARBAGE[name])
    assert ctl("submit", "p").code == 69
    assert not os.path.exists(ctl.queue_file)


@pytest.mark.parametrize("verb", [["status"], ["list"], ["show", "x"], ["cancel", "x"], ["outbox"], ["pull"], ["logs", "x"], ["drain"], ["audit", "verify"]], ids=" ".join)  # fmt: skip
def test_with_the_daemon_down_verbs_exit_69_and_say_what_to_do(ctl: Ctl, verb: list[str]) -> None:
    done = ctl(*verb)
    assert (done.code, done.out) == (69, "")
    assert "agentqctl doctor" in done.err
    if verb[0] != "logs":
        as_json = ctl(*verb, "--json")
        assert (as_json.code, as_json.json["error"], as_json.err) == (69, "unreachable", "")


@pytest.mark.parametrize(
    "args",
    [["bogus"], ["list", "--bogus"], ["show"], ["list", "--limit", "x"], ["outbox", "bogus"], ["wait"]],
    ids=" ".join,
)
def test_wrong_usage_exits_2_as_text_or_as_json(ctl: Ctl, args: list[str]) -> None:
    text = ctl(*args)
    assert (text.code, text.out) == (2, "")
    assert "--help" in text.err
    as_json = ctl(*args, "--json")
    assert (as_json.code, as_json.json["error"], as_json.err) == (2, "usage", "")


def test_a_misspelt_verb_names_the_nearest(ctl: Ctl) -> None:
    assert "Did you mean status?" in ctl("sttus").err


def test_the_socket_is_found_by_option_variable_and_folder(ctl: Ctl, daemon: StandIn) -> None:
    nowhere = f"{ctl.root}/nowhere"
    ctl.env = {
        "AGENTQD_RUNTIME_DIR": "",
        "AGENTQD_STATE_DIR": "",
        "AGENTQD_SOCKET": f"{nowhere}.sock",
        "XDG_RUNTIME_DIR": nowhere,
    }
    assert ctl("status").code == 69
    assert ctl("--socket", ctl.socket, "status").code == 0
    assert ctl("status", "--socket", ctl.socket).code == 0
    ctl.env["AGENTQD_SOCKET"] = ""
    assert ctl("--runtime-dir", f"{ctl.root}/run", "status").code == 0
    ctl.env["AGENTQD_RUNTIME_DIR"] = f"{ctl.root}/run"
    assert ctl("status").code == 0
    ctl.env |= {"AGENTQD_RUNTIME_DIR": nowhere, "AGENTQD_SOCKET": ctl.socket}
    assert ctl("status").code == 0


def test_a_user_is_served_by_their_own_daemon_and_else_by_the_systems() -> None:
    from agentqd.client.box import Where, candidate_folders

    env = {"HOME": "/home/u", "XDG_RUNTIME_DIR": "/run/user/7"}
    assert [folders.control_socket for folders in candidate_folders(Where(), env, 7)] == [
        "/run/user/7/agentqd/agentqd.sock",
        "/run/agentqd/agentqd.sock",
    ]
    assert [folders.state for folders in candidate_folders(Where(state_dir="/x"), env, 7)] == ["/x"]
    assert [folders.state for folders in candidate_folders(Where(), env, 0)] == ["/var/lib/agentqd"]


def test_a_closed_pipe_and_closed_descriptors_are_quiet(ctl: Ctl, daemon: StandIn) -> None:
    daemon.tasks = {f"t{number}": a_task(f"t{number}") for number in range(1000)}
    with ctl.popen("list", "--all", "--json") as process:
        assert process.stdout is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 141
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *PROGRAM, "status"],
        env=ctl.environment(),
        cwd=ctl.root,
        check=False,
    )
    assert closed.returncode in (0, 141)


def test_help_and_version_cost_no_verb_and_no_network(ctl: Ctl) -> None:
    code = "import sys; from agentqd.cli.main import run; run(sys.argv[1:]); print(sorted(sys.modules), file=sys.stderr)"
    loaded = ctl("status", program=[sys.executable, "-c", code]).err
    for heavy in (
        "'http.client'",
        "'asyncio'",
        "'rich'",
        "'msgspec'",
        "'email'",
        "'aiohttp'",
        "'agentqd.cli.verbs.submit'",
        "'agentqd.daemon'",
        "'agentqd.control'",
    ):
        assert heavy not in loaded
    assert "agentqd.cli.verbs.status" in loaded
    assert ctl("--version").out == ctl("version").out == "agentqctl 0.1.0\n"


def test_parts_of_a_path_can_never_become_another_path() -> None:
    assert make_target(("tasks", "../status?x#y z/é"), {}) == "/v1/tasks/..%2Fstatus%3Fx%23y%20z%2F%C3%A9"
    assert make_target(("tasks", ".."), {"a": None, "b": "1&c=2"}) == "/v1/tasks/%2E%2E?b=1%26c%3D2"


class Scripted:
    """A channel that hands out these bytes in pieces of a given size, and then the end."""

    name = "scripted"

    def __init__(self, data: bytes, piece: int) -> None:
        self._data, self._piece = data, piece

    def open(self) -> Scripted:
        return self

    def send_all(self, data: bytes) -> None: ...

    def set_timeout(self, timeout_s: float) -> None: ...

    def close(self) -> None: ...

    def receive(self, bytes_max: int) -> bytes:
        piece, self._data = self._data[: self._piece], self._data[self._piece :]
        return piece


@given(
    chunks=st.lists(st.binary(min_size=1, max_size=50), max_size=8),
    piece=st.integers(1, 64),
    chunked=st.booleans(),
)
def test_a_body_is_read_whole_however_it_is_cut(chunks: list[bytes], piece: int, chunked: bool) -> None:
    whole = b"".join(chunks)
    head = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n"
    if chunked:
        body = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
        data = head + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"0\r\nTrailer: x\r\n\r\n"
    else:
        data = head + b"content-length: %d\r\n\r\n%s" % (len(whole), whole)
    with exchange(Scripted(data, piece), "GET", "/", body=None, timeout_s=1) as answer:
        assert (answer.status, answer.read()) == (200, whole)
    for end in range(0, len(data), 7):
        with (
            pytest.raises(AnswerLost),
            exchange(Scripted(data[:end], piece), "GET", "/", body=None, timeout_s=1) as answer,
        ):
            answer.read()


@settings(max_examples=tries(300))
@given(
    data=st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: b"HTTP/1.1 200 OK\r\n" + tail),
    piece=st.integers(1, 50),
)
def test_no_bytes_whatever_are_more_than_a_typed_error(data: bytes, piece: int) -> None:
    with (
        contextlib.suppress(AnswerLost, BadAnswer),
        exchange(Scripted(data, piece), "GET", "/", body=None, timeout_s=1) as answer,
    ):
        answer.read()


def test_a_slow_answer_is_an_error_that_names_the_daemon(ctl: Ctl, daemon: StandIn) -> None:
    import asyncio

    from agentqd.client.channel import UnixTransport
    from agentqd.client.connection import Connection

    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.5)
        return web.json_response({})

    daemon.answers[("GET", "/v1/status")] = slow
    with pytest.raises(AnswerLost, match="does not answer in time"):
        Connection(UnixTransport([ctl.socket]), timeout_s=0.1).get("status")
    assert Connection(UnixTransport([ctl.socket]), timeout_s=0.1).get("status", extra_s=5) == {}


def test_json_never_carries_a_raw_control_character(ctl: Ctl, daemon: StandIn) -> None:
    daemon.tasks["t1"] = a_task(task="\x9b2J\u202e\x7f\ud800 日本")
    out = ctl("show", "t1", "--json").out
    assert "日本" in out
    assert not any(char in out for char in "\x9b\u202e\x7f")
    assert json.loads(out)["task"] == "\x9b2J\u202e\x7f\ud800 日本"
