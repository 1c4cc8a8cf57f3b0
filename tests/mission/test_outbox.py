"""What workers hand over and what ends tell: stored before it counts, sent until it is heard, once for each key."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeBox
from realbox import RealBox, alive, wait_for

pytestmark = pytest.mark.real


def started(path: Path) -> int:
    return int(wait_for(f"{path.name}", lambda: path.exists() and path.read_text().strip()))


def file_sink(folder: Path, more: str = "") -> str:
    return f"sinks:\n  archive: {{type: file, path: {folder}/entries.jsonl, backoff: [100ms]{more}}}\n"


def command_sink(script: Path, body: str, more: str = "") -> str:
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return f"sinks:\n  tell: {{type: command, command: [{script}], backoff: [100ms]{more}}}\n"


def archived(folder: Path) -> list[dict[str, Any]]:
    path = folder / "entries.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rows(box: RealBox, task_id: str, sink: str) -> list[dict[str, Any]]:
    return [row for row in box.show(task_id).get("outbox", ()) if row["sink"] == sink]


# Completion is not delivery.


@pytest.mark.row(48, 60)
def test_a_finished_task_is_not_a_delivered_one_and_it_shows(make_box: MakeBox, tmp_path: Path) -> None:
    away = tmp_path / "away"
    box = make_box(file_sink(away))
    box.append({"task": "done", "id": "done", "prompt": "echo x", "deliver_to": ["archive"]})
    box.wait_state("done", "finished")
    (row,) = wait_for(
        "a try", lambda: [row for row in rows(box, "done", "archive") if row["state"] == "retryable"]
    )
    assert row["delivered_at"] is None
    assert str(away) in row["last_error"]
    assert box.status()["sinks"]["archive"]["pending"] == 1
    finished = box.show("done")["finished_at"]
    away.mkdir()
    (row,) = wait_for(
        "the delivery", lambda: [row for row in rows(box, "done", "archive") if row["state"] == "delivered"]
    )
    assert row["delivered_at"] > finished
    assert box.show("done")["finished_at"] == finished
    (envelope,) = archived(away)
    assert (envelope["specversion"], envelope["type"], envelope["id"]) == (
        "1.0",
        "agentq.task.success",
        row["delivery_id"],
    )
    assert envelope["data"]["task_id"] == "done"


@pytest.mark.row(54)
def test_a_hundred_pending_entries_drain_by_themselves_when_the_sink_is_up_again(
    make_box: MakeBox, tmp_path: Path
) -> None:
    away = tmp_path / "away"
    box = make_box(file_sink(away, ", backoff_max: 200ms"))
    prompt = "for n in $(seq 100); do echo $n > $AGENTQ_OUTBOX/$n; done; echo x"
    box.append({"task": "many", "id": "many", "prompt": prompt, "deliver_to": ["archive"]})
    box.result("many")
    wait_for("101 waiting", lambda: box.status()["sinks"]["archive"]["pending"] == 101)
    assert box.entries("many")
    away.mkdir()
    wait_for("101 delivered", lambda: box.status()["sinks"]["archive"]["delivered"] == 101)
    ids = [entry["id"] for entry in archived(away)]
    assert len(ids) == len(set(ids)) == 101


@pytest.mark.row(43, 48)
def test_a_result_that_is_not_delivered_in_time_alerts_and_names_its_sink(
    make_box: MakeBox, tmp_path: Path
) -> None:
    box = make_box(file_sink(tmp_path / "away"))
    box.append(
        {
            "task": "stuck",
            "id": "stuck",
            "prompt": "echo x",
            "deliver_to": ["archive"],
            "deliver_within": "100ms",
        }
    )
    alert = wait_for("the alert", lambda: box.alerts("undelivered"))[0]
    assert "archive" in alert["message"]
    assert alert["task"] == "stuck"


# What a worker hands over.


@pytest.mark.row(52, 50)
def test_two_of_four_replies_survive_the_sigkill_of_their_worker(box: RealBox, tmp_path: Path) -> None:
    prompt = f"""
