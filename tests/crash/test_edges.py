"""Every numbered edge of docs/crash-states.md: the process ends (or stops) exactly there, and the next start does what the last column says.

An edge that a system call marks is hit by strace on that call; the others are failpoints (agentqd/system/failpoints.py); what the
worker or the writer does itself, it does here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeBox
from realbox import RealBox, alive, wait_for

from crash.checker import Side, check_all, check_once, query, wait_until_at_rest
from crash.inject import Strace, kill_at, threads_of
from crash.processes import (
    connected,
    daemon_died,
    holders,
    is_stopped,
    reap_killed,
    start_supervisor,
    without_a_stock,
)

pytestmark = [pytest.mark.real, pytest.mark.root]

WORK = "sleep 0.1"
JOURNAL_THREAD = 2  # main, an executor's, journal, ...


class Edge:
    """A box, its worker's side effects, and the names of the failpoints it runs with."""

    def __init__(self, make_box: MakeBox, tmp_path: Path) -> None:
        self.box = make_box(start=False)
        self.side = Side(tmp_path / "side")
        self._supervisors: list[subprocess.Popen[bytes]] = []

    def start(self, failpoint: str | None = None) -> None:
        self.box.env = {"AGENTQD_FAILPOINT": failpoint} if failpoint else {}
        self.box.start()

    def supervisor(self, failpoint: str | None = None) -> subprocess.Popen[bytes]:
        """One of its own, so that a failpoint is in it and not in the one that follows it."""
        self.box.env = {"AGENTQD_FAILPOINT": failpoint} if failpoint else {}
        self._supervisors.append(start_supervisor(self.box))
        self.box.env = {}
        return self._supervisors[-1]

    def end(self) -> None:
        for child in self._supervisors:
            child.kill()
            child.wait()

    def task(self, rest: str = WORK, **more: Any) -> dict[str, Any]:
        return {"task": "t", "id": "t", "prompt": self.side.script("t", rest), **more}

    def killed(self) -> None:
        """The daemon has died at its failpoint. It is started again without one."""
        assert self.box.daemon is not None
        wait_for(
            "the daemon's death", lambda: self.box.daemon is not None and self.box.daemon.poll() is not None
        )
        reap_killed(self.box)
        self.start()

    def ends_well(self) -> list[dict[str, Any]]:
        """One success, one entry, one run, nothing left over."""
        wait_until_at_rest(self.box, "t")
        lines = check_all(self.box)
        check_once(self.box, self.side, "t", lines)
        self.side.check()
        return lines

    def ends(self) -> dict[str, Any]:
        """The one result, whatever it is."""
        wait_until_at_rest(self.box, "t")
        found = [line for line in check_all(self.box) if line["name"] == "t" and "status" in line]
        assert len(found) == 1, found
        self.side.check()
        return found[0]

    def event(self, name: str) -> list[dict[str, Any]]:
        """What the audit chain says under this name."""
        return [
            json.loads(row[0])
            for row in query(self.box, "SELECT data FROM events WHERE event = ? ORDER BY seq", name)
        ]

    def state(self) -> str | None:
        rows = query(self.box, "SELECT state FROM tasks WHERE id = 't'")
        return rows[0][0] if rows else None

    def folder(self, attempt: int = 1) -> Path:
        return self.box.attempt_folder("t", attempt)


@pytest.fixture
def edge(make_box: MakeBox, tmp_path: Path) -> Any:
    made = Edge(make_box, tmp_path)
    yield made
    made.end()


# From the line to the claim.


def test_edge_01_part_of_a_line_waits_for_its_newline_across_a_kill(edge: Edge) -> None:
    edge.start()
    line = json.dumps(edge.task()).encode() + b"\n"
    with edge.box.queue_file.open("ab", buffering=0) as writer:
        writer.write(line[:40])
        edge.box.kill()
        edge.start()
        assert query(edge.box, "SELECT count(*) FROM tasks") == [(0,)]
        writer.write(line[40:])
    edge.ends_well()
    assert edge.box.rejected() == []


def test_edge_02_a_line_that_nobody_read_is_read_at_the_next_start(edge: Edge) -> None:
    edge.start()
    edge.box.kill()
    edge.box.append(edge.task())
    edge.start()
    edge.ends_well()


def test_edge_02_a_line_appended_to_a_stopped_daemon_that_is_then_killed(edge: Edge) -> None:
    edge.start()
    os.kill(edge.box.daemon_pid(), signal.SIGSTOP)
    edge.box.append(edge.task())
    edge.box.kill()
    edge.start()
    edge.ends_well()


