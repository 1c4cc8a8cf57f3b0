"""A person's word: every verb with its words and exit codes, as the contract says them."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from conftest import MakeBox
from realbox import RealBox, wait_for

pytestmark = pytest.mark.real

SHOW = {
    "id",
    "task",
    "queue",
    "runner",
    "state",
    "result",
    "reason",
    "submitted_at",
    "accepted_at",
    "finished_at",
    "attempts",
    "outbox",
    "events",
}
ATTEMPT = {"attempt", "pid", "started_at", "ended_at", "exit_code", "signal", "result", "reason"}
ROW = {"delivery_id", "type", "name", "sink", "state", "attempts", "delivered_at", "last_error"}


@pytest.mark.row(45, 22)
def test_show_tells_one_timeline_from_the_lines_offset_to_its_delivery(box: RealBox) -> None:
    box.append({"task": "before", "prompt": "echo x"})
    offset = box.queue_file.stat().st_size
    box.append(
        {
            "task": "story",
            "id": "story",
            "prompt": "echo x; echo e > $AGENTQ_OUTBOX/e; exit 3",
            "max_attempts": 2,
            "backoff": ["10ms"],
        }
    )
    box.result("story")
    wait_for("the deliveries", lambda: {row["state"] for row in box.show("story")["outbox"]} == {"delivered"})
    shown = box.ctl_json("show", "story")
    assert set(shown) >= SHOW
    assert all(set(attempt) >= ATTEMPT for attempt in shown["attempts"])
    assert all(set(row) >= ROW for row in shown["outbox"])
    assert (shown["source"]["file"], shown["source"]["offset"]) == ("tasks.jsonl", offset)
    assert [attempt["exit_code"] for attempt in shown["attempts"]] == [3, 3]
    events = [event["event"] for event in shown["events"]]
    story = ["accepted", "claimed", "worker_started", "attempt_ended", "claimed", "finished", "delivered"]
    places = iter(events)
    assert all(step in places for step in story), events
    assert "entry_handed_over" in events
    assert [event["seq"] for event in shown["events"]] == sorted(event["seq"] for event in shown["events"])
    text = box.ctl("show", "story").stdout.decode()
    assert "story" in text
    assert "failed" in text


@pytest.mark.row(45, 1)
def test_the_reading_verbs_give_the_contracts_objects(box: RealBox) -> None:
    box.append({"task": "one", "id": "one", "prompt": "echo x", "labels": ["nightly"]})
    box.result("one")
    listed = box.ctl_json("list")
    assert isinstance(listed, list)
    assert SHOW - {"attempts", "outbox", "events"} <= set(listed[0])
    assert not {"attempts", "outbox", "events"} & set(listed[0])
    assert box.ctl_json("list", "--label", "nightly")[0]["id"] == "one"
    assert box.ctl_json("list", "--state", "running") == []
    assert set(wait_for("a row", lambda: box.ctl_json("outbox", "list"))[0]) >= ROW
    status = box.ctl_json("status")
    assert {"daemon", "supervisor", "tasks", "results", "queues", "outbox", "sinks", "alerts"} <= set(status)
    assert {"pid", "version", "uptime_s"} <= set(status["daemon"])
    assert status["daemon"]["pid"] == box.daemon_pid()
    assert status["supervisor"]["pid"] == box.supervisor_pid()
    assert (status["tasks"]["finished"], status["results"]["success"]) == (1, 1)
    error = box.ctl("show", "nobody", "--json")
    assert (error.returncode, json.loads(error.stdout)["error"]) == (66, "no_such_task")
    assert box.ctl("no-such-verb").returncode == 2


@pytest.mark.row(80, 62)
def test_submit_answers_with_the_contracts_object(box: RealBox) -> None:
    answer = box.ctl_json("submit", "--task", "hi", "--id", "hi", "echo x")
    assert {name: answer[name] for name in ("task_id", "result", "duplicate", "where")} == {
        "task_id": "hi", "result": None, "duplicate": False, "where": "accepted",
    }  # fmt: skip
    assert answer["state"] in {"queued", "running"}
    box.result("hi")
    again = box.ctl_json("submit", "--task", "hi", "--id", "hi", "echo x")
    assert (again["task_id"], again["duplicate"], again["result"]) == ("hi", True, "success")
    bad = box.ctl("submit", "--json", "--queue", "nowhere", "echo x")
    assert (bad.returncode, json.loads(bad.stdout)["error"]) == (65, "unknown_queue")


@pytest.mark.row(12, 44)
@pytest.mark.parametrize(
    ("task", "code"),
    [
        ({"prompt": "echo x"}, 0),
        ({"prompt": "exit 7"}, 7),
        ({"prompt": "sleep 300", "run_timeout": "100ms", "kill_grace": "50ms"}, 124),
        ({"prompt": "kill -9 $$"}, 125),
        ({"prompt": "true"}, 125),
        ({"command": ["/no/such"]}, 125),
        ({"prompt": "echo x", "expires_at": "2020-01-01T00:00:00Z"}, 125),
        ({"prompt": "echo x", "expect": {"files": ["nothing"]}}, 125),
    ],
)
def test_wait_exits_as_the_task_ended(box: RealBox, task: dict[str, object], code: int) -> None:
    box.append({"task": "w", "id": "w", **task})
    wait_for("it", lambda: box.show("w").get("state"))
    assert box.ctl("wait", "w").returncode == code


@pytest.mark.row(44)
def test_wait_gives_up_with_124_and_knows_no_stranger(box: RealBox) -> None:
    box.submit(task="long", id="long", prompt="echo x; sleep 300", kill_grace="50ms")
    assert box.ctl("wait", "--timeout", "200ms", "long").returncode == 124
    assert box.show("long")["state"] != "finished"
    assert box.ctl("wait", "nobody").returncode == 66


@pytest.mark.row(14)
def test_wait_outlasts_a_restart_of_the_daemon(box: RealBox, tmp_path: Path) -> None:
    box.submit(
        task="w",
        id="w",
        prompt=f"echo $$ > {tmp_path}/pid; while ! [ -e {tmp_path}/go ]; do sleep 0.02; done; echo x; exit 5",
    )
    codes: list[int] = []
    waiter = threading.Thread(target=lambda: codes.append(box.ctl("wait", "w").returncode))
    waiter.start()
    wait_for("its start", (tmp_path / "pid").exists)
    box.kill()
    box.start()
    (tmp_path / "go").touch()
    waiter.join(30)
    assert codes == [5]


@pytest.mark.row(12)
def test_submit_wait_and_logs_follow_a_worker_to_its_end(box: RealBox) -> None:
    done = box.ctl("submit", "--wait", "echo out; exit 9")
    assert done.returncode == 9
    done = box.ctl("submit", "--follow", "echo one; sleep 0.3; echo two; exit 4")
    assert (done.returncode, done.stdout) == (4, b"one\ntwo\n")


@pytest.mark.row(80)
@pytest.mark.parametrize("how", ["--wait", "--follow"])
def test_a_line_that_is_rejected_is_told_to_who_waits_for_it_and_its_id_is_free(
    box: RealBox, how: str
) -> None:
    def submit_while_off(*words: str) -> tuple[int, bytes, bytes]:
        """Waiting begins before the daemon does."""
        box.stop()
        done: list[tuple[int, bytes, bytes]] = []

        def run() -> None:
            ended = box.ctl("submit", "--id", "OFF3", how, *words)
            done.append((ended.returncode, ended.stdout, ended.stderr))

        lines = box.queue_file.read_text().count("\n") if box.queue_file.exists() else 0
        waiter = threading.Thread(target=run)
        waiter.start()
        wait_for("the line", lambda: box.queue_file.exists() and box.queue_file.read_text().count("\n") > lines)  # fmt: skip
        box.start()
        waiter.join(30)
        return done[0]

    code, _, said = submit_while_off("--queue", "nosuch", "echo off")
    assert code == 65
    assert b"'nosuch'" in said
    for verb in ("wait", "show", "logs"):
        asked = box.ctl(verb, "OFF3")
        assert (asked.returncode, b"'nosuch'" in asked.stderr) == (65, True), verb
    code, out, _ = submit_while_off("echo out; exit 3")  # the older rejection is none of this one's
    assert (code, b"out\n" in out) == (3, how == "--follow")
    assert box.show("OFF3")["result"] == "failed"


@pytest.mark.row(17)
def test_pause_resume_hold_and_release_stop_and_start_what_they_say(box: RealBox) -> None:
    assert box.ctl("pause", "default").returncode == 0
    box.append({"task": "a", "id": "a", "prompt": "echo x"}, {"task": "b", "id": "b", "prompt": "echo x"})
    assert box.wait_state("b", "queued")["waiting_for"]["reason"] == "queue_paused"
    assert box.ctl("hold", "a").returncode == 0
    assert box.ctl("resume", "default").returncode == 0
    box.result("b")
    assert box.show("a")["state"] == "held"
    assert box.ctl("release", "a").returncode == 0
    assert box.result("a")["status"] == "success"


@pytest.mark.row(17)
def test_a_queue_paused_by_the_config_starts_nothing_until_the_config_says_so(make_box: MakeBox) -> None:
    box = make_box("queues: {slow: {paused: true}}\n")
    box.append(
        {"task": "waits", "id": "waits", "queue": "slow", "prompt": "echo x"},
        {"task": "goes", "prompt": "echo x"},
    )
    box.result("goes")
    shown = box.wait_state("waits", "queued")
    assert shown["waiting_for"]["reason"] == "queue_paused"
    assert box.ctl("resume", "slow").returncode == 1
    box.config.write_text("queues: {slow: {}}\n")
    assert box.result("waits")["status"] == "success"


@pytest.mark.row(17)
def test_a_draining_daemon_takes_nothing_over_the_socket_and_starts_nothing(box: RealBox) -> None:
    box.submit(task="runs", id="runs", prompt="sleep 1; echo x")
    box.wait_state("runs", "running")
    assert box.ctl("drain").returncode == 0
    refused = box.ctl("submit", "--json", "echo x")
    assert (refused.returncode, json.loads(refused.stdout)["error"]) == (75, "refused_for_now")
    box.append({"task": "by file", "id": "f", "prompt": "echo x"})
    assert box.wait_state("f", "queued")["waiting_for"]["reason"] == "draining"
    assert box.result("runs")["status"] == "success"
    assert box.ctl("drain", "--off").returncode == 0
    assert box.result("by file")["status"] == "success"


@pytest.mark.row(17)
def test_a_drain_outlives_kills_and_stops_until_a_person_ends_it(box: RealBox) -> None:
    assert box.ctl("drain").returncode == 0
    since = box.status()["daemon"]["draining_since"]
    box.append({"task": "waits", "id": "w", "prompt": "echo x"})
    for end in (box.kill, box.stop):
        end()
        box.start()
        assert box.wait_state("w", "queued")["waiting_for"]["reason"] == "draining"
        assert box.status()["daemon"]["draining_since"] == since
        assert box.events("still_draining")
        assert b"agentqctl drain --off" in box.ctl("status").stdout
    assert box.ctl("drain", "--off").returncode == 0
    assert box.result("waits")["status"] == "success"
    box.kill()
    box.start()
    assert box.status()["daemon"]["draining"] is False


@pytest.mark.row(17)
def test_a_full_queue_refuses_for_now(make_box: MakeBox) -> None:
    box = make_box("queues: {small: {paused: true, waiting_max: 2}}\n")
    codes = [
        box.api("POST", "/v1/tasks", {"task": "t", "queue": "small", "prompt": "echo x"})[0] for _ in range(3)
    ]
    assert codes == [201, 201, 503]
    assert box.ctl("submit", "--queue", "small", "echo x").returncode == 75


@pytest.mark.row(65)
def test_priority_goes_first_then_age(make_box: MakeBox) -> None:
    box = make_box("max_workers: 1\nqueues: {default: {paused: true}}\n")
    for name, priority in (("low", -1), ("old", 0), ("young", 0), ("high", 5)):
        box.append({"task": name, "id": name, "prompt": "echo x", "priority": priority})
    box.wait_state("high", "queued")
    box.config.write_text("max_workers: 1\n")
    wait_for("4 ends", lambda: len(box.results()) == 4)
    assert [line["name"] for line in box.completions()] == ["high", "old", "young", "low"]


@pytest.mark.row(45)
def test_logs_and_the_event_stream_name_the_task_and_hold_no_prompt_or_environment(box: RealBox) -> None:
    box.append(
        {
            "task": "quiet",
            "id": "quiet",
            "prompt": "echo 'sesame-open' > /dev/null; echo x",
            "env": {"PASS": "hush-hush"},
        }
    )
    box.append({"task": "loud", "prompt": "   "})
    box.result("quiet")
    (line,) = wait_for("its canonical line", lambda: box.events("task_finished"))
    assert (line["task"], line["result"], line["exit_code"]) == ("quiet", "success", 0)
    everything = (
        box.log_text() + json.dumps(box.show("quiet")) + json.dumps(box.api("GET", "/v1/audit/events")[1])
    )
    assert "sesame-open" not in everything
    assert "hush-hush" not in everything
    assert box.ctl("logs", "quiet").stdout == b"x\n"


@pytest.mark.row(22, 45)
def test_the_doctor_finds_a_healthy_box_healthy_and_metrics_count(box: RealBox) -> None:
    box.append({"task": "one", "prompt": "echo x"})
    box.result("one")
    checks = box.api("GET", "/v1/doctor")[1]["checks"]
    assert [check for check in checks if check["level"] == "error"] == []
    assert box.ctl("doctor").returncode == 0


@pytest.mark.row(43)
@pytest.mark.root
def test_a_disk_that_fills_stops_intake_loudly_and_delivery_goes_on(
    make_box: MakeBox, tmp_path: Path
) -> None:
    box = make_box("limits: {disk_free_min: 4MiB, reserve_bytes: 1MiB, rescan_every: 200ms}\n", start=False)
    box.state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "agentqd-test", str(box.state)], check=True)
    try:
        box.start()
        box.append(
            {
                "task": "runs",
                "id": "runs",
                "prompt": f"while ! [ -e {tmp_path}/go ]; do sleep 0.02; done; echo x",
            }
        )
        box.wait_state("runs", "running")
        free = box.status()["disk"]["free_bytes"]
        (box.state / "filler").write_bytes(b"x" * (free - 3 * 2**20))
        wait_for("the alert", lambda: box.alerts("disk_low"))
        assert box.status()["disk"]["intake_stopped"] is True
        refused = box.ctl("submit", "--json", "echo x")
        assert (refused.returncode, json.loads(refused.stdout)["reason"]) == (75, "disk_low")
        box.append({"task": "waits", "prompt": "echo x"})
        (tmp_path / "go").touch()
        assert box.result("runs")["status"] == "success"
        assert "waits" not in box.results()
        (box.state / "filler").unlink()
        assert box.result("waits")["status"] == "success"
    finally:
        box.kill()
        box.__exit__()
        subprocess.run(["umount", "-l", str(box.state)], check=True)


@pytest.mark.row(60)
def test_a_stuck_supervisor_is_told_and_the_box_goes_on_when_it_wakes(box: RealBox) -> None:
    box.append({"task": "first", "prompt": "echo x"})
    box.result("first")
    supervisor = box.supervisor_pid()
    os.kill(supervisor, signal.SIGSTOP)
    try:
        box.append(*({"task": f"t{n}", "prompt": "echo x"} for n in range(20)))
        wait_for(
            "their acceptance",
            lambda: sum(box.status()["tasks"][state] for state in ("queued", "running")) == 20,
        )
        time.sleep(0.1)  # nothing may have happened meanwhile
        assert len(box.results()) == 1
    finally:
        os.kill(supervisor, signal.SIGCONT)
    wait_for("21 ends", lambda: len(box.results()) == 21)
    assert {line["status"] for line in box.results().values()} == {"success"}


def claimed_behind_a_stopped_supervisor(box: RealBox, tmp_path: Path, tasks: int) -> list[str]:
    """Each would leave a mark."""
    box.append({"task": "first", "prompt": "echo x"})
    box.result("first")
    os.kill(box.supervisor_pid(), signal.SIGSTOP)
    wait_for("its stop", lambda: read_state(box.supervisor_pid()) == "T")
    names = [f"t{n}" for n in range(tasks)]
    for name in names:
        box.submit(task=name, id=name, prompt=f"touch {tmp_path}/ran-{name}; sleep 100")
        box.wait_state(name, "running")
    return names


def read_state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.row(60)
@pytest.mark.parametrize("daemon", ["stays", "is killed after it", "is killed before it"])
def test_a_task_cancelled_behind_a_stopped_supervisor_never_starts(
    box: RealBox, tmp_path: Path, daemon: str
) -> None:
    names = claimed_behind_a_stopped_supervisor(box, tmp_path, 3)
    if daemon == "is killed before it":
        box.kill()
        box.start()
    for name in names[:2]:
        assert box.ctl("cancel", name).returncode == 0
        assert box.show(name)["state"] == "stopping"
    if daemon == "is killed after it":
        box.kill()
        box.start()
    os.kill(box.supervisor_pid(), signal.SIGCONT)
    for name in names[:2]:
        assert box.result(name)["status"] == "cancelled"
        assert not (tmp_path / f"ran-{name}").exists()
        assert box.show(name)["attempts"] == []
    wait_for("the one that nobody cancelled", (tmp_path / "ran-t2").exists)


@pytest.mark.row(60)
def test_a_stopped_supervisor_is_told_of_each_task_that_runs_behind_it(box: RealBox, tmp_path: Path) -> None:
    box.submit(task="runs", id="runs", prompt="sleep 100")
    wait_for("its worker", lambda: box.show("runs")["pid"])
    assert box.show("runs")["waiting_for"] is None
    (waits,) = claimed_behind_a_stopped_supervisor(box, tmp_path, 1)
    pid = box.supervisor_pid()
    assert box.ctl("cancel", waits).returncode == 0
    for name, state, reason in (("runs", "running", "supervisor_silent"), (waits, "stopping", "cancelled")):
        shown = box.show(name)
        told = shown["waiting_for"]
        assert (shown["state"], shown["reason"], told["reason"], told["supervisor_pid"]) == (state, reason, "supervisor_silent", pid)  # fmt: skip
        assert told["since"] <= time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 1))
        assert f"kill -CONT {pid}" in told["text"]
        assert f"the supervisor (pid {pid}) has not answered for".encode() in box.ctl("show", name).stdout
    rows = [line.split(b"\t") for line in box.ctl("list", "--state", "running,stopping").stdout.splitlines()]
    assert [b"supervisor" in row[5] for row in rows] == [True, True]
    page = " ".join(box.ctl("status").stdout.decode().split())
    assert f"supervisor pid {pid}, NO ANSWER for " in page
    assert f"kill -CONT {pid}" in page.partition("agentqd ")[0]  # under what needs attention
    os.kill(pid, signal.SIGCONT)
    assert box.result(waits)["status"] == "cancelled"
    shown = wait_for("an answer", lambda: box.show("runs") if not box.show("runs")["waiting_for"] else None)
    assert (shown["state"], shown["reason"]) == ("running", None)
    assert "NO ANSWER" not in box.ctl("status").stdout.decode()
