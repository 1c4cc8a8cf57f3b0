"""The socket itself: its file, who may use it, and what happens when something goes wrong."""

from __future__ import annotations

import asyncio
import grp
import json
import os
import pwd
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentqd.control import access, table
from agentqd.control.route import Route
from agentqd.core.errors import StateFolderError
from agentqd.core.settings import Control, Settings
from agentqd.system.peercred import Peer

from .harness import Daemon

OTHER = "nobody"
_CLIENT = """
import socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
s.sendall(b"GET /v1/status HTTP/1.1\\r\\nHost: box\\r\\nConnection: close\\r\\n\\r\\n")
while data := s.recv(65536): sys.stdout.buffer.write(data)
"""


def mode_of(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


async def as_other_user(daemon: Daemon, *setpriv: str) -> str:
    """What a client under another uid is told."""
    argv = ["setpriv", *setpriv, "/usr/bin/env", "python3", "-c", _CLIENT, daemon.folders.control_socket]
    argv[argv.index("/usr/bin/env") : argv.index("-c")] = [_system_python()]
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/"
    )
    out, err = await asyncio.wait_for(process.communicate(), 20)
    return (out or err).decode()


def _system_python() -> str:
    """One that other users may run."""
    for path in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if os.path.exists(path):
            return path
    return sys.executable


def open_doors(daemon: Daemon) -> None:
    """Modes out of the way: only the peer's credentials are left to refuse it."""
    os.chmod(daemon.root, 0o755)
    os.chmod(daemon.folders.runtime, 0o755)
    os.chmod(daemon.folders.control_socket, 0o666)


@pytest.mark.root
async def test_another_user_is_refused_by_its_credentials_alone(daemon: Daemon) -> None:
    open_doors(daemon)
    said = await as_other_user(
        daemon,
        f"--reuid={OTHER}",
        f"--regid={grp.getgrgid(pwd.getpwnam(OTHER).pw_gid).gr_name}",
        "--clear-groups",
    )
    assert said.startswith("HTTP/1.1 403"), said
    assert json.loads(said.partition("\r\n\r\n")[2])["error"] == "not_permitted"
    assert "control_refused" in daemon.log.events()


@pytest.mark.root
@pytest.mark.parametrize("settings", [Settings(control=Control(group="daemon"))])
async def test_a_member_of_the_control_group_is_let_in(daemon: Daemon) -> None:
    found = os.stat(daemon.folders.control_socket)
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, grp.getgrnam("daemon").gr_gid)
    open_doors(daemon)
    assert (await as_other_user(daemon, f"--reuid={OTHER}", "--regid=daemon", "--clear-groups")).startswith(
        "HTTP/1.1 200"
    )


def test_group_membership_is_looked_up_by_uid(monkeypatch: pytest.MonkeyPatch) -> None:
    user = pwd.getpwuid(os.geteuid())
    mine = grp.getgrgid(user.pw_gid)
    assert access.member(Peer(1, user.pw_uid, 99999), mine.gr_name)
    assert not access.member(Peer(1, 4_000_000, 99999), mine.gr_name)
    assert access.member(Peer(1, 4_000_000, mine.gr_gid), mine.gr_name)
    assert not access.member(Peer(1, user.pw_uid, user.pw_gid), "there-is-no-such-group")
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, 12345])
    monkeypatch.setattr(grp, "getgrnam", lambda name: grp.struct_group((name, "x", 12345, [])))
    assert access.member(Peer(1, user.pw_uid, 99999), "supplementary")
    assert access.always_allowed(Peer(1, 0, 0))
    assert not access.always_allowed(Peer(1, os.geteuid() + 1, 0))


async def test_the_socket_is_private_and_leaves_with_its_server(root: Path) -> None:
    daemon = Daemon(root, Settings())
    await daemon.open()
    assert mode_of(daemon.folders.control_socket) == 0o600
    assert os.listdir(daemon.folders.runtime) == ["agentqd.sock"]
    await daemon.close()
    assert os.listdir(daemon.folders.runtime) == []


@pytest.mark.parametrize("settings", [Settings(control=Control(mode="0640"))])
async def test_control_mode_is_the_sockets_mode_and_follows_an_edit(daemon: Daemon) -> None:
    assert mode_of(daemon.folders.control_socket) == 0o640
    daemon.box.apply(Settings())
    await daemon.server._look()
    assert mode_of(daemon.folders.control_socket) == 0o600


async def test_a_dead_daemons_socket_is_replaced_a_living_ones_is_not(root: Path) -> None:
    daemon = Daemon(root, Settings())
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(daemon.folders.control_socket)
    await daemon.open()
    await daemon.get("/v1/status")
    second = type(daemon.server)(daemon.box, daemon.parts)
    with pytest.raises(StateFolderError, match="another agentqd serves"):
        await second.start()
    await second.close()
    await daemon.get("/v1/status")
    await daemon.close()


async def test_what_is_no_socket_is_left_alone(root: Path) -> None:
    daemon = Daemon(root, Settings())
    Path(daemon.folders.control_socket).write_text("mine")
    with pytest.raises(StateFolderError, match="no socket"):
        await daemon.open()
    await daemon.server.close()
    daemon.supervision.close()
    await daemon.journal.close()
    assert Path(daemon.folders.control_socket).read_text() == "mine"