for n in 1 2; do echo "reply $n" > $AGENTQ_OUTBOX/reply-$n.txt; done
echo '{{"half": tru' > $AGENTQ_OUTBOX/.reply-3; echo $$ > {tmp_path}/pid; sleep 300
"""
    box.append({"task": "mails", "id": "mails", "prompt": prompt})
    wait_for("both", lambda: len(box.entries("mails")) == 2)
    os.kill(started(tmp_path / "pid"), signal.SIGKILL)
    told = box.result("mails")
    assert (told["status"], told["reason"], told["signal"]) == ("failed", "signal", signal.SIGKILL)
    assert {entry["key"]: entry["content"] for entry in box.entries("mails")} == {
        "reply-1.txt": "reply 1\n", "reply-2.txt": "reply 2\n",
    }  # fmt: skip


@pytest.mark.row(52)
def test_replies_in_json_survive_a_sigkill_that_comes_right_after_them(box: RealBox) -> None:
    prompt = """for n in 1 2; do echo "{\\"reply\\": $n}" > $AGENTQ_OUTBOX/reply-$n.json; done; kill -9 $$"""
    box.append({"task": "mails", "prompt": prompt})
    assert box.result("mails")["status"] == "failed"
    assert [entry["content"] for entry in box.entries("mails")] == [{"reply": 1}, {"reply": 2}]


@pytest.mark.row(52)
def test_an_entry_is_delivered_while_its_worker_goes_on(box: RealBox, tmp_path: Path) -> None:
    prompt = f"echo early > $AGENTQ_OUTBOX/.t; mv $AGENTQ_OUTBOX/.t $AGENTQ_OUTBOX/early.txt; echo $$ > {tmp_path}/pid; sleep 300"
    box.append({"task": "goes on", "id": "g", "prompt": prompt})
    (entry,) = wait_for("the entry", lambda: box.entries("goes on"))
    assert entry["content"] == "early\n"
    assert {"task_id", "name", "attempt", "key", "content", "seq", "delivery_id", "type", "pulled"} <= set(
        entry
    )
    assert "status" not in entry
    assert box.show("g")["state"] == "running"
    assert alive(started(tmp_path / "pid"))
    assert box.ctl("cancel", "g").returncode == 0
    assert box.result("goes on")["status"] == "cancelled"


@pytest.mark.row(52)
def test_a_file_that_is_still_open_for_writing_is_not_taken(make_box: MakeBox, tmp_path: Path) -> None:
    box = make_box("limits: {rescan_every: 100ms}\n")
    prompt = f"exec 3> $AGENTQ_OUTBOX/slow.txt; echo one >&3; touch {tmp_path}/half; while ! [ -e {tmp_path}/go ]; do sleep 0.02; done; echo two >&3; exec 3>&-; sleep 300"
    box.append({"task": "writes", "prompt": prompt})
    wait_for("half of it", (tmp_path / "half").exists)
    box.append({"task": "other", "prompt": "sleep 0.5; echo x"})
    box.result("other")  # some rescans later
    assert not box.entries("writes")
    (tmp_path / "go").touch()
    (entry,) = wait_for("the entry", lambda: box.entries("writes"))
    assert entry["content"] == "one\ntwo\n"


@pytest.mark.row(52, 28)
def test_what_was_handed_over_while_the_daemon_was_down_is_taken_at_its_start(
    box: RealBox, tmp_path: Path
) -> None:
    prompt = f"echo $$ > {tmp_path}/pid; while ! [ -e {tmp_path}/go ]; do sleep 0.02; done; echo a > $AGENTQ_OUTBOX/a; touch {tmp_path}/wrote; sleep 300"
    box.append({"task": "alone", "prompt": prompt})
    worker = started(tmp_path / "pid")
    box.kill()
    (tmp_path / "go").touch()
    wait_for("the file", (tmp_path / "wrote").exists)
    box.start()
    (entry,) = wait_for("the entry", lambda: box.entries("alone"))
    assert entry["key"] == "a"
    assert alive(worker)


@pytest.mark.row(52, 55)
def test_after_a_kill_only_a_json_that_parses_counts_and_the_rest_is_told(
    box: RealBox, tmp_path: Path
) -> None:
    prompt = f"""
