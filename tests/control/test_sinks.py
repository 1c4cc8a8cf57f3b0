"""Sinks over the socket, with the real delivery loop and a real file at its end."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agentqd.core.outbox import RowEvent
from agentqd.core.settings import Queue, Settings, Sink
from agentqd.core.units import Backoff, Rate, parse_time_us
from agentqd.sinks.base import Deferred
from agentqd.storage import outbox
from agentqd.storage.outbox import NewEntry
from agentqd.storage.transaction import Transaction

from .harness import Daemon

SOON = Backoff((0.05,), doubles=False)


@pytest.fixture
def settings(root: Path) -> Settings:
    def file(name: str, **more: Any) -> Sink:
        return Sink(type="file", path=str(root / name), backoff=SOON, **more)

    return Settings(
        sinks={
            "out": file("out.jsonl"),
            "away": file("away/out.jsonl"),
            "slow": file("slow.jsonl", rate=Rate(1, "d")),
            "paced": file("paced.jsonl", rate=Rate(20, "s")),
            "run": Sink(type="command", command=["x"]),
        },
        queues={"narrow": Queue(allow_deliver_to=["o*"])},
    )


@pytest.fixture
async def delivering(daemon: Daemon) -> AsyncIterator[Daemon]:
    task = asyncio.create_task(daemon.delivery.run())
    await daemon.until(lambda: len(daemon.delivery.runners) == 7)
    await daemon.until(
        lambda: all(runner.is_open or runner.last_error for runner in daemon.delivery.runners.values())
    )
    yield daemon
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def sinks(daemon: Daemon) -> dict[str, dict[str, Any]]:
    return {sink["name"]: sink for sink in (await daemon.get("/v1/sinks"))["sinks"]}


async def until_backlog(daemon: Daemon, name: str, **wanted: int) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while True:
            sink = (await sinks(daemon)).get(name, {})
            if {state: n for state, n in sink.get("backlog", {}).items() if n} == wanted:
                return sink
            await asyncio.sleep(0.01)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_the_list_says_of_each_sink_what_keeps_it_and_what_waits(
    delivering: Daemon, root: Path
) -> None:
    daemon = delivering
    for _ in range(2):
        await daemon.run_to_end(deliver_to=["out", "away", "slow"])
    out = await until_backlog(daemon, "out", delivered=2)
    assert (out["type"], out["breaker"], out["in_config"], out["last_error"]) == (
        "file",
        "closed",
        True,
        None,
    )
    assert out["delivered_last"] == {"1m": 2, "5m": 2, "1h": 2}
    assert out["counted_since"] is not None
    assert (
        delivering.delivery.runners["out"].delivered_us is not None
    )  # what ends an alert that nothing is sent
    assert delivering.delivery.runners["away"].delivered_us is None
    away = (await sinks(daemon))["away"]
    assert away["backlog"]["pending"] + away["backlog"]["retryable"] + away["backlog"]["delivering"] == 2
    assert str(root / "away") in away["last_error"]
    assert 0 <= away["oldest_pending_s"] < 60
    slow = await until_backlog(daemon, "slow", delivered=1, pending=1)
    assert (slow["rate"], slow["rate_limited"]) == ("1/d", True)
    assert 86_000 < slow["rate_wait_s"] <= 86_400
    status = (await daemon.get("/v1/status"))["sinks"]
    assert status["slow"]["rate_limited"]
    assert status["out"].keys() < out.keys()


async def test_a_rate_runs_on_its_own_clock(delivering: Daemon, root: Path) -> None:
    """Nobody kicks the sink: it wakes for each token."""
    daemon = delivering

    def unit(tx: Transaction) -> None:
        for n in range(30):
            payload = b'{"specversion":"1.0","id":"d%d"}' % n
            outbox.add_entry(tx, NewEntry(f"d{n}", None, 0, 0, "entry", str(n), "t", payload, ["paced"]))

    began = daemon.clock.monotonic_s()
    await daemon.journal.commit(unit)
    await until_backlog(daemon, "paced", delivered=30)
    assert 0.45 < daemon.clock.monotonic_s() - began < 10
    assert [line["id"] for line in lines(root / "paced.jsonl")] == [f"d{n}" for n in range(30)]


async def test_a_sink_with_rows_that_is_no_longer_in_the_config_is_shown_as_that(delivering: Daemon) -> None:
    daemon, old = delivering, delivering.box.settings
    await daemon.run_to_end(deliver_to=["away"])
    kept = {name: sink for name, sink in old.sinks.items() if name != "away"}
    daemon.box.apply(Settings(sinks=kept))
    await daemon.until(lambda: "away" not in daemon.delivery.runners)
    (sink,) = [sink for name, sink in (await sinks(daemon)).items() if name == "away"]
    assert (sink["in_config"], sink["type"], sink["last_error"]) == (False, None, "not in the config")
    (row,) = (await daemon.get("/v1/outbox", sink="away"))["rows"]
    assert row["sink_in_config"] is False
    (item,) = [item for item in (await daemon.get("/v1/status"))["attention"] if "away" in item["text"]]
    assert "not in the config, 1 delivery waits" in item["text"]
    assert item["fix"] == "agentqctl outbox move ALL --from away --to SINK"
    moved = await daemon.post("/v1/outbox/move", {"all": True, "from": "away", "to": "out", "dry_run": True})
    assert moved == {"changed": 0, "would_change": 1, "kept": 0}
    assert await daemon.post("/v1/outbox/move", {"all": True, "from": "away", "to": "out"}) == {
        "changed": 1,
        "kept": 0,
    }
    await until_backlog(daemon, "out", delivered=1)
    assert "away" not in await sinks(daemon)
    (shown,) = (await daemon.get("/v1/outbox", sink="out"))["rows"]
    assert shown["delivery_id"] == row["delivery_id"]


async def test_disable_and_enable_say_what_they_did_and_who_it_was(delivering: Daemon, root: Path) -> None:
    daemon = delivering
    assert await daemon.post("/v1/sinks/out/disable", {"reason": "it is full"}) == {"sink": "out", "disabled": True, "changed": True}  # fmt: skip
    assert (await daemon.post("/v1/sinks/out/disable"))["changed"] is False
    await daemon.run_to_end(deliver_to=["out"])
    sink = await until_backlog(daemon, "out", held=1)
    assert (sink["breaker"], sink["disabled_by"]) == ("disabled", "person")
    assert sink["disabled"] == f"by a person (uid {os.getuid()}): it is full"
    (item,) = [
        item for item in (await daemon.get("/v1/status"))["attention"] if "out was disabled" in item["text"]
    ]
    assert item["text"] == f"out was disabled {sink['disabled']}; 1 delivery is held"
    assert (item["level"], item["fix"]) == ("warning", "agentqctl sink enable out")
    assert not [alert for alert in (await daemon.get("/v1/status"))["alerts"] if "disabled" in alert["type"]]
    assert (await daemon.post("/v1/sinks/out/enable"))["changed"] is True
    await until_backlog(daemon, "out", delivered=1)
    assert (await daemon.post("/v1/sinks/out/enable"))["changed"] is False
    assert len(lines(root / "out.jsonl")) == 1
    assert [event for event in daemon.log.events() if event in {"sink_disabled", "sink_enabled"}] == [
        "sink_disabled",
        "sink_enabled",
    ]  # not of what was so before


async def test_a_sink_that_is_no_longer_in_the_config_and_has_nothing_left_to_do_is_not_listed(
    delivering: Daemon,
) -> None:
    daemon, old = delivering, delivering.box.settings
    await daemon.run_to_end(deliver_to=["out"])
    await until_backlog(daemon, "out", delivered=1)
    daemon.box.apply(Settings(sinks={name: sink for name, sink in old.sinks.items() if name != "out"}))
    await daemon.until(lambda: "out" not in daemon.delivery.runners)
    assert "out" not in await sinks(daemon)
    assert "out" not in (await daemon.get("/v1/status"))["sinks"]
    assert (await daemon.post("/v1/sinks/out/enable"))["changed"] is False  # it has a row: it is known


async def test_a_release_says_that_a_disabled_sink_keeps_its_rows(delivering: Daemon) -> None:
    daemon = delivering
    await daemon.post("/v1/sinks/out/disable")
    await daemon.run_to_end(deliver_to=["out"])
    await until_backlog(daemon, "out", held=1)
    (row,) = (await daemon.get("/v1/outbox", sink="out"))["rows"]
    for verb in ("release", "retry"):
        for which in ({"all": True, "state": "held"}, {"delivery_ids": [row["delivery_id"]]}):
            said = await daemon.post(f"/v1/outbox/{verb}", {"sink": "out", **which})
            assert said == {"changed": 0, "stay_held": {"out": 1}}
    assert (await daemon.post("/v1/outbox/hold", {"all": True, "sink": "out"})) == {"changed": 1}
    said = await daemon.post("/v1/outbox/release", {"all": True, "sink": "out"})  # a person's no more
    assert said == {"changed": 1, "stay_held": {"out": 1}}
    await until_backlog(daemon, "out", held=1)
    said = await daemon.post("/v1/sinks/out/enable")
    assert (said["changed"], said["releasing"]) == (True, 1)
    await until_backlog(daemon, "out", delivered=1)


async def test_what_cannot_be_disabled_tested_or_found_is_refused_with_its_reason(delivering: Daemon) -> None:
    daemon = delivering
    said = await daemon.fails("POST", "/v1/sinks/completions/disable", 409, "illegal_transition")
    assert "every result" in said["message"]
    said = await daemon.fails("POST", "/v1/sinks/completions/test", 409, "illegal_transition")
    assert "a line of no task" in said["message"]
    for verb in ("disable", "enable", "test"):
        await daemon.fails("POST", f"/v1/sinks/nope/{verb}", 404, "no_such_sink")
    await daemon.fails("POST", "/v1/sinks/%ED%A0%80/enable", 404, "no_such_sink")
    await daemon.fails(
        "POST", "/v1/sinks/out/disable", 400, "invalid_request", data='{"reason": "a\\u001b[31m"}'
    )
    await daemon.fails("POST", "/v1/sinks/out/disable", 400, "invalid_request", data='{"why": "x"}')
    assert (await sinks(daemon))["out"]["breaker"] == "closed"


@pytest.mark.parametrize("how", ["retry", "enable", "test"])
async def test_a_receiver_that_asked_to_be_left_alone_is_shown_and_a_person_ends_that(
    delivering: Daemon, how: str
) -> None:
    daemon = delivering
    await daemon.run_to_end(deliver_to=["out"])
    await until_backlog(daemon, "out", delivered=1)
    asked = [Deferred("HTTP 429", retry_after_s=600.0, busy=True)]
    daemon.delivery.runners["out"].gate.leave_alone(asked, daemon.clock.monotonic_s())
    shown = (await daemon.get("/v1/status"))["sinks"]["out"]
    assert shown["left_alone_until"] == (await sinks(daemon))["out"]["left_alone_until"]
    assert 590 < (parse_time_us(shown["left_alone_until"]) - daemon.clock.now_us()) / 1e6 <= 600
    await daemon.run_to_end(deliver_to=["out"])
    await until_backlog(daemon, "out", delivered=1, pending=1)
    if how == "retry":
        await daemon.post("/v1/outbox/retry", {"all": True, "sink": "out", "state": "delivered"})
    else:
        await daemon.post(f"/v1/sinks/out/{how}")
    await until_backlog(daemon, "out", delivered=2)
    assert (await sinks(daemon))["out"]["left_alone_until"] is None


async def test_a_row_that_is_held_has_no_next_try(delivering: Daemon) -> None:
    daemon = delivering
    await daemon.run_to_end(deliver_to=["away"])
    async with asyncio.timeout(10):
        while not (await daemon.get("/v1/outbox", sink="away", state="retryable"))["rows"]:
            await asyncio.sleep(0.01)
    await daemon.post("/v1/sinks/away/disable")
    await until_backlog(daemon, "away", held=1)
    (row,) = (await daemon.get("/v1/outbox", sink="away"))["rows"]
    assert row["next_try_at"] is None


async def test_a_test_goes_through_a_disabled_sink_and_leaves_no_row(delivering: Daemon, root: Path) -> None:
    daemon = delivering
    await daemon.post("/v1/sinks/out/disable")
    tried = await daemon.post("/v1/sinks/out/test")
    assert (tried["outcome"], tried["type"], tried["sink"]) == ("delivered", "file", "out")
    (envelope,) = lines(root / "out.jsonl")
    assert (envelope["type"], envelope["id"]) == ("agentq.test", tried["delivery_id"])
    assert envelope["data"]["test"] is True
    assert "subject" not in envelope
    assert (await daemon.post("/v1/sinks/out/test"))["delivery_id"] != tried["delivery_id"]
    assert (await daemon.get("/v1/outbox"))["rows"] == []
    assert await daemon.journal.read(lambda c: c.execute("SELECT count(*) FROM entries").fetchone()) == (0,)
    await daemon.post("/v1/sinks/out/enable")
    await daemon.run_to_end(deliver_to=["out"])
    await until_backlog(daemon, "out", delivered=1)
    assert [line["type"] for line in lines(root / "out.jsonl")] == ["agentq.test"] * 2 + [
        "agentq.task.success"
    ]


async def test_a_test_that_does_not_arrive_says_why_and_changes_nothing(
    delivering: Daemon, root: Path
) -> None:
    daemon = delivering
    tried = await daemon.post("/v1/sinks/away/test")
    assert tried["outcome"] == "deferred"
    assert str(root / "away") in tried["detail"]
    tried = await daemon.post("/v1/sinks/run/test")  # no supervisor runs here
    assert tried["outcome"] == "deferred"
    assert "no supervisor" in tried["detail"]
    assert (await sinks(daemon))["run"]["breaker"] == "closed"


async def test_a_task_that_names_a_sink_it_may_not_is_refused_at_the_door(daemon: Daemon) -> None:
    body = {"task": "x", "prompt": "true", "queue": "narrow", "deliver_to": ["out", "away"]}
    said = await daemon.fails("POST", "/v1/tasks", 422, "sink_not_allowed", data=json.dumps(body))
    assert said["message"] == "deliver_to: the queue narrow does not allow 'away'; it allows completions, o*"
    assert (said["sink"], said["forbidden_by"], said["allowed"]) == ("away", "the queue narrow", ["o*"])
    await daemon.submit(queue="narrow", deliver_to=["out", "completions"])


# Rows by time.


async def test_rows_are_found_and_sent_again_by_the_time_their_entry_was_made(daemon: Daemon) -> None:
    for _ in range(4):
        await daemon.run_to_end()
    hour = 3600 * 1_000_000
    now = daemon.clock.now_us()
    await daemon.journal.commit(lambda tx: [tx.execute("UPDATE entries SET at = ? WHERE seq = ?", (now - (4 - n) * hour, n + 1)) for n in range(4)])  # fmt: skip
    ids = [row["delivery_id"] for row in (await daemon.get("/v1/outbox"))["rows"]][::-1]

    async def listed(**query: str) -> list[int]:
        return sorted(
            ids.index(row["delivery_id"]) for row in (await daemon.get("/v1/outbox", **query))["rows"]
        )

    assert await listed(since="210m") == [1, 2, 3]
    assert await listed(since="210m", until="90m") == [1, 2]
    assert await listed(until="90m", state="pending") == [0, 1, 2]
    between = {"all": True, "since": "210m", "until": "90m"}
    assert await daemon.post("/v1/outbox/retry", between | {"dry_run": True}) == {
        "changed": 0,
        "would_change": 0,
    }
    await daemon.deliver(event=RowEvent.REJECTED, error="no")
    assert await daemon.post("/v1/outbox/retry", between | {"dry_run": True}) == {
        "changed": 0,
        "would_change": 2,
    }
    assert await daemon.post("/v1/outbox/retry", between) == {"changed": 2}
    assert await listed(state="pending") == [1, 2]
    await daemon.deliver()
    assert await daemon.post("/v1/outbox/retry", {"all": True, "until": "90m"}) == {
        "changed": 1
    }  # the dead one only
    assert await daemon.post("/v1/outbox/retry", {"all": True, "until": "90m", "state": "delivered"}) == {
        "changed": 2
    }
    assert await daemon.post("/v1/outbox/hold", {"all": True, "since": "2026-01-01T00:00:00Z", "until": "150m"}) == {"changed": 2}  # fmt: skip
    assert await daemon.post("/v1/outbox/drop", {"all": True, "state": "held,dead"}) == {"changed": 3}
    assert await listed(state="dropped") == [0, 1, 3]


@pytest.mark.parametrize(
    ("verb", "body"),
    [
        ("retry", {"all": True, "since": "yesterday"}),
        ("retry", {"all": True, "since": 7}),
        ("retry", {"all": True, "since": "1h", "until": "2h"}),
        ("retry", {"all": True, "dry_run": "yes"}),
        ("retry", {"all": True, "state": "dead,lost"}),
        ("move", {"all": True, "from": "out"}),
        ("move", {"all": True, "from": "out", "to": "out"}),
        ("move", {"all": True, "from": "out", "to": "run", "state": "delivered"}),
        ("move", {"all": True, "from": "out", "to": "run", "sink": "out"}),
    ],
)
async def test_what_is_not_clearly_said_changes_nothing(daemon: Daemon, verb: str, body: object) -> None:
    await daemon.fails("POST", f"/v1/outbox/{verb}", 400, "invalid_request", data=json.dumps(body))


async def test_nothing_is_moved_to_what_is_not_there_or_from_and_to_completions(daemon: Daemon) -> None:
    for body, status, code in (
        ({"from": "out", "to": "nope"}, 404, "no_such_sink"),
        ({"from": "completions", "to": "out"}, 409, "illegal_transition"),
        ({"from": "out", "to": "completions"}, 409, "illegal_transition"),
    ):
        await daemon.fails("POST", "/v1/outbox/move", status, code, data=json.dumps({"all": True, **body}))
