"""Daemon, supervisor and workers die at every moment; what was accepted ends once, and what is known stays known."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import MakeBox
from realbox import RealBox, alive, wait_for

pytestmark = pytest.mark.real


def started(path: Path) -> int:
    return int(wait_for(f"{path.name}", lambda: path.exists() and path.read_text().strip()))


@pytest.mark.row(14, 29)
def test_a_worker_outlives_its_daemon_and_keeps_pid_output_and_status(box: RealBox, tmp_path: Path) -> None:
    prompt = f"echo $$ > {tmp_path}/pid; echo x >> {tmp_path}/runs; echo before; while ! [ -e {tmp_path}/go ]; do sleep 0.05; done; echo after; exit 7"
    box.append({"task": "lives", "id": "lives", "prompt": prompt})
    worker = started(tmp_path / "pid")
    for _ in range(3):
        box.kill()
        assert alive(worker)
        box.start()
        assert wait_for("its pid", lambda: box.wait_state("lives", "running")["pid"]) == worker
    (tmp_path / "go").touch()
    told = box.result("lives")
    assert (told["status"], told["exit_code"], told["stdout_tail"]) == ("failed", 7, "before\nafter\n")
    assert (tmp_path / "runs").read_text() == "x\n"
    assert [attempt["pid"] for attempt in box.show("lives")["attempts"]] == [worker]


@pytest.mark.row(14, 28)
def test_an_end_while_the_daemon_is_away_is_found_and_delivered(box: RealBox, tmp_path: Path) -> None:
    box.append(
        {
            "task": "ends",
            "prompt": f"echo $$ > {tmp_path}/pid; while ! [ -e {tmp_path}/go ]; do sleep 0.02; done; echo fin; exit 3",
        }
    )
    worker = started(tmp_path / "pid")
    box.kill()
    (tmp_path / "go").touch()
    wait_for("its end", lambda: not alive(worker))
    box.start()
    told = box.result("ends")
    assert (told["status"], told["exit_code"], told["stdout_tail"]) == ("failed", 3, "fin\n")


@pytest.mark.row(14)
def test_a_stop_of_the_daemon_leaves_workers_running(box: RealBox, tmp_path: Path) -> None:
    prompt = f"echo $$ > {tmp_path}/pid; while ! [ -e {tmp_path}/go ]; do sleep 0.05; done; echo x"
    box.append({"task": "lives", "prompt": prompt})
    worker = started(tmp_path / "pid")
    assert box.stop() == 0
    assert alive(worker)
    (tmp_path / "go").touch()
    box.start()
    assert box.result("lives")["status"] == "success"


@pytest.mark.row(14)
@pytest.mark.parametrize("on_lost", ["fail", "requeue", "hold"])
def test_a_worker_lost_with_its_supervisor_is_never_a_success_and_on_lost_says_what_follows(
    box: RealBox, tmp_path: Path, on_lost: str
) -> None:
    prompt = f"echo $$ > {tmp_path}/pid-$AGENTQ_ATTEMPT; [ $AGENTQ_ATTEMPT = 2 ] || sleep 300; echo second"
    box.append(
        {
            "task": "lost",
            "id": "lost",
            "prompt": prompt,
            "on_lost": on_lost,
            "kill_grace": "200ms",
            "backoff": "100ms",
        }
    )
    worker = started(tmp_path / "pid-1")
    box.kill_supervisor()
    wait_for("the alert", lambda: box.alerts("lost"))
    assert not alive(worker)
    first = box.show("lost")["attempts"][0]
    assert (first["result"], first["reason"]) == ("lost", "supervisor_lost")
    if on_lost == "fail":
        told = box.result("lost")
        assert (told["status"], told["reason"], told["exit_code"]) == ("lost", "supervisor_lost", None)
    elif on_lost == "requeue":
        assert box.result("lost")["stdout_tail"] == "second\n"
        assert len(box.show("lost")["attempts"]) == 2
    else:
        assert box.wait_state("lost", "held")["reason"] == "supervisor_lost"
        assert "lost" not in box.results()
        assert box.ctl("release", "lost").returncode == 0
        assert box.result("lost")["status"] == "success"


@pytest.mark.row(51, 52)
def test_what_a_lost_worker_has_left_and_handed_over_is_delivered(box: RealBox, tmp_path: Path) -> None:
    """Its whole box dies around it, after it has handed over a reply that no daemon has seen."""
    prompt = f"""
