"""The verdict: every rule, the first match wins, and exit 0 alone is never success."""

from __future__ import annotations

from itertools import product

import pytest
from budget import tries
from hypothesis import given, settings
from hypothesis import strategies as st

from agentqd.core.lifecycle import Result
from agentqd.core.task import Expect, ExpectFile
from agentqd.core.units import Duration, Size
from agentqd.core.verdict import TIMEOUT_INTENTS, Ended, Evidence, FileSeen, judge, signal_name

OURS = [*sorted(TIMEOUT_INTENTS), "cancelled", "supervisor_lost", "result_grace"]
WORK = Evidence(stdout_bytes=1, duration_s=5)
FILE = Expect(files=[ExpectFile(path="out", min_bytes=Size(10))])


def _seen(size: int | None, *, changed: bool = True, stdout: int = 1) -> Evidence:
    return Evidence(stdout_bytes=stdout, expected=(FileSeen("out", size, changed),), duration_s=5)


@pytest.mark.parametrize(
    ("ended", "evidence", "expect", "result", "reason"),
    [
        (Ended(error="no such file"), WORK, None, Result.SPAWN_FAILED, "spawn_failed"),
        (Ended(error="x", intent="cancelled", signal=9), WORK, None, Result.SPAWN_FAILED, "spawn_failed"),
        (Ended(signal=15, intent="run_timeout"), WORK, None, Result.TIMEOUT, "run_timeout"),
        (Ended(exit_code=0, intent="total_timeout"), WORK, None, Result.TIMEOUT, "total_timeout"),
        (Ended(exit_code=7, intent="silence_timeout"), WORK, None, Result.TIMEOUT, "silence_timeout"),
        (Ended(exit_code=0, intent="cancelled"), WORK, None, Result.CANCELLED, "cancelled"),
        (Ended(signal=9, intent="survivor"), WORK, None, Result.LOST, "survivor"),
        (Ended(signal=9), WORK, None, Result.FAILED, "signal"),
        (Ended(exit_code=1), WORK, None, Result.FAILED, "exit_code"),
        (Ended(exit_code=75), Evidence(), None, Result.FAILED, "exit_code"),
        (Ended(), WORK, None, Result.FAILED, "exit_code"),
        (Ended(exit_code=0), Evidence(), None, Result.NO_WORK, "no_evidence"),
        (Ended(exit_code=0), Evidence(duration_s=99), None, Result.NO_WORK, "no_evidence"),
        (Ended(exit_code=0), _seen(None, stdout=0), FILE, Result.NO_WORK, "no_evidence"),
        (Ended(exit_code=0), _seen(None), FILE, Result.FAILED, "expect_files"),
        (Ended(exit_code=0), _seen(9), FILE, Result.FAILED, "expect_files"),
        (Ended(exit_code=0), _seen(10, changed=False), FILE, Result.FAILED, "expect_files"),
        (Ended(exit_code=0), _seen(10, stdout=0), FILE, Result.SUCCESS, None),
        (Ended(exit_code=0), WORK, Expect(stdout_min_bytes=Size(2)), Result.FAILED, "expect_stdout"),
        (Ended(exit_code=0), WORK, Expect(min_duration=Duration(6)), Result.FAILED, "expect_duration"),
        (Ended(exit_code=0), WORK, Expect(min_duration=Duration(5), stdout_min_bytes=Size(1)), Result.SUCCESS, None),
        (Ended(exit_code=0), Evidence(entries=1), None, Result.SUCCESS, None),
        (Ended(exit_code=0), Evidence(work_files=1), None, Result.SUCCESS, None),
        (Ended(exit_code=0), Evidence(stdout_bytes=1, check_passed=False, check_detail="3 tests fail"), Expect(check=["x"]), Result.FAILED, "expect_check"),
        (Ended(exit_code=0), Evidence(stdout_bytes=1, check_passed=True), Expect(check=["x"]), Result.SUCCESS, None),
        (Ended(signal=15, intent="result_grace"), Evidence(entries=1), None, Result.SUCCESS, "result_grace"),
        (Ended(exit_code=3, intent="result_grace"), Evidence(entries=1), None, Result.SUCCESS, "result_grace"),
        (Ended(signal=9, intent="result_grace"), _seen(None), FILE, Result.FAILED, "expect_files"),
    ],
)  # fmt: skip
def test_each_rule(
    ended: Ended, evidence: Evidence, expect: Expect | None, result: Result, reason: str | None
) -> None:
    verdict = judge(ended, evidence, expect, allow_no_work=False)
    assert (verdict.result, verdict.reason) == (result, reason)


