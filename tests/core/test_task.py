"""One written task: each field right and wrong, the words of an error, and that nothing but InvalidTask ever comes out."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from budget import tries
from hypothesis import given, settings
from hypothesis import strategies as st

from agentqd.core import limits
from agentqd.core.errors import InvalidTask
from agentqd.core.task import (
    FIELD_NAMES,
    TASK_ID,
    Expect,
    TaskRequest,
    check_task,
    content_digest,
    derived_id,
    prompt_digest,
    read_task,
    task_from_fields,
)
from agentqd.core.units import Backoff, parse_time_us

BASE: dict[str, Any] = {"task": "demo", "prompt": "p"}
TIME = "2026-04-07T18:30:00Z"


def _read(**fields: Any) -> TaskRequest:
    return read_task(json.dumps({**BASE, **fields}).encode())


def _wrong(**fields: Any) -> InvalidTask:
    with pytest.raises(InvalidTask) as caught:
        _read(**fields)
    return caught.value


RIGHT: list[tuple[str, Any, Any]] = [
    ("id", "A-z_09", "A-z_09"),
    ("id", "x" * 64, "x" * 64),
    ("submitted_at", TIME, TIME),
    ("command", ["/bin/true", ""], ["/bin/true", ""]),
    ("runner", "claude", "claude"),
    ("queue", "q", "q"),
    ("priority", -1_000_000, -1_000_000),
    ("labels", ["a", "b c"], ["a", "b c"]),
    ("workdir", "/w", "/w"),
    ("env", {"A_1": "x=y"}, {"A_1": "x=y"}),
    ("not_before", TIME, TIME),
    ("expires_at", "2026-04-07T20:30:00+02:00", "2026-04-07T20:30:00+02:00"),
    ("after", "t1", "t1"),
    ("after", ["t1", "t2"], ["t1", "t2"]),
    ("run_timeout", "45m", 2700.0),
    ("timeout", 0.5, 0.5),
    ("total_timeout", "2d", 172800.0),
    ("queue_timeout", 0, 0.0),
    ("first_output_timeout", "1s", 1.0),
    ("silence_timeout", "1s", 1.0),
    ("kill_grace", 0, 0.0),
    ("warning_signal", "SIGUSR1", "SIGUSR1"),
    ("result_grace", "0s", 0.0),
    ("max_attempts", 1000, 1000),
    ("backoff", "1s", Backoff((1.0,), doubles=True)),
    ("backoff", [1, "2s"], Backoff((1.0, 2.0), doubles=False)),
    ("on_lost", "requeue", "requeue"),
    ("writes_to", ["a", "/b/*"], ["a", "/b/*"]),
    ("on_conflict", "warn", "warn"),
    ("intent_ttl", "1h", 3600.0),
    ("deliver_to", [], []),
    ("deliver_to", ["completions"], ["completions"]),
    ("deliver_to", "completions", "completions"),
    ("deliver_within", "1m", 60.0),
    ("dedup_ttl", 0, 0.0),
    (
        "expect",
        {"stdout_min_bytes": "1KiB", "min_duration": "1s", "check": ["true"], "allow_no_work": False},
        Expect(stdout_min_bytes=1024, min_duration=1.0, check=["true"], allow_no_work=False),  # type: ignore[arg-type]
    ),
]


@pytest.mark.parametrize(("field", "written", "found"), RIGHT)
def test_a_right_field_is_read(field: str, written: Any, found: Any) -> None:
    assert getattr(_read(**{field: written}), field) == found


def test_every_field_is_tried() -> None:
    assert {field for field, _, _ in RIGHT} | {"task", "prompt", "prompt_ref", "after_policy"} == set(
        FIELD_NAMES
    )


WRONG: list[tuple[str, Any]] = [
    ("task", ""), ("task", "  "), ("task", "x" * 257), ("task", "a\nb"), ("task", "\x1b[31m"), ("task", 1), ("task", None),
    ("id", ""), ("id", "x" * 65), ("id", "a.b"), ("id", "a/b"), ("id", "ä"), ("id", "a\n"), ("id", 7),
    ("submitted_at", "yesterday"), ("submitted_at", "2026-04-07T18:30:00"), ("submitted_at", 0), ("submitted_at", ""),
    ("prompt", ""), ("prompt", " \n\t"), ("prompt", 1), ("prompt", ["x"]),
    ("command", []), ("command", [""]), ("command", ["a", "b\x00"]), ("command", "ls"), ("command", ["x"] * 4097), ("command", ["x" * (1 << 20), "y"]),
    ("runner", 1), ("queue", []), ("priority", 1_000_001), ("priority", -1_000_001), ("priority", 1.5), ("priority", True), ("priority", "1"),
    ("labels", ["x"] * 33), ("labels", [""]), ("labels", ["a\x00"]), ("labels", ["x" * 129]), ("labels", ["a\x07"]), ("labels", "a"),
    ("workdir", ""), ("workdir", "/a\x00b"), ("env", {"1A": "x"}), ("env", {"": "x"}), ("env", {"A-B": "x"}), ("env", {"AGENTQ_TASK_ID": "x"}),
    ("env", {"A": "x\x00"}), ("env", {"A": 1}), ("env", ["A=1"]), ("env", {f"A{n}": "" for n in range(513)}),
    ("not_before", "soon"), ("not_before", ""), ("expires_at", ""), ("expires_at", "2026-04-07"), ("after", "a b"), ("after", ["a.b"]), ("after", ["x"] * 1001), ("after", {}),
    ("after_policy", "success"), ("after_policy", "sometimes"),
    ("run_timeout", 0), ("run_timeout", "0s"), ("run_timeout", "-1s"), ("run_timeout", "soon"), ("run_timeout", None.__class__), ("run_timeout", 10**400),
    ("timeout", 0), ("total_timeout", 0), ("first_output_timeout", 0), ("silence_timeout", 0.0001), ("queue_timeout", "x"), ("kill_grace", -1),
    ("warning_signal", "SIGKILL"), ("warning_signal", "USR1"), ("warning_signal", 10), ("result_grace", []), ("max_attempts", 0),
    ("max_attempts", 1001), ("max_attempts", 1.0), ("backoff", []), ("backoff", "x"), ("on_lost", "ignore"), ("writes_to", [""]), ("writes_to", ["a\x00"]),
    ("writes_to", "a"), ("writes_to", ["x"] * 257), ("on_conflict", "fail"), ("intent_ttl", "x"), ("deliver_to", ["x"] * 33), ("deliver_to", ""), ("deliver_to", {}),
    ("deliver_within", True), ("dedup_ttl", "forever"), ("expect", []), ("expect", {"files": ["x"] * 257}), ("expect", {"files": [""]}),
    ("expect", {"files": [{"path": "a\x00"}]}), ("expect", {"files": [{"min_bytes": 1}]}), ("expect", {"check": []}), ("expect", {"check": [""]}),
    ("expect", {"stdout_min_bytes": 10**400}), ("expect", {"stdout_min_bytes": "9" * 400}), ("expect", {"allow_no_work": "yes"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "written"), WRONG, ids=[f"{field}-{n}" for n, (field, _) in enumerate(WRONG)]
)
def test_a_wrong_field_is_named_in_a_short_message(field: str, written: Any) -> None:
    if isinstance(written, type):
        written = [None]
    error = _wrong(**{field: written})
    assert error.fields["field"] == field
    assert field in error.message
    assert len(error.message) < 500
    msgspec.json.encode(error.as_json())


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt_ref": "x"}, "prompt_ref"),
        ({"prompt": None, "prompt_ref": " "}, "prompt_ref"),
        ({"prompt": None, "prompt_ref": "a\x00"}, "prompt_ref"),
        ({"prompt": None}, "prompt"),
        ({"timeout": "1m", "run_timeout": "2m"}, "timeout"),
        ({"not_before": TIME, "expires_at": TIME}, "expires_at"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], field: str) -> None:
    assert _wrong(**fields).fields["field"] == field


def test_one_of_prompt_prompt_ref_and_command_is_enough_and_none_is_not() -> None:
    for more in ({"prompt": "x"}, {"prompt_ref": "x"}, {"command": ["x"]}):
        assert task_from_fields({"task": "t", **more}).task == "t"
    with pytest.raises(InvalidTask) as caught:
        task_from_fields({"task": "t"})
    assert caught.value.code == "missing_field"


def test_timeout_and_run_timeout_may_both_say_the_same() -> None:
    assert _read(timeout="1m", run_timeout=60).timeout == 60


def test_one_sink_may_be_named_as_a_text_and_is_the_same_task() -> None:
    text, listed = _read(deliver_to="mail"), _read(deliver_to=["mail"])
    assert text.own_sinks() == listed.own_sinks() == ["mail"]
    assert content_digest(text, None) == content_digest(listed, None)
    assert _read().own_sinks() is None


def test_after_policy_goes_with_after() -> None:
    assert _read(after="t1", after_policy="any").after_policy == "any"


@pytest.mark.parametrize(
    ("name", "nearest"), [("promt", "prompt"), ("Task", "task"), ("time_out", "timeout"), ("deliverto", "deliver_to"), ("maxattempts", "max_attempts")]
)  # fmt: skip
def test_an_unknown_field_names_the_nearest_known_one(name: str, nearest: str) -> None:
    error = _wrong(**{name: 1})
    assert (error.code, error.fields["field"], error.fields["nearest"]) == ("unknown_field", name, nearest)
    assert f"did you mean {nearest}?" in error.message


def test_an_unknown_field_that_resembles_nothing_lists_the_known_ones() -> None:
    error = _wrong(qqqqqqqq=1)
    assert error.fields["nearest"] is None
    assert all(name in error.message for name in FIELD_NAMES)


def test_unknown_fields_inside_expect_name_their_nearest_too() -> None:
    assert _wrong(expect={"file": []}).fields["nearest"] == "files"
    assert _wrong(expect={"files": [{"path": "x", "min_byte": 1}]}).fields["nearest"] == "min_bytes"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("allow_no_work", "expect.allow_no_work"),
        ("stdout_min_bytes", "expect.stdout_min_bytes"),
        ("min_duration", "expect.min_duration"),
        ("files", "expect.files"),
        ("check", "expect.check"),
        ("alow_no_work", "expect.allow_no_work"),
        ("min_bytes", "expect.files[].min_bytes"),
        ("changed", "expect.files[].changed"),
    ],
)
def test_a_field_of_expect_that_stands_at_the_top_is_told_its_place(name: str, place: str) -> None:
    error = _wrong(**{name: True})
    assert (error.code, error.fields["nearest"]) == ("unknown_field", place)
    assert f"did you mean {place}?" in error.message


def test_a_field_of_a_file_that_stands_in_expect_is_told_its_place() -> None:
    assert _wrong(expect={"min_bytes": 1}).fields["nearest"] == "expect.files[].min_bytes"
    assert _wrong(expect={"stdout_min_byte": 1}).fields["nearest"] == "stdout_min_bytes"


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b"null", "invalid_json"),
        (b'"x"', "invalid_json"),
        (b"1", "invalid_json"),
        (b"true", "invalid_json"),
        (b'{"task":"x","prompt":"p"} x', "invalid_json"),
        (b'{"task":"x","prompt":"p","priority":NaN}', "invalid_json"),
        (b'{"task":"x","prompt":"p","timeout":-Infinity}', "invalid_json"),
        (b'{"task":"x","prompt":"\x00"}', "invalid_json"),
        (b'{"task":"x","prompt":"\xff"}', "invalid_utf8"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"a":' * 100_000, "invalid_json"),
        (b'{"prompt":"p"}', "missing_field"),
        (b"{}", "missing_field"),
        (b'{"task":"x","prompt":"p","priority":1' + b"0" * 5000 + b"}", None),
        (b'{"task":"x","prompt":"p","timeout":1' + b"0" * 400 + b"}", "invalid_field"),
        (b'{"\\ud800":1}', None),
        (b'{"task":"\\ud800","prompt":"p"}', None),
    ],
)
def test_what_is_no_task_at_all_says_why(raw: bytes, code: str | None) -> None:
    with pytest.raises(InvalidTask) as caught:
        read_task(raw)
    assert code is None or caught.value.code == code
    msgspec.json.encode(caught.value.as_json())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
LIKELY = st.sampled_from(
    ["x", "1s", "-1", "", "SIGTERM", "any", "warn", "hold", TIME, ["x"], [], {}, {"A": "b"}, {"files": ["x"]}, 0, 1, 1e300, 10**30]
)  # fmt: skip


def _checked(raw: bytes) -> TaskRequest | None:
    try:
        task = read_task(raw)
    except InvalidTask as error:
        msgspec.json.encode(error.as_json())
        return None
    check_task(task)
    assert task.id is None or TASK_ID.fullmatch(task.id)
    for when in (task.not_before, task.expires_at, task.submitted_at):
        assert when is None or isinstance(parse_time_us(when), int)
    assert len(content_digest(task, None)) == 32
    return task


@given(st.binary(max_size=200))
def test_any_bytes_are_a_checked_task_or_invalid(raw: bytes) -> None:
    _checked(raw)


@given(JSON)
def test_any_json_is_a_checked_task_or_invalid(value: Any) -> None:
    _checked(json.dumps(value).encode())


@settings(max_examples=tries(400))
@given(st.dictionaries(st.sampled_from(FIELD_NAMES), LIKELY | JSON, max_size=6))
def test_any_values_of_known_fields_are_a_checked_task_or_invalid(fields: dict[str, Any]) -> None:
    _checked(json.dumps({**BASE, **fields}).encode())


@given(st.text(max_size=60).map(lambda text: json.dumps({**BASE, "prompt": text}).encode()), st.data())
def test_a_torn_or_bent_line_is_a_checked_task_or_invalid(raw: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(raw)))
    bent = raw[:at] + data.draw(st.binary(max_size=3)) + raw[at + data.draw(st.integers(0, 3)) :]
    _checked(bent)


# What makes two writings the same task.


def _digest(**fields: Any) -> bytes:
    return content_digest(_read(**fields), None)


def test_the_same_task_written_otherwise_has_the_same_content() -> None:
    one = read_task(b'{"task":"x","prompt":"p","timeout":"45m","priority":1}')
    two = read_task(b' {"priority": 1, "run_timeout" : 2700, "prompt":"\\u0070", "task":"x", "id": "z"} ')
    assert content_digest(one, None) == content_digest(two, None)


@pytest.mark.parametrize(
    "same",
    [{"id": "other"}, {"submitted_at": TIME}, {"queue": None}, {"expect": None}],
)
def test_identity_and_what_is_not_given_are_no_content(same: dict[str, Any]) -> None:
    assert _digest(**same) == _digest()


@pytest.mark.parametrize(
    "other",
    [{"prompt": "q"}, {"task": "other"}, {"priority": 0}, {"labels": ["x"]}, {"deliver_to": []}, {"env": {"A": "1"}}, {"backoff": "1s"}, {"expect": {}}],
)  # fmt: skip
def test_everything_else_is_content(other: dict[str, Any]) -> None:
    assert _digest(**other) != _digest()


def test_a_schedule_of_one_step_is_not_a_doubling_backoff() -> None:
    assert _digest(backoff="1s") != _digest(backoff=["1s"])


def test_a_prompt_counts_by_its_bytes_and_never_by_its_path() -> None:
    sha = prompt_digest(b"p")
    by_ref = [content_digest(read_task(json.dumps({"task": "demo", "prompt_ref": ref}).encode()), sha) for ref in ("a", "b/c")]  # fmt: skip
    assert by_ref[0] == by_ref[1] == _digest()
    assert content_digest(_read(prompt=None, prompt_ref="a"), prompt_digest(b"q")) != _digest()


@given(st.permutations(sorted({**BASE, "priority": 3, "labels": ["a"], "env": {"A": "1", "B": "2"}}.items())))
def test_the_order_of_fields_is_no_content(items: list[tuple[str, Any]]) -> None:
    assert content_digest(read_task(json.dumps(dict(items)).encode()), None) == _digest(
        priority=3, labels=["a"], env={"B": "2", "A": "1"}
    )


@given(st.lists(st.binary(max_size=5), max_size=4))
def test_a_derived_id_is_a_stable_valid_id(parts: list[bytes]) -> None:
    made = derived_id(*parts)
    assert made == derived_id(*parts)
    assert len(made) == 20
    assert TASK_ID.fullmatch(made)


def test_limits_are_what_the_messages_say() -> None:
    assert str(limits.MAX_ATTEMPTS_MAX) in _wrong(max_attempts=10**6).message
    assert str(limits.AFTER_MAX) in _wrong(after=["x"] * (limits.AFTER_MAX + 1)).message


@pytest.mark.parametrize(
    ("field", "written", "told"),
    [
        ("on_conflict", "wait", "it is one of queue, refuse, warn"),
        ("on_lost", "requeu", "it is one of fail, hold, requeue; did you mean requeue?"),
        ("after_policy", "sometimes", "it is one of"),
        ("writes_to", "a", "writes_to: expected a list, got a text"),
    ],
)
def test_a_value_that_is_none_of_the_known_is_told_in_plain_words(
    field: str, written: str, told: str
) -> None:
    message = _wrong(**{field: written}).message
    assert told in message
    assert "`" not in message
    assert "enum" not in message


def test_a_word_that_resembles_no_known_one_gets_no_wrong_advice() -> None:
    assert "did you mean" not in _wrong(on_conflict="wait").message
