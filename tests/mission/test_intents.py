"""Declared writes: who collides is told before anything of it runs. Advisory; nothing stops an undeclared write."""

import fcntl
import json
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeBox
from realbox import RealBox, wait_for

pytestmark = pytest.mark.real


def holder(box: RealBox, path: Path | str, gate: Path, **more: Any) -> None:
    """A running task that has claimed `path`, until `gate` exists."""
    prompt = f"while ! [ -e {gate} ]; do sleep 0.02; done; echo x"
    box.submit(task="holder", id="holder", prompt=prompt, writes_to=[str(path)], **more)
    box.wait_state("holder", "running")


def soon() -> str:
    """Half a second from now."""
    return datetime.fromtimestamp(time.time() + 0.5, UTC).isoformat()


@pytest.mark.row(62, 63, 64, 80)
def test_a_conflict_is_refused_before_a_spawn_and_names_task_and_path(box: RealBox, tmp_path: Path) -> None:
    holder(box, tmp_path / "f", tmp_path / "go")
    status, answer = box.api(
        "POST",
        "/v1/tasks",
        {"task": "second", "prompt": f"touch {tmp_path}/ran", "writes_to": [f"{tmp_path}/f"]},
    )
    assert (status, answer["error"]) == (409, "write_conflict")
    assert answer["conflicts"] == [{"task_id": "holder", "task": "holder", "path": f"{tmp_path}/f"}]
    done = box.ctl("submit", "--json", "--writes", f"{tmp_path}/f", f"touch {tmp_path}/ran")
    assert (done.returncode, json.loads(done.stdout)["conflicts"][0]["task_id"]) == (75, "holder")
    assert len(box.api("GET", "/v1/tasks")[1]["tasks"]) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.row(62, 63, 80)
def test_a_conflict_by_file_is_a_finished_task_that_was_refused_and_its_id_is_free_again(
    box: RealBox, tmp_path: Path
) -> None:
    holder(box, tmp_path / "f", tmp_path / "go")
    line = {
        "task": "second",
        "id": "second",
        "prompt": f"touch {tmp_path}/ran; echo x",
        "writes_to": [f"{tmp_path}/f"],
    }
    box.append(line)
    told = box.result("second")
    assert (told["status"], told["reason"], told["task_id"]) == ("refused", "write_conflict", "second")
    assert told["conflicts"][0]["task_id"] == "holder"
    assert box.show("second")["attempts"] == []
    assert box.ctl("wait", "second").returncode == 125
    assert not (tmp_path / "ran").exists()
    (tmp_path / "go").touch()
    box.result("holder")
    box.append(line)
    wait_for("its run", lambda: box.results()["second"]["status"] == "success")
    assert (tmp_path / "ran").exists()


@pytest.mark.row(65, 74)
def test_the_queue_policy_runs_them_one_by_one_in_order(box: RealBox, tmp_path: Path) -> None:
    shared = tmp_path / "shared.txt"
    body = "cp {0} {0}.$AGENTQ_TASK; echo $AGENTQ_TASK >> {0}.$AGENTQ_TASK; sleep 0.1; mv {0}.$AGENTQ_TASK {0}; chmod 600 {0}; echo ok"
    shared.touch()
    box.append(
        *(
            {
                "task": f"t{n}",
                "prompt": body.format(shared),
                "writes_to": [str(shared)],
                "on_conflict": "queue",
            }
            for n in range(5)
        )
    )
    wait_for("5 ends", lambda: len(box.results()) == 5)
    assert shared.read_text().split() == [f"t{n}" for n in range(5)]


@pytest.mark.row(65)
def test_a_wide_claim_is_not_overtaken_by_narrow_ones_that_come_later(box: RealBox, tmp_path: Path) -> None:
    """However many they are and whatever their policy; only who warns goes past, and says so."""
    order = tmp_path / "order"
    holder(box, tmp_path / "d/0", tmp_path / "go")
    say = f"echo $AGENTQ_TASK >> {order}; echo x"
    box.submit(task="wide", id="wide", prompt=say, writes_to=[f"{tmp_path}/d"], on_conflict="queue")
    for n in range(1, 6):
        box.submit(task=f"n{n}", id=f"n{n}", prompt=say, writes_to=[f"{tmp_path}/d/{n}"], on_conflict="queue")
    refused = box.submit(task="r", prompt=say, writes_to=[f"{tmp_path}/d/r"])
    assert [each["task_id"] for each in refused["conflicts"]] == ["wide"]
    box.submit(task="warns", id="warns", prompt=say, writes_to=[f"{tmp_path}/d/w"], on_conflict="warn")
    assert box.result("warns")["status"] == "success"
    assert {box.show(f"n{n}")["state"] for n in range(1, 6)} == {"blocked"}
    (tmp_path / "go").touch()
    wait_for("all ends", lambda: len(box.results()) == 8)
    ran = order.read_text().split()
    assert ran[:2] == ["warns", "wide"]
    assert sorted(ran[2:]) == [f"n{n}" for n in range(1, 6)]


