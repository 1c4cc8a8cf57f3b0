"""The order of system calls in one run, seen by strace: what must be durable before somebody is told (crash-states, "Order").

SIGKILL cannot tell a missing fdatasync from a present one, the kernel's cache outlives the process: this can.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import MakeBox
from realbox import RealBox

from crash.checker import wait_until_at_rest
from crash.inject import MUTATING, Strace, threads_of

pytestmark = [pytest.mark.real, pytest.mark.root]

_LINE = re.compile(r"^(?:(\d+)\s+)?(\d+\.\d+) (.*)$")
_ENDS = re.compile(r"<(\d+\.\d+)>$")


@dataclass
class Call:
    name: str
    text: str  # the arguments, with the paths behind descriptors
    began: float
    ended: float


def read_trace(lines: list[str]) -> list[Call]:
    """Calls by the time of their beginning; a call that was interrupted in the trace ends with its `resumed` line."""
    calls: list[Call] = []
    open_calls: dict[str, Call] = {}
    for line in lines:
        found = _LINE.match(line)
        if found is None:
            continue
        tid, at, rest = found[1] or "", float(found[2]), found[3]
        ends = _ENDS.search(rest)
        if rest.startswith("<... ") and tid in open_calls:
            call = open_calls.pop(tid)
            call.text += rest
            call.ended = at
            continue
        name, parenthesis, text = rest.partition("(")
        if not parenthesis or not name.replace("_", "").isalnum():
            continue
        call = Call(name, text, at, at + float(ends[1]) if ends else float("inf"))
        calls.append(call)
        if rest.endswith("<unfinished ...>"):
            open_calls[tid] = call
    return sorted(calls, key=lambda call: call.began)


class Seen:
    """One run, of daemon and supervisor."""

    def __init__(self, daemon: list[Call], supervisor: list[Call]) -> None:
        self.daemon = daemon
        self.supervisor = supervisor


def only(calls: list[Call], what: str, matches: Callable[[Call], bool]) -> Call:
    found = [call for call in calls if matches(call)]
    assert len(found) == 1, f"{what}: {len(found)} calls in\n" + "\n".join(
        f"{c.began:.6f} {c.name}({c.text[:160]}" for c in calls
    )
    return found[0]


def to_wal(call: Call) -> bool:
    return call.name == "pwrite64" and "journal.db-wal" in call.text[:300]


def syncs_wal(call: Call) -> bool:
    return call.name == "fdatasync" and "journal.db-wal" in call.text


def said(tag: str) -> Callable[[Call], bool]:
    """A message of the supervisor's protocol is sent."""
    return lambda call: (
        call.name in {"sendto", "write", "sendmsg"}
        and "<UNIX" in call.text[:40]
        and f'{{\\"type\\":\\"{tag}\\"' in call.text
    )


def durable_before(calls: list[Call], from_s: float, until: Call, what: str) -> Call:
    """Between the two the log was written, and its last write was synced. Returns that fdatasync."""
    written = [call for call in calls if to_wal(call) and from_s <= call.began < until.began]
    assert written, f"nothing was written to the log before {what}"
    synced = [
        call
        for call in calls
        if syncs_wal(call) and call.began > written[-1].began and call.ended <= until.began
    ]
    assert synced, f"{what} came before the fdatasync of the log"
    return synced[0]


def trace_run(box: RealBox, act: Callable[[], None]) -> Seen:
    """The calls of daemon and supervisor while `act` runs."""
    options = ["-f", "-T", "-yy", "-s", "65536", "-e", f"trace={','.join(MUTATING)}"]
    slow = [
        "-e",
        "inject=fdatasync,fsync:delay_enter=10ms",
    ]  # who does not wait for a sync is seen to overtake it
    straces = [
        Strace(threads_of(box.daemon_pid()), [*options, *slow], box.folder / "daemon.trace"),
        Strace([box.supervisor_pid()], options[1:], box.folder / "supervisor.trace"),
    ]
    act()
    wait_until_at_rest(box, "traced")
    box.result("traced")  # a mark that came too early is no rest
    for strace in straces:
        strace.detach()
    return Seen(*(read_trace(strace.lines()) for strace in straces))


@pytest.fixture
def traced(make_box: MakeBox) -> tuple[RealBox, Seen]:
    """One run that leaves stdout and a file in work/, on a box that has run one before."""
    box = make_box()
    box.append(
        {"task": "first", "prompt": "sleep 0.1; echo hi; echo x > made"}
    )  # slow: mutants must get past it
    wait_until_at_rest(box, "first")
    run = trace_run(
        box, lambda: box.append({"task": "traced", "prompt": "echo hi; echo x > made; sleep 0.2"})
    )
    return box, run


def test_each_step_waits_for_the_one_before(traced: tuple[RealBox, Seen]) -> None:
    _, seen = traced
    nothing_starts_before_the_claim_is_durable(seen)
    started_is_exclusive_and_before_the_fork(seen)
    exit_json_is_there_before_the_end_is_told(seen)
    result = only(
        seen.daemon,
        "the result's line",
        lambda call: call.name == "write" and "completions.jsonl" in call.text[:300],
    )
    finishing = files_are_durable_before_the_finishing_commit(seen, result)
    forget_is_sent_after_the_finishing_commit(seen, finishing)
    the_line_is_durable_before_it_is_marked(seen, finishing, result)


