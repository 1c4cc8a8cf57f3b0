"""Submitting, showing, listing and changing tasks over the real socket."""

from __future__ import annotations

import asyncio
import io

import pytest

from agentqd.control import submit, tasklist
from agentqd.core.settings import Queue, Settings

from .harness import Daemon


async def test_submit_answers_201_and_the_task_is_in_the_journal(daemon: Daemon) -> None:
    status, answer = await daemon.ask("POST", "/v1/tasks", data=b'{"task":"a","prompt":"true","id":"one"}')
    assert status == 201
    assert answer == {
        "task_id": "one",
        "state": "queued",
        "result": None,
        "duplicate": False,
        "where": "accepted",
    }
    rows = await daemon.journal.read(lambda c: c.execute("SELECT id, source FROM tasks").fetchall())
    assert rows == [("one", '{"kind":"socket"}')]


async def test_the_same_id_again_is_a_duplicate_even_while_draining(daemon: Daemon) -> None:
    await daemon.submit(id="one")
    daemon.set_draining(True)
    status, answer = await daemon.ask(
        "POST", "/v1/tasks", json={"task": "demo", "prompt": "true", "id": "one"}
    )
    assert (status, answer["duplicate"], answer["task_id"]) == (200, True, "one")


async def test_tasks_without_an_id_each_get_their_own(daemon: Daemon) -> None:
    assert await daemon.submit() != await daemon.submit()


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 422, "invalid_json"),
        (b"[1]", 422, "invalid_json"),
        (b'{"task":"x"}', 422, "missing_field"),
        (b'{"task":"x","prompt":" "}', 422, "empty_prompt"),
        (b'{"task":"x","prompt":"true","promt":1}', 422, "unknown_field"),
        (b'{"task":"x","prompt":"true","prompt":"false"}', 422, "duplicate_field"),
        (b'{"task":"x","prompt":"true","queue":"no"}', 422, "unknown_queue"),
        (b'{"task":"x","prompt_ref":"../journal.db"}', 422, "prompt_outside"),
        (b'{"task":"\xff","prompt":"true"}', 422, "invalid_utf8"),
    ],
)
async def test_a_task_that_can_never_be_accepted_is_422_and_leaves_nothing(
    daemon: Daemon, body: bytes, status: int, code: str
) -> None:
    await daemon.fails("POST", "/v1/tasks", status, code, data=body)
    assert await daemon.journal.read(lambda c: c.execute("SELECT count(*) FROM tasks").fetchone()[0]) == 0


async def test_the_same_id_with_other_content_is_409(daemon: Daemon) -> None:
    await daemon.submit(id="one")
    await daemon.fails(
        "POST", "/v1/tasks", 409, "id_conflict", json={"task": "demo", "prompt": "false", "id": "one"}
    )


async def test_a_write_conflict_is_409_names_the_other_task_and_is_remembered(daemon: Daemon) -> None:
    await daemon.submit(id="one", writes_to=["/srv/repo"])
    body = {"task": "demo", "prompt": "true", "id": "two", "writes_to": ["/srv/repo/src"]}
    answer = await daemon.fails("POST", "/v1/tasks", 409, "write_conflict", json=body)
    assert [(each["task_id"], each["path"]) for each in answer["conflicts"]] == [("one", "/srv/repo")]
    await daemon.fails("GET", "/v1/tasks/two", 404, "no_such_task")
    (claim,) = (await daemon.get("/v1/writes"))["claims"]
    assert (claim["path"], claim["task_id"]) == ("/srv/repo", "one")
    (pair,) = (await daemon.get("/v1/writes/conflicts"))["conflicts"]
    assert (pair["other_id"], pair["count"]) == ("one", 1)