cd $AGENTQ_OUTBOX; exec 3> a.json 4> b.json 5> c.txt 6> d.bin
printf '{{"whole": 1}}' >&3; printf '{{"half": ' >&4; printf 'text' >&5; printf '\\377' >&6
echo $$ > {tmp_path}/pid; sleep 300
"""
    box.append({"task": "cut", "id": "cut", "prompt": prompt})
    os.kill(started(tmp_path / "pid"), signal.SIGKILL)
    box.result("cut")
    (entry,) = box.entries("cut")
    assert (entry["key"], entry["content"]) == ("a.json", {"whole": 1})
    dead = {row["key"]: row for row in box.show("cut")["outbox"] if row["state"] == "dead"}
    assert set(dead) == {"b.json", "c.txt", "d.bin"}
    assert {row["last_error"] for row in dead.values()} == {"incomplete"}
    assert (
        len(
            wait_for(
                "3 alerts",
                lambda: len(box.alerts("entry_incomplete")) == 3 and box.alerts("entry_incomplete"),
            )
        )
        == 3
    )


@pytest.mark.row(52, 56)
def test_the_key_of_an_incomplete_entry_is_free_for_the_next_attempt(box: RealBox) -> None:
    prompt = """
if [ $AGENTQ_ATTEMPT = 1 ]; then exec 3> $AGENTQ_OUTBOX/r.txt; echo ha >&3; kill -9 $$; fi
echo whole > $AGENTQ_OUTBOX/r.txt
"""
    box.append({"task": "again", "prompt": prompt, "max_attempts": 2, "backoff": ["10ms"]})
    assert box.result("again")["status"] == "success"
    assert [(entry["key"], entry["content"], entry["attempt"]) for entry in box.entries("again")] == [
        ("r.txt", "whole\n", 2)
    ]


@pytest.mark.row(55)
def test_a_malformed_entry_among_good_ones_is_set_aside_told_and_blocks_nothing(
    make_box: MakeBox, tmp_path: Path
) -> None:
    box = make_box(file_sink(tmp_path))
    prompt = r"""
cd $AGENTQ_OUTBOX
echo one > a.txt; echo '{"not json' > b.json; echo '{"deliver_to": ["nobody"], "body": "x"}' > c.json
echo '{"deliver_to": ["archive"], "body": "x", "attachments": ["../../../../../etc/passwd"]}' > d.json
ln -s /etc/passwd e.txt; mkdir f; mkfifo g; printf '"\377"' > h.json
echo '{"deliver_to": ["archive"], "attachments": ["a\u0000b"]}' > i.json; echo two > z.txt; echo done
"""
    box.append({"task": "mixed", "id": "mixed", "prompt": prompt})
    assert box.result("mixed")["status"] == "success"
    assert [entry["key"] for entry in box.entries("mixed")] == ["a.txt", "c.json", "z.txt"]
    dead = {row["key"]: row["last_error"] for row in box.show("mixed")["outbox"] if row["state"] == "dead"}
    assert set(dead) == {"b.json", "c.json", "d.json", "h.json", "i.json"}
    assert dead.pop("c.json").startswith("no_such_sink")  # that row alone: the others get the entry as usual
    assert all(reason.startswith("malformed") for reason in dead.values())
    wait_for("the alerts", lambda: len(box.alerts("entry_malformed")) == 4)
    wait_for("the alert", lambda: len(box.alerts("sink_refused")) == 1)
    assert "root:" not in (box.state / "completions.jsonl").read_text()


@pytest.mark.row(55)
def test_names_that_are_not_utf8_are_handed_over_like_any_other(box: RealBox) -> None:
    prompt = "printf x > \"$AGENTQ_OUTBOX/$(printf 'r\\377')\"; printf y > \"$(printf 'w\\377')\"; echo fine > $AGENTQ_OUTBOX/a"
    box.append({"task": "bytes", "id": "bytes", "prompt": prompt})
    box.append({"task": "next", "prompt": "echo x"})
    assert box.result("next")["status"] == "success"
    assert box.result("bytes", 5)["status"] == "success"
    assert len(box.entries("bytes")) == 2


@pytest.mark.row(57, 55)
def test_a_json_entry_may_address_itself(make_box: MakeBox, tmp_path: Path) -> None:
    box = make_box(file_sink(tmp_path))
    prompt = """
