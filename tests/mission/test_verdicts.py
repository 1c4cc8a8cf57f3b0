"""Exit 0 proves that a process ran: what counts as work, and what is told of each attempt."""

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeBox
from realbox import RealBox, wait_for

pytestmark = pytest.mark.real


@pytest.mark.row(39)
@pytest.mark.parametrize(
    "prompt", ["true", "echo only on stderr >&2", "touch $AGENTQ_OUTBOX/.hidden", "mkdir folder"]
)
def test_exit_0_with_nothing_to_show_is_no_work_and_alerts(box: RealBox, prompt: str) -> None:
    box.append({"task": "idle", "id": "idle", "prompt": prompt})
    told = box.result("idle")
    assert (told["status"], told["exit_code"], told["reason"]) == ("no_work", 0, "no_evidence")
    assert wait_for("the alert", lambda: box.alerts("no_work"))[0]["task"] == "idle"
    assert any(item["type"] == "agentq.alert.no_work" for item in box.status()["alerts"])


@pytest.mark.row(39)
@pytest.mark.parametrize("prompt", ["echo word", "echo x > $AGENTQ_OUTBOX/a", "echo x > file"])
def test_a_word_an_entry_or_a_file_is_work(box: RealBox, prompt: str) -> None:
    box.append({"task": "busy", "prompt": prompt})
    assert box.result("busy")["status"] == "success"
    assert not box.alerts("no_work")


@pytest.mark.row(39)
def test_a_task_may_say_that_nothing_is_fine(box: RealBox) -> None:
    box.append({"task": "quiet", "prompt": "true", "expect": {"allow_no_work": True}})
    assert box.result("quiet")["status"] == "success"


@pytest.mark.row(39, 47)
def test_no_work_is_retried_like_a_failure(box: RealBox) -> None:
    prompt = "[ $AGENTQ_ATTEMPT = 2 ] && echo now; exit 0"
    box.append({"task": "second", "id": "s", "prompt": prompt, "max_attempts": 3, "backoff": ["10ms"]})
    assert (box.result("second")["status"], box.result("second")["attempt"]) == ("success", 2)
    assert [attempt["result"] for attempt in box.show("s")["attempts"]] == ["no_work", "success"]


@pytest.mark.row(40)
@pytest.mark.parametrize(
    ("expect", "prompt", "reason"),
    [
        ({"files": ["report.md"]}, "echo all done", "expect_files"),
        ({"files": [{"path": "report.md", "min_bytes": 100}]}, "echo short > report.md", "expect_files"),
        ({"files": ["report.md"]}, "mkdir report.md; echo x", "expect_files"),
        ({"check": ["sh", "-c", "grep -q good report.md"]}, "echo bad > report.md", "expect_check"),
        ({"check": ["/no/such/check"]}, "echo x", "expect_check"),
        ({"stdout_min_bytes": 100}, "echo x", "expect_stdout"),
        ({"min_duration": "30s"}, "echo x", "expect_duration"),
    ],
)
def test_exit_0_without_the_expected_evidence_is_a_failure(
    box: RealBox, expect: dict[str, Any], prompt: str, reason: str
) -> None:
    box.append({"task": "claims", "prompt": prompt, "expect": expect})
    told = box.result("claims")
    assert (told["status"], told["exit_code"], told["reason"]) == ("failed", 0, reason)


@pytest.mark.row(40)
def test_the_expected_evidence_makes_a_success(box: RealBox) -> None:
    expect = {"files": [{"path": "report.md", "min_bytes": 5}], "check": ["grep", "-q", "good", "report.md"]}
    box.append({"task": "shows", "prompt": "echo all good > report.md", "expect": expect})
    assert box.result("shows")["status"] == "success"
    assert box.result("shows")["evidence"]["check_passed"] is True


@pytest.mark.row(41)
def test_a_stale_artifact_is_not_success(box: RealBox, tmp_path: Path) -> None:
    artifact = tmp_path / "out" / "report.md"
    artifact.parent.mkdir()
    artifact.write_text("yesterday's words\n")
    task = {"workdir": str(artifact.parent), "expect": {"files": ["report.md"]}}
    box.append({"task": "stale", "prompt": "echo done", **task})
    told = box.result("stale")
    assert (told["status"], told["reason"]) == ("failed", "expect_files")
    assert "not changed" in told["detail"]
    box.append({"task": "fresh", "prompt": "echo new words > report.md", **task})
    told = box.result("fresh")
    assert told["status"] == "success"
    digest = hashlib.sha256(b"new words\n").hexdigest()
    assert told["artifacts"] == [{"path": "report.md", "bytes": 10, "sha256": digest}]