def test_the_detail_says_what_was_expected_and_what_was_found() -> None:
    for evidence, said in (
        (_seen(None), "out is not there"),
        (_seen(9), "9 bytes, expected 10"),
        (_seen(10, changed=False), "was not changed"),
    ):
        assert said in (judge(Ended(exit_code=0), evidence, FILE, allow_no_work=False).detail or "")
    checked = Evidence(stdout_bytes=1, check_passed=False, check_detail="3 tests fail")
    assert (
        judge(Ended(exit_code=0), checked, Expect(check=["x"]), allow_no_work=False).detail == "3 tests fail"
    )


def test_a_file_that_need_not_change_may_be_old() -> None:
    expect = Expect(files=[ExpectFile(path="out", changed=False)])
    assert (
        judge(Ended(exit_code=0), _seen(1, changed=False), expect, allow_no_work=False).result
        is Result.SUCCESS
    )


def test_a_foreign_signal_is_named() -> None:
    assert "SIGSEGV" in (judge(Ended(signal=11), WORK, None, allow_no_work=False).detail or "")
    assert signal_name(200) == "signal 200"


def test_allowed_no_work_is_success_but_expectations_still_count() -> None:
    assert judge(Ended(exit_code=0), Evidence(), None, allow_no_work=True).result is Result.SUCCESS
    unmet = judge(Ended(exit_code=0), _seen(None, stdout=0), FILE, allow_no_work=True)
    assert (unmet.result, unmet.reason) == (Result.FAILED, "expect_files")


ENDED = st.builds(
    Ended,
    exit_code=st.none() | st.sampled_from([0, 1, 75, 255]),
    signal=st.none() | st.sampled_from([2, 9, 15, 200]),
    intent=st.none() | st.sampled_from(OURS),
    error=st.none() | st.just("no such file"),
)
EVIDENCE = st.builds(
    Evidence,
    stdout_bytes=st.integers(0, 2),
    entries=st.integers(0, 1),
    work_files=st.integers(0, 1),
    expected=st.tuples(st.builds(FileSeen, path=st.just("out"), bytes=st.none() | st.integers(0, 12), changed=st.booleans())),
    duration_s=st.floats(0, 10),
    check_passed=st.none() | st.booleans(),
)  # fmt: skip
EXPECT = st.builds(
    Expect,
    files=st.just(FILE.files),
    stdout_min_bytes=st.none() | st.just(Size(2)),
    min_duration=st.none() | st.just(Duration(1)),
)


@settings(max_examples=tries(500))
@given(ENDED, EVIDENCE, EXPECT, st.booleans())
def test_over_all_combinations_the_first_rule_wins(
    ended: Ended, evidence: Evidence, expect: Expect, allow: bool
) -> None:
    verdict = judge(ended, evidence, expect, allow_no_work=allow)
    if ended.error is not None:
        wanted = {Result.SPAWN_FAILED}
    elif ended.intent in TIMEOUT_INTENTS:
        wanted = {Result.TIMEOUT}
    elif ended.intent == "cancelled":
        wanted = {Result.CANCELLED}
    elif ended.intent not in {None, "result_grace"}:
        wanted = {Result.LOST}
    elif ended.intent is None and (ended.signal is not None or ended.exit_code != 0):
        wanted = {Result.FAILED}
    else:
        wanted = {Result.SUCCESS, Result.FAILED, Result.NO_WORK}
    assert verdict.result in wanted
    shown = (
        evidence.stdout_bytes
        or evidence.entries
        or evidence.work_files
        or evidence.expected[0].bytes is not None
    )
    if verdict.result is Result.SUCCESS:
        assert shown or allow
        assert (evidence.expected[0].bytes or 0) >= 10
        assert evidence.expected[0].changed
        assert evidence.check_passed is not False
    if verdict.result is Result.NO_WORK:
        assert not shown
        assert not allow
    assert (verdict.reason is None) == (verdict.result is Result.SUCCESS and ended.intent is None)


def test_an_intent_of_ours_always_wins_over_what_the_process_says() -> None:
    for intent, code, number, evidence in product(OURS[:-1], (None, 0, 1), (None, 9, 15), (Evidence(), WORK)):
        verdict = judge(Ended(code, number, intent), evidence, None, allow_no_work=True)
        assert verdict.result in {Result.TIMEOUT, Result.CANCELLED, Result.LOST}
        assert verdict.reason == intent