def test_edge_03_lines_read_and_decided_but_not_committed_are_read_again(edge: Edge) -> None:
    edge.start("lines_decided:kill")
    edge.box.append(edge.task())
    edge.killed()
    edge.ends_well()
    assert len(edge.event("accepted")) == 1


def has_journal_thread(pid: int) -> bool:
    return len(threads_of(pid)) > JOURNAL_THREAD


@pytest.mark.parametrize("call", ["pwrite64", "fdatasync"])
def test_edge_04_killed_at_the_writes_of_the_first_commits(edge: Edge, call: str) -> None:
    """The tasks and the position are one commit: neither is there without the other. (A commit counts, after a SIGKILL,
    from its last write on; fdatasync is for the power cut.)"""
    for when in range(2, 32, 4) if call == "pwrite64" else (1, 2):
        edge.start()
        pid = edge.box.daemon_pid()
        wait_for("a connected supervisor", lambda: connected(edge.box))
        wait_for("the threads", partial(has_journal_thread, pid))
        strace = kill_at([threads_of(pid)[JOURNAL_THREAD]], call, when, edge.box.folder / "kill")
        name = f"t{when}"
        edge.box.append({"task": name, "id": name, "prompt": edge.side.script(name, WORK)})
        edge.killed()
        strace.wait()
        wait_until_at_rest(edge.box, name)
        check_once(edge.box, edge.side, name, check_all(edge.box))
        edge.box.kill()


def test_edge_04_the_same_lines_again_are_duplicates_not_tasks(edge: Edge) -> None:
    """What dedupe rests on where a position was lost: the queue file is put back as it was, on another inode."""
    edge.start()
    edge.box.append(edge.task())
    edge.ends_well()
    edge.box.kill()
    content = edge.box.queue_file.read_bytes()
    again = edge.box.queue_file.with_suffix(".again")
    again.write_bytes(b"\n" + content)
    again.rename(edge.box.queue_file)
    edge.start()
    wait_for("the duplicate", lambda: edge.event("duplicate_submitted"))
    edge.ends_well()
    assert edge.box.rejected() == []


def test_edge_05_a_queued_task_is_claimed_after_a_kill(edge: Edge) -> None:
    """Queued behind another one, which ends while the daemon is away."""
    edge.box.config.write_text("max_workers: 1\n")
    edge.start()
    edge.box.append({"task": "first", "id": "first", "prompt": "while [ ! -e go ]; do sleep 0.02; done"})
    wait_for("the first to run", lambda: query(edge.box, "SELECT 1 FROM attempts WHERE pid IS NOT NULL"))
    edge.box.append(edge.task())
    wait_for("the second to wait", lambda: edge.state() == "queued")
    edge.box.kill()
    first = edge.box.attempt_folder("first")
    (first / "work" / "go").touch()
    wait_for("the first's end", (first / "exit.json").exists)
    edge.start()
    edge.ends_well()


def test_edge_06_a_durable_claim_that_was_not_sent_is_sent_again(edge: Edge) -> None:
    edge.supervisor()
    edge.start("claimed:kill")
    wait_for("a connected supervisor", lambda: connected(edge.box))
    edge.box.append(edge.task())
    edge.killed()
    edge.ends_well()
    assert edge.box.events("reconciled")[-1]["sent_again"] == 1


def test_edge_06_a_claim_that_was_not_sent_and_its_supervisor_gone_is_withdrawn(edge: Edge) -> None:
    child = edge.supervisor()
    edge.start("claimed:kill")
    wait_for("a connected supervisor", lambda: connected(edge.box))
    edge.box.append(edge.task())
    wait_for("the daemon's death", lambda: edge.box.daemon is not None and edge.box.daemon.poll() is not None)
    child.kill()
    child.wait()
    edge.killed()
    edge.ends_well()
    assert edge.box.events("reconciled")[-1]["withdrawn"] == 1


# The attempt.


def supervisor_dies_at(edge: Edge, failpoint: str) -> None:
    child = edge.supervisor(f"{failpoint}:kill")
    edge.start()
    wait_for("a connected supervisor", lambda: connected(edge.box))
    edge.box.append(edge.task(on_lost="fail"))
    assert child.wait(30) == -signal.SIGKILL


