"""Why a task waits, as the control socket tells it: every cause that the loops can bring about."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from agentqd.core.lifecycle import Event
from agentqd.core.settings import Queue, Runner, Settings
from agentqd.core.task import read_task
from agentqd.core.units import parse_time_us
from agentqd.core.usage_limit import Limit
from agentqd.loops.ends import AttemptEnd
from agentqd.loops.finishing import finish_attempt
from agentqd.loops.usage_limits import met
from agentqd.storage import tasks as store
from agentqd.supervisor import wire

from .harness import Daemon

US = 1_000_000


async def _why(daemon: Daemon, task_id: str) -> dict[str, Any]:
    shown: dict[str, Any] = (await daemon.get(f"/v1/tasks/{task_id}"))["waiting_for"]
    (listed,) = [task for task in (await daemon.get("/v1/tasks"))["tasks"] if task["id"] == task_id]
    assert listed["waiting_for"] == shown
    assert shown["text"]
    return shown


async def test_a_write_conflict_names_the_task_and_both_paths(daemon: Daemon) -> None:
    await daemon.submit(id="first", writes_to=["/srv/site"])
    await daemon.submit(id="second", writes_to=["/srv/site/index.html"], on_conflict="queue")
    why = await _why(daemon, "second")
    assert why["reason"] == "write_conflict"
    (conflict,) = why["conflicts"]
    assert (conflict["task_id"], conflict["path"], conflict["own_path"]) == (
        "first",
        "/srv/site",
        "/srv/site/index.html",
    )
    assert "first" in why["text"]


async def test_a_queue_that_was_taken_from_the_config_is_told(daemon: Daemon) -> None:
    daemon.box.apply(Settings(queues={"old": Queue()}))
    await daemon.submit(id="a", queue="old")
    daemon.box.apply(Settings())
    why = await _why(daemon, "a")
    assert (why["reason"], "old" in why["text"]) == ("queue_removed", True)
    assert (await daemon.get("/v1/status"))["queues"]["old"]["reasons"] == {"queue_removed": 1}


async def test_a_hold_says_by_whom(daemon: Daemon) -> None:
    daemon.connect_supervisor()
    await daemon.submit(id="lost")

    def unit(tx: Any) -> None:
        task = store.find(tx, "lost")
        assert task is not None
        store.move_task(tx, task, Event.ATTEMPT_HELD, reason="supervisor_lost", wake_at=None)

    await daemon.journal.commit(unit)
    why = await _why(daemon, "lost")
    assert (why["reason"], why["by"], why["cause"]) == ("held", "on_lost", "supervisor_lost")
    daemon.disconnect_supervisor()
    await daemon.submit(id="mine")
    await daemon.post("/v1/tasks/mine/hold")
    assert (await _why(daemon, "mine"))["by"] == "person"
    assert (await daemon.get("/v1/status"))["waiting"] == {"held": 2}


async def test_many_before_one_are_counted_up_to_a_limit(daemon: Daemon) -> None:
    daemon.box.apply(Settings(max_workers=1))
    await daemon.admit_many(1200)
    await daemon.submit(id="last")
    await daemon.submit(id="first", priority=9)
    daemon.connect_supervisor()
    await daemon.submit(id="nudge")
    why = await _why(daemon, "last")
    assert (why["reason"], why["limit"], why["ahead"], why["ahead_more"]) == (
        "no_free_slot",
        "max_workers",
        1000,
        True,
    )
    assert "1000+" in why["text"]
    assert (await daemon.get("/v1/status"))["waiting"] == {"no_free_slot": 1202}


async def test_a_task_that_waits_for_its_runners_limit_says_until_when_and_whether_that_is_known(
    daemon: Daemon,
) -> None:
    daemon.box.apply(Settings(runners={"claude": Runner(preset="claude")}))
    daemon.connect_supervisor()
    await daemon.submit(id="a")

    def unit(tx: Any) -> None:
        task = store.find(tx, "a")
        assert task is not None
        task = msgspec.structs.replace(task, runner="claude")
        met(tx, daemon.box, task, Limit("usage limit", None))

    await daemon.journal.commit(unit)
    await daemon.submit(id="b", runner="claude")
    why = await _why(daemon, "b")
    assert (why["reason"], why["known"], why["runner"], why["until"] is not None) == ("usage_limit", False, "claude", True)  # fmt: skip
    status = await daemon.get("/v1/status")
    assert status["waiting"] == {"usage_limit": 1}
    assert status["runner_limits"]["claude"]["known"] is False


async def test_a_task_whose_worker_was_lost_counts_its_requeues_and_not_its_attempts(daemon: Daemon) -> None:
    daemon.connect_supervisor()
    await daemon.submit(id="a", on_lost="requeue")

    def unit(tx: Any) -> None:
        task = store.find(tx, "a")
        assert task is not None
        request = read_task(store.spec_of(tx, task.seq)[0])
        finish_attempt(tx, daemon.box, AttemptEnd("a", 1, request, lost_reason="supervisor_lost"))

    await daemon.journal.commit(unit)
    why = await _why(daemon, "a")
    assert (why["reason"], why["cause"], why["requeues_used"]) == ("backoff", "supervisor_lost", 1)
    assert "requeued 1 of at most 10" in why["text"]
    assert "attempt 1 of 1" not in why["text"]


async def test_resuming_a_queue_that_the_config_no_longer_has_says_so(daemon: Daemon) -> None:
    daemon.box.apply(Settings(queues={"old": Queue()}))
    await daemon.submit(id="a", queue="old")
    assert (await daemon.post("/v1/queues/old/pause"))["in_config"] is True
    daemon.box.apply(Settings())
    assert await daemon.post("/v1/queues/old/resume") == {"queue": "old", "paused": False, "in_config": False}


async def _close(daemon: Daemon, task_id: str, for_s: float) -> None:
    """The task has met its runner's limit."""

    def unit(tx: Any) -> None:
        task = store.find(tx, task_id)
        assert task is not None
        task = msgspec.structs.replace(task, runner="claude")
        met(tx, daemon.box, task, Limit("usage limit", tx.now_us + int(for_s * US)))

    await daemon.journal.commit(unit)


