"""Status, what needs attention, metrics, doctor, config, queues, writes."""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import pytest

from agentqd.core.errors import ConfigError
from agentqd.core.outbox import RowEvent
from agentqd.core.settings import Queue, Settings, Sink
from agentqd.loops.alerts import alert
from agentqd.storage import intents, outbox

from .harness import VERSION, Daemon, fake_runner


async def test_the_status_of_an_empty_box_has_every_part(daemon: Daemon) -> None:
    status = await daemon.get("/v1/status")
    assert set(status) == {
        "box", "daemon", "supervisor", "tasks", "results", "queues", "outbox", "sinks", "alerts", "attention", "running", "intake", "disk",
        "waiting", "runner_limits",
    }  # fmt: skip
    assert (status["box"], status["daemon"]["version"], status["supervisor"]) == ("testbox", VERSION, None)
    assert set(status["tasks"].values()) == {0}
    assert set(status["queues"]) == {"default"}
    assert status["sinks"]["completions"]["type"] == "completions"
    assert status["disk"]["free_bytes"] > 0
    assert status["daemon"]["rss_bytes"] > 0
    assert [item["level"] for item in status["attention"]] == ["error"]  # no supervisor


async def test_the_sums_follow_the_tasks(daemon: Daemon) -> None:
    daemon.connect_supervisor()
    running = await daemon.submit(run_timeout="100s")
    await daemon.start_task(running)
    daemon.disconnect_supervisor()
    waiting = await daemon.submit()
    await daemon.post(f"/v1/tasks/{await daemon.submit()}/cancel")
    status = await daemon.get("/v1/status")
    assert {state: n for state, n in status["tasks"].items() if n} == {
        "running": 1,
        "queued": 1,
        "finished": 1,
    }
    assert {result: n for result, n in status["results"].items() if n} == {"cancelled": 1}
    queue = status["queues"]["default"]
    assert (queue["running"], queue["waiting"], queue["paused"]) == (1, 1, False)
    assert 0 <= queue["oldest_waiting_s"] < 60
    (shown,) = status["running"]
    assert (shown["id"], shown["pid"], shown["queue"]) == (running, 4242, "default")
    assert 90 < shown["deadline_in_s"] <= 100
    assert status["outbox"]["pending"] == 1
    assert 0 <= status["sinks"]["completions"]["oldest_pending_s"] < 60
    assert waiting


@pytest.mark.parametrize(
    "settings",
    [Settings(queues={"slow": Queue(paused=True)}, sinks={"hook": Sink(type="file", path="/x/y")})],
)
async def test_attention_names_each_trouble_with_its_fix(daemon: Daemon) -> None:
    await daemon.run_to_end(deliver_to=["hook"])
    await daemon.deliver("hook", RowEvent.REJECTED, "the receiver said no")
    daemon.delivery.runners["hook"] = fake_runner(last_error="the receiver said no")
    daemon.disconnect_supervisor()
    await daemon.submit(queue="slow")
    daemon.set_draining(True)
    daemon.connect_supervisor(version="1.0")
    daemon.box.disk_low = True
    daemon.reload.last_error = ConfigError("queues.slow.pausd: unknown", problems=[])

    def unit(tx: Any) -> None:
        for n in range(3):
            alert(tx, daemon.box, "line_rejected", f"line {n}", key=str(n))
        tx.execute("UPDATE outbox SET created_at = created_at - 600000000 WHERE sink = 'completions'")

    await daemon.journal.commit(unit)
    status = await daemon.get("/v1/status")
    found = {item["text"]: item["fix"] for item in status["attention"]}

    def fix(text: str) -> str | None:
        (match,) = [value for key, value in found.items() if text in key]
        return match

    assert fix("the receiver said no") == "agentqctl outbox list --sink hook --state dead"
    assert fix("not delivered, the oldest") == "agentqctl outbox list --sink completions"
    assert fix("queue slow is paused (by the config)") is None
    assert fix("the supervisor runs version 1.0") is None
    assert fix("draining") == "agentqctl drain --off"
    assert "du " in str(fix("intake has stopped"))
    assert fix("is not applied") == "agentqctl config check /etc/agentqd/agentqd.yaml"
    assert str(fix("line_rejected: 3 times")).startswith("tail ")
    (shown,) = status["alerts"]
    assert (shown["type"], shown["count"], shown["message"]) == ("agentq.alert.line_rejected", 3, "line 2")
    levels = [item["level"] for item in status["attention"]]
    assert levels == sorted(levels, key=lambda level: level != "error")