def supervisor_dies_at_call(edge: Edge, call: str, when: int, **more: Any) -> None:
    child = edge.supervisor()
    edge.start()
    wait_for("a connected supervisor", lambda: connected(edge.box))
    strace = kill_at([child.pid], call, when, edge.box.folder / "kill")
    edge.box.append(edge.task(**more))
    assert child.wait(30) == -signal.SIGKILL
    strace.wait()


def is_withdrawn_and_made_anew(edge: Edge) -> None:
    edge.ends_well()
    assert len(edge.event("claim_withdrawn")) == 1


def test_edge_07_a_run_that_was_received_and_not_begun_never_ran(edge: Edge) -> None:
    supervisor_dies_at(edge, "run_received")
    is_withdrawn_and_made_anew(edge)


@pytest.mark.parametrize("when", [2, 3, 4])
def test_edge_07_a_temporary_folder_is_never_run_and_does_not_stay(edge: Edge, when: int) -> None:
    """mkdirat: the task's folder, the temporary one, outbox, work."""
    without_a_stock(edge.box)
    supervisor_dies_at_call(edge, "mkdirat", when)
    is_withdrawn_and_made_anew(edge)


def test_edge_08_a_complete_temporary_folder_is_not_an_attempt(edge: Edge) -> None:
    without_a_stock(edge.box)
    supervisor_dies_at_call(edge, "renameat", 1)
    is_withdrawn_and_made_anew(edge)


def test_edge_08_a_folder_from_the_stock_that_was_not_renamed_is_not_an_attempt(edge: Edge) -> None:
    supervisor_dies_at_call(edge, "renameat", 1)
    is_withdrawn_and_made_anew(edge)


def test_edge_08_a_held_run_dies_with_its_connection(edge: Edge) -> None:
    """The daemon dies after the commit, with the folder made ready and no `Go` sent; its Run comes again, without hold."""
    edge.supervisor()
    edge.start("claimed:pause")
    wait_for("a connected supervisor", lambda: connected(edge.box))
    edge.box.append(edge.task())
    wait_for("the folder", edge.folder().exists)
    pid = edge.box.daemon_pid()
    wait_for("the pause", lambda: is_stopped(pid))
    assert not (edge.folder() / "started").exists()
    assert edge.side.runs("t") == []
    edge.box.kill()
    edge.start()
    edge.ends_well()
    assert edge.box.events("reconciled")[-1]["sent_again"] == 1


def test_edge_08_a_run_that_a_leaving_supervisor_holds_is_handed_back(edge: Edge) -> None:
    """It is claimed for one that is told to stop and waits for a stubborn worker: the next one runs it."""
    edge.start()
    wait_for("a connected supervisor", lambda: connected(edge.box))
    edge.box.append(
        {
            "task": "stubborn",
            "prompt": "trap '' TERM; echo x; touch here; while :; do sleep 0.05; done",
            "kill_grace": "1s",
        }
    )
    wait_for("the stubborn one", lambda: list(edge.box.state.glob("tasks/*/attempt-1/work/here")))
    os.kill(edge.box.supervisor_pid(), signal.SIGTERM)
    wait_for("it to be ended", lambda: query(edge.box, "SELECT 1 FROM tasks WHERE state = 'stopping'"))
    edge.box.append(edge.task())
    edge.ends_well()


def test_edge_09_a_whole_folder_without_started_never_ran(edge: Edge) -> None:
    supervisor_dies_at(edge, "folder_made")
    is_withdrawn_and_made_anew(edge)


def test_edge_09_started_is_made_once_whoever_tries(edge: Edge) -> None:
    """`started` appears between the folder and our own: another one has it, and we do not run."""
    child = edge.supervisor("folder_made:pause")
    edge.start()
    wait_for("a connected supervisor", lambda: connected(edge.box))
    edge.box.append(edge.task())
    wait_for("the folder", lambda: edge.folder().exists())
    wait_for("the pause", lambda: is_stopped(child.pid))
    (edge.folder() / "started").write_text("another\n")
    os.kill(child.pid, signal.SIGCONT)
    assert edge.ends()["status"] != "success"
    assert edge.side.runs("t") == []


@pytest.mark.parametrize("call", [None, "clone3"])
def test_edge_10_started_without_a_worker_is_lost_never_run_again(edge: Edge, call: str | None) -> None:
    if call is None:
        supervisor_dies_at(edge, "started_made")
    else:
        supervisor_dies_at_call(edge, call, 1)
    result = edge.ends()
    assert (result["status"], result["reason"]) == ("lost", "supervisor_lost")
    assert edge.side.runs("t") == []