echo $$ > {tmp_path}/pid; echo hi; echo words >&2; echo part > rep.md
while [ ! -e {tmp_path}/go ]; do sleep 0.01; done
echo '{{"n":1}}' > .reply; mv .reply $AGENTQ_OUTBOX/reply.json; printf half > $AGENTQ_OUTBOX/half.txt
touch {tmp_path}/handed; sleep 300
"""
    box.append({"task": "loser", "id": "loser", "prompt": prompt, "kill_grace": "200ms"})
    worker = started(tmp_path / "pid")
    box.kill()
    (tmp_path / "go").touch()
    wait_for("the reply", (tmp_path / "handed").exists)
    box.kill_supervisor()
    os.kill(worker, signal.SIGKILL)
    box.start()
    told = box.result("loser")
    assert (told["status"], told["reason"]) == ("lost", "supervisor_lost")
    assert told["stdout_tail"] == "hi\n"
    assert told["artifacts"] == [
        {"path": "rep.md", "bytes": 5, "sha256": hashlib.sha256(b"part\n").hexdigest()}
    ]
    evidence = told["evidence"]
    assert (evidence["stdout_bytes"], evidence["stderr_bytes"], evidence["work_files"]) == (3, 6, 1)
    assert told["started_at"] is not None
    assert told["duration_s"] > 0
    assert [(line["key"], line["content"]) for line in box.entries("loser")] == [("reply.json", {"n": 1})]
    said = json.dumps(box.show("loser")["outbox"])
    assert "half.txt" in said, said
    assert [
        row["state"] for row in box.show("loser")["outbox"] if "incomplete" in str(row["last_error"])
    ] == ["dead"]


@pytest.mark.row(29, 14)
def test_worker_daemon_and_supervisor_killed_at_once_come_back_once(box: RealBox, tmp_path: Path) -> None:
    prompt = f"echo $$ > {tmp_path}/pid-$AGENTQ_ATTEMPT; [ $AGENTQ_ATTEMPT = 2 ] || sleep 300; echo second"
    box.append({"task": "all", "id": "all", "prompt": prompt, "on_lost": "requeue", "backoff": "50ms"})
    worker = started(tmp_path / "pid-1")
    box.kill()
    box.kill_supervisor()
    os.kill(worker, signal.SIGKILL)
    box.start()
    told = box.result("all")
    assert (told["status"], told["attempt"]) == ("success", 2)
    assert sorted(path.name for path in tmp_path.glob("pid-*")) == ["pid-1", "pid-2"]


@pytest.mark.row(29, 59)
def test_no_second_attempt_starts_while_a_process_of_the_first_is_alive(box: RealBox, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    prompt = f"""
exec 9> {lock}; flock -n 9 || {{ echo overlap > {tmp_path}/overlap; exit 9; }}
echo $$ > {tmp_path}/pid-$AGENTQ_ATTEMPT
[ $AGENTQ_ATTEMPT = 1 ] && {{ (trap '' TERM; setsid sleep 1.5); sleep 300; }}
echo second
"""
    box.append(
        {"task": "one", "prompt": prompt, "on_lost": "requeue", "kill_grace": "300ms", "backoff": ["1ms"]}
    )
    started(tmp_path / "pid-1")
    box.kill_supervisor()
    told = box.result("one")
    assert (told["status"], told["attempt"]) == ("success", 2)
    assert not (tmp_path / "overlap").exists()


@pytest.mark.row(11)
def test_a_supervisor_killed_while_it_starts_workers_leaves_no_half_folder_and_runs_none_twice(
    box: RealBox, tmp_path: Path
) -> None:
    draw = random.Random(11)
    for n in range(30):
        box.append(
            {
                "task": f"t{n}",
                "prompt": f"echo x >> {tmp_path}/$AGENTQ_TASK.$AGENTQ_ATTEMPT; echo ok",
                "on_lost": "requeue",
                "backoff": "10ms",
            }
        )
        if n % 5 == 4:
            wait_for("a supervisor", lambda: box.status()["supervisor"])
            time.sleep(draw.uniform(0, 0.05))  # the random moment itself
            box.kill_supervisor()
    wait_for("30 ends", lambda: len(box.results()) == 30)
    assert {line["status"] for line in box.results().values()} == {"success"}
    runs = list(tmp_path.glob("t*.*"))
    assert {path.read_text() for path in runs} == {"x\n"}
    assert not list(box.state.glob("tasks/*/.attempt-*"))
    for folder in box.state.glob("tasks/*/attempt-*"):
        assert {path.name for path in folder.iterdir()} >= {"started", "stdout", "stderr", "outbox", "work"}


@pytest.mark.row(11)
def test_the_half_folders_of_a_crash_are_cleared_away_and_never_run(make_box: MakeBox) -> None:
    box = make_box("queues: {default: {paused: true}}\n")
    box.submit(task="half", id="half", prompt="ls; echo ran")
    temporary, whole = box.state / "tasks/half/.attempt-1.tmp-dead", box.state / "tasks/half/attempt-1"
    for folder in (temporary, whole):  # as a kill before the rename, and one before `started`, leave them
        (folder / "work").mkdir(parents=True)
        (folder / "work" / "junk").write_text("of another life")
    box.config.write_text("{}\n")
    told = box.result("half")
    assert (told["status"], told["stdout_tail"]) == ("success", "ran\n")
    assert not temporary.exists()


@pytest.mark.row(11)
def test_an_attempt_that_somebody_has_started_before_is_never_run_again(
    make_box: MakeBox, tmp_path: Path
) -> None:
    box = make_box("queues: {default: {paused: true}}\n")
    box.submit(task="begun", id="begun", prompt=f"touch {tmp_path}/ran; echo x")
    folder = box.state / "tasks/begun/attempt-1"
    folder.mkdir(parents=True)
    (folder / "started").write_text('{"instance":"another","boot_id":"this","at":1}\n')
    box.config.write_text("{}\n")
    assert box.result("begun")["status"] == "lost"
    assert not (tmp_path / "ran").exists()


@pytest.mark.row(13)
def test_two_thousand_lines_survive_kills_of_the_reader_without_repeat_or_skip(make_box: MakeBox) -> None:
    box = make_box("queues: {default: {paused: true}}\n")
    script = """
