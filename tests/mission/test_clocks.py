"""Workers and their clocks: what starts, what is too slow, too quiet, or will not go."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeBox
from realbox import RealBox, alive, wait_for

pytestmark = pytest.mark.real


def pid_of(box: RealBox, task_id: str) -> int:
    def look() -> int | None:
        shown = box.show(task_id)
        return shown.get("pid") if shown.get("state") == "running" else None

    return int(wait_for(f"the pid of {task_id}", look))


def started(path: Path) -> int:
    """The pid that a worker wrote down."""
    return int(wait_for(f"{path.name}", lambda: path.exists() and path.read_text().strip()))


@pytest.mark.row(12)
@pytest.mark.parametrize(
    ("task", "word"),
    [
        ({"command": ["/no/such/program"]}, "/no/such/program"),
        ({"command": ["no-such-program-anywhere"]}, "no-such-program-anywhere"),
        ({"prompt": "echo x", "workdir": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_what_cannot_be_started_ends_as_spawn_failed_and_is_delivered(
    box: RealBox, task: dict[str, Any], word: str
) -> None:
    box.append({"task": "unstartable", "id": "u", **task})
    told = box.result("unstartable")
    assert (told["status"], told["exit_code"], told["signal"]) == ("spawn_failed", None, None)
    assert told["reason"] == "spawn_failed"
    assert word in told["detail"]
    (attempt,) = box.show("u")["attempts"]
    assert (attempt["pid"], attempt["result"]) == (None, "spawn_failed")


@pytest.mark.row(12)
def test_every_accepted_task_runs_or_is_reported(box: RealBox) -> None:
    box.append(*({"task": f"t{n}", "command": ["/no/such"] if n % 2 else ["echo", "x"]} for n in range(20)))
    wait_for("20 ends", lambda: len(box.results()) == 20)
    assert {line["status"] for line in box.results().values()} == {"success", "spawn_failed"}


@pytest.mark.row(44, 51)
def test_a_deadline_ends_the_whole_tree_and_what_it_had_is_delivered(box: RealBox, tmp_path: Path) -> None:
    prompt = f"""