async def test_draining_and_a_full_disk_refuse_for_now_and_keep_nothing(daemon: Daemon) -> None:
    for name, reason in (("draining", "draining"), ("disk_low", "disk_low")):
        setattr(daemon.box, name, True)
        body = {"task": "demo", "prompt": "true", "id": "one"}
        answer = await daemon.fails("POST", "/v1/tasks", 503, "refused_for_now", json=body)
        assert answer["reason"] == reason
        setattr(daemon.box, name, False)
    assert await daemon.journal.read(lambda c: c.execute("SELECT count(*) FROM events").fetchone()[0]) == 0
    await daemon.submit(id="one")


async def test_a_task_larger_than_the_limits_is_refused(daemon: Daemon) -> None:
    body = io.BytesIO(b'{"task":"x","prompt":"' + b"a" * (18 * 1024 * 1024) + b'"}')
    await daemon.fails("POST", "/v1/tasks", 422, "task_too_large", data=body)


@pytest.mark.parametrize("settings", [Settings(queues={"small": Queue(waiting_max=3)})])
async def test_a_full_queue_takes_not_one_more_even_from_many_at_once(daemon: Daemon) -> None:
    bodies = [{"task": "x", "prompt": "true", "queue": "small", "id": f"t{n}"} for n in range(12)]
    answers = await asyncio.gather(*(daemon.ask("POST", "/v1/tasks", json=body) for body in bodies))
    assert sorted(status for status, _ in answers) == [201] * 3 + [503] * 9
    assert {value["reason"] for status, value in answers if status == 503} == {"queue_full"}
    await daemon.submit()  # another queue has room


async def test_a_claimed_task_runs_with_pid_and_deadline_from_memory(daemon: Daemon) -> None:
    daemon.connect_supervisor()
    task_id = await daemon.submit(run_timeout="10m", labels=["red"], env={"KEY": "hidden-value"})
    await daemon.start_task(task_id)
    (daemon.attempt_folder(task_id) / "stdout").write_bytes(b"12345")
    shown = await daemon.get(f"/v1/tasks/{task_id}")
    assert (shown["state"], shown["pid"], shown["attempt"], shown["labels"]) == ("running", 4242, 1, ["red"])
    attempt = shown["attempts"][0]
    assert (attempt["pid"], attempt["stdout_bytes"], attempt["ended_at"]) == (4242, 5, None)
    assert attempt["deadline_at"] > attempt["started_at"]
    assert shown["settings"]["run_timeout_s"] == 600.0
    assert [event["event"] for event in shown["events"]] == ["accepted", "claimed"]
    assert shown["source"] == {"kind": "socket"}
    assert "hidden-value" not in str(shown)


async def test_a_finished_task_shows_its_attempt_and_its_outbox(daemon: Daemon) -> None:
    task_id = await daemon.run_to_end()
    shown = await daemon.get(f"/v1/tasks/{task_id}")
    assert (shown["state"], shown["result"], shown["waiting_for"]) == ("finished", "success", None)
    assert (shown["attempts"][0]["exit_code"], shown["attempts"][0]["result"]) == (0, "success")
    assert [(row["sink"], row["state"]) for row in shown["outbox"]] == [("completions", "pending")]
    assert [event["event"] for event in shown["events"]] == [
        "accepted",
        "claimed",
        "worker_started",
        "finished",
    ]


async def test_what_is_no_task_is_404_everywhere(daemon: Daemon) -> None:
    for path in ("nope", "nope/wait", "nope/logs", "..%2Fjournal", "%ff", "x" * 65):
        await daemon.fails("GET", f"/v1/tasks/{path}", 404, "no_such_task")
    for verb in ("cancel", "hold", "release", "retry"):
        await daemon.fails("POST", f"/v1/tasks/nope/{verb}", 404, "no_such_task")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "no_supervisor"),
        ({"not_before": "2099-01-01T00:00:00Z"}, "start_time"),
        ({"prompt": None, "prompt_ref": "later"}, "prompt_missing"),
    ],
)
async def test_a_waiting_task_says_what_it_waits_for(
    daemon: Daemon, fields: dict[str, str | None], reason: str
) -> None:
    body = {
        name: value for name, value in {"task": "x", "prompt": "true", **fields}.items() if value is not None
    }
    task_id = (await daemon.post("/v1/tasks", body))["task_id"]
    waiting = (await daemon.get(f"/v1/tasks/{task_id}"))["waiting_for"]
    assert waiting["reason"] == reason
    assert waiting["text"]
    assert (waiting["until"] is None) == (reason == "no_supervisor")
    if reason == "start_time":
        assert waiting["until"] == "2099-01-01T00:00:00.000Z"