import json, os, sys, time
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
for n in range(2000):
    os.write(fd, (json.dumps({"task": f"t{n}", "prompt": "p"}) + "\\n").encode())
    time.sleep(0.0005)
"""
    writer = subprocess.Popen([sys.executable, "-I", "-c", script, str(box.queue_file)])
    while writer.poll() is None:
        box.kill()
        box.start()
    wait_for("all lines", lambda: box.status()["tasks"]["queued"] >= 2000)
    wait_for("the rest", lambda: box.status()["intake"]["bytes_waiting"] == 0)
    names = [task["task"] for task in box.api("GET", "/v1/tasks?limit=10000")[1]["tasks"]]
    assert names[::-1] == [f"t{n}" for n in range(2000)]


@pytest.mark.row(28, 49, 22)
def test_results_survive_kills_of_the_daemon_and_none_is_doubled(box: RealBox, tmp_path: Path) -> None:
    for n in range(60):
        box.append(
            {
                "task": f"t{n}",
                "prompt": f"echo x >> {tmp_path}/t{n}; echo ok; echo r{n} > $AGENTQ_OUTBOX/reply",
            }
        )
        if n % 6 == 5:
            box.kill()
            box.start()
    wait_for("60 ends", lambda: len(box.results()) == 60)
    wait_for("60 replies", lambda: len(box.entries()) == 60)
    ids = [line["delivery_id"] for line in box.completions()]
    assert len(ids) == len(set(ids)) == 120
    assert [line["seq"] for line in box.completions()] == list(range(1, 121))
    assert {path.read_text() for path in tmp_path.glob("t*") if path.is_file()} == {"x\n"}
    assert box.ctl("audit", "verify").returncode == 0


@pytest.mark.row(28)
def test_a_result_that_was_written_but_not_yet_marked_is_read_back_and_not_doubled(make_box: MakeBox) -> None:
    box = make_box(start=False)
    box.append({"task": "one", "id": "one", "prompt": "echo x"})
    box.env = {"AGENTQD_FAILPOINT": "receiver_answered:kill"}
    box.start(wait=False)
    assert box.daemon is not None
    assert box.daemon.wait(30) == -signal.SIGKILL
    assert [line["name"] for line in box.completions()] == ["one"]
    box.daemon, box.env = None, {}
    box.start()
    box.append({"task": "two", "prompt": "echo x"})
    box.result("two")
    assert [(line["name"], line["seq"]) for line in box.completions()] == [("one", 1), ("two", 2)]
    wait_for("its mark", lambda: [row["state"] for row in box.show("one")["outbox"]] == ["delivered"])


@pytest.mark.row(32, 36)
def test_a_second_daemon_is_refused_with_the_pid_of_the_first(box: RealBox) -> None:
    command = [
        sys.executable,
        "-m",
        "agentqd.daemon",
        "--state-dir",
        str(box.state),
        "--runtime-dir",
        str(box.runtime),
    ]
    second = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert second.returncode == 1
    assert f"pid {box.daemon_pid()}" in second.stderr.decode()
    box.append({"task": "still", "prompt": "echo x"})
    assert box.result("still")["status"] == "success"


@pytest.mark.row(32)
def test_a_second_daemon_is_refused_even_when_the_lock_file_was_moved_away(box: RealBox) -> None:
    (box.state / "agentqd.lock").rename(box.state / "was.lock")  # whoever does this breaks the lock
    command = [
        sys.executable,
        "-m",
        "agentqd.daemon",
        "--state-dir",
        str(box.state),
        "--runtime-dir",
        str(box.runtime),
    ]
    second = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert second.returncode == 1
    box.append({"task": "still", "prompt": "echo x"})
    assert box.result("still")["status"] == "success"


@pytest.mark.row(33, 34)
def test_a_large_entry_is_synced_renamed_and_its_folder_synced_before_the_journal_commits_it(
    box: RealBox, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    words = [
        "strace",
        "-f",
        "-y",
        "-s",
        "200",
        "-o",
        str(trace),
        "-e",
        "trace=fsync,fdatasync,rename,renameat2",
    ]
    with subprocess.Popen([*words, "-p", str(box.daemon_pid())], stderr=subprocess.PIPE) as strace:
        assert strace.stderr is not None
        strace.stderr.readline()  # attached
        box.append(
            {
                "task": "big",
                "prompt": "head -c 400000 /dev/zero | tr '\\0' x > $AGENTQ_OUTBOX/.t; mv $AGENTQ_OUTBOX/.t $AGENTQ_OUTBOX/big; sleep 0.3; echo x",
            }
        )
        (entry,) = wait_for("the entry", lambda: box.entries("big"))
        box.until_pullable(1)  # its line is to be seen before it is synced
        strace.send_signal(signal.SIGINT)
    calls = trace.read_text().splitlines()

    def first(pattern: str, after: int = -1) -> int:
        return next(n for n, line in enumerate(calls) if n > after and re.search(pattern, line))

    synced = first(r"fsync\(\d+<[^>]*/blobs/\.tmp-")
    renamed = first(r"rename\w*\(.*/blobs/\.tmp-", synced)
    folder = first(r"fsync\(\d+<[^>]*/blobs>", renamed)
    committed = first(r"fdatasync\(\d+<[^>]*journal\.db-wal", folder)
    told = first(r"fdatasync\(\d+<[^>]*completions\.jsonl", committed)
    assert synced < renamed < folder < committed < told
    assert Path(entry["path"]).stat().st_size == 400_000


@pytest.mark.row(34)
def test_whoever_sees_a_result_sees_all_of_it(box: RealBox) -> None:
    body = "for n in $(seq 200); do echo line $n of it; done; seq 5000 > out.txt"
    box.append(*({"task": f"t{n}", "id": f"t{n}", "prompt": body} for n in range(20)))
    looked: set[str] = set()

    def look() -> bool:
        for task in box.api("GET", "/v1/tasks?state=finished")[1]["tasks"]:
            if task["id"] not in looked:
                looked.add(task["id"])
                shown = box.show(task["id"])
                folder = Path(shown["attempts"][0]["folder"])
                assert (folder / "stdout").stat().st_size == shown["attempts"][0]["stdout_bytes"] == 2892
                assert (folder / "work" / "out.txt").stat().st_size == 23893
                assert [row["type"] for row in shown["outbox"]] == ["agentq.task.success"]
        return len(looked) == 20

    wait_for("20 results, each whole when first seen", look)
    for line in box.results().values():
        assert line["artifacts"][0]["bytes"] == 23893


@pytest.mark.row(35)
def test_a_network_file_system_is_refused_with_a_clear_message(tmp_path: Path) -> None:
    script = """