@pytest.mark.parametrize(
    ("health", "text", "fix"),
    [
        ({"breaker": "disabled", "disabled": "410 Gone"}, "hook is disabled, its deliveries are held: 410 Gone", "sink enable hook"),
        ({"breaker": "disabled", "disabled": "by a person", "disabled_by": "person"}, "hook was disabled by a person; 0 deliveries are held", "sink enable hook"),
        ({"breaker": "open", "next_probe_at": "2026-01-01T00:00:00.000Z"}, "left alone until 2026-01-01T00:00:00.000Z: no route", "sink test hook"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("settings", [Settings(sinks={"hook": Sink(type="file", path="/x/y")})])
async def test_a_sink_that_is_not_sent_to_is_named(daemon: Daemon, health: dict[str, str], text: str, fix: str) -> None:  # fmt: skip
    daemon.delivery.runners["hook"] = runner = fake_runner(last_error="no route")
    runner.health = lambda: health
    (item,) = [each for each in (await daemon.get("/v1/status"))["attention"] if "hook" in each["text"]]
    assert text in item["text"]
    assert item["fix"] == f"agentqctl {fix}"


@pytest.mark.parametrize(
    ("health", "fix"),
    [
        ({"breaker": "closed"}, "outbox retry ALL --sink hook --state retryable"),
        ({"breaker": "half_open"}, "sink test hook"),
        ({"breaker": "closed", "rate_wait_s": 9.0}, "outbox list --sink hook"),
        ({"breaker": "closed", "left_alone_until": "2026-01-01T00:00:00.000Z"}, "outbox list --sink hook"),
    ],
)
@pytest.mark.parametrize("settings", [Settings(sinks={"hook": Sink(type="file", path="/x/y")})])
async def test_what_is_not_delivered_for_long_comes_with_what_sends_it_now(
    daemon: Daemon, health: dict[str, Any], fix: str
) -> None:
    await daemon.run_to_end(deliver_to=["hook"])
    await daemon.deliver("hook", RowEvent.DEFERRED, "no route")
    sql = "UPDATE outbox SET created_at = created_at - 600000000, due_at = created_at WHERE sink = 'hook'"
    await daemon.journal.commit(lambda tx: tx.execute(sql))
    daemon.delivery.runners["hook"] = runner = fake_runner(last_error="no route")
    runner.health = lambda: health
    (item,) = [each for each in (await daemon.get("/v1/status"))["attention"] if "hook" in each["text"]]
    assert "not delivered, the oldest" in item["text"]
    assert ("asked to be left alone until 2026" in item["text"]) is ("left_alone_until" in health)
    assert item["fix"] == f"agentqctl {fix}"


TWO_SINKS = Settings(sinks={name: Sink(type="file", path="/x/y") for name in ("hook", "mail")})


async def texts(daemon: Daemon) -> list[str]:
    return [item["text"] for item in (await daemon.get("/v1/status"))["attention"]]


@pytest.mark.parametrize("settings", [TWO_SINKS])
async def test_an_alert_that_is_over_needs_no_attention_and_the_others_say_when_they_were(
    daemon: Daemon,
) -> None:
    daemon.connect_supervisor()
    daemon.delivery.runners["hook"] = fake_runner()

    def unit(tx: Any) -> None:
        alert(tx, daemon.box, "bad_config", "the edited config is not applied", key="1")
        alert(tx, daemon.box, "disk_low", "intake has stopped", key="1")
        alert(tx, daemon.box, "stuck", "its processes do not die", key="1")
        for kind in ("sink_disabled", "dead_letter", "webhook_secret", "undelivered"):
            alert(tx, daemon.box, kind, f"hook: {kind}", key="1", sink="hook")
        alert(tx, daemon.box, "line_rejected", "not JSON", key="1")
        alert(tx, daemon.box, "sink_file", "hook: it was replaced", key="1", sink="hook")
        tx.execute("UPDATE entries SET at = at - 7200000000 WHERE kind = 'alert'")

    await daemon.journal.commit(unit)
    assert sorted(await texts(daemon)) == [
        "line_rejected: 2h00m ago: not JSON",
        "sink_file: 2h00m ago: hook: it was replaced",
    ]
    assert len((await daemon.get("/v1/status"))["alerts"]) == 9  # what happened is still told


@pytest.mark.parametrize("settings", [TWO_SINKS])
async def test_an_alert_of_one_sink_does_not_hide_anothers_and_ends_when_it_delivers(daemon: Daemon) -> None:
    daemon.connect_supervisor()
    for name in ("hook", "mail"):
        daemon.delivery.runners[name] = fake_runner(last_error="cannot be signed")

    def unit(tx: Any) -> None:
        for n, name in enumerate(("hook", "mail", "mail")):
            alert(tx, daemon.box, "webhook_secret", f"{name}: nothing is sent", key=str(n), sink=name)

    await daemon.journal.commit(unit)
    shown = {each["sink"]: each["count"] for each in (await daemon.get("/v1/status"))["alerts"]}
    assert shown == {"hook": 1, "mail": 2}
    assert len(found := await texts(daemon)) == 2
    assert any("hook: nothing" in text for text in found)
    daemon.delivery.runners["mail"].delivered_us = daemon.clock.now_us() + 1
    (text,) = await texts(daemon)
    assert "hook: nothing is sent" in text


@pytest.mark.parametrize("settings", [TWO_SINKS])
async def test_dead_rows_say_why_the_newest_of_them_died_also_after_a_send_that_went_well(
    daemon: Daemon,
) -> None:
    daemon.delivery.runners["hook"] = fake_runner()
    for reason in ("HTTP 500", "HTTP 413"):
        await daemon.run_to_end(deliver_to=["hook"])
        await daemon.deliver("hook", RowEvent.REJECTED, reason)
    (text,) = [text for text in await texts(daemon) if "gave up" in text]
    assert text == "2 deliveries to hook gave up and will not be sent again by itself: HTTP 413"


@pytest.mark.parametrize("settings", [TWO_SINKS])
async def test_an_entry_that_was_set_aside_is_named_once_however_many_sinks_it_was_for(
    daemon: Daemon,
) -> None:
    task_id = await daemon.run_to_end()
    daemon.delivery.runners["hook"] = fake_runner()

    def unit(tx: Any) -> None:
        seq = tx.one("SELECT seq FROM tasks WHERE id = ?", (task_id,))[0]
        outbox.add_entry(
            tx,
            outbox.NewEntry(
                "broken-1", seq, 1, 1, "broken", "mail.json", "agentq.task.entry", b"{}",
                ["completions", "hook", "mail"], task_id=task_id, dead_reason="malformed: not JSON",
            ),
        )  # fmt: skip
        alert(tx, daemon.box, "entry_malformed", "mail.json is not sent: malformed: not JSON", key="1")

    await daemon.journal.commit(unit)
    assert (await daemon.get("/v1/status"))["sinks"]["hook"]["dead"] == 1
    (item,) = (await daemon.get("/v1/status"))["attention"]
    assert item == {
        "level": "error",
        "text": f"an entry of task {task_id} ('mail.json') was set aside and is not sent: malformed: not JSON",
        "fix": "agentqctl outbox show broken-1",
    }
    await daemon.post("/v1/outbox/drop", {"all": True})
    assert await texts(daemon) == []


async def test_a_task_that_does_not_die_is_named(daemon: Daemon) -> None:
    daemon.connect_supervisor()
    task_id = await daemon.submit()
    await daemon.start_task(task_id)
    await daemon.post(f"/v1/tasks/{task_id}/cancel")
    assert not [item for item in (await daemon.get("/v1/status"))["attention"] if "stopping" in item["text"]]
    await daemon.journal.commit(lambda tx: tx.execute("UPDATE events SET at = at - 120000000"))
    (item,) = [item for item in (await daemon.get("/v1/status"))["attention"] if "stopping" in item["text"]]
    assert (item["level"], item["fix"]) == ("error", f"agentqctl show {task_id}")


async def test_a_paused_queue_starts_nothing_and_says_so(daemon: Daemon) -> None:
    assert await daemon.post("/v1/queues/default/pause") == {
        "queue": "default",
        "paused": True,
        "in_config": True,
    }
    daemon.connect_supervisor()
    task_id = await daemon.submit()
    shown = await daemon.get(f"/v1/tasks/{task_id}")
    assert (shown["state"], shown["waiting_for"]["reason"]) == ("queued", "queue_paused")
    status = await daemon.get("/v1/status")
    assert status["queues"]["default"]["paused"]
    assert [item["fix"] for item in status["attention"]] == ["agentqctl resume default"]
    assert await daemon.post("/v1/queues/default/resume") == {
        "queue": "default",
        "paused": False,
        "in_config": True,
    }
    await daemon.until(lambda: task_id in daemon.supervision.live)
    await daemon.fails("POST", "/v1/queues/nope/pause", 404, "no_such_queue")
    await daemon.fails("POST", "/v1/queues/%ff/resume", 404, "no_such_queue")


@pytest.mark.parametrize("settings", [Settings(queues={"slow": Queue(paused=True)})])
async def test_what_the_config_has_paused_is_resumed_there(daemon: Daemon) -> None:
    await daemon.fails("POST", "/v1/queues/slow/resume", 409, "illegal_transition")


async def test_drain_is_switched_on_and_off(daemon: Daemon) -> None:
    begun = await daemon.post("/v1/drain", {"on": True})
    assert begun["draining"]
    assert daemon.box.draining
    assert await daemon.post("/v1/drain", {"on": True}) == begun, "the first word counts"
    assert (await daemon.get("/v1/status"))["daemon"]["draining_since"] == begun["since"]
    (check,) = [each for each in (await daemon.get("/v1/doctor"))["checks"] if each["name"] == "draining"]
    assert (check["level"], check["fix"]) == ("warning", "agentqctl drain --off")
    assert begun["since"] in check["message"]
    for _ in range(2):
        ended = await daemon.post("/v1/drain", {"on": False})
        assert ended == {"draining": False, "since": None}
    assert all(each["name"] != "draining" for each in (await daemon.get("/v1/doctor"))["checks"])
    events = await daemon.journal.read(lambda c: c.execute("SELECT event FROM events").fetchall())
    assert [name for (name,) in events] == ["draining_begun", "draining_ended"]
    for body in (b"{}", b'{"on": 1}', b'{"on": true, "x": 1}', b'{"on": false, "on": true}'):
        await daemon.fails("POST", "/v1/drain", 400, "invalid_request", data=body)


async def test_writes_shows_claims_and_conflicts_by_pair(daemon: Daemon) -> None:
    await daemon.submit(id="one")

    def unit(tx: Any) -> None:
        intents.claim(tx, 1, [("/srv/repo", "repo")], "refuse")
        for seq in (1, 2):
            tx.execute(
                "INSERT INTO conflicts VALUES (?, ?, NULL, 'two', '/srv/repo', 'one', '/srv/repo', 'refuse')",
                (seq, seq),
            )

    await daemon.journal.commit(unit)
    (claim,) = (await daemon.get("/v1/writes"))["claims"]
    assert (claim["path"], claim["task_id"], claim["task"], claim["state"]) == (
        "/srv/repo",
        "one",
        "demo",
        "queued",
    )
    (pair,) = (await daemon.get("/v1/writes/conflicts"))["conflicts"]
    assert (pair["task"], pair["other_id"], pair["other_task"], pair["count"]) == ("two", "one", "demo", 2)


async def test_metrics_are_prometheus_text(daemon: Daemon) -> None:
    await daemon.run_to_end()
    async with daemon.session.get("http://box/metrics") as response:
        text = await response.text()
        assert response.content_type == "text/plain"
    assert 'agentqd_tasks{queue="default",state="finished",result="success"} 1\n' in text
    assert 'agentqd_outbox_rows{sink="completions",state="pending"} 1\n' in text
    for line in text.splitlines():
        name = line.split()[2] if line.startswith("#") else line.split("{")[0].split(" ")[0]
        assert name.startswith("agentqd_")
        assert line.startswith("#") or float(line.rsplit(" ", 1)[1]) >= 0


async def test_doctor_sees_no_damage_in_a_journal_with_dependencies(daemon: Daemon) -> None:
    """SQLite 3.40's quick_check does: a key of a WITHOUT ROWID table in another order than its columns."""
    first = await daemon.submit()
    await daemon.submit(after=[first])
    (pages,) = [
        each for each in (await daemon.get("/v1/doctor"))["checks"] if each["name"] == "journal pages"
    ]
    assert (pages["ok"], pages["message"]) == (True, "whole")


async def test_doctor_finds_what_is_wrong_and_says_how_to_mend_it(daemon: Daemon) -> None:
    def by_name(answer: dict[str, Any]) -> dict[str, Any]:
        return {check["name"]: check for check in answer["checks"]}

    daemon.connect_supervisor()
    daemon.delivery.runners["completions"] = fake_runner()
    sound = by_name(await daemon.get("/v1/doctor"))
    assert {name for name, check in sound.items() if not check["ok"]} <= {"disk", "inotify", "inodes"}
    daemon.disconnect_supervisor()
    daemon.reload.last_error = ConfigError("bad", problems=[])
    daemon.delivery.runners["completions"] = fake_runner(last_error="no space")
    os.chmod(daemon.folders.queue_file, 0o666)
    await daemon.submit()
    await daemon.journal.commit(lambda tx: tx.execute("UPDATE events SET at = at + 3600000000"))
    sick = by_name(await daemon.get("/v1/doctor"))
    assert sick["supervisor"]["level"] == sick["config"]["level"] == sick["queue folder"]["level"] == "error"
    assert sick["queue folder"]["fix"].startswith("chmod o-w ")
    assert (sick["sink completions"]["level"], sick["clock"]["level"]) == ("warning", "warning")
    assert sick["journal pages"]["ok"]


async def test_doctor_has_dead_letters_looked_at_before_they_are_sent_again(daemon: Daemon) -> None:
    """Among them may be what was not allowed."""
    daemon.delivery.runners["completions"] = fake_runner()
    await daemon.run_to_end()
    await daemon.deliver(event=RowEvent.REJECTED, error="not_allowed: x")
    (check,) = [each for each in (await daemon.get("/v1/doctor"))["checks"] if "completions" in each["name"]]
    assert check["message"].startswith("1 dead letters; ")
    assert check["fix"] == "agentqctl outbox list --sink completions --state dead"


@pytest.mark.parametrize("settings", [TWO_SINKS])
async def test_doctor_says_that_a_sink_works_only_once_something_has_arrived_since(daemon: Daemon) -> None:
    async def said(name: str) -> str:
        (found,) = [
            each for each in (await daemon.get("/v1/doctor"))["checks"] if each["name"] == f"sink {name}"
        ]
        return str(found["message"])

    unknown = "nothing is known to have arrived there since"
    for name in ("completions", "hook", "mail"):
        daemon.delivery.runners[name] = fake_runner()  # the daemon was restarted: no last error
    task_id = await daemon.run_to_end(deliver_to=["hook", "mail"])
    await daemon.deliver("mail")
    await daemon.run_to_end(deliver_to=["mail"])
    await daemon.deliver("mail", RowEvent.REJECTED, "HTTP 400")
    await daemon.deliver("hook", RowEvent.REJECTED, "HTTP 400")

    def set_aside(tx: Any) -> None:
        seq = tx.one("SELECT seq FROM tasks WHERE id = ?", (task_id,))[0]
        outbox.add_entry(
            tx,
            outbox.NewEntry(
                "broken-1", seq, 1, 1, "broken", "mail.json", "agentq.task.entry", b"{}", ["completions", "hook"],
                task_id=task_id, dead_reason="malformed: not JSON",
            ),
        )  # fmt: skip
        for sink in ("hook", "mail"):
            seqs = tx.execute("SELECT entry_seq FROM outbox WHERE sink = ? AND state = 'dead'", (sink,))
            for (entry_seq,) in seqs.fetchall():
                outbox.record_try(tx, entry_seq, sink, "rejected", "HTTP 400")

    await daemon.journal.commit(set_aside)
    assert await said("mail") == f"1 dead letters; {unknown}", "what arrived before it says nothing"
    assert await said("hook") == f"1 dead letters; 1 set aside; {unknown}"
    assert await said("completions") == f"1 set aside; {unknown}"
    await daemon.run_to_end(deliver_to=["hook", "mail"])
    for name in ("completions", "hook", "mail"):
        await daemon.deliver(name)
        assert (await said(name)).endswith("; it works now")


async def test_config_and_schema_and_reload(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = types.ModuleType("agentqd.core.config_schema")
    stand_in.config_schema = lambda: {"type": "object"}  # type: ignore[attr-defined]
    stand_in.settings_as_json = lambda settings: {"max_workers": settings.max_workers}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "agentqd.core.config_schema", stand_in)
    shown = await daemon.get("/v1/config")
    assert (shown["path"], shown["settings"], shown["error"]) == (
        "/etc/agentqd/agentqd.yaml",
        {"max_workers": None},
        None,
    )
    assert await daemon.get("/v1/config/schema") == {"type": "object"}
    assert await daemon.post("/v1/reload") == {"changed": True}
    daemon.reload.last_error = ConfigError("bad", problems=[{"line": 3}])
    answer = await daemon.fails("POST", "/v1/reload", 422, "invalid_config")
    assert answer["problems"] == [{"line": 3}]
    assert (await daemon.get("/v1/config"))["error"]["message"] == "bad"
