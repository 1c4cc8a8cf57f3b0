"""Several sinks on a running daemon: which entry goes where, who may choose, what a person does with what does not arrive."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeBox
from httpserver import http_server
from realbox import RealBox, wait_for

pytestmark = pytest.mark.real


def archived(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def file_sinks(folder: Path, *names: str) -> str:
    lines = [f"  {name}: {{type: file, path: {folder}/{name}.jsonl, backoff: [50ms]}}\n" for name in names]
    return "sinks:\n" + "".join(lines)


def ids(path: Path) -> list[str]:
    return [envelope["id"] for envelope in archived(path)]


def rows(box: RealBox, *query: str) -> list[dict[str, Any]]:
    return list(box.ctl_json("outbox", "list", *query))


def sink(box: RealBox, name: str) -> dict[str, Any]:
    return next((each for each in box.ctl_json("sink", "list") if each["name"] == name), {})


@pytest.mark.row(57, 31)
def test_a_webhook_that_says_500_twice_gets_the_same_entry_a_third_time(
    make_box: MakeBox, tmp_path: Path
) -> None:
    with http_server() as web:
        web.plan = [500, 500]
        box = make_box(
            f"sinks: {{hook: {{type: webhook, url: '{web.url}', backoff: 50ms, backoff_max: 50ms}}, archive: {{type: file, path: {tmp_path}/archive.jsonl}}}}\n"
            "routes: [{match: {type: agentq.task.success}, deliver_to: [hook, archive]}]\n"
        )
        box.append({"task": "one", "id": "one", "prompt": "echo x"})
        wait_for("the third try", lambda: rows(box, "--sink", "hook", "--state", "delivered"))
        assert [status for _, status, _, _ in web.seen] == [500, 500, 200]
        assert {(entry_id, body) for entry_id, _, _, body in web.seen} == {(web.seen[0][0], web.seen[0][3])}
        assert json.loads(web.seen[0][3])["data"]["task_id"] == "one"
        wait_for("the archive", lambda: ids(tmp_path / "archive.jsonl"))
        assert ids(tmp_path / "archive.jsonl") == [web.seen[0][0]]
        shown = box.ctl_json("outbox", "show", web.seen[0][0])
        tries = next(row["tries"] for row in shown["rows"] if row["sink"] == "hook")
        assert [(each["outcome"], each["reason"]) for each in tries] == [("deferred", "HTTP 500 Internal Server Error")] * 2 + [("delivered", None)]  # fmt: skip


@pytest.mark.row(57)
def test_routes_by_label_result_and_type_lead_to_three_sinks(make_box: MakeBox, tmp_path: Path) -> None:
    routes = """
routes:
  - {match: {label: nightly}, deliver_to: [night]}
  - {match: {type: "agentq.task.*", result: [failed, timeout]}, deliver_to: [bad]}
  - {match: {type: "agentq.alert.no_work", label: nightly}, deliver_to: [bad]}
  - {match: {type: agentq.task.entry, label: "team=*"}, deliver_to: [entries]}