import sys
from agentqd.daemon import folders, main
folders.file_system_of = lambda path: "nfs4"
sys.exit(main.main(sys.argv[1:]))
"""
    command = [
        sys.executable,
        "-c",
        script,
        "--state-dir",
        str(tmp_path / "state"),
        "--runtime-dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, capture_output=True, timeout=10, check=False)
    assert done.returncode == 1
    assert "network file system (nfs4)" in done.stderr.decode()
    assert not (tmp_path / "state" / "journal.db").exists()


@pytest.mark.row(16, 4)
def test_what_waits_outlives_both_sides(make_box: MakeBox) -> None:
    box = make_box()
    box.api("POST", "/v1/queues/default/pause", {})
    box.append(*({"task": f"t{n}", "prompt": "echo x"} for n in range(5)))
    wait_for("5 tasks", lambda: box.status()["tasks"]["queued"] == 5)
    box.kill()
    box.start()
    assert box.status()["tasks"]["queued"] == 5
    assert box.status()["queues"]["default"]["paused"] is True
    box.api("POST", "/v1/queues/default/resume", {})
    wait_for("5 ends", lambda: len(box.results()) == 5)
    box.kill()
    box.start()
    box.until_pullable(5)
    assert [json.loads(line)["name"] for line in box.ctl("pull").stdout.splitlines()] == [
        line["name"] for line in box.completions()
    ]


@pytest.mark.row(14)
def test_stop_workers_ends_them_too(make_box: MakeBox, tmp_path: Path) -> None:
    box = make_box(start=False)
    command = [
        sys.executable,
        "-m",
        "agentqd.daemon",
        "--stop-workers",
        "--state-dir",
        str(box.state),
        "--runtime-dir",
        str(box.runtime),
    ]
    with box.log.open("ab") as log:
        box.daemon = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    box.append(
        {
            "task": "ended",
            "id": "ended",
            "prompt": f"echo $$ > {tmp_path}/pid; sleep 300",
            "kill_grace": "200ms",
        }
    )
    worker, supervisor = started(tmp_path / "pid"), box.supervisor_pid()
    assert box.stop() == 0
    assert not alive(worker)
    wait_for("the supervisor's leave", lambda: not alive(supervisor))
    box.start()
    assert box.result("ended")["status"] == "lost"
    assert box.result("ended")["reason"] == "shutdown"