echo half the answer; echo part > $AGENTQ_OUTBOX/part.txt; echo art > art.txt
setsid sh -c 'echo $$ > {tmp_path}/child; sleep 300' &
sleep 300
"""
    box.append({"task": "slow", "id": "slow", "prompt": prompt, "run_timeout": "1s", "kill_grace": "200ms"})
    child = started(tmp_path / "child")
    told = box.result("slow")
    assert (told["status"], told["reason"], told["exit_code"]) == ("timeout", "run_timeout", None)
    assert told["stdout_tail"] == "half the answer\n"
    assert [item["path"] for item in told["artifacts"]] == ["art.txt"]
    assert told["duration_s"] < 10
    assert not alive(child)
    assert [entry["key"] for entry in box.entries("slow")] == ["part.txt"]
    assert box.show("slow")["attempts"][0]["result"] == "timeout"


@pytest.mark.row(44)
def test_a_worker_that_ignores_sigterm_is_killed_after_its_grace(box: RealBox) -> None:
    prompt = "trap '' TERM; echo ready; while :; do sleep 1; done"
    box.append({"task": "deaf", "prompt": prompt, "run_timeout": "1s", "kill_grace": "300ms"})
    told = box.result("deaf")
    assert (told["status"], told["signal"]) == ("timeout", signal.SIGKILL)
    assert told["duration_s"] >= 1.3


@pytest.mark.row(44)
def test_an_exit_0_after_our_signal_is_still_a_timeout(box: RealBox) -> None:
    prompt = "trap 'echo sorry; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    box.append({"task": "polite", "prompt": prompt, "run_timeout": "1s"})
    told = box.result("polite")
    assert (told["status"], told["reason"]) == ("timeout", "run_timeout")
    assert told["stdout_tail"] == "ready\nsorry\n"


@pytest.mark.row(44)
def test_a_warning_signal_comes_kill_grace_before_the_deadline(box: RealBox) -> None:
    prompt = "trap 'echo warned; exit 3' USR1; echo ready; while :; do sleep 0.05; done"
    box.append(
        {
            "task": "warned",
            "prompt": prompt,
            "run_timeout": "4s",
            "kill_grace": "2500ms",
            "warning_signal": "SIGUSR1",
        }
    )
    told = box.result("warned")
    assert (told["status"], told["exit_code"]) == ("failed", 3)
    assert told["stdout_tail"] == "ready\nwarned\n"
    assert told["duration_s"] < 4


@pytest.mark.row(44)
def test_deadlines_are_kept_while_the_daemon_is_away(box: RealBox, tmp_path: Path) -> None:
    box.append(
        {
            "task": "slow",
            "prompt": f"echo $$ > {tmp_path}/pid; sleep 300",
            "run_timeout": "1s",
            "kill_grace": "100ms",
        }
    )
    worker = started(tmp_path / "pid")
    box.kill()
    wait_for("its end", lambda: not alive(worker), 10)
    box.start()
    assert (box.result("slow")["status"], box.result("slow")["duration_s"] < 5) == ("timeout", True)


@pytest.mark.row(44)
def test_total_timeout_counts_over_waiting_and_retries(box: RealBox) -> None:
    box.append(
        {
            "task": "all",
            "id": "all",
            "prompt": "echo x; exit 1",
            "max_attempts": 50,
            "backoff": ["200ms"],
            "total_timeout": "2s",
        }
    )
    told = box.result("all")
    assert told["status"] in {"failed", "timeout"}
    attempts = box.show("all")["attempts"]
    assert 2 <= len(attempts) <= 11
    box.submit(
        task="held", id="held", prompt="echo x", not_before="2099-01-01T00:00:00Z", total_timeout="300ms"
    )
    told = box.result("held")
    assert (told["status"], told["reason"], told["attempt"]) == ("timeout", "total_timeout", 0)


@pytest.mark.row(44)
def test_expires_at_ends_a_task_that_has_not_started(box: RealBox) -> None:
    soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 2))
    box.api("POST", "/v1/queues/default/pause", {})
    box.append({"task": "old", "prompt": "echo x", "expires_at": "2020-01-01T00:00:00Z"})
    box.append({"task": "soon", "id": "soon", "prompt": "echo x", "expires_at": soon})
    assert (box.result("old")["status"], box.result("old")["reason"]) == ("expired", "expires_at")
    assert box.result("soon")["status"] == "expired"
    assert box.show("soon")["attempts"] == []


@pytest.mark.row(44)
def test_not_before_holds_a_task_until_its_time(box: RealBox) -> None:
    at = time.time() + 3
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
    answer = box.submit(task="later", id="later", prompt="date +%s; sleep 0.1", not_before=when)
    assert answer["state"] == "scheduled"
    assert box.show("later")["waiting_for"] == {
        "reason": "start_time",
        "until": when.replace("Z", ".000Z"),
        "text": "its start time lies ahead",
    }
    assert int(box.result("later")["stdout_tail"]) >= int(at)


@pytest.mark.row(42)
def test_a_worker_that_never_says_a_word_is_ended(box: RealBox) -> None:
    box.append(
        {"task": "mute", "prompt": "sleep 300", "first_output_timeout": "400ms", "kill_grace": "100ms"}
    )
    told = box.result("mute")
    assert (told["status"], told["reason"]) == ("timeout", "first_output_timeout")


@pytest.mark.row(42)
def test_a_worker_that_falls_silent_is_ended_though_its_process_is_healthy(box: RealBox) -> None:
    prompt = "for n in 1 2 3 4 5 6; do echo $n; sleep 0.3; done; while :; do :; done"
    box.append({"task": "busy", "prompt": prompt, "silence_timeout": "1s", "kill_grace": "100ms"})
    told = box.result("busy")
    assert (told["status"], told["reason"]) == ("timeout", "silence_timeout")
    assert told["stdout_tail"].endswith("6\n")


@pytest.mark.row(42)
@pytest.mark.parametrize("sign", ["touch $AGENTQ_HEARTBEAT", "echo x >&2", "echo x > $AGENTQ_OUTBOX/$n"])
def test_a_heartbeat_an_error_line_or_an_entry_is_a_sign_of_life(box: RealBox, sign: str) -> None:
    prompt = f"for n in 1 2 3 4 5 6; do {sign}; sleep 0.4; done; echo done"
    box.append({"task": "alive", "prompt": prompt, "silence_timeout": "1500ms"})
    assert box.result("alive")["status"] == "success"


@pytest.mark.row(42, 43)
def test_a_task_that_waits_too_long_alerts_and_goes_on_waiting(make_box: MakeBox) -> None:
    box = make_box("queues: {default: {paused: true}}\n")
    box.append({"task": "waits", "id": "waits", "prompt": "echo x", "queue_timeout": "300ms"})
    wait_for("the alert", lambda: box.alerts("queue_timeout"))
    assert box.show("waits")["state"] == "queued"
    assert any(item["text"].startswith("queue_timeout") for item in box.status()["attention"])


@pytest.mark.row(42, 43)
def test_a_ready_task_that_nobody_starts_alerts(make_box: MakeBox) -> None:
    box = make_box("alerts: {oldest_queued: 200ms}\n")
    box.append({"task": "first", "prompt": "echo x"})
    box.result("first")
    (box.runtime / "supervisor.log").rename(box.runtime / "gone")
    (box.runtime / "supervisor.log").mkdir()  # a new one cannot be started
    box.kill_supervisor()
    box.append({"task": "stays", "id": "stays", "prompt": "echo x"})
    alert = wait_for("the alert", lambda: box.alerts("oldest_queued"))[0]
    assert alert["task"] == "stays"
    assert box.show("stays")["waiting_for"]["reason"] == "no_supervisor"


@pytest.mark.row(58)
def test_a_timeout_raised_in_the_config_lets_a_running_worker_live(make_box: MakeBox, tmp_path: Path) -> None:
    box = make_box("defaults: {run_timeout: 4s, kill_grace: 100ms}\n")
    box.append({"task": "long", "id": "long", "prompt": f"echo $$ > {tmp_path}/pid; sleep 5; echo done"})
    worker = started(tmp_path / "pid")
    assert box.show("long")["settings"]["run_timeout_s"] == 4
    box.config.write_text("defaults: {run_timeout: 60s, kill_grace: 100ms}\n")
    told = box.result("long")
    assert (told["status"], told["stdout_tail"]) == ("success", "done\n")
    (attempt,) = box.show("long")["attempts"]
    assert attempt["pid"] == worker


@pytest.mark.row(58)
def test_a_timeout_lowered_in_the_config_ends_a_running_worker_but_never_beats_the_tasks_own(
    make_box: MakeBox,
) -> None:
    box = make_box("defaults: {run_timeout: 60s, kill_grace: 100ms}\n")
    box.append({"task": "follows", "id": "follows", "prompt": "echo x; sleep 60"})
    box.append({"task": "own", "id": "own", "prompt": "echo x; sleep 2.5; echo y", "run_timeout": "50s"})
    pid_of(box, "follows")
    pid_of(box, "own")
    box.config.write_text("defaults: {run_timeout: 700ms, kill_grace: 100ms}\n")
    assert box.result("follows")["status"] == "timeout"
    assert box.result("own")["status"] == "success"


@pytest.mark.row(59)
def test_a_worker_that_has_handed_in_its_result_and_stays_is_ended_after_a_grace(
    box: RealBox, tmp_path: Path
) -> None:
    prompt = f"""echo $$ > {tmp_path}/pid; echo '{{"answer": 42}}' > $AGENTQ_OUTBOX/result.json; sleep 300"""
    box.append(
        {"task": "lingers", "id": "lingers", "prompt": prompt, "result_grace": "500ms", "kill_grace": "100ms"}
    )
    told = box.result("lingers")
    assert (told["status"], told["reason"]) == ("success", "result_grace")
    assert told["duration_s"] < 20
    assert not alive(started(tmp_path / "pid"))
    (entry,) = box.entries("lingers")
    assert (entry["key"], entry["content"], entry["type"]) == (
        "result.json",
        {"answer": 42},
        "agentq.task.entry",
    )


@pytest.mark.row(59)
def test_a_worker_that_leaves_within_its_result_grace_is_left_alone(box: RealBox) -> None:
    prompt = "echo '{}' > $AGENTQ_OUTBOX/result.json; sleep 0.5; exit 4"
    box.append({"task": "leaves", "prompt": prompt, "result_grace": "20s"})
    assert (box.result("leaves")["status"], box.result("leaves")["exit_code"]) == ("failed", 4)


@pytest.mark.row(59, 40)
def test_a_result_handed_in_does_not_replace_the_tasks_own_check(box: RealBox) -> None:
    prompt = "echo '{}' > $AGENTQ_OUTBOX/result.json; sleep 300"
    box.append(
        {
            "task": "checked",
            "prompt": prompt,
            "result_grace": "200ms",
            "kill_grace": "100ms",
            "expect": {"check": ["false"]},
        }
    )
    assert (box.result("checked")["status"], box.result("checked")["reason"]) == ("failed", "expect_check")


@pytest.mark.row(59)
def test_processes_left_behind_are_ended_and_named(box: RealBox, tmp_path: Path) -> None:
    prompt = f"setsid sh -c 'echo $$ > {tmp_path}/left; exec sleep 300' & until [ \"$(cat /proc/$!/comm)\" = sleep ]; do sleep 0.02; done; echo done"
    box.append({"task": "messy", "id": "messy", "prompt": prompt})
    told = box.result("messy")
    assert told["status"] == "success"
    left = started(tmp_path / "left")
    assert told["evidence"]["left_behind"] == [{"pid": left, "name": "sleep"}]
    assert not alive(left)
    assert box.show("messy")["attempts"][0]["left_behind"] == [{"pid": left, "name": "sleep"}]


@pytest.mark.row(44)
def test_output_beyond_its_limit_loses_its_middle_and_the_worker_goes_on(make_box: MakeBox) -> None:
    box = make_box("limits: {stdout_bytes_max: 64KiB}\n")
    prompt = "echo head; head -c 3000000 /dev/zero | tr '\\0' x; sleep 1.5; echo; echo tail"
    box.append({"task": "loud", "prompt": prompt})
    told = box.result("loud")
    assert told["status"] == "success"
    assert told["stdout_tail"].endswith("tail\n")
    assert told["evidence"]["stdout_truncated"] is True
    stdout = Path(told["output_dir"]) / "stdout"
    assert stdout.read_bytes().startswith(b"head\n")
    assert stdout.stat().st_blocks * 512 < 300_000


@pytest.mark.row(20)
def test_an_idle_box_takes_next_to_nothing(box: RealBox) -> None:
    box.append({"task": "one", "prompt": "echo x"})
    box.result("one")

    def ticks(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def rss_mib(pid: int) -> float:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    pids = box.daemon_pid(), box.supervisor_pid()
    before, began = sum(map(ticks, pids)), time.monotonic()
    time.sleep(4)  # the measurement itself
    used_s = (sum(map(ticks, pids)) - before) / os.sysconf("SC_CLK_TCK")
    assert used_s / (time.monotonic() - began) <= 0.01
    assert rss_mib(pids[0]) <= 60
    assert rss_mib(pids[1]) <= 25