"""
    box = make_box(file_sinks(tmp_path, "night", "bad", "entries") + routes)
    hand = "echo one > $AGENTQ_OUTBOX/one; "
    box.append(
        {"task": "plain", "prompt": "echo x"},
        {"task": "broken", "prompt": hand + "false", "labels": ["team=web"]},
        {"task": "tired", "prompt": "true", "labels": ["nightly"]},
        {"task": "both", "prompt": hand + "exit 3", "labels": ["nightly", "team=web"]},
        {"task": "own", "prompt": hand + "false", "labels": ["nightly"], "deliver_to": ["entries"]},
    )
    for name in ("plain", "broken", "tired", "both", "own"):
        box.result(name)

    def seen() -> dict[str, list[tuple[str, str]]]:
        return {
            name: sorted((each["data"]["name"], each["type"].removeprefix("agentq.")) for each in archived(tmp_path / f"{name}.jsonl"))
            for name in ("night", "bad", "entries")
        }  # fmt: skip

    wanted = {
        "night": [("both", "task.entry"), ("both", "task.failed"), ("tired", "task.no_work")],
        "bad": [("both", "task.failed"), ("broken", "task.failed"), ("tired", "alert.no_work")],
        "entries": [
            ("both", "task.entry"),
            ("broken", "task.entry"),
            ("own", "task.entry"),
            ("own", "task.failed"),
        ],
    }
    wait_for("all of them", lambda: sum(map(len, seen().values())) >= 10)
    assert seen() == wanted
    assert len(box.entries()) == 3  # completions has them all


@pytest.mark.row(57, 55)
def test_a_task_and_its_worker_choose_among_the_sinks_that_are_allowed(
    make_box: MakeBox, tmp_path: Path
) -> None:
    narrow = "queues:\n  narrow: {allow_deliver_to: [mail, 'team-*']}\nalerts: {deliver_to: [night]}\n"
    box = make_box(file_sinks(tmp_path, "mail", "team-web", "night") + narrow)
    box.append({"task": "line", "id": "line", "prompt": "true", "queue": "narrow", "deliver_to": ["night"]})
    (rejected,) = wait_for("the rejection", box.rejected)
    assert rejected["reason"] == "sink_not_allowed"
    assert (
        "the queue narrow does not allow 'night'; it allows completions, mail, team-*" in rejected["message"]
    )
    done = box.ctl("submit", "--queue", "narrow", "--deliver-to", "night", "echo x")
    assert done.returncode == 65
    assert b"the queue narrow does not allow 'night'" in done.stderr
    prompt = """echo '{"deliver_to": ["team-web", "night", "nobody"], "body": "x"}' > $AGENTQ_OUTBOX/x.json; echo x"""
    box.append({"task": "entry", "id": "entry", "prompt": prompt, "queue": "narrow", "deliver_to": ["mail"]})
    assert box.result("entry")["status"] == "success"
    assert [entry["key"] for entry in box.entries("entry")] == ["x.json"]
    wait_for("the entry", lambda: archived(tmp_path / "team-web.jsonl"))
    dead = {row["sink"]: row["last_error"] for row in rows(box, "--task", "entry", "--state", "dead")}
    assert dead["nobody"].startswith("no_such_sink")
    assert (
        dead["night"]
        == "not_allowed: the queue narrow does not allow 'night'; it allows completions, mail, team-*"
    )
    wait_for("the alerts", lambda: len(box.alerts("sink_refused")) == 2)
    told = wait_for("one is told", lambda: [each for each in archived(tmp_path / "night.jsonl") if each["type"].endswith("sink_refused")])  # fmt: skip
    assert [each["data"]["sink"] for each in told] == ["nobody"]  # that about `night` does not go to `night`


@pytest.mark.row(57)
def test_a_receiver_that_fails_twice_gets_the_entry_once_with_the_third_try(
    make_box: MakeBox, tmp_path: Path
) -> None:
    """500, 500, 200: with the command sink."""
    script = tmp_path / "tell.sh"
    script.write_text(f"""#!/bin/sh