async def test_a_waiting_task_is_cancelled_at_once_and_not_twice(daemon: Daemon) -> None:
    task_id = await daemon.submit()
    assert await daemon.post(f"/v1/tasks/{task_id}/cancel") == {
        "id": task_id,
        "state": "finished",
        "result": "cancelled",
    }
    answer = await daemon.fails("POST", f"/v1/tasks/{task_id}/cancel", 409, "illegal_transition")
    assert (answer["state"], answer["result"]) == ("finished", "cancelled")


async def test_a_running_task_is_stopping_first_and_cannot_be_held(daemon: Daemon) -> None:
    daemon.connect_supervisor()
    task_id = await daemon.submit()
    await daemon.fails("POST", f"/v1/tasks/{task_id}/hold", 409, "illegal_transition")
    assert (await daemon.post(f"/v1/tasks/{task_id}/cancel"))["state"] == "stopping"


async def test_hold_and_release_and_retry(daemon: Daemon) -> None:
    task_id = await daemon.submit()
    assert (await daemon.post(f"/v1/tasks/{task_id}/hold"))["state"] == "held"
    assert (await daemon.get(f"/v1/tasks/{task_id}"))["waiting_for"]["reason"] == "held"
    assert (await daemon.post(f"/v1/tasks/{task_id}/release"))["state"] == "queued"
    await daemon.fails("POST", f"/v1/tasks/{task_id}/release", 409, "illegal_transition")
    await daemon.fails("POST", f"/v1/tasks/{task_id}/retry", 409, "illegal_transition")
    await daemon.post(f"/v1/tasks/{task_id}/cancel")
    assert await daemon.post(f"/v1/tasks/{task_id}/retry") == {
        "id": task_id,
        "state": "queued",
        "result": None,
        "run": 2,
    }


async def test_a_retry_may_say_what_becomes_of_a_conflict_and_says_whom_it_waits_for(daemon: Daemon) -> None:
    daemon.connect_supervisor()
    again = await daemon.submit(id="again", writes_to=["/w"])
    await daemon.end_task(again)
    await daemon.submit(id="other", writes_to=["/w"])
    door = f"/v1/tasks/{again}/retry"
    for wrong in ({"on_conflict": "wait"}, {"on_conflict": ["queue"]}, {"policy": "queue"}):
        await daemon.fails("POST", door, 400, "invalid_request", json=wrong)
    refused = await daemon.fails("POST", door, 409, "write_conflict")
    assert [each["task_id"] for each in refused["conflicts"]] == ["other"]
    answer = await daemon.post(door, {"on_conflict": "queue"})
    assert {name: answer[name] for name in ("state", "run", "reason")} == {"state": "blocked", "run": 2, "reason": "write_conflict"}  # fmt: skip
    assert answer["message"].startswith("waits for other (")
    await daemon.end_task("other")
    assert (await daemon.get(f"/v1/tasks/{again}"))["state"] == "running"


async def test_an_unknown_body_field_is_never_ignored(daemon: Daemon) -> None:
    task_id = await daemon.submit()
    await daemon.fails("POST", f"/v1/tasks/{task_id}/cancel", 400, "invalid_request", json={"force": True})
    await daemon.fails("POST", f"/v1/tasks/{task_id}/cancel", 400, "invalid_request", data=b"{")


