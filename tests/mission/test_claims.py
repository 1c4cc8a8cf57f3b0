"""How long a write claim lives: its TTL beside live, silent and dead workers; claims of processes that are no task's."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol

import pytest
from conftest import MakeBox
from realbox import RealBox, alive, wait_for

from agentqd.loops.lifesigns import last_sign_us

pytestmark = pytest.mark.real


def holder(box: RealBox, path: Path, gate: Path, **more: Any) -> None:
    """A running task that has claimed `path`, until `gate` exists."""
    prompt = f"while ! [ -e {gate} ]; do sleep 0.02; done; echo x"
    box.submit(task="holder", id="holder", **{"prompt": prompt, "writes_to": [str(path)], **more})
    box.wait_state("holder", "running")


def waiter(box: RealBox, path: Path, name: str = "second") -> None:
    box.submit(task=name, id=name, prompt="echo x", writes_to=[str(path)], on_conflict="queue")


def claims(box: RealBox) -> list[dict[str, Any]]:
    return box.api("GET", "/v1/writes")[1]["claims"]


def events(box: RealBox, task_id: str) -> list[str]:
    return [event["event"] for event in box.show(task_id)["events"]]


def lapses(box: RealBox) -> list[dict[str, Any]]:
    return box.alerts("claim_expired")


@pytest.mark.row(70, 71)
def test_a_stopped_worker_keeps_its_claim_past_the_ttl_and_that_is_told_once(
    box: RealBox, tmp_path: Path
) -> None:
    holder(box, tmp_path / "f", tmp_path / "go", intent_ttl="300ms")
    pid = wait_for("its pid", lambda: box.show("holder")["attempts"][0]["pid"])
    os.killpg(pid, signal.SIGSTOP)
    waiter(box, tmp_path / "f")
    (told,) = wait_for("the alert", lambda: lapses(box))
    assert all(word in told["message"] for word in ("holder", str(tmp_path / "f"), "second"))
    (claim, waits) = sorted(claims(box), key=lambda each: each["waiting"])
    assert (claim["task_id"], claim["state"], waits["task_id"]) == ("holder", "running", "second")
    assert claim["expires_at"] is not None
    box.kill()
    box.start()
    os.killpg(pid, signal.SIGCONT)
    (tmp_path / "go").touch()
    assert box.result("second")["status"] == "success"
    assert len(lapses(box)) == 1


@pytest.mark.row(70)
def test_signs_of_life_put_the_ttl_off(box: RealBox, tmp_path: Path) -> None:
    signs = {
        "output": "echo x",
        "heartbeat": "touch $AGENTQ_HEARTBEAT",
        "outbox": "echo x > $AGENTQ_OUTBOX/.$n",
    }
    for name, sign in signs.items():
        prompt = f"n=0; while ! [ -e {tmp_path}/quiet ]; do n=$((n+1)); {sign}; sleep 0.2; done; sleep 300"
        box.submit(
            task=name,
            id=name,
            prompt=prompt,
            writes_to=[f"{tmp_path}/{name}"],
            intent_ttl="2s",
            kill_grace="100ms",
        )
    for name in signs:
        box.wait_state(name, "running")
    folders = [box.attempt_folder(name) for name in signs]
    wait_for("all starts", lambda: all((folder / "started").exists() for folder in folders))
    began_us = min((folder / "started").stat().st_ctime_ns for folder in folders) // 1000
    for folder in folders:
        wait_for("two TTLs", lambda f=folder: last_sign_us(str(f), 0, 2**62) - began_us > 4_000_000)
    assert lapses(box) == []
    assert all(claim["expires_at"] for claim in claims(box))
    (tmp_path / "quiet").touch()
    told = wait_for("three alerts", lambda: (found := lapses(box))[2:] and found)
    assert sorted(each["task"] for each in told) == sorted(signs)
    assert len(claims(box)) == 3


@pytest.mark.row(70)
def test_a_claim_in_backoff_is_released_by_its_ttl_and_made_again_before_the_next_attempt(
    box: RealBox, tmp_path: Path
) -> None:
    prompt = f"echo $AGENTQ_ATTEMPT >> {tmp_path}/ran; [ -e {tmp_path}/well ] && echo x"
    box.submit(
        task="first", id="first", prompt=prompt, writes_to=[f"{tmp_path}/f"], on_conflict="queue", max_attempts=2,
        backoff=["6s"], intent_ttl="300ms",
    )  # fmt: skip
    box.wait_state("first", "retryable")
    (tmp_path / "well").touch()
    gate = tmp_path / "go"
    box.submit(
        task="second", id="second", prompt=f"while ! [ -e {gate} ]; do sleep 0.02; done; echo x",
        writes_to=[f"{tmp_path}/f"], on_conflict="queue",
    )  # fmt: skip
    box.wait_state("second", "running")
    assert box.show("first")["state"] == "retryable", "the claim went before the attempt came"
    shown = box.wait_state("first", "blocked")
    assert (shown["reason"], "second" in shown["detail"]) == ("write_conflict", True)
    gate.touch()
    assert box.result("first")["status"] == "success"
    assert (tmp_path / "ran").read_text().split() == ["1", "2"]
    assert {"claim_released", "claimed_again"} <= set(events(box, "first"))


@pytest.mark.row(71)
def test_a_reboot_leaves_no_claim(box: RealBox, tmp_path: Path) -> None:
    holder(box, tmp_path / "f", tmp_path / "go")
    waiter(box, tmp_path / "f")
    box.kill()
    box.kill_supervisor()
    with closing(sqlite3.connect(box.state / "journal.db")) as journal:
        journal.execute("UPDATE attempts SET boot_id = 'before'")
        journal.commit()
    (box.attempt_folder("holder") / "started").write_text(
        (box.attempt_folder("holder") / "started").read_text().replace('"boot_id":"', '"boot_id":"x')
    )
    box.start()
    assert (box.result("holder")["status"], box.results()["holder"]["reason"]) == ("lost", "box_rebooted")
    assert box.result("second")["status"] == "success"
    assert claims(box) == []


@pytest.mark.row(71)
def test_a_claim_ends_with_a_worker_that_is_killed(box: RealBox, tmp_path: Path) -> None:
    holder(box, tmp_path / "f", tmp_path / "go", intent_ttl="1h")
    waiter(box, tmp_path / "f")
    os.kill(wait_for("its pid", lambda: box.show("holder")["attempts"][0]["pid"]), signal.SIGKILL)
    assert box.result("second")["status"] == "success"
    assert box.results()["holder"]["reason"] == "signal"


# Claims from outside.


class Outside(Protocol):
    def __call__(self, box: RealBox, *words: str | Path) -> subprocess.Popen[bytes]: ...


@pytest.fixture
def outside() -> Iterator[Outside]:
    """`agentqctl writes claim WORDS`, in a process group of its own; ended with the test."""
    with ExitStack() as stack:

        def start(box: RealBox, *words: str | Path) -> subprocess.Popen[bytes]:
            command = [
                sys.executable,
                "-m",
                "agentqd.cli.main",
                "--state-dir",
                str(box.state),
                "--runtime-dir",
                str(box.runtime),
            ]
            made = subprocess.Popen(
                [*command, "writes", "claim", *map(str, words)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )

            def end() -> None:
                if made.poll() is None:
                    os.killpg(made.pid, signal.SIGKILL)
                made.communicate(timeout=30)

            stack.callback(end)
            return made

        yield start


def held(box: RealBox, count: int = 1) -> list[dict[str, Any]]:
    return wait_for(
        f"{count} outside claims",
        lambda: (found := [c for c in claims(box) if c["state"] == "held"])[count - 1 :] and found,
    )


@pytest.mark.row(75)
def test_an_outside_claim_refuses_tasks_while_its_command_runs_and_exits_as_it_did(
    box: RealBox, tmp_path: Path, outside: Outside
) -> None:
    script = f"while ! [ -e {tmp_path}/go ]; do sleep 0.02; done; exit 7"
    claim = outside(box, tmp_path / "d", "--name", "editor", "--", "sh", "-c", script, "secret-argument")
    (shown,) = held(box)
    assert (shown["kind"], shown["task"], shown["path"], shown["pid"] > 0) == (
        "outside",
        "editor",
        f"{tmp_path}/d",
        True,
    )
    task = {"task": "t", "prompt": "echo x", "writes_to": [f"{tmp_path}/d/f"]}
    status, answer = box.api("POST", "/v1/tasks", task)
    conflict = {"task_id": shown["task_id"], "task": "editor", "path": f"{tmp_path}/d"}
    assert (status, answer["conflicts"]) == (409, [conflict])
    refused = box.ctl(
        "writes",
        "claim",
        f"{tmp_path}/d",
        "--on-conflict",
        "refuse",
        "--json",
        "--",
        "touch",
        f"{tmp_path}/ran",
    )
    assert (refused.returncode, json.loads(refused.stdout)["conflicts"]) == (75, [conflict])
    assert not (tmp_path / "ran").exists()
    (tmp_path / "go").touch()
    assert claim.wait(30) == 7
    wait_for("its release", lambda: not claims(box))
    assert box.api("POST", "/v1/tasks", task)[0] == 201
    assert "secret-argument" not in box.log_text()
    assert box.events("outside_claim_held")[0]["name"] == "editor"


@pytest.mark.row(75)
def test_claims_and_tasks_wait_for_each_other_in_order(
    box: RealBox, tmp_path: Path, outside: Outside
) -> None:
    holder(box, tmp_path / "f", tmp_path / "go")
    claim = outside(
        box,
        tmp_path / "f",
        "--on-conflict",
        "queue",
        "--",
        "sh",
        "-c",
        f"while ! [ -e {tmp_path}/go2 ]; do sleep 0.02; done",
    )
    wait_for("the waiting claim", lambda: [c for c in claims(box) if c["state"] == "waiting"])
    waiter(box, tmp_path / "f")
    assert box.wait_state("second", "blocked")["detail"].startswith("waits for ")
    late = box.ctl("writes", "claim", f"{tmp_path}/f", "--wait", "300ms", "--", "touch", f"{tmp_path}/ran")
    assert (late.returncode, (tmp_path / "ran").exists()) == (124, False)
    (tmp_path / "go").touch()
    held(box)
    assert box.show("second")["state"] == "blocked", "the older claim goes first"
    (tmp_path / "go2").touch()
    assert claim.wait(30) == 0
    assert box.result("second")["status"] == "success"


@pytest.mark.row(75)
@pytest.mark.parametrize("who", ["agentqctl", "its command", "both"])
def test_a_killed_claimer_holds_nothing(box: RealBox, tmp_path: Path, outside: Outside, who: str) -> None:
    claim = outside(box, tmp_path / "f", "--", "sleep", "300")
    (shown,) = held(box)
    assert shown["pid"] != claim.pid
    if who == "both":
        os.killpg(claim.pid, signal.SIGKILL)
    else:
        os.kill(claim.pid if who == "agentqctl" else shown["pid"], signal.SIGKILL)
    wait_for("its release", lambda: not claims(box))
    assert not alive(shown["pid"])
    assert claim.wait(30) == (128 + signal.SIGKILL if who == "its command" else -signal.SIGKILL)


@pytest.mark.row(75)
def test_an_outside_claim_outlasts_the_daemon_but_not_its_command_nor_the_boot(
    box: RealBox, tmp_path: Path, outside: Outside
) -> None:
    goes_on = outside(box, tmp_path / "a", "--", "sleep", "300")
    held(box)
    ends = outside(box, tmp_path / "b", "--", "sleep", "300")
    waits = outside(box, tmp_path / "a", "--on-conflict", "queue", "--", "true")
    outside(box, tmp_path / "c", "--", "sleep", "300")
    held(box, 3)
    wait_for("the waiting claim", lambda: len(claims(box)) == 4)
    box.kill()
    os.killpg(ends.pid, signal.SIGKILL)
    ends.wait(30)
    with closing(sqlite3.connect(box.state / "journal.db")) as journal:
        journal.execute(
            "UPDATE outside_claims SET boot_id = 'before' WHERE seq = (SELECT -task_seq FROM intents WHERE path = ?)",
            (f"{tmp_path}/c",),
        )
        journal.commit()
    box.start()
    wait_for("the dead claims' release", lambda: [c["path"] for c in claims(box)] == [f"{tmp_path}/a"] * 2)
    assert (goes_on.poll(), waits.poll()) == (None, None)
    os.kill(goes_on.pid, signal.SIGTERM)
    assert goes_on.wait(30) == 128 + signal.SIGTERM
    assert waits.wait(30) == 0


@pytest.mark.row(73)
def test_conflicts_are_kept_by_time_and_counted_by_policy(
    make_box: MakeBox, tmp_path: Path, outside: Outside
) -> None:
    box = make_box()
    outside(box, tmp_path / "f", "--name", "editor", "--", "sleep", "300")
    held(box)
    for policy in ("refuse", "refuse", "warn"):
        box.submit(task="t", id="t", prompt="echo x", writes_to=[f"{tmp_path}/f"], on_conflict=policy)
    found = box.ctl_json("writes", "conflicts", "--since", "1h")
    assert sorted((each["task"], each["policy"], each["count"]) for each in found) == [
        ("t", "refuse", 2),
        ("t", "warn", 1),
    ]
    outsiders = {each["task_id"] for each in claims(box) if each["kind"] == "outside"}
    assert {each["other_id"] for each in found} == outsiders
    assert len(outsiders) == 1
    assert box.ctl_json("writes", "conflicts", "--since", "2999-01-01T00:00:00Z") == []
    metrics = subprocess.run(
        ["curl", "-s", "--unix-socket", str(box.runtime / "agentqd.sock"), "http://box/metrics"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert 'agentqd_write_conflicts_total{policy="refuse"} 2' in metrics
    assert 'agentqd_write_claims{by="outside"} 1' in metrics


# What was written and not declared.


@pytest.mark.row(78)
def test_undeclared_writes_are_named_where_the_runner_asks_and_nothing_fails(
    make_box: MakeBox, tmp_path: Path
) -> None:
    box = make_box("runners: {shell: {preset: shell, check_writes: true}}\n")
    work = tmp_path / "work"
    (work / ".git").mkdir(parents=True)
    (work / "sub").mkdir()
    for name in ("old", "sub/gone", "mine"):
        (work / name).touch()
    prompt = "echo x > mine; echo x > stray; echo x > .git/index; rm sub/gone; ln -s / link; echo done"
    box.submit(task="t", id="t", prompt=prompt, workdir=str(work), writes_to=["mine"])
    told = box.result("t")
    expected = {"paths": ["link", "stray", "sub/"], "count": 3, "truncated": False}
    assert (told["status"], told["evidence"]["undeclared_writes"]) == ("success", expected)
    assert box.show("t")["attempts"][0]["evidence"]["undeclared_writes"] == expected
    assert "undeclared_writes" in events(box, "t")
    assert b"stray" in box.ctl("show", "t").stdout
    box.submit(task="all", id="all", prompt="echo x > mine; echo done", workdir=str(work), writes_to=["*"])
    assert box.result("all")["evidence"]["undeclared_writes"]["count"] == 0
    assert "undeclared_writes" not in events(box, "all")
