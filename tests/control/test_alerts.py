"""Each kind of alert that stands for something that lasts needs attention as long as it lasts, and no longer; all are told for a day."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from agentqd.core.outbox import RowEvent
from agentqd.core.settings import Settings, Sink
from agentqd.core.units import format_time
from agentqd.loops.alerts import alert
from agentqd.storage import outbox, runner_limits
from agentqd.storage import tasks as store
from agentqd.storage.outbox import NewEntry
from agentqd.storage.runner_limits import RunnerLimit

from .harness import Daemon, fake_runner

HOOK = Settings(sinks={"hook": Sink(type="file", path="/x/y")})
hook = pytest.mark.parametrize("settings", [HOOK])


async def shown(daemon: Daemon, about: str) -> list[str]:
    found = (await daemon.get("/v1/status"))["attention"]
    return [item["text"] for item in found if about in item["text"]]


async def tell(daemon: Daemon, kind: str, task_id: str | None = None, key: str = "1", **fields: Any) -> None:
    def unit(tx: Any) -> None:
        task = None if task_id is None else store.find(tx, task_id)
        alert(tx, daemon.box, kind, f"told {task_id}", task=task, key=key, **fields)

    await daemon.journal.commit(unit)


async def running(daemon: Daemon, **fields: Any) -> str:
    daemon.connect_supervisor()
    task_id = await daemon.submit(**fields)
    await daemon.start_task(task_id)
    return task_id


def silent(daemon: Daemon, **more: Any) -> dict[str, Any]:
    return {"attempt": 1, "last_sign_at": format_time(daemon.clock.now_us()), **more}


async def test_a_silent_claim_until_its_task_has_ended(daemon: Daemon) -> None:
    task_id = await running(daemon)
    await tell(daemon, "claim_expired", task_id, **silent(daemon))
    assert len(await shown(daemon, "claim_expired")) == 1
    await daemon.end_task(task_id)
    assert await shown(daemon, "claim_expired") == []
    assert [each["type"] for each in (await daemon.get("/v1/status"))["alerts"]] == ["agentq.alert.claim_expired"]  # fmt: skip


async def test_a_silent_claim_until_its_task_shows_a_sign_of_life(daemon: Daemon) -> None:
    task_id = await running(daemon)
    folder = daemon.attempt_folder(task_id)
    (folder / "stdout").write_text("hello")
    await asyncio.sleep(0.005)  # the alert says it to the millisecond
    await tell(daemon, "claim_expired", task_id, **silent(daemon))
    assert len(await shown(daemon, "claim_expired")) == 1
    async with asyncio.timeout(10):
        while await shown(daemon, "claim_expired"):
            (folder / "stdout").write_text("hello again")
            await asyncio.sleep(0.005)


async def test_an_alert_that_is_over_does_not_hide_an_earlier_one_that_is_not(daemon: Daemon) -> None:
    first, second = await running(daemon), await running(daemon)
    for task_id in (first, second):
        await tell(daemon, "claim_expired", task_id, **silent(daemon))
    (text,) = await shown(daemon, "claim_expired")
    assert text.startswith("claim_expired: 2 times in 24 h")
    assert second in text
    await daemon.end_task(second)
    (text,) = await shown(daemon, "claim_expired")
    assert first in text
    assert "times" not in text


@pytest.mark.parametrize("kind", ["lost", "no_work"])
async def test_a_lost_or_empty_attempt_until_a_later_one_succeeds(daemon: Daemon, kind: str) -> None:
    task_id = await running(daemon)
    await daemon.end_task(task_id, exit_code=1)
    await tell(daemon, kind, task_id)
    assert len(await shown(daemon, f"{kind}:")) == 1
    await daemon.post(f"/v1/tasks/{task_id}/retry")
    assert len(await shown(daemon, f"{kind}:")) == 1
    await daemon.start_task(task_id)
    await daemon.end_task(task_id)
    assert await shown(daemon, f"{kind}:") == []


@pytest.mark.parametrize("kind", ["oldest_queued", "queue_timeout"])
async def test_a_task_that_waits_for_too_long_until_it_is_started(daemon: Daemon, kind: str) -> None:
    task_id = await daemon.submit()
    await tell(daemon, kind, task_id)
    assert len(await shown(daemon, kind)) == 1
    daemon.connect_supervisor()
    await daemon.submit()  # a commit that the claims ride on
    assert await shown(daemon, kind) == []


async def test_a_usage_limit_and_a_silent_supervisor_are_said_by_themselves(daemon: Daemon) -> None:
    now = daemon.clock.now_us()
    task_id = await daemon.run_to_end()
    limit = RunnerLimit("shell", now, now + 3_600_000_000, True, 1, task_id)
    await daemon.journal.commit(lambda tx: runner_limits.put(tx, limit))
    await tell(daemon, "usage_limit", task_id=None, runner="shell")
    await tell(daemon, "supervisor_silent")
    (text,) = await shown(daemon, "usage limit")
    assert "no task waits for it" in text
    assert await shown(daemon, "usage_limit:") == []
    assert await shown(daemon, "supervisor_silent") == []


@pytest.mark.parametrize("fields", [{"loop": "intake"}, {}], ids=["named", "of an earlier version"])
async def test_a_loop_that_stands_still_until_it_turns_again(daemon: Daemon, fields: dict[str, str]) -> None:
    daemon.box.beats["intake"] = daemon.clock.monotonic_s() - 10_000
    await tell(daemon, "stalled_loop", **fields)
    assert len(await shown(daemon, "stalled_loop")) == 1
    daemon.box.beat("intake")
    assert await shown(daemon, "stalled_loop") == []


async def test_a_refused_task_until_a_person_has_it_run_again(daemon: Daemon) -> None:
    daemon.connect_supervisor()
    await daemon.submit(writes_to=["/srv/a"])
    holder = next(iter(daemon.supervision.live))
    await daemon.start_task(holder)
    body = {"task": "late", "prompt": "true", "writes_to": ["/srv/a"], "on_conflict": "refuse"}
    task_id = str((await daemon.ask("POST", "/v1/tasks?spooled=k1", json=body))[1]["task_id"])
    assert len(await shown(daemon, "write_conflict")) == 1
    await tell(daemon, "prompt_missing", task_id)
    assert len(await shown(daemon, "prompt_missing")) == 1
    await daemon.end_task(holder)
    await daemon.post(f"/v1/tasks/{task_id}/retry")
    assert await shown(daemon, "write_conflict") == []
    assert await shown(daemon, "prompt_missing") == []


@hook
async def test_an_undelivered_result_until_it_has_arrived_whatever_else_waits(daemon: Daemon) -> None:
    daemon.delivery.runners["hook"] = fake_runner(last_error="HTTP 500")
    task_id = await daemon.run_to_end(deliver_to=["hook"])
    (row,) = (await daemon.get("/v1/outbox", sink="hook"))["rows"]
    await tell(daemon, "undelivered", task_id, sink="hook", delivery_id=row["delivery_id"])
    assert len(await shown(daemon, "undelivered")) == 1
    await daemon.deliver("hook", RowEvent.DEFERRED, "HTTP 500")
    assert len(await shown(daemon, "undelivered")) == 1
    await daemon.deliver("hook")
    await daemon.run_to_end(deliver_to=["hook"])
    assert await shown(daemon, "undelivered") == []


@hook
async def test_an_entry_that_a_sink_was_not_allowed_to_get_until_a_person_sends_it(daemon: Daemon) -> None:
    daemon.delivery.runners["hook"] = fake_runner()

    def unit(tx: Any) -> None:
        dead = {"hook": "not_allowed: x"}
        outbox.add_entry(tx, NewEntry("e1", None, 0, 0, "entry", "k", "t", b"{}", ["hook"], dead_sinks=dead))

    await daemon.journal.commit(unit)
    await tell(daemon, "sink_refused", sink="hook", delivery_id="e1")
    await tell(daemon, "sink_refused", key="2", sink="gone", delivery_id="e1")  # it was left out: no row
    assert len(await shown(daemon, "sink_refused")) == 2
    await daemon.post("/v1/outbox/retry", {"delivery_ids": ["e1"]})
    assert len(await shown(daemon, "sink_refused")) == 1


@hook
@pytest.mark.parametrize("kind", ["webhook_secret", "email_setup", "host_key"])
async def test_a_sink_that_cannot_send_until_something_is_delivered(daemon: Daemon, kind: str) -> None:
    daemon.delivery.runners["hook"] = fake_runner(last_error="no")
    await tell(daemon, kind, sink="hook")
    assert len(await shown(daemon, kind)) == 1
    daemon.delivery.runners["hook"].delivered_us = daemon.clock.now_us() + 1
    assert await shown(daemon, kind) == []


async def test_a_queue_file_that_is_none_until_a_file_stands_there(daemon: Daemon) -> None:
    path = daemon.folders.queue_file
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.lexists(path):
        os.unlink(path)
    os.symlink("/etc/hostname", path)
    await tell(daemon, "queue_symlink")
    await tell(daemon, "queue_truncated")
    assert len(await shown(daemon, "queue_symlink")) == 1
    os.unlink(path)
    Path(path).write_bytes(b"")
    assert await shown(daemon, "queue_symlink") == []
    assert len(await shown(daemon, "queue_truncated")) == 1, "it has happened, and has no end"


@pytest.mark.parametrize(
    "settings", [Settings(sinks={"hook": Sink(type="webhook", url="http://127.0.0.1:9/")})]
)
async def test_an_open_secret_file_until_it_is_closed(daemon: Daemon, root: Path) -> None:
    secret = root / "secret"
    secret.write_text("whsec_x")
    secret.chmod(0o644)
    hook = Sink(type="webhook", url="http://127.0.0.1:9/", secret_file=str(secret))
    daemon.box.apply(Settings(sinks={"hook": hook}))
    await tell(daemon, "secret_file", sink="hook", file=str(secret))
    found = (await daemon.get("/v1/status"))["attention"]
    (item,) = [each for each in found if "secret" in each["text"]]
    assert item["fix"] == f"chmod 600 {secret}"
    secret.chmod(0o600)
    assert await shown(daemon, "secret") == []
