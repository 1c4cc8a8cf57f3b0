"""How an attempt ended, judged by evidence. Exit 0 proves that a process ran, nothing more.

Rules, first match wins:
1. Nothing was spawned → `spawn_failed`.
2. We ended it (an intent) → only our intent counts: `timeout`, `cancelled`, `lost`; after `result_grace` its result stands.
3. A signal that was not ours → `failed`, reason `signal`.  4. Exit code not 0 → `failed`, reason `exit_code`.
5. Exit 0 with nothing to show → `no_work`, unless the task allows it.  6. An expectation unmet → `failed`.  7. `success`.
"""

from __future__ import annotations

import signal as signals
from typing import Final

import msgspec

from agentqd.core.lifecycle import Result
from agentqd.core.task import Expect

TIMEOUT_INTENTS: Final = frozenset(
    {"run_timeout", "total_timeout", "first_output_timeout", "silence_timeout"}
)
RESULT_GRACE: Final = "result_grace"
CANCELLED: Final = "cancelled"


class FileSeen(msgspec.Struct, frozen=True):
    """One expected file as found after the attempt."""

    path: str
    bytes: int | None  # None: not there, or not a regular file
    changed: bool


class Evidence(msgspec.Struct, frozen=True):
    stdout_bytes: int = 0
    entries: int = 0  # handed over by this attempt, or earlier in this run
    work_files: int = 0
    expected: tuple[FileSeen, ...] = ()
    duration_s: float = 0.0
    check_passed: bool | None = None  # None: no check was asked for
    check_detail: str | None = None


class Ended(msgspec.Struct, frozen=True):
    """What the supervisor said."""

    exit_code: int | None = None
    signal: int | None = None
    intent: str | None = None
    error: str | None = None


class Verdict(msgspec.Struct, frozen=True):
    result: Result
    reason: str | None  # machine-readable; None for a success that ended by itself
    detail: str | None = None


def signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


def judge(ended: Ended, evidence: Evidence, expect: Expect | None, *, allow_no_work: bool) -> Verdict:
    if ended.error is not None:
        return Verdict(Result.SPAWN_FAILED, "spawn_failed", ended.error)
    if ended.intent is not None and ended.intent != RESULT_GRACE:
        return _our_intent(ended.intent)
    if ended.intent is None and ended.signal is not None:
        return Verdict(
            Result.FAILED, "signal", f"ended by {signal_name(ended.signal)}, which agentqd did not send"
        )
    if ended.intent is None and ended.exit_code != 0:
        return Verdict(Result.FAILED, "exit_code", f"exit code {ended.exit_code}")
    return _exit_zero(ended, evidence, expect or Expect(), allow_no_work)


def _our_intent(intent: str) -> Verdict:
    if intent in TIMEOUT_INTENTS:
        return Verdict(Result.TIMEOUT, intent)
    if intent == CANCELLED:
        return Verdict(Result.CANCELLED, CANCELLED)
    return Verdict(Result.LOST, intent)


def _exit_zero(ended: Ended, evidence: Evidence, expect: Expect, allow_no_work: bool) -> Verdict:
    present = any(item.bytes is not None for item in evidence.expected)
    nothing = not (evidence.stdout_bytes or evidence.entries or evidence.work_files or present)
    if nothing and not allow_no_work:
        return Verdict(
            Result.NO_WORK,
            "no_evidence",
            "exit 0, but nothing on stdout, nothing handed over, no file in work/, no expected file",
        )
    unmet = _unmet(evidence, expect)
    if unmet is not None:
        return unmet
    return Verdict(Result.SUCCESS, ended.intent, None)


def _unmet(evidence: Evidence, expect: Expect) -> Verdict | None:
    for wanted, seen in zip(expect.file_list(), evidence.expected, strict=True):
        if seen.bytes is None:
            return Verdict(Result.FAILED, "expect_files", f"{wanted.path} is not there")
        if seen.bytes < wanted.min_bytes:
            return Verdict(
                Result.FAILED,
                "expect_files",
                f"{wanted.path} has {seen.bytes} bytes, expected {int(wanted.min_bytes)}",
            )
        if wanted.changed and not seen.changed:
            return Verdict(Result.FAILED, "expect_files", f"{wanted.path} was not changed by this run")
    if expect.stdout_min_bytes is not None and evidence.stdout_bytes < expect.stdout_min_bytes:
        return Verdict(
            Result.FAILED,
            "expect_stdout",
            f"{evidence.stdout_bytes} bytes on stdout, expected {int(expect.stdout_min_bytes)}",
        )
    if expect.min_duration is not None and evidence.duration_s < expect.min_duration:
        return Verdict(
            Result.FAILED,
            "expect_duration",
            f"ran {evidence.duration_s:.1f} s, expected {float(expect.min_duration):g} s",
        )
    if evidence.check_passed is False:
        return Verdict(Result.FAILED, "expect_check", evidence.check_detail)
    return None