@pytest.mark.row(65)
def test_a_task_that_waits_for_a_place_says_for_whom(box: RealBox, tmp_path: Path) -> None:
    holder(box, tmp_path / "f", tmp_path / "go")
    box.append(
        {
            "task": "second",
            "id": "second",
            "prompt": "echo x",
            "writes_to": [f"{tmp_path}/f"],
            "on_conflict": "queue",
        }
    )
    shown = box.wait_state("second", "blocked")
    assert (shown["reason"], shown["waiting_for"]["reason"]) == ("write_conflict", "write_conflict")
    assert "holder" in shown["detail"]
    (tmp_path / "go").touch()
    assert box.result("second")["status"] == "success"


@pytest.mark.row(64, 65, 80)
def test_a_retry_claims_anew_and_meets_its_policy(box: RealBox, tmp_path: Path) -> None:
    for policy in ("refuse", "queue"):
        box.submit(task=policy, id=policy, prompt="exit 1", writes_to=[f"{tmp_path}/d/f"], on_conflict=policy)
        box.wait_state(policy, "finished")
    holder(box, tmp_path / "d", tmp_path / "go")
    done = box.ctl("retry", "--json", "refuse")
    assert (done.returncode, json.loads(done.stdout)["conflicts"][0]["task_id"]) == (75, "holder")
    assert box.show("refuse")["state"] == "finished"
    assert box.ctl("retry", "queue").returncode == 0
    shown = box.show("queue")
    assert (shown["state"], shown["reason"]) == ("blocked", "write_conflict")
    waits = box.ctl("retry", "refuse", "--on-conflict", "queue")
    assert waits.returncode == 0
    assert waits.stdout.startswith(b"refuse  blocked: waits for queue (queue), which writes ")
    (tmp_path / "go").touch()
    wait_for("its second end", lambda: len(box.show("queue")["attempts"]) == 2)
    wait_for("the end of the other", lambda: len(box.show("refuse")["attempts"]) == 2)


@pytest.mark.row(66)
def test_the_warn_policy_admits_both_and_alerts_once(box: RealBox, tmp_path: Path) -> None:
    holder(box, tmp_path / "f", tmp_path / "go")
    box.append({"task": "second", "prompt": "echo x", "writes_to": [f"{tmp_path}/f"], "on_conflict": "warn"})
    assert box.result("second")["status"] == "success"
    assert box.show("holder")["state"] == "running"
    assert len(wait_for("the alert", lambda: box.alerts("write_conflict"))) == 1


@pytest.mark.row(67)
@pytest.mark.parametrize(
    ("config", "states"),
    [
        ("{}", {"refused"}),
        ("writes: {on_conflict: queue}", {"blocked"}),
        ("writes: {on_conflict: warn}", {"success"}),
        ("writes: {on_conflict: warn}\nqueues: {default: {on_conflict: queue}}", {"blocked"}),
    ],
)
def test_the_policy_is_the_deployments_and_refuse_without_one(
    make_box: MakeBox, tmp_path: Path, config: str, states: set[str]
) -> None:
    box = make_box(config + "\n")
    holder(box, tmp_path / "f", tmp_path / "go")
    box.append({"task": "second", "id": "second", "prompt": "echo x", "writes_to": [f"{tmp_path}/f"]})
    shown = box.wait_state("second", "finished", "blocked")
    assert {shown["result"] or shown["state"]} == states


@pytest.mark.row(68, 73)
def test_claims_and_conflicts_can_be_looked_at(box: RealBox, tmp_path: Path) -> None:
    holder(box, tmp_path / "f", tmp_path / "go")
    for _ in range(3):
        box.api(
            "POST",
            "/v1/tasks",
            {"task": "second", "id": "second", "prompt": "echo x", "writes_to": [f"{tmp_path}/f"]},
        )
    (claim,) = box.ctl_json("writes")
    assert (claim["path"], claim["task_id"], claim["task"], claim["state"]) == (
        f"{tmp_path}/f",
        "holder",
        "holder",
        "running",
    )
    (conflict,) = box.ctl_json("writes", "conflicts")
    assert (conflict["task_id"], conflict["other_id"], conflict["path"], conflict["count"]) == (
        "second",
        "holder",
        f"{tmp_path}/f",
        3,
    )
    (tmp_path / "go").touch()
    box.result("holder")
    assert box.ctl_json("writes") == []