async def test_wait_answers_when_the_task_ends(daemon: Daemon) -> None:
    daemon.connect_supervisor()
    task_id = await daemon.submit()
    waiting = asyncio.ensure_future(daemon.get(f"/v1/tasks/{task_id}/wait", timeout_s="20"))
    await daemon.until(lambda: daemon.server._room.watch._waiters)
    await daemon.end_task(task_id, exit_code=7)
    assert await waiting == {
        "id": task_id, "state": "finished", "result": "failed", "reason": "exit_code", "detail": "exit code 7",
        "conflicts": [], "exit_code": 7, "finished": True,
    }  # fmt: skip
    assert not daemon.server._room.watch._waiters


async def test_wait_gives_up_after_its_time_and_says_so(daemon: Daemon) -> None:
    task_id = await daemon.submit()
    answer = await daemon.get(f"/v1/tasks/{task_id}/wait", timeout_s="0.05")
    assert (answer["finished"], answer["state"], answer["exit_code"]) == (False, "queued", None)
    await daemon.fails("GET", f"/v1/tasks/{task_id}/wait?timeout_s=-1", 400, "invalid_request")


async def test_a_new_run_does_not_show_the_exit_code_of_the_run_before(daemon: Daemon) -> None:
    task_id = await daemon.run_to_end()
    daemon.disconnect_supervisor()
    await daemon.post(f"/v1/tasks/{task_id}/retry")
    await daemon.post(f"/v1/tasks/{task_id}/cancel")
    answer = await daemon.get(f"/v1/tasks/{task_id}/wait")
    assert (answer["result"], answer["exit_code"]) == ("cancelled", None)


@pytest.mark.parametrize("settings", [Settings(queues={"slow": Queue(paused=True)})])
async def test_list_filters_and_pages_newest_first(daemon: Daemon) -> None:
    ids = [await daemon.submit(id=f"t{n}", task=f"name{n % 2}", priority=n % 3) for n in range(9)]
    await daemon.submit(id="slow1", queue="slow", labels=["red", "blue"])
    await daemon.post("/v1/tasks/t4/cancel")
    await daemon.post("/v1/tasks/t5/hold")

    async def listed(**query: str) -> list[str]:
        return [task["id"] for task in (await daemon.get("/v1/tasks", **query))["tasks"]]

    assert await listed() == ["slow1", *reversed(ids)]
    assert await listed(state="finished") == await listed(result="cancelled") == ["t4"]
    assert await listed(state="held,finished") == ["t5", "t4"]
    assert await listed(state="queued", queue="default", limit="3") == ["t8", "t7", "t6"]
    assert await listed(state="running") == await listed(result="lost") == []
    assert await listed(name="name1", state="queued") == ["t7", "t3", "t1"]
    assert await listed(label="blue") == await listed(queue="slow") == ["slow1"]
    assert await listed(label="green") == await listed(runner="command") == []
    assert len(await listed(runner="shell")) == 10

    found: list[str] = []
    before = None
    while True:
        page = await daemon.get("/v1/tasks", limit="4", **({} if before is None else {"before": str(before)}))
        found += [task["id"] for task in page["tasks"]]
        before = page["next_before"]
        if before is None:
            break
    assert found == ["slow1", *reversed(ids)]


async def test_list_walks_windows_and_finds_the_oldest_too(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasklist, "WINDOW", 7)
    monkeypatch.setattr(tasklist, "WINDOW_WITH_LABELS", 3)
    await daemon.submit(id="first", labels=["old"])
    await daemon.post("/v1/tasks/first/hold")
    await daemon.admit_many(50)
    for query in ({"state": "held"}, {"name": "demo"}, {"label": "old"}):
        found = await daemon.get("/v1/tasks", **query)
        assert [task["id"] for task in found["tasks"]] == ["first"]
        assert found["next_before"] is None


async def test_list_refuses_what_it_does_not_know(daemon: Daemon) -> None:
    for query in (
        "state=quued",
        "result=fine",
        "limit=0",
        "limit=x",
        "limit=99999999",
        "colour=red",
        "limit=1&limit=2",
        "before=-1",
    ):
        await daemon.fails("GET", f"/v1/tasks?{query}", 400, "invalid_request")


