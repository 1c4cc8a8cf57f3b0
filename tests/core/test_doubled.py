"""Keys that stand twice: found however they are written, and never where there are none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentqd.core.doubled import DoubledKey, refuse_doubled_keys
from agentqd.core.errors import InvalidTask
from agentqd.core.lines import split_glued
from agentqd.core.task import read_task, read_written_task


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b'{"task":"t","prompt":"p","id":"a","id":"b"}', "id"),
        (b'{"id":"a","task":"t","prompt":"p","id" \t: "a"}', "id"),
        (b'{"id":"a","task":"t","prompt":"p","\\u0069d":"b"}', "id"),
        (b'{"task":"t","prompt":"p","env":{"A":"1","A":"2"}}', "A"),
        (b'{"task":"t","prompt":"p","expect":{"check":["a"],"check":["b"]}}', "check"),
        (b'{"task":"t","prompt":"p","expect":{"files":[{"path":"a"},{"path":"b","path":"c"}]}}', "path"),
        (b'{"task":":","prompt":":id\\":","id":"a","labels":[",",":b"],"id":"b"}', "id"),
        (b'{"task":"t","id":null,"prompt":"say \\"id\\":","id":null}', "id"),
    ],
)
def test_a_key_that_stands_twice_is_named(raw: bytes, name: str) -> None:
    read_task(raw)  # what the journal has accepted before is still read
    with pytest.raises(InvalidTask, match=f"the key '{name}' stands twice") as caught:
        read_written_task(raw)
    assert (caught.value.code, caught.value.fields["field"]) == ("duplicate_field", name)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"task":"t","prompt":"p","env":{"task":"x","prompt":"y"}}',
        b'{"task":"id","prompt":"{\\"id\\": 1, \\"id\\": 2}","id":"id"}',
        b'{"task":"t","prompt":"p","expect":{"files":[{"path":"a"},{"path":"b"}]}}',
        b'{"task":":","prompt":":","submitted_at":"2026-01-01T00:00:00Z"}',
    ],
)
def test_the_same_word_in_another_place_is_no_second_key(raw: bytes) -> None:
    assert read_written_task(raw) == read_task(raw)


def test_a_good_line_behind_a_torn_one_must_be_one_that_is_taken() -> None:
    torn, good = b'{"task":"torn","pro', b'{"task":"t","prompt":"p"}'
    assert split_glued(torn + good) == (torn, good)
    assert split_glued(torn + b'{"task":"t","prompt":"p","task":"u"}') is None


NAMES = st.sampled_from(["id", "a", "b", ":", '"', "\\", "\\u0069d", "\ud800", ""])
VALUES = st.recursive(
    NAMES | st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_keys_of_their_own_are_never_doubled(value: Any) -> None:
    refuse_doubled_keys(_written(value))


@given(NAMES, VALUES, VALUES, st.sampled_from([b"", b" ", b"\t\r\n"]))
def test_a_second_key_is_found_beside_anything(name: str, first: Any, second: Any, space: bytes) -> None:
    escaped = b"".join(b"\\u%04x" % ord(letter) for letter in name)
    raw = b'[%s,{%s%s:%s,"other":1,"%s"%s:%s}]'
    with pytest.raises(DoubledKey) as caught:
        refuse_doubled_keys(
            raw % (_written(second), _written(name), space, _written(first), escaped, space, _written(second))
        )
    json.dumps(caught.value.name, ensure_ascii=False).encode()


def test_a_number_that_python_would_not_convert_hides_nothing() -> None:
    with pytest.raises(DoubledKey):
        refuse_doubled_keys(b'{"n":1' + b"0" * 5000 + b',"id":1,"id":2}')


def _written(value: Any) -> bytes:
    return json.dumps(value).encode()
