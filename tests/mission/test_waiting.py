"""A waiting task says why, and what would free it; a usage limit is waited for with no attempt used. On a real daemon."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeBox
from realbox import RealBox, wait_for

pytestmark = pytest.mark.real

# Say what the real program says, each in one of its ways: the limit until OPENS (if that is not there: for 2 s), and then an answer, as stream-json.
SAYS = {
    "plain, exit 1": """echo "Claude AI usage limit reached|$until"; exit 1""",
    "a record, exit 0": """echo '{"type":"result","is_error":true,"result":"Claude AI usage limit reached|'$until'"}'; exit 0""",
}
AGENT = """#!/bin/sh
cat > /dev/null
test -e OPENS || echo $(($(date +%s) + 2)) > OPENS
until=$(cat OPENS)
if [ "$(date +%s)" -lt "$until" ]; then
    SAYS
fi
echo '{"type":"result","subtype":"success","is_error":false,"result":"done after the rate limit","num_turns":1}'
"""


def _agent(make_box: MakeBox, tmp_path: Path, says: str) -> RealBox:
    agent, opens = tmp_path / "agent", tmp_path / "opens"
    agent.write_text(AGENT.replace("OPENS", str(opens)).replace("SAYS", SAYS[says]))
    agent.chmod(0o755)
    return make_box(f"runners: {{claude: {{preset: claude, command: [{agent}]}}}}\nmax_workers: 1\n")


@pytest.mark.row(47)
def test_a_usage_limit_is_waited_for_by_the_whole_runner_and_uses_no_attempt(
    make_box: MakeBox, tmp_path: Path
) -> None:
    until = int(time.time()) + 3600
    (tmp_path / "opens").write_text(str(until))
    box = _agent(make_box, tmp_path, "plain, exit 1")
    box.append({"task": "one", "id": "one", "runner": "claude", "prompt": "x", "priority": 1})
    shown = box.wait_state("one", "retryable")
    assert (shown["reason"], shown["waiting_for"]["reason"]) == ("usage_limit", "usage_limit")
    assert shown["waiting_for"]["until"] == time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(until))
    box.append(
        {"task": "two", "id": "two", "runner": "claude", "prompt": "x"},
        {"task": "shell", "prompt": "echo on"},
    )
    assert box.result("shell")["status"] == "success"
    two = box.show("two")
    assert (two["state"], two["waiting_for"]["reason"], two["attempts"]) == ("queued", "usage_limit", [])
    status = box.status()
    assert status["waiting"] == {"usage_limit": 2}
    assert status["runner_limits"]["claude"]["task_id"] == "one"
    assert "agentqctl retry one" in [item["fix"] for item in status["attention"]]
    box.kill()
    box.start()
    wait_for(
        "the limit, kept", lambda: box.show("two")["waiting_for"]["reason"] == "usage_limit"
    )  # first: no_supervisor
    assert len(box.show("one")["attempts"]) == 1
    (tmp_path / "opens").write_text("0")  # the account's limit was raised, and a person says so
    assert box.ctl("retry", "one").returncode == 0
    assert [box.result(name)["attempt"] for name in ("one", "two")] == [2, 1]
    (alert,) = box.alerts("usage_limit")
    assert "runner claude" in alert["message"]
    assert (box.attempt_folder("one", 1).is_dir(), box.attempt_folder("one", 2).is_dir()) == (True, True)


@pytest.mark.row(47)
def test_a_limit_that_is_told_by_a_record_with_exit_0_ends_by_itself(
    make_box: MakeBox, tmp_path: Path
) -> None:
    box = _agent(make_box, tmp_path, "a record, exit 0")  # two seconds from its first run on
    box.append({"task": "one", "id": "one", "runner": "claude", "prompt": "x"})
    told = box.result("one")
    assert (told["status"], told["attempt"]) == ("success", 2)
    assert time.time() >= int((tmp_path / "opens").read_text())
    assert [attempt["reason"] for attempt in box.show("one")["attempts"]] == ["usage_limit", None]


def _why(box: RealBox, name: str) -> dict[str, Any]:
    """As `show` says it, and `list` and the page for people too."""
    shown = box.show(name)
    why: dict[str, Any] = shown["waiting_for"]
    (listed,) = [task for task in box.ctl_json("list") if task["id"] == name]
    assert listed["waiting_for"] == why
    assert shown["reason"]
    page = box.ctl("show", name).stdout
    text = page if isinstance(page, str) else page.decode()
    assert " ".join(why["text"].split()[:3]) in " ".join(text.split())
    return why


def test_every_cause_is_told_with_what_would_free_the_task(make_box: MakeBox, tmp_path: Path) -> None:
    go = tmp_path / "go"
    box = make_box("max_workers: 2\nqueues: {slow: {concurrency: 1}, shut: {paused: true}, other: {}}\n")
    box.append(
        {"task": "busy", "id": "busy", "queue": "slow", "priority": 2, "prompt": f"while ! test -e {go}; do sleep 0.05; done; echo"},
        {"task": "next", "id": "next", "queue": "slow", "prompt": "echo", "priority": 1},
        {"task": "last", "id": "last", "queue": "slow", "prompt": "echo"},
        {"task": "after", "id": "after", "after": ["busy", "next"], "prompt": "echo"},
        {"task": "later", "id": "later", "not_before": "2099-01-01T00:00:00Z", "prompt": "echo"},
        {"task": "shut", "id": "shut", "queue": "shut", "prompt": "echo"},
        {"task": "noprompt", "id": "noprompt", "prompt_ref": "late.txt"},
        {"task": "retries", "id": "retries", "queue": "other", "prompt": "exit 1", "max_attempts": 3, "backoff": "1h"},
    )  # fmt: skip
    box.wait_state("retries", "retryable")
    slots = _why(box, "last")
    assert (slots["reason"], slots["limit"], slots["slots"], slots["ahead"]) == ("no_free_slot", "queues.slow.concurrency", 1, 1)  # fmt: skip
    after = _why(box, "after")
    assert (after["reason"], after["tasks"]) == ("dependency", [{"id": "busy", "state": "running"}, {"id": "next", "state": "queued"}])  # fmt: skip
    assert _why(box, "later")["until"] == "2099-01-01T00:00:00.000Z"
    shut = _why(box, "shut")
    assert (shut["reason"], shut["by"], "queues.shut.paused" in shut["text"]) == (
        "queue_paused",
        "config",
        True,
    )
    assert "late.txt" in _why(box, "noprompt")["text"]
    backoff = _why(box, "retries")
    assert (backoff["reason"], backoff["cause"], backoff["attempts_used"], backoff["max_attempts"]) == ("backoff", "exit_code", 1, 3)  # fmt: skip
    assert box.ctl("hold", "later").returncode == 0
    assert "agentqctl release later" in _why(box, "later")["text"]
    assert box.ctl("pause", "slow").returncode == 0
    paused = _why(box, "next")
    assert (paused["by"], paused["since"] is not None, "agentqctl resume slow" in paused["text"]) == ("person", True, True)  # fmt: skip
    assert box.status()["waiting"] == {
        "backoff": 1, "dependency": 1, "held": 1, "prompt_missing": 1, "queue_paused": 3,
    }  # fmt: skip
    assert box.status()["queues"]["slow"]["reasons"] == {"queue_paused": 2}
    page = box.ctl("status").stdout
    assert "2 queue paused" in (page if isinstance(page, str) else page.decode())
    assert box.ctl("retry", "retries").returncode == 0
    wait_for("its second attempt", lambda: len(box.show("retries")["attempts"]) == 2)
    go.touch()
    assert box.ctl("resume", "slow").returncode == 0
    assert box.result("after")["status"] == "success"


def test_a_line_a_period_with_an_id_of_its_own_runs_once_a_period(box: RealBox) -> None:
    """docs/scheduling.md, "Recurring": what cron runs, twice within a period and once in the next."""
    doc = (Path(__file__).parents[2] / "docs" / "scheduling.md").read_text()
    line = next(row.strip() for row in doc.splitlines() if row.startswith("    printf"))
    command = line.replace("/var/lib/agentqd/queue/tasks.jsonl", str(box.queue_file))
    import subprocess

    for day in ("2026-11-20", "2026-11-20", "2026-11-21"):
        fixed = command.replace("$(date +%F)", day)
        assert fixed != command
        subprocess.run(["/bin/sh", "-c", fixed], check=True, timeout=10)
    wait_for("both days", lambda: len([row for row in box.completions() if row["name"] == "nightly"]) == 2)
    assert sorted(row["task_id"] for row in box.completions()) == ["nightly-2026-11-20", "nightly-2026-11-21"]
    assert json.loads(box.queue_file.read_text().splitlines()[0])["id"] == "nightly-2026-11-20"