def test_every_waiting_state_counts_against_a_queues_limit() -> None:
    assert "'scheduled'" in submit._COUNT_WAITING
    assert "'running'" not in submit._COUNT_WAITING


async def test_a_list_of_a_queue_that_is_nowhere_is_an_error_that_names_the_queues(daemon: Daemon) -> None:
    daemon.box.apply(Settings(queues={"old": Queue(), "idle": Queue()}))
    await daemon.submit(id="a", queue="old")
    daemon.box.apply(Settings(queues={"idle": Queue()}))
    answer = await daemon.fails("GET", "/v1/tasks?queue=nope", 404, "no_such_queue")
    assert "default, idle" in answer["message"]
    assert (await daemon.get("/v1/tasks", queue="idle"))["tasks"] == []
    assert [task["id"] for task in (await daemon.get("/v1/tasks", queue="old,default"))["tasks"]] == ["a"]


async def test_a_refused_task_says_to_who_waits_for_it_whose_claim_it_has_met(daemon: Daemon) -> None:
    await daemon.submit(id="one", writes_to=["/srv/repo"])
    body = {"task": "demo", "prompt": "true", "id": "two", "writes_to": ["/srv/repo/src"]}
    answer = await daemon.post("/v1/tasks?spooled=k1", body)
    assert answer["result"] == "refused"
    end = await daemon.get("/v1/tasks/two/wait")
    assert (end["result"], end["reason"]) == ("refused", "write_conflict")
    assert "one" in end["detail"]
    assert end["conflicts"] == [{"task_id": "one", "task": "demo", "path": "/srv/repo"}]


async def test_hold_and_release_say_what_the_task_does_and_what_to_do_instead(daemon: Daemon) -> None:
    async def told(verb: str, task_id: str) -> str:
        answer = await daemon.fails("POST", f"/v1/tasks/{task_id}/{verb}", 409, "illegal_transition")
        assert answer["message"].startswith(f"task {task_id} ")
        assert "nothing was changed" in answer["message"]
        assert "hold_requested" not in answer["message"]
        return str(answer["message"])

    await daemon.submit(id="later", not_before="2099-01-01T00:00:00Z")
    await daemon.submit(id="kept")
    await daemon.post("/v1/tasks/kept/hold")
    await daemon.submit(id="done")
    await daemon.post("/v1/tasks/done/cancel")
    daemon.connect_supervisor()
    await daemon.submit(id="busy")
    for verb in ("hold", "release"):
        assert "is running (attempt 1); wait for its end, or agentqctl cancel busy" in await told(
            verb, "busy"
        )
        assert "has finished (cancelled); agentqctl retry done runs it again" in await told(verb, "done")
    assert "is held; agentqctl release kept" in await told("hold", "kept")
    assert "its start time lies ahead; agentqctl show later" in await told("release", "later")


async def test_retry_of_a_task_that_waits_points_to_why_it_waits(daemon: Daemon) -> None:
    async def told(task_id: str) -> str:
        answer = await daemon.fails("POST", f"/v1/tasks/{task_id}/retry", 409, "illegal_transition")
        return str(answer["message"])

    await daemon.post("/v1/tasks", {"task": "x", "id": "late", "prompt_ref": "later"})
    blocked = await told("late")
    assert "(prompt_missing)" in blocked
    assert "None" not in blocked
    await daemon.run_to_end(id="old")
    daemon.disconnect_supervisor()
    await daemon.post("/v1/tasks/old/retry")
    await daemon.submit(id="new")
    assert "has not run yet" in await told("new")
    for told_of in (await told("old"), await told("new")):
        assert "says why it waits" in told_of
        assert "as soon as it can" not in told_of
    assert "has not run yet" not in await told("old")


