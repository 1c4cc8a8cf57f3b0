"""The outbox and the completion queue over the socket."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from agentqd.control import completions, outboxchange
from agentqd.core.outbox import RowEvent
from agentqd.core.settings import Settings, Sink
from agentqd.sinks.base import Context
from agentqd.sinks.completions import CompletionLines
from agentqd.sinks.registry import make_sink

from .harness import Daemon, fake_runner

TWO_SINKS = Settings(sinks={"out": Sink(type="file", path="/tmp/agentqd-test-out")})


@pytest.mark.parametrize("settings", [TWO_SINKS])
async def test_outbox_rows_are_listed_by_state_sink_and_task(daemon: Daemon) -> None:
    first = await daemon.run_to_end(deliver_to=["out"])
    second = await daemon.run_to_end()
    await daemon.deliver("completions")

    async def rows(**query: str) -> list[tuple[str, str, str]]:
        return [
            (row["task_id"], row["sink"], row["state"])
            for row in (await daemon.get("/v1/outbox", **query))["rows"]
        ]

    done, todo = (first, "completions", "delivered"), (first, "out", "pending")
    assert await rows() == [(second, "completions", "delivered"), done, todo]
    assert await rows(state="pending") == await rows(sink="out") == [todo]
    assert await rows(task=first) == [done, todo]
    assert await rows(task=second, sink="out") == await rows(state="dead") == []
    page = await daemon.get("/v1/outbox", limit="1")
    assert await rows(limit="1", before=str(page["next_before"])) == [done, todo]  # an entry is never split
    await daemon.fails("GET", "/v1/outbox?state=lost", 400, "invalid_request")


async def test_a_row_in_flight_is_shown_as_delivering_and_is_not_dropped(daemon: Daemon) -> None:
    task_id = await daemon.run_to_end()
    row = (await daemon.get("/v1/outbox"))["rows"][0]
    daemon.delivery.runners["completions"] = fake_runner(1)
    assert (await daemon.get("/v1/outbox", state="delivering"))["rows"][0]["task_id"] == task_id
    assert (await daemon.get("/v1/outbox", state="pending"))["rows"] == []
    assert (await daemon.get("/v1/status"))["outbox"]["delivering"] == 1
    for body in ({"delivery_ids": [row["delivery_id"]]}, {"all": True}):
        assert await daemon.post("/v1/outbox/drop", body) == {"changed": 0}
    daemon.delivery.runners["completions"] = fake_runner()
    assert await daemon.post("/v1/outbox/drop", {"delivery_ids": [row["delivery_id"]]}) == {"changed": 1}


async def test_one_entry_is_shown_with_its_envelope_and_its_tries(daemon: Daemon) -> None:
    task_id = await daemon.run_to_end()
    delivery_id = (await daemon.get("/v1/outbox"))["rows"][0]["delivery_id"]
    shown = await daemon.get(f"/v1/outbox/{delivery_id}")
    assert (shown["type"], shown["task_id"], shown["run"]) == ("agentq.task.success", task_id, 1)
    assert shown["envelope"]["id"] == delivery_id
    assert shown["envelope"]["data"]["status"] == "success"
    assert (shown["rows"][0]["sink"], shown["rows"][0]["tries"]) == ("completions", [])
    await daemon.fails("GET", "/v1/outbox/dnope", 404, "no_such_delivery")


async def test_a_person_holds_releases_retries_and_drops_rows(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outboxchange, "CHANGES_A_COMMIT", 2)
    monkeypatch.setattr(outboxchange, "WINDOW", 3)
    for _ in range(5):
        await daemon.run_to_end()
    assert await daemon.post("/v1/outbox/hold", {"all": True}) == {"changed": 5}
    assert await daemon.post("/v1/outbox/release", {"all": True, "state": "held"}) == {"changed": 5}
    await daemon.deliver(event=RowEvent.REJECTED, error="no")
    assert (await daemon.get("/v1/outbox", state="dead"))["rows"][0]["last_error"] == "no"
    assert await daemon.post("/v1/outbox/retry", {"all": True}) == {"changed": 5}
    await daemon.deliver()
    assert await daemon.post("/v1/outbox/retry", {"all": True}) == {
        "changed": 0
    }  # delivered ones only by name
    assert await daemon.post("/v1/outbox/drop", {"all": True}) == {"changed": 0}
    ids = [row["delivery_id"] for row in (await daemon.get("/v1/outbox"))["rows"]]
    assert await daemon.post("/v1/outbox/retry", {"delivery_ids": [*ids, "dnope"]}) == {
        "changed": 5,
        "unknown": ["dnope"],
    }
    assert await daemon.post("/v1/outbox/drop", {"all": True}) == {"changed": 5}


async def _states(daemon: Daemon) -> dict[str, str]:
    return {row["sink"]: row["state"] for row in (await daemon.get("/v1/outbox"))["rows"]}


@pytest.mark.parametrize("settings", [TWO_SINKS])
async def test_a_retry_by_id_leaves_alone_what_is_delivered_unless_all_of_it_is(daemon: Daemon) -> None:
    await daemon.run_to_end(deliver_to=["out"])
    ids = [(await daemon.get("/v1/outbox"))["rows"][0]["delivery_id"]]
    await daemon.deliver("completions")
    body = {"delivery_ids": ids}
    assert await daemon.post("/v1/outbox/retry", body) == {"changed": 0}  # out waits for its first try
    await daemon.deliver("out", RowEvent.REJECTED, "no")
    dry = body | {"dry_run": True}
    assert await daemon.post("/v1/outbox/retry", dry) == {"changed": 0, "would_change": 1}
    assert await daemon.post("/v1/outbox/retry", body) == {"changed": 1}
    assert await _states(daemon) == {"completions": "delivered", "out": "pending"}
    assert await daemon.post("/v1/outbox/retry", body | {"state": "delivered"}) == {"changed": 1}
    await daemon.deliver("completions")
    assert await daemon.post("/v1/outbox/retry", body | {"sink": "completions"}) == {"changed": 1}
    await daemon.deliver("completions")
    await daemon.deliver("out")
    assert await daemon.post("/v1/outbox/retry", body) == {"changed": 2}


@pytest.mark.parametrize(
    "reason",
    ["not_allowed: x", "no_such_sink: x", "malformed: x", "incomplete", "too_large: 9 bytes"],
)
async def test_a_retry_of_all_leaves_what_cannot_be_sent_as_it_is_and_counts_it(
    daemon: Daemon, reason: str
) -> None:
    await daemon.run_to_end()
    await daemon.deliver(event=RowEvent.REJECTED, error=reason)
    await daemon.run_to_end()
    await daemon.deliver(event=RowEvent.REJECTED, error="HTTP 400")
    dry = {"all": True, "dry_run": True}
    assert await daemon.post("/v1/outbox/retry", dry) == {"changed": 0, "would_change": 1, "left": 1}
    assert await daemon.post("/v1/outbox/retry", {"all": True}) == {"changed": 1, "left": 1}
    assert await daemon.post("/v1/outbox/retry", {"all": True, "state": "dead"}) == {"changed": 0, "left": 1}
    (row,) = (await daemon.get("/v1/outbox", state="dead"))["rows"]
    assert row["last_error"] == reason
    assert await daemon.post("/v1/outbox/retry", {"delivery_ids": [row["delivery_id"]]}) == {"changed": 1}


async def test_a_retry_that_finds_nothing_dead_says_what_waits(daemon: Daemon) -> None:
    await daemon.run_to_end()
    await daemon.deliver(event=RowEvent.DEFERRED, error="no route")
    body = {"all": True, "sink": "completions"}
    assert await daemon.post("/v1/outbox/retry", body) == {"changed": 0, "waiting": {"retryable": 1}}
    assert await daemon.post("/v1/outbox/retry", body | {"state": "retryable"}) == {"changed": 1}


async def test_rows_of_a_sink_or_an_id_that_nobody_knows_are_an_error(daemon: Daemon) -> None:
    await daemon.run_to_end()
    for verb in ("retry", "hold", "release", "drop"):
        for more in ({}, {"dry_run": True}):
            url, all_of = f"/v1/outbox/{verb}", {"all": True, "sink": "hok", **more}
            said = await daemon.fails("POST", url, 404, "no_such_sink", json=all_of)
            assert "no sink 'hok'" in said["message"]
            by_id = {"delivery_ids": ["dnope"], **more}
            said = await daemon.fails("POST", url, 404, "no_such_delivery", json=by_id)
            assert "no delivery 'dnope'" in said["message"]


@pytest.mark.parametrize("settings", [TWO_SINKS])
async def test_a_move_from_a_sink_that_nobody_knows_is_an_error(daemon: Daemon) -> None:
    body = {"all": True, "from": "hok", "to": "out"}
    for more in ({}, {"dry_run": True}):
        await daemon.fails("POST", "/v1/outbox/move", 404, "no_such_sink", json=body | more)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"delivery_ids": ["d"], "all": True},
        {"delivery_ids": "d"},
        {"all": True, "state": "x"},
        {"all": "yes"},
        {"ids": []},
    ],
)
async def test_a_change_that_says_not_clearly_which_rows_is_refused(daemon: Daemon, body: object) -> None:
    for verb in ("retry", "hold", "release", "drop"):
        await daemon.fails("POST", f"/v1/outbox/{verb}", 400, "invalid_request", json=body)


async def test_completions_are_the_very_lines_that_the_sink_writes(daemon: Daemon) -> None:
    """The real sink delivers the real rows; what is pulled equals the file, but for `pulled`."""
    for n in range(3):
        await daemon.run_to_end(id=f"t{n}")
    await daemon.submit(id="t3")
    context = Context(
        "completions",
        Sink(type="completions"),
        daemon.folders.state,
        daemon.supervision.execs,
        daemon.clock.now_us,
    )
    assert make_sink(context, 1 << 20)
    task = asyncio.ensure_future(daemon.delivery.run())
    try:
        rows = []
        while len(rows) < 3:
            rows = (await daemon.get("/v1/completions", wait_s="10"))["rows"]
    finally:
        task.cancel()
        await asyncio.wait([task])
    written = [json.loads(line) for line in Path(daemon.folders.completions).read_text().splitlines()]
    assert rows == written[: len(rows)]
    await daemon.post("/v1/consumers/default/ack", {"seq": rows[1]["seq"]})
    again = await daemon.get("/v1/completions", after="0")
    assert [row["pulled"] for row in again["rows"][:3]] == [True, True, False]
    assert CompletionLines.numbered


async def test_each_consumer_has_a_position_that_never_moves_back(daemon: Daemon) -> None:
    for _ in range(3):
        await daemon.run_to_end()
    await daemon.deliver()
    assert [row["seq"] for row in (await daemon.get("/v1/completions"))["rows"]] == [1, 2, 3]
    page = await daemon.get("/v1/completions", limit="2", consumer="laptop")
    assert (page["consumer"], page["acknowledged"], page["more"], len(page["rows"])) == ("laptop", 0, True, 2)
    assert await daemon.post("/v1/consumers/laptop/ack", {"seq": 2}) == {
        "consumer": "laptop",
        "acknowledged": 2,
    }
    assert await daemon.post("/v1/consumers/laptop/ack", {"seq": 1}) == {
        "consumer": "laptop",
        "acknowledged": 2,
    }
    assert [row["seq"] for row in (await daemon.get("/v1/completions", consumer="laptop"))["rows"]] == [3]
    assert await daemon.post("/v1/consumers/laptop/ack", {"seq": 999}) == {
        "consumer": "laptop",
        "acknowledged": 3,
    }
    (one,) = (await daemon.get("/v1/consumers"))["consumers"]
    assert (one["name"], one["acknowledged"], one["behind"]) == ("laptop", 3, 0)
    for body in ({}, {"seq": -1}, {"seq": True}, {"seq": "1"}, {"seq": 1, "x": 1}):
        await daemon.fails("POST", "/v1/consumers/laptop/ack", 400, "invalid_request", json=body)
    await daemon.fails("POST", "/v1/consumers/a%20b/ack", 400, "invalid_request", json={"seq": 1})
    await daemon.fails("GET", "/v1/completions?consumer=a/b", 400, "invalid_request")


async def test_a_waiting_pull_answers_with_the_commit_that_delivers(daemon: Daemon) -> None:
    await daemon.run_to_end()
    waiting = asyncio.ensure_future(daemon.get("/v1/completions", wait_s="20"))
    await asyncio.sleep(0)
    await daemon.deliver()
    assert len((await asyncio.wait_for(waiting, 5))["rows"]) == 1


async def test_a_page_of_completions_is_bounded_in_bytes_but_never_empty(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        await daemon.run_to_end()
    await daemon.deliver()
    monkeypatch.setattr(completions, "PAGE_BYTES_MAX", 10)
    page = await daemon.get("/v1/completions")
    assert (len(page["rows"]), page["more"]) == (1, True)


async def test_rows_of_a_sink_or_a_task_that_nobody_knows_are_an_error_and_not_an_empty_list(
    daemon: Daemon,
) -> None:
    await daemon.submit(id="waits")
    assert (await daemon.get("/v1/outbox", task="waits"))["rows"] == []
    assert (await daemon.get("/v1/outbox", sink="completions"))["rows"] == []
    told = await daemon.fails("GET", "/v1/outbox", 404, "no_such_sink", params={"sink": "typo"})
    assert "there is completions" in told["message"]
    await daemon.fails("GET", "/v1/outbox", 404, "no_such_task", params={"task": "typo"})