@pytest.mark.row(69)
@pytest.mark.parametrize(
    "end",
    ["success", "failed", "timeout", "cancelled", "lost", "spawn_failed", "no_work", "expired", "refused"],
)
def test_every_kind_of_end_releases_its_claim(box: RealBox, tmp_path: Path, end: str) -> None:
    more: dict[str, Any] = {
        "success": {"prompt": "echo x"},
        "failed": {"prompt": "exit 1"},
        "timeout": {"prompt": "sleep 300", "run_timeout": "100ms"},
        "cancelled": {"prompt": f"touch {tmp_path}/up; sleep 300"},
        "lost": {"prompt": f"touch {tmp_path}/up; sleep 300"},
        "spawn_failed": {"command": ["/no/such"]},
        "no_work": {"prompt": "true"},
        "expired": {"prompt": "true", "after": "failing", "expires_at": soon()},
        "refused": {"prompt": "true", "after": "failing"},
    }[end]
    box.submit(
        task="failing", id="failing", prompt=f"while ! [ -e {tmp_path}/fail ]; do sleep 0.02; done; exit 1"
    )
    box.submit(task="first", id="first", writes_to=[f"{tmp_path}/f"], kill_grace="100ms", **more)
    if end in {"cancelled", "lost"}:
        wait_for("its start", (tmp_path / "up").exists)
        box.kill_supervisor() if end == "lost" else box.api("POST", "/v1/tasks/first/cancel", {})
    if end == "refused":
        assert box.show("first")["state"] == "blocked"
        (tmp_path / "fail").touch()
    assert box.result("first")["status"] == end
    assert box.api("GET", "/v1/writes")[1]["claims"] == []
    answer = box.submit(task="second", id="second", prompt="echo x", writes_to=[f"{tmp_path}/f"])
    assert answer["duplicate"] is False
    assert box.result("second")["status"] == "success"


@pytest.mark.row(69)
def test_a_claim_is_held_through_backoff_and_over_a_restart(box: RealBox, tmp_path: Path) -> None:
    box.submit(
        task="first", id="first", prompt="exit 1", max_attempts=2, backoff=["1h"], writes_to=[f"{tmp_path}/f"]
    )
    box.wait_state("first", "retryable")
    box.kill()
    box.start()
    status, _ = box.api(
        "POST", "/v1/tasks", {"task": "second", "prompt": "echo x", "writes_to": [f"{tmp_path}/f"]}
    )
    assert status == 409


@pytest.mark.row(76)
def test_of_fifty_claims_at_once_one_wins(make_box: MakeBox, tmp_path: Path) -> None:
    box = make_box("queues: {default: {paused: true}}\n")
    statuses: list[int] = []

    def claim(n: int) -> None:
        task = {"task": f"t{n}", "prompt": "echo x", "writes_to": [f"{tmp_path}/f"]}
        statuses.append(box.api("POST", "/v1/tasks", task)[0])

    threads = [threading.Thread(target=claim, args=(n,)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [201] + [409] * 49


@pytest.mark.row(79)
@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        ("d/f", "d/../d/./f"),
        ("d", "d/f"),
        ("d/f", "d"),
        ("d/f", "link/f"),
        ("d/new", "link/new"),
        ("d/f", "//{w}///d/f/"),
        ("d/f", "d/back/d/f"),
        ("d/later/f", "ahead/f"),
        ("d", "link/**/x"),
        ("d/*.md", "d/a.md"),
        ("d/a.md", "d/*.md"),
        ("**/x", "d/e/x"),
    ],
)
def test_aliases_of_a_path_conflict(box: RealBox, tmp_path: Path, held: str, wanted: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "d")
    (tmp_path / "d/back").symlink_to("..")
    (tmp_path / "ahead").symlink_to("d/later")
    wanted = wanted.replace("{w}", str(tmp_path))
    holder(box, tmp_path / held, tmp_path / "go")
    task = {"task": "second", "prompt": "echo x", "workdir": str(tmp_path), "writes_to": [wanted]}
    assert box.api("POST", "/v1/tasks", task)[0] == 409


@pytest.mark.row(79)
@pytest.mark.parametrize(
    ("held", "wanted"),
    [("d", "d2"), ("d/a", "d/A"), ("d/a", "d/b"), ("d/*.md", "d/a.txt"), ("d/f", "d/f.bak")],
)
def test_neighbours_do_not_conflict(box: RealBox, tmp_path: Path, held: str, wanted: str) -> None:
    holder(box, tmp_path / held, tmp_path / "go")
    task = {"task": "second", "prompt": "echo x", "workdir": str(tmp_path), "writes_to": [wanted]}
    assert box.api("POST", "/v1/tasks", task)[0] == 201