@pytest.mark.row(41)
@pytest.mark.parametrize("said_by", ["task", "config"])
def test_the_evidence_is_looked_for_where_the_worker_worked(
    make_box: MakeBox, tmp_path: Path, said_by: str
) -> None:
    (tmp_path / "project").mkdir()
    box = make_box("defaults: {workdir: ~/project}\n" if said_by == "config" else None, start=False)
    box.env["HOME"] = str(tmp_path)
    box.start()
    place = {"workdir": "~/project"} if said_by == "task" else {}
    expect = {"files": ["report.md"], "check": ["grep", "-q", "good", "report.md"]}
    box.append({"task": "home", "prompt": "echo good > report.md", "expect": expect, **place})
    assert box.result("home")["status"] == "success"
    assert [item["path"] for item in box.result("home")["artifacts"]] == ["report.md"]


@pytest.mark.row(41)
def test_every_file_in_the_work_folder_is_recorded_with_its_digest(box: RealBox) -> None:
    box.append({"task": "files", "prompt": "mkdir d; echo a > a; echo b > d/b; ln -s /etc/passwd p"})
    told = box.result("files")
    assert {item["path"]: item["sha256"] for item in told["artifacts"]} == {
        "a": hashlib.sha256(b"a\n").hexdigest(), "d/b": hashlib.sha256(b"b\n").hexdigest(),
    }  # fmt: skip
    assert told["evidence"]["work_files"] == 2


@pytest.mark.row(41)
def test_a_thousand_and_more_artifacts_are_cut_and_it_is_said(box: RealBox) -> None:
    box.append({"task": "many", "prompt": "for n in $(seq 1100); do echo $n > $n; done"})
    told = box.result("many")
    assert (len(told["artifacts"]), told["artifacts_truncated"]) == (1000, True)


@pytest.mark.row(40)
@pytest.mark.parametrize(
    ("end", "reason", "code", "number"), [("exit 3", "exit_code", 3, None), ("kill -9 $$", "signal", None, 9)]
)
def test_a_code_or_a_foreign_signal_is_a_failure(
    box: RealBox, end: str, reason: str, code: int | None, number: int | None
) -> None:
    box.append({"task": "fails", "prompt": f"echo x; {end}"})
    told = box.result("fails")
    assert (told["status"], told["reason"], told["exit_code"], told["signal"]) == (
        "failed",
        reason,
        code,
        number,
    )


@pytest.mark.row(47)
def test_each_retry_is_recorded_waits_longer_and_is_capped(box: RealBox) -> None:
    box.append(
        {
            "task": "fails",
            "id": "f",
            "prompt": "echo try $AGENTQ_ATTEMPT; exit 75",
            "max_attempts": 4,
            "backoff": "100ms",
        }
    )
    told = box.result("fails")
    assert (told["status"], told["exit_code"], told["attempt"], told["stdout_tail"]) == (
        "failed",
        75,
        4,
        "try 4\n",
    )
    shown = box.show("f")
    assert [attempt["result"] for attempt in shown["attempts"]] == ["failed"] * 4
    assert [event["event"] for event in shown["events"]].count("attempt_ended") == 3
    ended = [parse(attempt["ended_at"]) for attempt in shown["attempts"]]
    began = [parse(attempt["started_at"]) for attempt in shown["attempts"]]
    waits = [start - end for start, end in zip(began[1:], ended, strict=False)]
    assert all(wait >= least - 0.01 for wait, least in zip(waits, [0.1, 0.2, 0.4], strict=True)), waits
    assert len([line for line in box.completions() if line["name"] == "fails"]) == 1


def parse(text: str) -> float:
    moment = time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S")
    return time.mktime(moment) + float(text[19:-1])


@pytest.mark.row(47)
def test_a_task_that_backs_off_says_so(box: RealBox) -> None:
    box.append({"task": "waits", "id": "w", "prompt": "exit 1", "max_attempts": 2, "backoff": ["1h"]})
    shown = box.wait_state("w", "retryable")
    assert shown["waiting_for"]["until"]
    assert box.ctl("cancel", "w").returncode == 0
    assert box.result("waits")["status"] == "cancelled"
    assert len(box.show("w")["attempts"]) == 1


