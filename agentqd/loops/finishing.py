"""The one transaction in which an attempt or a task ends: the transition, the entries handed over, the result, its outbox rows.

These are journal units: they decide with core rules and record; nothing here touches the world.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from agentqd.core.envelope import delivery_id, seal
from agentqd.core.lifecycle import ACTIVE_STATES, Event, Result, State
from agentqd.core.resolve import Resolved, resolve
from agentqd.core.routing import Subject, sinks_for
from agentqd.core.task import TaskRequest
from agentqd.core.units import format_time
from agentqd.core.usage_limit import Limit
from agentqd.core.verdict import CANCELLED, Ended, Evidence, Verdict, judge
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.loops.claimorder import grant_those
from agentqd.loops.dropfolder import Handed, record
from agentqd.loops.endlog import log_attempt, log_end
from agentqd.loops.evidence import Found, Seen, as_json
from agentqd.loops.nextattempt import too_late, what_next
from agentqd.loops.unblocking import candidates_after, request_of, unblock, what_blocks
from agentqd.loops.undeclared import Undeclared
from agentqd.loops.usage_limits import USAGE_LIMIT
from agentqd.storage import outbox
from agentqd.storage import tasks as store
from agentqd.storage.tasks import AttemptRow, TaskRow
from agentqd.storage.transaction import Transaction
from agentqd.supervisor.wire import Exited

US: Final = 1_000_000
_TELLS: Final = frozenset(
    {Result.SUCCESS, Result.FAILED, Result.NO_WORK}
)  # its runner's limit is not reached


class AttemptEnd(msgspec.Struct, frozen=True):
    """Everything known about an attempt that is over."""

    task_id: str
    attempt: int
    request: TaskRequest
    exited: Exited | None = None  # None: nobody knows how it ended
    seen: Seen | None = None
    handed: list[Handed] = []
    keys: frozenset[str] = frozenset()  # handed over earlier, while it ran
    lost_reason: str | None = None
    failed_reason: tuple[str, str] | None = None  # (reason, detail): our own side failed it
    check_passed: bool | None = None
    check_detail: str | None = None
    undeclared: Undeclared | None = None  # where the runner has check_writes
    limit: Limit | None = None  # the agent said that its usage limit is reached
    found: Found | None = None  # of a lost attempt: what it has left


class Finished(msgspec.Struct, frozen=True):
    task: TaskRow
    verdict: Verdict


def finish_attempt(tx: Transaction, box: Box, end: AttemptEnd) -> Finished | None:
    """Record the end of an attempt and what follows from it. None: it was recorded before (nothing is done twice)."""
    task = store.find(tx, end.task_id)
    if task is None or task.attempt != end.attempt or task.state not in ACTIVE_STATES:
        return None
    attempt = store.attempt_of(tx, task.seq, end.attempt)
    if end.found is not None and attempt.started_at is not None:
        found = msgspec.structs.replace(end.found, started_at=attempt.started_at)
        end = msgspec.structs.replace(end, found=found)
    resolved = resolve(end.request, task.queue, task.runner, box.settings)
    sound = record(tx, box, task, end.request, end.attempt, end.handed)
    keys = {
        row[0]
        for row in tx.execute(
            "SELECT key FROM entries WHERE task_seq=? AND kind='entry' AND run=?", (task.seq, task.run)
        )
    }
    evidence = _evidence(end, len(keys | sound | end.keys))
    verdict = _verdict(end, evidence, resolved)
    said = _close_attempt(tx, task, attempt, end, verdict, evidence)
    if end.undeclared is not None and end.undeclared.count:
        tx.event(
            task.id,
            "undeclared_writes",
            attempt=end.attempt,
            count=end.undeclared.count,
            paths=end.undeclared.paths[:10],
        )
    _tell(tx, box, task, verdict)
    event, wake = what_next(tx, box, task, attempt, (end.request, end.limit), verdict, resolved)
    if event is Event.FINISHED:
        moved = _finish(tx, task, event, verdict, said)
        data = result_data(box, moved, end, evidence, said, tx.now_us)
        add_result(tx, box, moved, end.request, data)
        _settle_others(tx, box, moved)
    else:
        moved = store.move_task(
            tx,
            task,
            event,
            said={**said, "next_at": format_time(wake)} if event is Event.ATTEMPT_ENDED else said,
            reason=verdict.reason,
            detail=verdict.detail,
            run_attempts=task.run_attempts - (1 if verdict.reason == USAGE_LIMIT else 0),
            wake_at=wake,
        )
        tx.later(lambda: log_attempt(box, moved, verdict, wake))
    return Finished(moved, verdict)


def _evidence(end: AttemptEnd, entries: int) -> Evidence:
    exited, seen = end.exited, end.seen
    if exited is None:
        wrote = end.found.stdout_bytes if end.found else 0
        return Evidence(stdout_bytes=wrote, entries=entries, work_files=seen.work_files if seen else 0)
    began = exited.started_at or exited.ended_at
    return Evidence(
        stdout_bytes=exited.stdout_bytes,
        entries=entries,
        work_files=seen.work_files if seen else 0,
        expected=seen.expected if seen else (),
        duration_s=(exited.ended_at - began) / US,
        check_passed=end.check_passed,
        check_detail=end.check_detail,
    )


def _verdict(end: AttemptEnd, evidence: Evidence, resolved: Resolved) -> Verdict:
    if end.failed_reason is not None:
        return Verdict(Result.FAILED, *end.failed_reason)
    if end.exited is None:
        return Verdict(Result.LOST, end.lost_reason or "lost", "nobody knows how it ended")
    if end.limit is not None:
        return Verdict(Result.FAILED, USAGE_LIMIT, end.limit.text)
    exited = end.exited
    ended = Ended(
        exited.exit_code, exited.signal, exited.intent, exited.error if exited.pid is None else None
    )
    return judge(ended, evidence, end.request.expect, allow_no_work=resolved.allow_no_work)


def _close_attempt(
    tx: Transaction, task: TaskRow, attempt: AttemptRow, end: AttemptEnd, verdict: Verdict, evidence: Evidence
) -> dict[str, Any]:
    exited = end.exited
    started = (exited.started_at if exited else None) or attempt.started_at or _began(end)
    ended = exited.ended_at if exited else tx.now_us
    if exited is not None and exited.pid is not None and attempt.pid is None:
        tx.event(
            task.id, "worker_started", attempt=end.attempt, pid=exited.pid, at=format_time(exited.started_at)
        )
    store.update_attempt(
        tx,
        task.seq,
        end.attempt,
        pid=(exited.pid if exited else None) or attempt.pid,
        started_at=started,
        ended_at=ended,
        intent=(exited.intent if exited else None) or attempt.intent,
        exit_code=exited.exit_code if exited else None,
        signal=exited.signal if exited else None,
        result=verdict.result.value,
        reason=verdict.reason,
        evidence=msgspec.json.encode(evidence_json(end, evidence)).decode(),
    )
    said: dict[str, Any] = {"attempt": end.attempt, "result": verdict.result.value, "reason": verdict.reason}
    if exited is not None:
        said["exit_code"] = exited.exit_code
        said["signal"] = exited.signal
    return said


def _began(end: AttemptEnd) -> int | None:
    return None if end.found is None else end.found.started_at


def evidence_json(end: AttemptEnd, evidence: Evidence) -> dict[str, Any]:
    exited, seen = end.exited, end.seen
    data: dict[str, Any] = {
        "stdout_bytes": evidence.stdout_bytes,
        "stderr_bytes": exited.stderr_bytes if exited else end.found.stderr_bytes if end.found else 0,
        "entries": evidence.entries,
        "work_files": evidence.work_files,
    }
    if evidence.expected:
        data["expected"] = [
            {"path": f.path, "bytes": f.bytes, "changed": f.changed} for f in evidence.expected
        ]
    if evidence.check_passed is not None:
        data["check_passed"] = evidence.check_passed
    if exited is not None:
        if exited.stdout_truncated:
            data["stdout_truncated"] = True
        if exited.stderr_truncated:
            data["stderr_truncated"] = True
        if exited.left_behind:
            data["left_behind"] = [{"pid": item.pid, "name": item.name} for item in exited.left_behind]
        data["cpu_s"] = round(exited.user_cpu_s + exited.system_cpu_s, 3)
        data["max_rss_bytes"] = exited.max_rss_bytes
    if end.undeclared is not None:
        data["undeclared_writes"] = end.undeclared.as_json()
    if seen is not None and seen.problems:
        data["problems"] = seen.problems[:20]
    return data


def _tell(tx: Transaction, box: Box, task: TaskRow, verdict: Verdict) -> None:
    if verdict.result is Result.NO_WORK:
        message = f"task {task.id} ({task.name}) ended with exit 0 and did no work: {verdict.detail}"
        alert(tx, box, "no_work", message, task=task, key=str(task.attempt), attempt=task.attempt)
    elif verdict.result is Result.LOST:
        message = (
            f"the worker of task {task.id} ({task.name}), attempt {task.attempt}, was lost: {verdict.reason}"
        )
        alert(
            tx,
            box,
            "lost",
            message,
            task=task,
            key=str(task.attempt),
            attempt=task.attempt,
            reason=verdict.reason,
        )


def _finish(tx: Transaction, task: TaskRow, event: Event, verdict: Verdict, said: dict[str, Any]) -> TaskRow:
    return store.move_task(
        tx,
        task,
        event,
        said=said,
        result=verdict.result.value,
        reason=verdict.reason,
        detail=verdict.detail,
        finished_at=tx.now_us,
        wake_at=None,
    )


def settle(tx: Transaction, box: Box, task: TaskRow) -> TaskRow:
    """Look again at a blocked task: free it, keep it blocked (perhaps for another reason), or end what can never run."""
    moved = _settle(tx, box, task)
    if moved.state is State.FINISHED:
        _settle_others(tx, box, moved)
    return moved


def _settle(tx: Transaction, box: Box, task: TaskRow) -> TaskRow:
    request = request_of(tx, task)
    reason, detail = what_blocks(tx, task, request)
    if reason is None:
        late = too_late(tx, box, task, request)
        return unblock(tx, box, task, request) if late is None else _end_waiting(tx, box, task, *late)
    if reason == "dependency_failed":
        return _end_waiting(tx, box, task, Event.REFUSED, Verdict(Result.REFUSED, reason, detail))
    tx.execute("UPDATE tasks SET reason = ?, detail = ? WHERE seq = ?", (reason, detail, task.seq))
    return store.get(tx, task.seq)


def _settle_others(tx: Transaction, box: Box, ended: TaskRow) -> None:
    """Whom the end of a task frees, or ends; a list, not recursion: chains may be long."""
    ends = [ended]
    while ends:
        for waiting in candidates_after(tx, box, ends.pop()):
            moved = _settle(tx, box, waiting)
            if moved.state is State.FINISHED:
                ends.append(moved)


def look_again(tx: Transaction, box: Box, seqs: Iterable[int]) -> None:
    """A claim is gone before its task's end, or was no task's: those that waited for it (negative: outside claims) go on."""
    grant_those(tx, box, seqs)
    for seq in sorted(seq for seq in seqs if seq > 0):
        waiting = store.get(tx, seq)
        if waiting.state is State.BLOCKED:  # not ended meanwhile by what the one before it has brought about
            settle(tx, box, waiting)


def withdraw_claim(tx: Transaction, box: Box, was: TaskRow) -> None:
    """The worker provably never ran: the attempt is undone, its number is used again."""
    task = store.get(tx, was.seq)
    if task.attempt != was.attempt or task.state not in ACTIVE_STATES:
        return
    cancelled = store.attempt_of(tx, task.seq, task.attempt).intent == CANCELLED
    why = "it was cancelled" if cancelled else "the supervisor went away"
    tx.execute("DELETE FROM attempts WHERE task_seq = ? AND attempt = ?", (task.seq, task.attempt))
    moved = store.move_task(
        tx,
        task,
        Event.CLAIM_WITHDRAWN,
        said={"attempt": task.attempt, "reason": f"{why} before it started"},
        attempt=task.attempt - 1,
        run_attempts=task.run_attempts - 1,
        reason=None,
    )
    if cancelled:
        finish_waiting(tx, box, moved, Event.CANCELLED, Result.CANCELLED, CANCELLED)


def finish_waiting(
    tx: Transaction,
    box: Box,
    task: TaskRow,
    event: Event,
    result: Result,
    reason: str,
    detail: str | None = None,
) -> TaskRow:
    """End a task that has no worker: cancelled, expired, refused, out of time. Its result is delivered like any other."""
    moved = _end_waiting(tx, box, task, event, Verdict(result, reason, detail))
    _settle_others(tx, box, moved)
    return moved


def _end_waiting(tx: Transaction, box: Box, task: TaskRow, event: Event, verdict: Verdict) -> TaskRow:
    said = {"result": verdict.result.value, "reason": verdict.reason}
    moved = _finish(tx, task, event, verdict, said)
    request = request_of(tx, task)
    data = result_data(box, moved, AttemptEnd(task.id, task.attempt, request), None, {}, tx.now_us)
    add_result(tx, box, moved, request, data)
    return moved


def result_data(
    box: Box, task: TaskRow, end: AttemptEnd, evidence: Evidence | None, said: dict[str, Any], now_us: int
) -> dict[str, Any]:
    """The data object of a result (design, Delivery)."""
    exited, seen = end.exited, end.seen
    started = exited.started_at if exited is not None else _began(end)
    ended = exited.ended_at if exited is not None else now_us
    data: dict[str, Any] = {
        "task_id": task.id,
        "name": task.name,
        "status": task.result,
        "attempt": task.attempt,
        "run": task.run,
        "exit_code": said.get("exit_code"),
        "signal": said.get("signal"),
        "reason": task.reason,
        "detail": task.detail,
        "submitted_at": task.submitted_at or format_time(task.accepted_at),
        "started_at": format_time(started),
        "completed_at": format_time(ended),
        "duration_s": round((ended - started) / US, 3) if started is not None else 0.0,
        "output_dir": box.folders.attempt(task.id, task.attempt) if task.attempt else None,
        "stdout_tail": seen.stdout_tail if seen else "",
        "artifacts": as_json(seen) if seen else [],
        "evidence": evidence_json(end, evidence) if evidence is not None else {},
        "usage": None,
    }
    if seen is not None and seen.artifacts_truncated:
        data["artifacts_truncated"] = True
    return data


def add_result(tx: Transaction, box: Box, task: TaskRow, request: TaskRequest, data: dict[str, Any]) -> None:
    """The result entry and its rows, and the canonical log line once it is durable."""
    type_ = f"agentq.task.{task.result}"
    entry_id = delivery_id(box.state_id, task.id, task.run, "result", "result")
    subject = Subject(type_, task.queue, task.runner, task.result or "", tuple(request.labels or ()))
    resolved = resolve(request, task.queue, task.runner, box.settings)
    outbox.add_entry(
        tx,
        outbox.NewEntry(
            delivery_id=entry_id,
            task_seq=task.seq,
            run=task.run,
            attempt=task.attempt,
            kind="result",
            key="result",
            type=type_,
            payload=seal(entry_id, type_, box.name, task.id, tx.now_us, data),
            task_id=task.id,
            sinks=sinks_for(box.settings, subject, request.own_sinks(), resolved.deliver_to),
        ),
    )
    tx.later(lambda: log_end(box, task, data))
