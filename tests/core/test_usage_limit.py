"""Usage limits in what agents write: the forms that were seen, and what is not one."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentqd.core.limits import USAGE_LIMIT_TAIL_BYTES
from agentqd.core.runners import PRESETS
from agentqd.core.usage_limit import FALLBACK_MAX_S, fallback_s, find_limit

US = 1_000_000
NOW = int(datetime(2026, 11, 20, 12, 0, tzinfo=UTC).timestamp()) * US
BERLIN = ZoneInfo("Europe/Berlin")  # one hour ahead of UTC then


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp()) * US


def until(runner: str, text: str, *, where: str = "stderr", now: int = NOW) -> int | None:
    spec = PRESETS[runner]
    streams = {"stdout": "", "stderr": "", where: text}
    found = find_limit(spec.limit_signs, spec.result, streams["stdout"], streams["stderr"], now, zone=BERLIN)
    assert found is not None, text
    return found.until_us


@pytest.mark.parametrize(
    ("runner", "text", "expected"),
    [
        ("claude", "Claude AI usage limit reached|1795186800", "2026-11-20T15:00:00+00:00"),
        ("claude", "Claude AI usage limit reached|1795186800000", "2026-11-20T15:00:00+00:00"),
        ("claude", "5-hour limit reached ∙ resets 4pm", "2026-11-20T15:00:00+00:00"),
        ("claude", "5-hour limit reached ∙ resets 2am", "2026-11-21T01:00:00+00:00"),
        ("claude", "You've hit your limit · resets 1:30am (Asia/Dhaka)", "2026-11-20T19:30:00+00:00"),
        ("claude", "You've hit your session limit · resets 9:50pm (UTC)", "2026-11-20T21:50:00+00:00"),
        ("claude", "You're out of extra usage · resets Nov 25 at 5pm (America/Los_Angeles)", "2026-11-26T01:00:00+00:00"),
        ("claude", "rate limit exceeded, resets at 3pm (Europe/Berlin)", "2026-11-20T14:00:00+00:00"),
        ("claude", "usage limit until 01:52", "2026-11-21T00:52:00+00:00"),
        ("claude", "usage limit until 2026-11-20T18:30:00Z", "2026-11-20T18:30:00+00:00"),
        ("claude", "usage limit until 2026-11-20 18:30:00", "2026-11-20T17:30:00+00:00"),
        ("codex", "You've hit your usage limit. Try again in 3 hours 20 minutes.", "2026-11-20T15:20:00+00:00"),
        ("codex", "You've hit your usage limit. Upgrade to Pro (https://openai.com/chatgpt/pricing) or try again in 5 days 22 hours 11\nminutes.", "2026-11-26T10:11:00+00:00"),
        ("codex", "You've hit your usage limit. or try again at Nov 24th, 2026 1:36 PM.", "2026-11-24T12:36:00+00:00"),
        ("codex", "You've hit your usage limit, try again at 8:15 PM.", "2026-11-20T19:15:00+00:00"),
        ("codex", "Rate limit reached for gpt-5. Please try again in 1.5s.", "2026-11-20T12:00:01.5+00:00"),
        ("gemini", "You have exhausted your capacity. Your quota will reset after 2h3m4s.", "2026-11-20T14:03:04+00:00"),
        ("gemini", '"status": "RESOURCE_EXHAUSTED",\n "details": [{\n  "retryDelay": "39s"\n}]', "2026-11-20T12:00:39+00:00"),
    ],
)  # fmt: skip
def test_the_forms_that_were_seen_are_read(runner: str, text: str, expected: str) -> None:
    assert until(runner, text) == int(datetime.fromisoformat(expected).timestamp() * US)


@pytest.mark.parametrize(
    "text",
    [
        "Claude AI usage limit reached|1700000000",  # past
        "Claude AI usage limit reached|4102444800",  # 2100: not believed
        "usage limit reached",
        "usage limit reached, try again later",
        "usage limit until 12:45",  # in Berlin a quarter of an hour ago: over, not tomorrow's
        "usage limit until 31:99",
        "usage limit, resets Feb 31 at 5pm",
        "usage limit, resets 3pm (Nowhere/Atlantis)",
        "usage limit, try again in 99999 days",
        "usage limit, try again in 0 seconds",
    ],
)
def test_a_time_that_cannot_be_is_none_but_the_limit_is_one(text: str) -> None:
    assert until("claude", text) is None


def _stream(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_claudes_own_record_says_when() -> None:
    rejected = {"type": "rate_limit_event", "rate_limit_info": {"status": "rejected", "resetsAt": 1795186800}}
    result = {"type": "result", "subtype": "success", "is_error": True, "result": "You've hit your limit"}
    assert until("claude", _stream(rejected, {"type": "result", "is_error": True, "result": "x"}), where="stdout") == 1795186800 * US  # fmt: skip
    assert until("claude", _stream(result), where="stdout") is None
    allowed = {"type": "rate_limit_event", "rate_limit_info": {"status": "allowed_warning"}}
    spec = PRESETS["claude"]
    assert find_limit(spec.limit_signs, spec.result, _stream(allowed), "", NOW) is None


def test_codex_says_it_in_its_error_records() -> None:
    failed = {
        "type": "turn.failed",
        "error": {"message": "You've hit your usage limit. Try again in 1 hour."},
    }
    assert until("codex", _stream({"type": "turn.started"}, failed), where="stdout") == NOW + 3600 * US


@pytest.mark.parametrize(
    ("runner", "record"),
    [
        ("claude", {"type": "assistant", "message": {"content": [{"text": "the usage limit reached|1795186800"}]}}),
        ("claude", {"type": "user", "message": {"content": "5-hour limit reached, resets 4pm"}}),
        ("claude", {"type": "result", "is_error": False, "result": "I fixed the rate limit code"}),
        ("codex", {"type": "item.completed", "item": {"type": "agent_message", "text": "usage limit"}}),
    ],
)  # fmt: skip
def test_an_agent_that_works_on_limits_has_not_met_one(runner: str, record: object) -> None:
    spec = PRESETS[runner]
    assert find_limit(spec.limit_signs, spec.result, _stream(record), "", NOW) is None


def test_of_an_exit_zero_only_the_last_word_counts() -> None:
    spec = PRESETS["claude"]
    word = {"type": "result", "subtype": "success", "is_error": True, "result": "Claude AI usage limit reached|1795186800"}  # fmt: skip
    found = find_limit(spec.limit_signs, spec.result, _stream(word), "", NOW, exited_zero=True)
    assert found is not None
    assert found.until_us == 1795186800 * US
    said = "usage limit reached, trying again\n" + _stream(
        {"type": "result", "is_error": False, "result": "ok"}
    )
    assert find_limit(spec.limit_signs, spec.result, said, said, NOW, exited_zero=True) is None
    assert find_limit(("limit",), "text", "limit", "limit", NOW, exited_zero=True) is None


def test_a_persons_own_texts_are_found_whatever_the_case_and_a_star_is_anything() -> None:
    assert find_limit(("budget*spent",), "text", "", "Your BUDGET of 5 EUR is Spent", NOW) is not None
    assert find_limit(("budget*spent",), "text", "", "spent the budget", NOW) is None
    assert find_limit((), "text", "usage limit", "usage limit", NOW) is None
    assert find_limit(("*",), "text", "anything", "", NOW) is None


def test_what_is_told_to_people_moves_no_terminal() -> None:
    found = find_limit(("limit",), "text", "", "\x1b[31mlimit\x1b[0m \x07 reached " + "x" * 1000, NOW)
    assert found is not None
    assert found.text.isprintable()
    assert len(found.text) <= 300


def test_the_wait_for_an_unknown_time_doubles_up_to_an_hour() -> None:
    assert [fallback_s(n) for n in (1, 2, 3, 4, 500)] == [900, 1800, 3600, 3600, FALLBACK_MAX_S]


HOSTILE = st.text(alphabet="usage limit|resets at in 0123456789:apm(/)TZ-+.,{}\"'\n", max_size=400)


@given(HOSTILE, HOSTILE)
def test_nothing_that_a_worker_writes_breaks_the_reading(stdout: str, stderr: str) -> None:
    for name in ("claude", "codex", "gemini", "aider"):
        spec = PRESETS[name]
        found = find_limit(spec.limit_signs, spec.result, stdout, stderr, NOW, zone=BERLIN)
        assert found is None or found.until_us is None or NOW < found.until_us <= NOW + 7 * 86400 * US


@pytest.mark.parametrize(
    "unit",
    ["usage limit ", "usage limit in 1 h ", "usage limit\n", "in 1h1m1s1d, and ", "Nov 1 at ", '{"type":"error",', "again at ", "1" * 50],
)  # fmt: skip
def test_no_output_takes_long_to_read(unit: str) -> None:
    text = ("usage limit " + unit * USAGE_LIMIT_TAIL_BYTES)[:USAGE_LIMIT_TAIL_BYTES]
    began = time.process_time()
    find_limit(PRESETS["claude"].limit_signs, "claude-stream-json", text, text, NOW, zone=BERLIN)
    assert time.process_time() - began < 0.5