async def test_a_removed_socket_file_comes_back_and_open_connections_stay(daemon: Daemon) -> None:
    task_id = await daemon.submit()
    waiting = asyncio.ensure_future(daemon.get(f"/v1/tasks/{task_id}/wait", timeout_s="20"))
    await daemon.until(lambda: daemon.server._room.watch._waiters)
    loop = asyncio.ensure_future(daemon.server.run())
    os.unlink(daemon.folders.control_socket)
    await daemon.until(lambda: os.path.exists(daemon.folders.control_socket))
    await daemon.post(f"/v1/tasks/{task_id}/cancel")  # over the new file
    assert (await waiting)["finished"]
    assert "control" in daemon.box.beats
    loop.cancel()
    await asyncio.wait([loop])


async def test_long_polls_answer_when_the_server_closes(root: Path) -> None:
    daemon = Daemon(root, Settings())
    await daemon.open()
    task_id = await daemon.submit()
    waiting = asyncio.ensure_future(daemon.get(f"/v1/tasks/{task_id}/wait", timeout_s="60"))
    pulling = asyncio.ensure_future(daemon.get("/v1/completions", wait_s="60"))
    await daemon.until(lambda: daemon.server._room.watch._waiters)
    await asyncio.wait_for(daemon.server.close(), 5)
    assert not (await waiting)["finished"]
    assert (await pulling)["rows"] == []
    await daemon.close()


async def test_unknown_paths_and_methods_are_json_errors(daemon: Daemon) -> None:
    await daemon.fails("GET", "/", 404, "not_found")
    await daemon.fails("GET", "/v1/nope", 404, "not_found")
    await daemon.fails("DELETE", "/v1/tasks", 405, "method_not_allowed")
    await daemon.fails("GET", "/v1/drain", 405, "method_not_allowed")


async def test_a_failed_journal_is_503_and_says_that_the_outcome_is_unknown(daemon: Daemon) -> None:
    await daemon.journal.commit(lambda tx: tx.execute("UPDATE meta SET value = 99 WHERE key = 'epoch'"))
    body = {"task": "x", "prompt": "true", "id": "one"}
    answer = await daemon.fails("POST", "/v1/tasks", 503, "journal_failed", json=body)
    assert "same id" in answer["message"]
    await daemon.fails("GET", "/v1/status", 503, "journal_failed")


async def test_a_bug_is_500_without_its_text_and_a_traceback_in_the_log(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the prompt was: secret")

    monkeypatch.setattr("agentqd.control.status.look", broken)
    answer = await daemon.fails("GET", "/v1/status", 500, "internal_error")
    assert "secret" not in str(answer)
    (fields,) = [fields for event, fields in daemon.log.lines if event == "control_failed"]
    assert "RuntimeError" in fields["traceback"]
    await daemon.get("/v1/tasks")


async def test_bytes_that_are_no_http_cost_only_their_connection(daemon: Daemon) -> None:
    reader, writer = await asyncio.open_unix_connection(daemon.folders.control_socket)
    writer.write(b"\x16\x03\x01 hello\r\n\r\n")
    assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.0 400")
    writer.close()
    await daemon.get("/v1/status")


async def test_a_body_over_the_limit_is_413(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = await asyncio.open_unix_connection(daemon.folders.control_socket)
    size = 65 * 1024 * 1024
    writer.write(b"POST /v1/tasks HTTP/1.1\r\nHost: box\r\nContent-Length: %d\r\n\r\n" % size)
    for _ in range(65):
        writer.write(bytes(1024 * 1024))
        await asyncio.sleep(0)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    assert head.startswith(b"HTTP/1.1 413"), head
    writer.close()


def test_the_route_table_is_the_table_of_the_docs() -> None:
    text = Path(__file__).parents[2].joinpath("docs/api.md").read_text()
    told: set[tuple[str, str]] = set()
    for line in text.splitlines():
        if not line.startswith("| `"):
            continue
        base, method = "", ""
        cell = line.split("` |")[0].removeprefix("| ")
        for part in cell.replace("; ", ", ").split(", "):
            words = part.strip("` ").split("?")[0].split(" ")
            if len(words) == 2:
                method, path = words
            else:  # `/release` after `POST /v1/tasks/ID/hold`
                path = f"{base.rsplit('/', 1)[0]}{words[0]}"
            base = path
            told.add((method, path))
    have = {(route.method, _as_in_docs(route)) for route in table.ROUTES}
    assert have == told


def _as_in_docs(route: Route) -> str:
    return re.sub(r"\{(\w+)\}", lambda part: part[1].upper(), route.path)


async def test_openapi_describes_every_route_and_parameter(daemon: Daemon) -> None:
    shown = await daemon.get("/v1/openapi.json")
    for route in table.ROUTES:
        operation = shown["paths"][route.path][route.method.lower()]
        named = {param["name"] for param in operation["parameters"] if param["in"] == "query"}
        assert named == {param.name for param in route.query}
        assert operation["summary"]
    ids = [operation["operationId"] for path in shown["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids)) == len(table.ROUTES)


def test_importing_the_control_room_loads_no_sinks_library() -> None:
    code = "import sys, agentqd.control.server; print([m for m in ('asyncssh', 'aiosmtplib', 'apprise') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