async def test_show_tells_what_was_declared_but_no_prompt_and_no_env(daemon: Daemon) -> None:
    await daemon.submit(id="one", not_before="2099-01-01T00:00:00Z")
    await daemon.submit(
        id="two", prompt="say nothing", env={"TOKEN": "s3cret"}, writes_to=["/srv/a"], after="one", after_policy="any",
        not_before="2099-01-01T00:00:00Z", expires_at="2099-01-02T00:00:00Z",
    )  # fmt: skip
    shown = await daemon.get("/v1/tasks/two")
    assert shown["declared"] == {
        "writes_to": ["/srv/a"], "after": ["one"], "after_policy": "any",
        "not_before": "2099-01-01T00:00:00Z", "expires_at": "2099-01-02T00:00:00Z",
    }  # fmt: skip
    assert "s3cret" not in str(shown)
    assert "say nothing" not in str(shown)


LINE = {"task": "off", "id": "OFF3", "prompt": "true", "queue": "nosuch", "submitted_at": "2026-01-02T03:04:05Z"}  # fmt: skip


@pytest.mark.parametrize("what", ["", "/wait", "/logs"])
async def test_who_asks_for_a_task_that_was_rejected_is_told_why(daemon: Daemon, what: str) -> None:
    await daemon.fails("POST", "/v1/tasks?spooled=k1", 422, "unknown_queue", json=LINE)
    told = await daemon.fails("GET", f"/v1/tasks/OFF3{what}", 422, "unknown_queue")
    assert told["message"].startswith("task OFF3 was not accepted: ")
    assert "'nosuch'" in told["message"]
    assert (told["id"], told["name"], told["submitted_at"]) == ("OFF3", "off", LINE["submitted_at"])
    assert told["rejected_at"]
    await daemon.fails("GET", f"/v1/tasks/OFF4{what}", 404, "no_such_task")


async def test_of_several_rejections_of_an_id_the_newest_is_told_and_a_task_comes_first(
    daemon: Daemon,
) -> None:
    await daemon.fails("POST", "/v1/tasks?spooled=k1", 422, "unknown_queue", json=LINE)
    later = {**LINE, "queue": "default", "deliver_to": ["nowhere"]}
    await daemon.fails("POST", "/v1/tasks?spooled=k2", 422, "unknown_sink", json=later)
    await daemon.fails("GET", "/v1/tasks/OFF3", 422, "unknown_sink")
    await daemon.submit(id="OFF3")
    assert (await daemon.get("/v1/tasks/OFF3"))["state"] == "queued"


async def test_a_rejected_id_that_is_no_id_leads_nowhere(daemon: Daemon) -> None:
    for n, task_id in enumerate(("../x", "x" * 65, 7)):
        await daemon.fails("POST", f"/v1/tasks?spooled=k{n}", 422, "invalid_field", json={**LINE, "id": task_id})  # fmt: skip
    assert await daemon.journal.read(lambda c: c.execute("SELECT * FROM rejected_ids").fetchall()) == []


async def test_a_task_that_ends_with_its_submission_is_answered_with_its_end(daemon: Daemon) -> None:
    daemon.connect_supervisor()
    await daemon.submit(id="A1")
    await daemon.start_task("A1")
    await daemon.end_task("A1", exit_code=1)
    refused = await daemon.post("/v1/tasks", {"task": "demo", "prompt": "true", "id": "A2", "after": "A1"})
    assert (refused["state"], refused["result"]) == ("finished", "refused")
    assert (refused["reason"], refused["message"]) == ("dependency_failed", "A1 did not end with success")
    late = {"task": "demo", "prompt": "true", "id": "late", "expires_at": "2020-01-01T00:00:00Z"}
    expired = await daemon.post("/v1/tasks", late)
    assert (expired["state"], expired["result"], expired["reason"]) == ("finished", "expired", "expires_at")
    assert (await daemon.get("/v1/tasks/late"))["result"] == "expired"
    (told,) = await daemon.journal.read(
        lambda c: c.execute("SELECT count(*) FROM entries WHERE type = 'agentq.task.expired'").fetchone()
    )
    assert told == 1