echo data > report.txt
echo '{"deliver_to": ["archive"], "to": "a@b.c", "subject": "hi", "body": "text", "attachments": ["../work/report.txt"]}' > $AGENTQ_OUTBOX/mail.json
"""
    box.append({"task": "mail", "prompt": prompt})
    box.result("mail")
    wait_for("the mail", lambda: archived(tmp_path))
    (envelope,) = archived(tmp_path)
    assert envelope["type"] == "agentq.task.entry"
    assert envelope["data"]["content"]["subject"] == "hi"


@pytest.mark.row(56, 47)
def test_a_retried_task_that_writes_the_same_reply_again_sends_it_once(
    make_box: MakeBox, tmp_path: Path
) -> None:
    box = make_box(file_sink(tmp_path))
    prompt = "echo same > $AGENTQ_OUTBOX/a.txt; echo $AGENTQ_ATTEMPT > $AGENTQ_OUTBOX/b.txt; [ $AGENTQ_ATTEMPT = 3 ]"
    box.append(
        {
            "task": "thrice",
            "id": "t",
            "prompt": prompt,
            "max_attempts": 3,
            "backoff": ["10ms"],
            "deliver_to": ["archive"],
        }
    )
    box.result("thrice")
    wait_for("3 deliveries", lambda: len(archived(tmp_path)) == 3)
    sent = [(entry["data"].get("key"), entry["data"].get("content")) for entry in archived(tmp_path)]
    assert sorted(sent, key=str) == [("a.txt", "same\n"), ("b.txt", "1\n"), (None, None)]
    assert [event["event"] for event in box.show("t")["events"]].count("entry_conflict") == 2
    wait_for("an alert for each other content", lambda: len(box.alerts("entry_conflict")) == 2)


@pytest.mark.row(50, 51)
def test_delivery_goes_on_after_its_worker_has_timed_out(make_box: MakeBox, tmp_path: Path) -> None:
    away = tmp_path / "away"
    box = make_box(file_sink(away))
    prompt = "echo r > $AGENTQ_OUTBOX/r; echo half; sleep 300"
    box.append(
        {
            "task": "late",
            "id": "late",
            "prompt": prompt,
            "run_timeout": "500ms",
            "kill_grace": "100ms",
            "deliver_to": ["archive"],
        }
    )
    assert box.result("late")["status"] == "timeout"
    assert not archived(away)
    away.mkdir()
    wait_for("both", lambda: len(archived(away)) == 2)
    assert {entry["type"] for entry in archived(away)} == {"agentq.task.entry", "agentq.task.timeout"}


# Sinks.


@pytest.mark.row(53, 28)
def test_a_daemon_killed_in_mid_batch_picks_up_where_it_stopped(make_box: MakeBox, tmp_path: Path) -> None:
    body = f'cat > /dev/null; echo "$AGENTQ_DELIVERY_ID" >> {tmp_path}/heard; sleep 0.15'
    box = make_box(command_sink(tmp_path / "tell.sh", body, ", concurrency: 1"))
    prompt = "for n in 1 2 3 4 5 6 7; do echo $n > $AGENTQ_OUTBOX/$n; done"
    box.append({"task": "batch", "id": "batch", "prompt": prompt, "deliver_to": ["tell"]})
    wait_for("3 delivered", lambda: box.status()["sinks"]["tell"]["delivered"] >= 3)
    box.kill()
    box.start()
    wait_for("8 delivered", lambda: box.status()["sinks"]["tell"]["delivered"] == 8)
    heard = (tmp_path / "heard").read_text().split()
    assert len(set(heard)) == 8
    assert len(heard) <= 8 + 2  # at most what was in flight came twice, under its own id
    assert {row["delivery_id"] for row in rows(box, "batch", "tell")} == set(heard)


@pytest.mark.row(31, 57)
def test_a_receiver_that_loses_its_first_answer_gets_the_same_id_again(
    make_box: MakeBox, tmp_path: Path
) -> None:
    body = f'cat >> {tmp_path}/bodies; echo >> {tmp_path}/bodies; echo "$AGENTQ_DELIVERY_ID" >> {tmp_path}/heard; [ $(wc -l < {tmp_path}/heard) -ge 3 ]'
    box = make_box(command_sink(tmp_path / "tell.sh", body))
    box.append({"task": "told", "id": "told", "prompt": "echo x", "deliver_to": ["tell"]})
    (row,) = wait_for(
        "the delivery", lambda: [row for row in rows(box, "told", "tell") if row["state"] == "delivered"]
    )
    assert row["attempts"] == 3
    assert (tmp_path / "heard").read_text().split() == [row["delivery_id"]] * 3
    bodies = [line for line in (tmp_path / "bodies").read_text().splitlines() if line]
    assert len(set(bodies)) == 1
    assert json.loads(bodies[0])["id"] == row["delivery_id"]
    tries = box.ctl_json("outbox", "show", row["delivery_id"])
    outcomes = [item["outcome"] for each in tries["rows"] if each["sink"] == "tell" for item in each["tries"]]
    assert outcomes == ["deferred", "deferred", "delivered"]


@pytest.mark.row(57, 61)
def test_a_rejected_delivery_is_a_dead_letter_that_alerts_and_a_person_sends_again_with_its_id(
    make_box: MakeBox, tmp_path: Path
) -> None:
    body = (
        f'cat > /dev/null; echo "$AGENTQ_DELIVERY_ID" >> {tmp_path}/heard; [ -e {tmp_path}/up ] || exit 100'
    )
    box = make_box(command_sink(tmp_path / "tell.sh", body))
    box.append({"task": "unwanted", "id": "u", "prompt": "echo x", "deliver_to": ["tell"]})
    (row,) = wait_for(
        "the dead letter", lambda: [row for row in rows(box, "u", "tell") if row["state"] == "dead"]
    )
    wait_for("the alert", lambda: box.alerts("dead_letter"))
    assert box.ctl_json("outbox", "list", "--state", "dead")[0]["delivery_id"] == row["delivery_id"]
    (tmp_path / "up").touch()
    assert box.ctl("outbox", "retry", row["delivery_id"], "--sink", "tell").returncode == 0
    wait_for("the delivery", lambda: rows(box, "u", "tell")[0]["state"] == "delivered")
    assert set((tmp_path / "heard").read_text().split()) == {row["delivery_id"]}


@pytest.mark.row(61)
def test_a_dropped_letter_is_kept_and_never_sent(make_box: MakeBox, tmp_path: Path) -> None:
    box = make_box(file_sink(tmp_path / "away"))
    box.append({"task": "dropped", "id": "d", "prompt": "echo x", "deliver_to": ["archive"]})
    (row,) = wait_for(
        "a try", lambda: [row for row in rows(box, "d", "archive") if row["state"] == "retryable"]
    )
    drop = ("outbox", "drop", row["delivery_id"], "--sink", "archive")
    wait_for("a moment between two tries", lambda: box.ctl(*drop).returncode == 0)
    (tmp_path / "away").mkdir()
    box.append({"task": "next", "id": "n", "prompt": "echo x", "deliver_to": ["archive"]})
    wait_for("the next", lambda: archived(tmp_path / "away"))
    assert [entry["data"]["name"] for entry in archived(tmp_path / "away")] == ["next"]
    assert rows(box, "d", "archive")[0]["state"] == "dropped"


@pytest.mark.row(57)
def test_a_sinks_lifetime_ends_in_a_dead_letter(make_box: MakeBox, tmp_path: Path) -> None:
    box = make_box(file_sink(tmp_path / "away", ", lifetime: 300ms"))
    box.append({"task": "dies", "id": "d", "prompt": "echo x", "deliver_to": ["archive"]})
    wait_for(
        "the dead letter",
        lambda: rows(box, "d", "archive") and rows(box, "d", "archive")[0]["state"] == "dead",
    )
    wait_for("the alert", lambda: box.alerts("dead_letter"))


@pytest.mark.row(57, 50)
def test_a_sink_that_hangs_delays_no_other(make_box: MakeBox, tmp_path: Path) -> None:
    config = command_sink(
        tmp_path / "tell.sh", "cat > /dev/null; sleep 300", ", timeout: 100s, concurrency: 1"
    )
    box = make_box(config + file_sink(tmp_path).removeprefix("sinks:\n"))
    box.append(*({"task": f"t{n}", "prompt": "echo x", "deliver_to": ["tell", "archive"]} for n in range(5)))
    wait_for("5 in the archive", lambda: len(archived(tmp_path)) == 5)
    assert box.status()["sinks"]["tell"]["delivered"] == 0


@pytest.mark.row(61)
def test_retry_of_a_task_is_a_new_run_with_a_new_result_and_sends_no_delivered_entry_again(
    make_box: MakeBox, tmp_path: Path
) -> None:
    box = make_box(file_sink(tmp_path))
    prompt = "echo r > $AGENTQ_OUTBOX/reply; echo more > $AGENTQ_OUTBOX/at-$AGENTQ_ATTEMPT; echo done"
    box.append({"task": "twice", "id": "t", "prompt": prompt, "deliver_to": ["archive"]})
    first = box.result("twice")
    assert box.ctl("retry", "t").returncode == 0
    second = wait_for(
        "the second result",
        lambda: box.results()["twice"] if box.results()["twice"]["seq"] != first["seq"] else None,
    )
    wait_for("all", lambda: len(archived(tmp_path)) == 5)
    assert second["delivery_id"] != first["delivery_id"]
    assert (second["run"], second["attempt"]) == (2, 2)
    keys = [entry["data"].get("key") for entry in archived(tmp_path)]
    assert sorted(keys, key=str) == sorted(["reply", "at-1", "at-2", None, None], key=str)
    assert box.ctl("retry", "nobody").returncode == 66


@pytest.mark.row(60)
def test_every_kind_of_end_is_delivered(make_box: MakeBox, tmp_path: Path) -> None:
    box = make_box(
        file_sink(tmp_path)
        + "queues: {shut: {paused: true}}\ndefaults: {deliver_to: [archive], kill_grace: 100ms}\n"
    )
    lost = {"task": "lost", "prompt": f"echo $$ > {tmp_path}/pid; sleep 300"}
    box.append(lost)
    started(tmp_path / "pid")
    box.kill_supervisor()
    assert box.result("lost")["status"] == "lost"
    box.append(
        {"task": "success", "prompt": "echo x"},
        {"task": "failed", "prompt": "exit 3"},
        {"task": "timeout", "prompt": "sleep 300", "run_timeout": "100ms"},
        {"task": "expired", "queue": "shut", "prompt": "echo x", "expires_at": "2020-01-01T00:00:00Z"},
        {"task": "spawn_failed", "command": ["/no/such"]},
        {"task": "no_work", "prompt": "true"},
        {"task": "cancelled", "id": "c", "queue": "shut", "prompt": "echo x"},
        {"task": "holder", "id": "h", "queue": "shut", "prompt": "echo x", "writes_to": ["/tmp/w"]},
        {"task": "refused", "prompt": "echo x", "writes_to": ["/tmp/w"]},
    )
    wait_for("it waits", lambda: box.show("c").get("state") == "queued")
    box.api("POST", "/v1/tasks/c/cancel", {})
    names = [
        "success",
        "failed",
        "timeout",
        "cancelled",
        "lost",
        "expired",
        "refused",
        "spawn_failed",
        "no_work",
    ]
    for name in names:
        told = box.result(name)
        assert told["status"] == name
        assert {
            "task_id",
            "reason",
            "attempt",
            "exit_code",
            "signal",
            "submitted_at",
            "started_at",
            "completed_at",
            "duration_s",
        } <= set(told)
    wait_for(
        "all",
        lambda: {entry["type"] for entry in archived(tmp_path)} == {f"agentq.task.{name}" for name in names},
    )


@pytest.mark.row(49)
def test_an_end_and_its_outbox_rows_are_in_one_transaction(make_box: MakeBox, tmp_path: Path) -> None:
    """Killed the moment the end is recorded: its rows are recorded too."""
    box = make_box(file_sink(tmp_path), start=False)
    box.append(
        {"task": "one", "id": "one", "prompt": "echo x; echo e > $AGENTQ_OUTBOX/e", "deliver_to": ["archive"]}
    )
    box.env = {"AGENTQD_FAILPOINT": "end_recorded:kill"}
    box.start(wait=False)
    assert box.daemon is not None
    assert box.daemon.wait(30) == -signal.SIGKILL
    box.daemon, box.env = None, {}
    box.start()
    assert box.show("one")["state"] == "finished"
    wait_for(
        "both, everywhere", lambda: [row["state"] for row in box.show("one")["outbox"]] == ["delivered"] * 4
    )
    assert [entry["type"] for entry in archived(tmp_path)] == ["agentq.task.entry", "agentq.task.success"]
    assert len(box.completions()) == 2