@pytest.mark.row(65)
def test_tasks_related_by_after_do_not_conflict(box: RealBox, tmp_path: Path) -> None:
    holder(box, tmp_path / "f", tmp_path / "go")
    answer = box.submit(task="next", id="next", prompt="echo x", after="holder", writes_to=[f"{tmp_path}/f"])
    assert answer["state"] == "blocked"
    (tmp_path / "go").touch()
    assert box.result("next")["status"] == "success"


@pytest.mark.row(65)
def test_whoever_comes_after_through_others_waits_though_those_end_early(
    box: RealBox, tmp_path: Path
) -> None:
    holder(box, tmp_path / "f", tmp_path / "go")
    box.submit(task="between", id="between", prompt="echo x", after="holder")
    answer = box.submit(task="last", id="last", prompt="echo x", after="between", after_policy="any", writes_to=[f"{tmp_path}/f"])  # fmt: skip
    assert answer["state"] == "blocked"  # not refused: it comes after the holder
    box.api("POST", "/v1/tasks/between/cancel", {})
    assert box.wait_state("last", "blocked")["reason"] == "write_conflict"
    (tmp_path / "go").touch()
    assert box.result("last")["status"] == "success"


@pytest.mark.row(77)
def test_file_locks_are_neither_taken_nor_broken(box: RealBox, tmp_path: Path) -> None:
    shared = tmp_path / "f"
    with shared.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        box.append(
            {"task": "polite", "prompt": f"flock -n {shared} true || echo locked", "writes_to": [str(shared)]}
        )
        assert box.result("polite")["stdout_tail"] == "locked\n"


@pytest.mark.row(78)
def test_an_undeclared_write_is_not_stopped(box: RealBox, tmp_path: Path) -> None:
    holder(box, tmp_path / "f", tmp_path / "go")
    box.append({"task": "silent", "prompt": f"echo mine > {tmp_path}/f; echo x"})
    assert box.result("silent")["status"] == "success"
    assert (tmp_path / "f").read_text() == "mine\n"


@pytest.mark.row(71)
def test_a_claim_of_a_worker_that_dies_with_its_supervisor_comes_free(box: RealBox, tmp_path: Path) -> None:
    holder(box, tmp_path / "f", tmp_path / "go")
    box.kill()
    box.kill_supervisor()
    box.start()
    assert box.result("holder")["status"] == "lost"
    assert (
        box.api("POST", "/v1/tasks", {"task": "second", "prompt": "echo x", "writes_to": [f"{tmp_path}/f"]})[
            0
        ]
        == 201
    )


@pytest.mark.row(72)
def test_claims_survive_kills_of_the_daemon_while_they_are_made(make_box: MakeBox, tmp_path: Path) -> None:
    box = make_box("queues: {default: {paused: true}}\n")
    for n in range(6):
        box.append(
            *({"task": f"t{n}-{m}", "prompt": "echo x", "writes_to": [f"{tmp_path}/{n}"]} for m in range(3))
        )
        box.kill()
        box.start()
    wait_for("12 refusals", lambda: box.status()["results"]["refused"] == 12)
    claims = box.api("GET", "/v1/writes")[1]["claims"]
    assert sorted(claim["path"] for claim in claims) == [f"{tmp_path}/{n}" for n in range(6)]


@pytest.mark.row(70)
def test_a_claim_past_its_ttl_beside_a_live_worker_alerts_and_is_kept(box: RealBox, tmp_path: Path) -> None:
    holder(box, tmp_path / "f", tmp_path / "go", intent_ttl="200ms")
    (told,) = wait_for("the alert", lambda: box.alerts("claim_expired"), 3)
    assert (told["task"], f"{tmp_path}/f" in told["message"]) == ("holder", True)
    assert box.api("GET", "/v1/writes")[1]["claims"][0]["task_id"] == "holder"


@pytest.mark.row(79)
def test_what_a_person_typed_is_kept_where_the_workdir_says_from_where_it_counts(
    box: RealBox, tmp_path: Path
) -> None:
    (tmp_path / "repo").mkdir()
    held = ["--not-before", "2099-01-01T00:00:00Z", "echo x"]
    typed = ["--workdir", f"{tmp_path}/repo", "--writes", "../out/a", "--writes", "src"]
    assert box.ctl("submit", "--id", "typed", *typed, *held).returncode == 0
    assert box.show("typed")["declared"]["writes_to"] == ["../out/a", "src"]
    claims = box.ctl_json("writes")
    assert {(each["path"], each["given"]) for each in claims} == {(f"{tmp_path}/out/a", "../out/a"), (f"{tmp_path}/repo/src", "src")}  # fmt: skip
    assert box.ctl("submit", "--writes", f"{tmp_path}/repo/src/x", *held).returncode == 75