def nothing_starts_before_the_claim_is_durable(seen: Seen) -> None:
    """`Run` may go ahead with `hold`; then `Go` is what must wait, and with it `started` and the fork."""
    run = only(seen.daemon, "Run", said("run"))
    order = only(seen.daemon, "Go", said("go")) if '\\"hold\\":true' in run.text else run
    durable_before(seen.daemon, 0.0, order, "the order to start")
    started = only(seen.supervisor, "started", is_started)
    durable_before(seen.daemon, 0.0, started, "the start")


def is_started(call: Call) -> bool:
    return call.name.startswith("rename") and '"started"' in call.text


def started_is_exclusive_and_before_the_fork(seen: Seen) -> None:
    started = only(seen.supervisor, "started", is_started)
    assert "RENAME_NOREPLACE" in started.text
    fork = only(seen.supervisor, "the fork", lambda call: call.name in {"vfork", "clone", "clone3", "fork"})
    assert started.ended <= fork.began, "the fork came before `started`"


def exit_json_is_there_before_the_end_is_told(seen: Seen) -> None:
    rename = only(
        seen.supervisor,
        "exit.json",
        lambda call: call.name.startswith("rename") and '"exit.json"' in call.text,
    )
    reaped = [
        call for call in seen.supervisor if call.name in {"wait4", "waitid"} and call.ended <= rename.began
    ]
    assert reaped, "exit.json was written before the worker was waited for"
    told = only(seen.supervisor, "Exited", said("exited"))
    assert rename.ended <= told.began, "the end was told before exit.json was there"


def files_are_durable_before_the_finishing_commit(seen: Seen, result: Call) -> Call:
    finishing = durable_before(seen.daemon, 0.0, result, "the result's line")
    for path in ("/attempt-1/stdout>", "/attempt-1/work/made>", "/attempt-1/work>", "/attempt-1>", "/tasks>"):
        synced = [call for call in seen.daemon if call.name in {"fsync", "fdatasync"} and path in call.text]
        assert synced, f"{path} was not synced"
        assert synced[0].ended <= finishing.began, f"{path} was synced after the finishing commit"
    files = max(call.ended for call in seen.daemon if call.name == "fsync" and "/attempt-1" in call.text)
    commits = [call for call in seen.daemon if syncs_wal(call) and files <= call.began < result.began]
    assert len(commits) == 1, (
        f"{len(commits)} commits between the files and the line: was it marked before it was written?"
    )
    return finishing


def forget_is_sent_after_the_finishing_commit(seen: Seen, finishing: Call) -> None:
    forget = only(seen.daemon, "Forget", said("forget"))
    assert finishing.ended <= forget.began, "Forget came before the finishing commit"


def the_line_is_durable_before_it_is_marked(seen: Seen, finishing: Call, result: Call) -> None:
    synced = [call for call in seen.daemon if call.name == "fdatasync" and "completions.jsonl" in call.text]
    assert synced, "completions.jsonl was not synced"
    assert result.ended <= synced[0].began
    between = [
        call for call in seen.daemon if to_wal(call) and finishing.ended < call.began < synced[0].ended
    ]
    assert not between, "the mark was written before the line was durable"
    marks = [call for call in seen.daemon if syncs_wal(call) and call.began >= synced[0].ended]
    assert marks, "the mark was not committed"


def test_a_submit_is_answered_after_its_commit(make_box: MakeBox) -> None:
    box = make_box("queues: {quiet: {concurrency: 1}}\n")
    box.append({"task": "first", "prompt": "echo hi"})
    wait_until_at_rest(box, "first")
    answers: list[int] = []

    def submit() -> None:
        status, _ = box.api("POST", "/v1/tasks", {"task": "traced", "prompt": "sleep 0.2; echo hi"})
        answers.append(status)

    seen = trace_run(box, submit)
    assert answers == [201]
    answer = only(
        seen.daemon,
        "the answer",
        lambda call: call.name in {"sendto", "sendmsg", "write", "writev"} and "HTTP/1.1 201" in call.text,
    )
    durable_before(seen.daemon, 0.0, answer, "the answer")


def test_a_handed_over_file_is_committed_before_it_is_sent(make_box: MakeBox) -> None:
    """A large one is copied into blobs/, synced with its folder, and only then committed."""
    box = make_box()
    box.append({"task": "first", "prompt": "echo hi"})
    wait_until_at_rest(box, "first")
    script = "head -c 400000 /dev/zero | tr '\\0' x > $AGENTQ_OUTBOX/.part; mv $AGENTQ_OUTBOX/.part $AGENTQ_OUTBOX/large.txt; sleep 0.3; echo hi"
    seen = trace_run(box, lambda: box.append({"task": "traced", "prompt": script}))
    lines = [call for call in seen.daemon if call.name == "write" and "completions.jsonl" in call.text[:300]]
    assert len(lines) == 2
    entry = lines[0]
    assert "large.txt" in entry.text
    committed = durable_before(seen.daemon, 0.0, entry, "the entry's line")
    copied = only(
        seen.daemon, "the copy's fsync", lambda call: call.name == "fsync" and "/blobs/.tmp-" in call.text
    )
    folder = only(
        seen.daemon,
        "the folder's fsync",
        lambda call: call.name == "fsync" and call.text.split(">")[0].endswith("/blobs"),
    )
    assert copied.ended <= folder.began
    assert folder.ended <= committed.began
    path = json.loads(Path(box.state / "completions.jsonl").read_text().splitlines()[-2])["path"]
    assert Path(path).stat().st_size == 400_000