def test_edge_11_a_worker_does_not_notice_the_death_of_its_daemon(edge: Edge) -> None:
    edge.start()
    edge.box.append(edge.task("while [ ! -e go ]; do sleep 0.02; done"))
    wait_for("the worker", lambda: edge.side.runs("t"))
    wait_for(
        "its pid in the journal", lambda: query(edge.box, "SELECT pid FROM attempts WHERE pid IS NOT NULL")
    )
    (pid,) = query(edge.box, "SELECT pid FROM attempts")[0]
    edge.box.kill()
    assert alive(pid)
    edge.start()
    wait_for("the adoption", lambda: any(event["adopted"] for event in edge.box.events("reconciled")))
    assert alive(pid)
    (edge.folder() / "work" / "go").touch()
    wait_until_at_rest(edge.box, "t")
    assert query(edge.box, "SELECT pid, result FROM attempts") == [(pid, "success")]


def test_edge_11_a_worker_that_ends_while_the_daemon_is_away_keeps_its_true_end(edge: Edge) -> None:
    edge.start()
    edge.box.append(edge.task("while [ ! -e go ]; do sleep 0.02; done; rm go; exit 7"))
    wait_for("the worker", lambda: edge.side.runs("t"))
    edge.box.kill()
    (edge.folder() / "work" / "go").touch()
    wait_for("its end", (edge.folder() / "exit.json").exists)
    edge.start()
    result = edge.ends()
    assert (result["status"], result["exit_code"]) == ("failed", 7)


def test_edge_11_a_worker_whose_supervisor_died_is_ended_and_lost(edge: Edge) -> None:
    edge.start()
    edge.box.append(edge.task("setsid sleep 60 & sleep 60"))
    wait_for("the worker", lambda: edge.side.runs("t"))
    edge.box.kill_supervisor()
    result = edge.ends()
    assert (result["status"], result["reason"]) == ("lost", "supervisor_lost")
    assert not holders(edge.side.folder / "lock-t")


def test_edge_11_both_die_and_the_worker_is_never_doubled(edge: Edge) -> None:
    edge.start()
    edge.box.append(
        edge.task(
            "trap '' TERM; sleep 60 & sleep 60",
            on_lost="requeue",
            backoff="50ms",
            run_timeout="400ms",
            kill_grace="0.1s",
        )
    )
    wait_for("the worker", lambda: edge.side.runs("t"))
    edge.box.kill()
    edge.box.kill_supervisor()
    edge.start()
    wait_for("the second run", lambda: len(edge.side.runs("t")) == 2)
    result = edge.ends()
    assert (result["status"], result["attempt"]) == ("timeout", 2)
    assert edge.side.runs("t") == [1, 2]


def test_edge_12_a_zombie_that_nobody_waited_for_is_lost_not_success(edge: Edge) -> None:
    supervisor_dies_at_call(edge, "wait4", 1)
    assert edge.ends()["status"] == "lost"
    assert edge.side.runs("t") == [1]


def test_edge_13_an_end_that_was_not_written_is_lost(edge: Edge) -> None:
    """renameat: the attempt's folder, then exit.json."""
    supervisor_dies_at_call(edge, "renameat", 2)
    assert edge.ends()["status"] == "lost"
    assert (edge.folder() / ".exit.json.tmp").exists()
    assert not (edge.folder() / "exit.json").exists()


def test_edge_13_exit_json_is_written_only_when_the_whole_tree_is_gone(edge: Edge) -> None:
    """The supervisor is held up in the rename to exit.json: nothing of the tree may live then."""
    edge.start()
    wait_for("a connected supervisor", lambda: connected(edge.box))
    slow = ["-e", "trace=renameat", "-e", "inject=renameat:delay_enter=500ms:when=2"]
    strace = Strace([edge.box.supervisor_pid()], slow, edge.box.folder / "slow")
    edge.box.append(
        edge.task(
            "(trap '' TERM; while :; do sleep 0.05; done) & setsid sh -c 'trap \"\" TERM; sleep 5' & exit 0"
        )
    )
    wait_for("the worker", lambda: edge.side.runs("t"))
    wait_for("the temporary file", (edge.folder() / ".exit.json.tmp").exists)
    living = holders(edge.side.folder / "lock-t")
    assert not (edge.folder() / "exit.json").exists(), "too late to prove anything"
    assert not living, "exit.json was on its way while processes of the tree lived"
    result = edge.ends()
    strace.detach()
    assert result["evidence"]["left_behind"]