async def _backs_off(daemon: Daemon, task_id: str) -> int:
    """The task waits ten seconds for its next attempt."""

    def unit(tx: Any) -> int:
        task = store.find(tx, task_id)
        assert task is not None
        wake = int(tx.now_us) + 10 * US
        store.move_task(tx, task, Event.ATTEMPT_ENDED, reason="exit_code", wake_at=wake)
        return wake

    return await daemon.journal.commit(unit)


async def test_a_backoff_that_ends_before_its_runners_limit_tells_the_later_time(daemon: Daemon) -> None:
    daemon.box.apply(Settings(runners={"claude": Runner(preset="claude")}))
    daemon.connect_supervisor()
    await daemon.submit(id="a", runner="claude")
    wake = await _backs_off(daemon, "a")
    assert parse_time_us((await _why(daemon, "a"))["until"]) // 1000 == wake // 1000
    await _close(daemon, "a", 3600)
    status = await daemon.get("/v1/status")
    assert (await _why(daemon, "a"))["until"] == status["runner_limits"]["claude"]["until"]


async def test_attention_names_a_task_that_waits_for_the_limit_and_none_if_none_does(daemon: Daemon) -> None:
    daemon.box.apply(Settings(runners={"claude": Runner(preset="claude")}))
    await daemon.submit(id="met")
    await _close(daemon, "met", 3600)
    await daemon.post("/v1/tasks/met/cancel")

    async def item() -> dict[str, Any]:
        found = (await daemon.get("/v1/status"))["attention"]
        (one,) = [each for each in found if each["text"].startswith("the usage limit")]
        return dict(one)

    assert ("no task waits" in (await item())["text"], (await item())["fix"]) == (True, None)
    await daemon.submit(id="waits", runner="claude")
    assert ("its tasks wait until" in (await item())["text"], (await item())["fix"]) == (True, "agentqctl retry waits")  # fmt: skip
    answer = await daemon.post("/v1/tasks/waits/retry")
    assert (answer["state"], answer["runner_opened"]) == ("queued", "claude")


async def test_a_supervisor_that_answers_no_ping_is_told_once_and_shown(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentqd.loops.link._PING_EVERY_S", 0.01)
    hung, pings = daemon.supervision.link, 0

    class Silent(asyncio.Transport):
        def write(self, data: Any) -> None:
            nonlocal pings
            pings += 1

    daemon.connect_supervisor()
    hung._transport = Silent()
    stays = asyncio.create_task(hung._stay())
    await daemon.until(lambda: pings >= 6)
    status = await daemon.get("/v1/status")
    (alert,) = [each for each in status["alerts"] if each["type"] == "agentq.alert.supervisor_silent"]
    assert (alert["count"], "pid 77" in alert["message"]) == (1, True)
    assert status["supervisor"]["silent_s"] > 0
    (item,) = [each for each in status["attention"] if each["text"].startswith("the supervisor (pid 77)")]
    assert item["level"] == "error"
    hung._take(wire.encode(wire.Pong(0)))
    assert (await daemon.get("/v1/status"))["supervisor"]["silent_s"] == 0 or pings > 8
    stays.cancel()