echo "$AGENTQ_DELIVERY_ID $AGENTQ_ATTEMPT" >> {tmp_path}/asked
[ $(wc -l < {tmp_path}/asked) -ge 3 ] || {{ echo "500 not now"; exit 1; }}
cat >> {tmp_path}/heard
""")
    script.chmod(0o755)
    box = make_box(f"sinks:\n  tell: {{type: command, command: [{script}], backoff: [100ms]}}\n")
    box.append({"task": "t", "id": "t", "prompt": "echo x", "deliver_to": ["tell"]})
    wait_for("the delivery", lambda: rows(box, "--task", "t", "--sink", "tell", "--state", "delivered"))
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    assert [attempt for _, attempt in asked] == ["1", "2", "3"]
    (envelope,) = archived(tmp_path / "heard")
    assert {one for one, _ in asked} == {envelope["id"]}
    (row,) = [
        each for each in box.ctl_json("outbox", "show", envelope["id"])["rows"] if each["sink"] == "tell"
    ]
    assert [each["outcome"] for each in row["tries"]] == ["deferred", "deferred", "delivered"]
    assert "500 not now" in row["tries"][0]["reason"]
    shown = sink(box, "tell")
    assert (shown["delivered_last"]["1h"], shown["failed_last"]["1h"]) == (1, 2)


@pytest.mark.row(61, 57)
def test_a_person_disables_a_sink_tests_it_and_has_what_was_held_sent(
    make_box: MakeBox, tmp_path: Path
) -> None:
    box = make_box(file_sinks(tmp_path, "out", "other") + "alerts: {deliver_to: [other]}\n")
    assert box.ctl("sink", "disable", "out", "--reason", "moving").stdout == b"out  disabled\n"
    box.append({"task": "t", "id": "t", "prompt": "echo x", "deliver_to": ["out"]})
    box.result("t")
    wait_for("it is held", lambda: sink(box, "out")["backlog"]["held"] == 1)
    box.kill()
    box.start()
    assert sink(box, "out")["breaker"] == "disabled"
    assert "moving" in rows(box, "--sink", "out")[0]["last_error"]
    assert b"disabled" in box.ctl("status").stdout
    tried = box.ctl_json("sink", "test", "out")
    assert tried["outcome"] == "delivered"
    assert ids(tmp_path / "out.jsonl") == [tried["delivery_id"]]
    box.ctl("sink", "enable", "out")
    wait_for("the delivery", lambda: sink(box, "out")["backlog"]["delivered"] == 1)
    assert ids(tmp_path / "out.jsonl") == [tried["delivery_id"], rows(box, "--sink", "out")[0]["delivery_id"]]
    box.ctl("sink", "test", "out")
    box.kill()
    box.start()  # it reads the file back: a test's line is nobody's
    box.append({"task": "u", "id": "u", "prompt": "echo x", "deliver_to": ["out"]})
    wait_for("the next", lambda: sink(box, "out")["backlog"]["delivered"] == 2)
    types = [each["type"].rpartition(".")[2] for each in archived(tmp_path / "out.jsonl")]
    assert types == ["test", "success", "test", "success"]
    assert archived(tmp_path / "other.jsonl") == []  # no alert: a person knows what they did
    assert box.ctl("sink", "disable", "completions").returncode == 1
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / "out.jsonl").mkdir()
    assert box.ctl("sink", "test", "out").returncode == 75


@pytest.mark.row(53, 61)
def test_a_renamed_sinks_rows_are_shown_and_go_on_under_the_new_name(
    make_box: MakeBox, tmp_path: Path
) -> None:
    away = tmp_path / "away"
    config = file_sinks(away, "old")
    box = make_box(config)
    box.append({"task": "t", "id": "t", "prompt": "echo r > $AGENTQ_OUTBOX/r; echo x", "deliver_to": ["old"]})
    box.result("t")
    wait_for("they wait", lambda: sink(box, "old").get("pending") == 2)
    before = {row["delivery_id"] for row in rows(box, "--sink", "old")}
    box.config.write_text(config.replace("  old:", "  new:").replace("old.jsonl", "new.jsonl"))
    wait_for("the edit", lambda: sink(box, "new"))
    assert sink(box, "old")["last_error"] == "not in the config"
    assert b"old (not in the config)" in box.ctl("outbox", "list", "--sink", "old").stdout
    away.mkdir()
    assert (
        box.ctl("outbox", "move", "ALL", "--from", "old", "--to", "new", "--dry-run").stdout
        == b"2 rows would change\n"
    )
    assert box.ctl("outbox", "move", "ALL", "--from", "old", "--to", "new").stdout == b"2 rows moved\n"
    wait_for("the deliveries", lambda: set(ids(away / "new.jsonl")) == before)
    assert sink(box, "old") == {}


@pytest.mark.row(54, 61)
def test_a_day_of_dead_letters_is_sent_again_by_its_time(make_box: MakeBox, tmp_path: Path) -> None:
    script = tmp_path / "tell.sh"
    take = f"printf '%s\\n' \"$(cat)\" >> {tmp_path}/heard"  # one write a line: two may run at once
    script.write_text(f"#!/bin/sh\n[ -e {tmp_path}/mended ] || exit 100\n{take}\n")
    script.chmod(0o755)
    box = make_box(f"sinks:\n  tell: {{type: command, command: [{script}]}}\n")
    for name in ("a", "b"):
        box.append({"task": name, "id": name, "prompt": "echo x", "deliver_to": ["tell"]})
    wait_for("two dead", lambda: sink(box, "tell").get("dead") == 2)
    (tmp_path / "mended").touch()
    newest = rows(box, "--sink", "tell")[0]
    assert newest["state"] == "dead"
    picked = ("--sink", "tell", "--since", newest["entry_at"])  # its milliseconds are cut: it is in
    count = box.ctl_json("outbox", "retry", "ALL", *picked, "--dry-run")["would_change"]
    assert box.ctl_json("outbox", "retry", "ALL", "--sink", "tell", "--until", "1h")["changed"] == 0
    assert box.ctl_json("outbox", "retry", "ALL", *picked)["changed"] == count >= 1
    assert box.ctl_json("outbox", "retry", "ALL", "--sink", "tell", "--since", "1h")["changed"] == 2 - count
    wait_for("both", lambda: len(archived(tmp_path / "heard")) == 2)
    again = ("--sink", "tell", "--state", "delivered", "--since", "1h")
    assert box.ctl_json("outbox", "retry", "ALL", *again)["changed"] == 2
    wait_for("both again, with their ids", lambda: len(ids(tmp_path / "heard")) == 4)
    assert len(set(ids(tmp_path / "heard"))) == 2