def test_edge_14_an_end_on_disk_that_was_not_told_is_read_from_disk(edge: Edge) -> None:
    """sendto: Running, then Exited."""
    supervisor_dies_at_call(edge, "sendto", 2)
    assert (edge.folder() / "exit.json").exists()
    edge.ends_well()
    assert edge.box.events("reconciled")[-1]["ended"] == 1


# What a worker hands over before it ends.


def test_edge_15_a_file_that_is_still_written_is_not_taken(edge: Edge) -> None:
    edge.start()
    script = "exec 8> $AGENTQ_OUTBOX/slow.json; printf '{\"a\"' >&8; touch here; while [ ! -e go ]; do sleep 0.02; done; printf ': 1}' >&8; exec 8>&-"
    edge.box.append(edge.task(script))
    wait_for("the half file", (edge.folder() / "work" / "here").exists)
    edge.box.kill()
    edge.start()
    wait_for("the adoption", lambda: any(event["adopted"] for event in edge.box.events("reconciled")))
    wait_for("the other entry", lambda: edge.box.entries("t"))
    assert [line["key"] for line in edge.box.entries("t")] == ["entry.json"]
    (edge.folder() / "work" / "go").touch()
    wait_until_at_rest(edge.box, "t")
    entries = {line["key"]: line["content"] for line in edge.box.entries("t")}
    assert entries == {"entry.json": {"n": 1}, "slow.json": {"a": 1}}


def test_edge_16_a_file_handed_over_while_the_daemon_was_away_is_taken_at_its_start(edge: Edge) -> None:
    edge.start()
    wait_for("a connected supervisor", lambda: connected(edge.box))
    os.kill(edge.box.daemon_pid(), signal.SIGSTOP)
    edge.box.append(edge.task())
    os.kill(edge.box.daemon_pid(), signal.SIGCONT)
    wait_for("the worker", lambda: edge.side.runs("t"))
    edge.box.kill()
    wait_for("the end", (edge.folder() / "exit.json").exists)
    edge.start()
    edge.ends_well()


def test_edge_17_an_entry_that_was_read_and_not_committed_is_taken_again(edge: Edge) -> None:
    edge.start("handover_read:kill")
    edge.box.append(edge.task("while [ ! -e go ]; do sleep 0.02; done; rm go"))
    edge.killed()
    wait_for("the entry", lambda: edge.box.entries("t"))
    assert edge.state() == "running", "it was taken while its worker lived"
    edge.box.kill()
    edge.start()
    (edge.folder() / "work" / "go").touch()
    edge.ends_well()


# From the end to the delivery.


@pytest.mark.parametrize("name", ["end_received", "evidence_durable"])
def test_edge_18_evidence_in_memory_is_read_again(edge: Edge, name: str) -> None:
    edge.start(f"{name}:kill")
    edge.box.append(edge.task())
    edge.killed()
    edge.ends_well()


@pytest.mark.parametrize("supervisor_too", [False, True])
def test_edge_19_an_end_that_was_not_committed_is_taken_again(edge: Edge, supervisor_too: bool) -> None:
    edge.start("evidence_durable:kill")
    edge.box.append(edge.task())
    assert edge.box.daemon is not None
    wait_for("the daemon's death", lambda: edge.box.daemon is not None and edge.box.daemon.poll() is not None)
    assert edge.state() == "running"
    if supervisor_too:
        edge.box.kill_supervisor()
    edge.killed()
    edge.ends_well()


def test_edge_20_an_end_that_was_not_forgotten_is_not_recorded_twice(edge: Edge) -> None:
    edge.supervisor()
    edge.start("end_recorded:kill")
    wait_for("a connected supervisor", lambda: connected(edge.box))
    edge.box.append(edge.task())
    edge.killed()
    edge.ends_well()
    assert len(edge.event("finished")) == 1


@pytest.mark.parametrize("name", ["send_begun", "lines_written", "receiver_answered"])
def test_edges_21_to_23_a_result_is_in_completions_once(edge: Edge, name: str) -> None:
    """Not sent; written, not synced; acknowledged, not marked."""
    edge.start(f"{name}:kill")
    edge.box.append(edge.task())
    edge.killed()
    edge.ends_well()
    assert edge.box.events("alert") == []