@pytest.mark.row(1)
def test_a_completion_line_says_everything_that_a_reader_needs(box: RealBox) -> None:
    box.append(
        {
            "task": "full",
            "id": "full",
            "submitted_at": "2026-04-07T18:30:00Z",
            "prompt": "echo hi; echo art > a.txt",
        }
    )
    told = box.result("full")
    assert {
        "task_id": "full", "name": "full", "status": "success", "attempt": 1, "exit_code": 0, "signal": None, "reason": None,
        "submitted_at": "2026-04-07T18:30:00Z", "stdout_tail": "hi\n", "pulled": False, "seq": 1,
    }.items() <= told.items()  # fmt: skip
    wanted = {
        "started_at",
        "completed_at",
        "duration_s",
        "output_dir",
        "artifacts",
        "evidence",
        "usage",
        "delivery_id",
    }
    assert wanted <= set(told)
    folder = Path(told["output_dir"])
    assert folder == box.attempt_folder("full")
    assert (folder / "stdout").read_text() == "hi\n"
    assert told["completed_at"] >= told["started_at"]
    raw = (box.state / "completions.jsonl").read_bytes()
    assert raw.endswith(b"\n")
    assert json.loads(raw.splitlines()[-1]) == told


@pytest.mark.row(37)
@pytest.mark.parametrize("wait_s", [0.0, 0.02, 0.04])
def test_a_cancel_that_races_an_end_gives_one_end(box: RealBox, wait_s: float) -> None:
    for n in range(10):
        box.append({"task": f"t{n}", "id": f"t{n}", "prompt": "sleep 0.03; echo x"})
        wait_for("it", lambda n=n: box.show(f"t{n}").get("state"))
        time.sleep(wait_s)  # the race itself
        status, answer = box.api("POST", f"/v1/tasks/t{n}/cancel", {})
        assert status in {200, 409}
        told = box.result(f"t{n}")
        assert told["status"] in {"success", "cancelled"}
        if status == 409:
            assert (answer["error"], answer["state"], answer["result"]) == (
                "illegal_transition",
                "finished",
                "success",
            )
        shown = box.show(f"t{n}")
        ends = [event for event in shown["events"] if event["event"] in {"finished", "cancelled"}]
        assert len(ends) == 1
        assert shown["result"] == told["status"]
    assert len([line for line in box.completions() if "status" in line]) == 10


@pytest.mark.row(37)
def test_a_second_cancel_and_a_wrong_move_change_nothing(box: RealBox) -> None:
    box.append({"task": "one", "id": "one", "prompt": "echo x"})
    box.result("one")
    for verb in ("cancel", "hold", "release"):
        done = box.ctl(verb, "one", "--json")
        assert done.returncode == 1
        assert json.loads(done.stdout)["error"] == "illegal_transition"
    assert box.show("one")["result"] == "success"


@pytest.mark.row(43, 29)
def test_a_tree_that_does_not_stop_stays_stopping_until_it_is_gone(box: RealBox, tmp_path: Path) -> None:
    box.append(
        {
            "task": "stops",
            "id": "stops",
            "prompt": f"trap '' TERM; echo $$ > {tmp_path}/pid; while :; do sleep 0.1; done",
            "kill_grace": "1s",
        }
    )
    wait_for("its start", (tmp_path / "pid").exists)
    box.api("POST", "/v1/tasks/stops/cancel", {})
    assert box.show("stops")["state"] == "stopping"
    assert box.result("stops")["status"] == "cancelled"
    assert box.result("stops")["signal"] == signal.SIGKILL


@pytest.mark.row(29)
def test_a_stopped_worker_is_ended_at_its_deadline_too(box: RealBox, tmp_path: Path) -> None:
    box.append(
        {
            "task": "frozen",
            "prompt": f"echo $$ > {tmp_path}/pid; kill -STOP $$; sleep 300",
            "run_timeout": "500ms",
            "kill_grace": "200ms",
        }
    )
    assert box.result("frozen")["status"] == "timeout"
    assert os.path.exists(tmp_path / "pid")


@pytest.mark.row(58)
def test_the_worker_gets_its_environment_and_nothing_else(make_box: MakeBox) -> None:
    box = make_box(start=False)
    box.env = {"SECRET_TOKEN": "hush"}
    box.start()
    box.append({"task": "env", "id": "env", "prompt": "env", "env": {"MINE": "1"}})
    seen = dict(
        line.split("=", 1)
        for line in (Path(box.result("env")["output_dir"]) / "stdout").read_text().splitlines()
    )
    folder = str(box.attempt_folder("env"))
    assert (seen["AGENTQ_TASK_ID"], seen["AGENTQ_TASK"], seen["AGENTQ_ATTEMPT"], seen["MINE"]) == (
        "env",
        "env",
        "1",
        "1",
    )
    assert (seen["AGENTQ_TASK_DIR"], seen["AGENTQ_OUTBOX"], seen["AGENTQ_PROMPT_FILE"]) == (
        folder,
        f"{folder}/outbox",
        f"{folder}/prompt",
    )
    assert seen["PWD"] == f"{folder}/work"
    assert {"AGENTQ_HEARTBEAT", "AGENTQ_DEADLINE", "PATH"} <= set(seen)
    assert "SECRET_TOKEN" not in seen
