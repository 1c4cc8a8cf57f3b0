"""The routes of write claims: what is shown, and what a process outside of any task may ask for."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from agentqd.core.limits import CLAIM_PATH_BYTES_MAX, WRITES_TO_MAX
from agentqd.system.peercred import Peer

from .harness import Daemon

CLAIMS = "/v1/writes/claims"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    made = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    yield made
    made.kill()
    made.wait()


async def claim(daemon: Daemon, *paths: str, **more: Any) -> dict[str, Any]:
    return await daemon.post(CLAIMS, {"paths": list(paths), **more})


async def test_a_claim_is_shown_beside_those_of_tasks(daemon: Daemon) -> None:
    daemon.connect_supervisor()
    await daemon.submit(id="a", writes_to=["/b/f"], intent_ttl="1h")
    await daemon.submit(id="late", writes_to=["/b/f"], on_conflict="queue")
    made = await claim(daemon, "/a/../a/d", name="my editor")
    assert (made["state"], made["pid"], made["conflicts"]) == ("held", os.getpid(), [])
    assert (await daemon.get("/v1/writes"))["claims"][1]["expires_at"] is None  # its worker has not begun
    (daemon.attempt_folder("a") / "started").touch()
    mine, task, waits = (await daemon.get("/v1/writes"))["claims"]
    assert (mine["path"], mine["given"], mine["task_id"], mine["task"], mine["kind"], mine["state"], mine["user"]) == (
        "/a/d", "/a/../a/d", made["claim_id"], "my editor", "outside", "held", made["user"],
    )  # fmt: skip
    assert (task["task_id"], task["state"], task["kind"], task["waiting"]) == ("a", "running", "task", False)
    assert task["expires_at"] > task["since"]
    assert (waits["task_id"], waits["waiting"], waits["expires_at"]) == ("late", True, None)


async def test_a_claim_that_waits_is_answered_when_it_is_held(daemon: Daemon) -> None:
    first = await claim(daemon, "/p")
    second = await claim(daemon, "/p/x", on_conflict="queue")
    assert (second["state"], second["conflicts"][0]["task_id"]) == ("waiting", first["claim_id"])
    place = f"{CLAIMS}/{second['claim_id']}"
    assert (await daemon.get(place))["conflicts"][0]["task_id"] == first["claim_id"]
    waiting = asyncio.ensure_future(daemon.get(place, timeout_s="30"))
    await asyncio.sleep(0)
    await daemon.post(f"{CLAIMS}/{first['claim_id']}/release")
    async with asyncio.timeout(5):
        assert (await waiting)["state"] == "held"
    await daemon.fails("POST", f"{CLAIMS}/{first['claim_id']}/release", 404, "no_such_claim", data="{}")
    await daemon.fails("GET", f"{CLAIMS}/{first['claim_id']}", 404, "no_such_claim")
    await daemon.fails("GET", f"{CLAIMS}/..%2f", 404, "no_such_claim")


async def test_a_conflict_is_409_with_who_stands_in_the_way(daemon: Daemon) -> None:
    await daemon.submit(id="a", writes_to=["/p"])
    body = json.dumps({"paths": ["/p/*"], "on_conflict": "refuse"})
    refused = await daemon.fails("POST", CLAIMS, 409, "write_conflict", data=body)
    assert refused["conflicts"] == [{"task_id": "a", "task": "demo", "path": "/p"}]
    (seen,) = (await daemon.get("/v1/writes/conflicts"))["conflicts"]
    assert (seen["other_id"], seen["policy"], seen["task_id"].startswith("claim-")) == ("a", "refuse", True)
    assert (await daemon.get("/v1/writes/conflicts", since="2999-01-01T00:00:00Z"))["conflicts"] == []
    await daemon.fails("GET", "/v1/writes/conflicts?since=yesterday", 400, "invalid_request")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"paths": []},
        {"paths": "/p"},
        {"paths": ["relative"]},
        {"paths": [1]},
        {"paths": ["/p\x00"]},
        {"paths": ["/" + "x" * CLAIM_PATH_BYTES_MAX]},
        {"paths": ["/p"] * (WRITES_TO_MAX + 1)},
        {"paths": ["/p"], "on_conflict": "ask"},
        {"paths": ["/p"], "id": "claim-"},
        {"paths": ["/p"], "id": 5},
        {"paths": ["/p"], "name": " "},
        {"paths": ["/p"], "name": "x" * 1000},
        {"paths": ["/p"], "pid": 0},
        {"paths": ["/p"], "pid": True},
        {"paths": ["/p"], "pid": 2**22 + 5},
        {"paths": ["/p"], "argv": ["vim"]},
    ],
)
async def test_what_makes_no_sense_is_refused(daemon: Daemon, body: dict[str, Any]) -> None:
    await daemon.fails("POST", CLAIMS, 400, "invalid_request", data=json.dumps(body))
    assert (await daemon.get("/v1/writes"))["claims"] == []


async def test_a_claim_is_held_for_another_process_of_the_same_user_only(
    daemon: Daemon, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await claim(daemon, "/p", pid=sleeper.pid)
    assert made["pid"] == sleeper.pid
    await daemon.outside.turn()
    sleeper.kill()
    await daemon.until(lambda: not daemon.outside._pidfds)
    await daemon.outside.turn()
    assert (await daemon.get("/v1/writes"))["claims"] == []
    monkeypatch.setattr("agentqd.control.writes.peer_of", lambda _sock: Peer(os.getpid(), 54321, 54321))
    body = json.dumps({"paths": ["/p"], "pid": os.getppid()})
    await daemon.fails("POST", CLAIMS, 403, "not_permitted", data=body)


async def test_a_peer_whose_process_cannot_be_seen_is_told_so(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentqd.control.writes.peer_of", lambda _sock: Peer(0, 0, 0))
    refused = await daemon.fails("POST", CLAIMS, 400, "invalid_request", data=json.dumps({"paths": ["/p"]}))
    assert "container" in refused["message"]


async def test_the_deployments_policy_counts_and_a_full_disk_takes_nothing(daemon: Daemon) -> None:
    await claim(daemon, "/p")
    await daemon.fails("POST", CLAIMS, 409, "write_conflict", data=json.dumps({"paths": ["/p"]}))
    daemon.box.disk_low = True
    await daemon.fails("POST", CLAIMS, 503, "refused_for_now", data=json.dumps({"paths": ["/q"]}))


async def test_metrics_count_claims_waiters_and_conflicts(daemon: Daemon) -> None:
    daemon.connect_supervisor()
    await daemon.submit(id="a", writes_to=["/p"])
    await daemon.submit(id="b", writes_to=["/p"], on_conflict="queue")
    await claim(daemon, "/p", on_conflict="queue")
    async with daemon.session.get("http://box/metrics") as response:
        text = await response.text()
    for line in (
        'agentqd_write_claims{by="task"} 2',
        'agentqd_write_claims{by="outside"} 1',
        'agentqd_write_claims_waiting{by="task"} 1',
        'agentqd_write_claims_waiting{by="outside"} 1',
        'agentqd_write_conflicts_total{policy="queue"} 3',
    ):
        assert line in text, text
    waited = next(
        line for line in text.splitlines() if line.startswith("agentqd_write_claim_oldest_wait_seconds ")
    )
    assert 0 < float(waited.split()[1]) < 60


async def test_arguments_of_a_command_stand_in_no_log_and_no_event(daemon: Daemon) -> None:
    await claim(daemon, "/p/secret-path", name="editor")
    said = next(fields for event, fields in daemon.log.lines if event == "outside_claim_held")
    assert (said["name"], said["paths"]) == ("editor", 1)
    assert "secret-path" not in str(daemon.log.lines)