def test_edge_22_a_torn_line_is_cut_and_sent_again_under_its_id(edge: Edge) -> None:
    """The page cache of a killed machine, made by hand: half of the result's line is in the file."""
    edge.start("lines_written:kill")
    edge.box.append({"task": "t", "id": "t", "prompt": "echo hello; echo made > made"})
    assert edge.box.daemon is not None
    wait_for("the daemon's death", lambda: edge.box.daemon is not None and edge.box.daemon.poll() is not None)
    path = edge.box.state / "completions.jsonl"
    whole = path.read_bytes()
    assert whole.endswith(b"\n")
    assert whole.count(b"\n") == 1
    os.truncate(path, len(whole) // 2)
    edge.killed()
    wait_until_at_rest(edge.box, "t")
    check_all(edge.box)
    assert path.read_bytes() == whole, "the same bytes, once"


def test_edge_23_another_sink_gets_the_same_id_again(make_box: MakeBox, tmp_path: Path) -> None:
    """At least once, with an id that does not change: the command ran, its word was not recorded."""
    got = tmp_path / "got"
    config = f"sinks: {{shout: {{type: command, command: [sh, -c, 'echo $AGENTQ_DELIVERY_ID >> {got}']}}}}\ndefaults: {{deliver_to: [shout]}}\n"
    box = make_box(config, start=False)
    box.env = {"AGENTQD_FAILPOINT": "receiver_answered:kill"}
    box.start()
    box.append({"task": "t", "id": "t", "prompt": "echo hello"})
    while (
        not got.exists()
    ):  # it dies for `completions` too; that line is read back, and the command's is next
        wait_for("the daemon's death", lambda: daemon_died(box))
        reap_killed(box)
        box.start(wait=False)
    box.kill()
    box.env = {}
    box.start()
    wait_until_at_rest(box, "t")
    ids = got.read_text().split()
    assert len(ids) >= 2
    assert len(set(ids)) == 1, ids
    check_all(box)


def test_edge_24_what_a_consumer_did_not_acknowledge_is_pulled_again(edge: Edge) -> None:
    edge.start()
    edge.box.append(edge.task())
    edge.ends_well()
    first = pull(edge.box, acknowledge=False)
    edge.box.kill()
    edge.start()
    again = pull(edge.box, acknowledge=False)
    assert again == first
    assert len(again) == 2
    assert pull(edge.box, acknowledge=True) == first
    edge.box.kill()
    edge.start()
    assert pull(edge.box, acknowledge=False) == []


def pull(box: RealBox, *, acknowledge: bool) -> list[str]:
    """The delivery ids that the default consumer has not acknowledged."""
    status, answer = box.api("GET", "/v1/completions?consumer=default")
    assert status == 200, answer
    lines = answer["rows"]
    if acknowledge:
        status, answer = box.api("POST", "/v1/consumers/default/ack", {"seq": lines[-1]["seq"]})
        assert status == 200, answer
    return [line["delivery_id"] for line in lines]


# A stop is not a death.


@pytest.mark.parametrize("who", ["daemon", "supervisor", "both"])
def test_a_stopped_process_goes_on_where_it_was(edge: Edge, who: str) -> None:
    edge.start()
    wait_for("a connected supervisor", lambda: connected(edge.box))
    edge.box.append(edge.task("sleep 0.3"))
    wait_for("the worker", lambda: edge.side.runs("t"))
    pids = {"daemon": [edge.box.daemon_pid()], "supervisor": [edge.box.supervisor_pid()]}
    pids["both"] = pids["daemon"] + pids["supervisor"]
    for pid in pids[who]:
        os.kill(pid, signal.SIGSTOP)
    wait_for("the worker's end", lambda: not holders(edge.side.folder / "lock-t"))
    for pid in pids[who]:
        os.kill(pid, signal.SIGCONT)
    edge.ends_well()


def test_a_stopped_daemon_that_is_replaced_can_write_nothing(edge: Edge) -> None:
    """Paused with an end in hand; its lock is taken from it by hand, and a second one takes over: the epoch guards."""
    edge.start("evidence_durable:pause")
    edge.box.append(edge.task())
    old = edge.box.daemon
    assert old is not None
    wait_for("the pause", lambda: is_stopped(old.pid))
    (edge.box.state / "agentqd.lock").unlink()
    (edge.box.runtime / "agentqd.sock").unlink()
    edge.box.daemon = None
    edge.start()
    edge.ends_well()
    os.kill(old.pid, signal.SIGCONT)
    try:
        wait_for("its failure", lambda: edge.box.events("journal_failed"))
        edge.ends_well()
    finally:
        old.kill()
        old.wait()
