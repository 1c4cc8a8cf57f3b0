"""Bytes become lines, whatever they are and however they come."""

import json
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentqd.core.errors import InvalidTask
from agentqd.core.lines import Line, expects_value, split_glued, split_lines
from agentqd.core.task import read_task

LIMIT = 1 << 20


def split(buffer: bytes, lines_max: int = 10**6, limit: int = LIMIT) -> tuple[list[Line], int]:
    return split_lines(buffer, 0, 0, lines_max, limit)


def is_task(raw: bytes) -> bool:
    try:
        read_task(raw)
    except InvalidTask:
        return False
    return True


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ['"', "\\", '\\"', "{", "}", '{"task":', "[,:", "a\\"]
)
tasks = st.fixed_dictionaries(
    {"task": st.sampled_from(["build", "a b", "x{y"]), "prompt": texts.map(lambda text: "p" + text)},
    optional={
        "id": st.from_regex(r"[a-z]{1,8}", fullmatch=True),
        "labels": st.lists(texts, max_size=3),
        "env": st.dictionaries(st.sampled_from(["A", "B"]), texts.map(lambda text: text.replace("\x00", ""))),
        "priority": st.integers(-9, 9),
        "expect": st.just({"files": [{"path": "out,[:"}], "stdout_min_bytes": 3}),
    },
)
good_lines = st.builds(
    lambda fields, spaced, ascii_only: json.dumps(
        fields, separators=None if spaced else (",", ":"), ensure_ascii=ascii_only
    ).encode(),
    tasks, st.booleans(), st.booleans(),
).filter(is_task)  # fmt: skip


def test_a_line_without_its_newline_waits():
    assert split(b'{"a":1}\n{"b"') == ([Line(0, 8, b'{"a":1}')], 8)
    assert split(b'{"b"') == ([], 0)
    assert split(b"") == ([], 0)


def test_crlf_and_a_byte_order_mark_are_not_part_of_the_content_but_of_the_length():
    lines, consumed = split(b'\xef\xbb\xbf{"a":1}\r\n\xef\xbb\xbf{"b":2}\n')
    assert lines == [Line(0, 12, b'{"a":1}'), Line(12, 11, b'{"b":2}')]
    assert consumed == 23


def test_blank_lines_are_consumed_and_not_handed_out():
    assert split(b"\n\r\n  \t\n\xef\xbb\xbf\n{}\n\n") == ([Line(11, 3, b"{}")], 15)
    assert split(b"\n" * 100_000, lines_max=10) == ([], 100_000)


def test_a_line_over_the_limit_is_cut_and_flagged():
    lines, consumed = split(b"{" + b"x" * 20 + b"}\n{}\n", limit=10)
    assert lines == [Line(0, 23, b"{" + b"x" * 9, too_long=True), Line(23, 3, b"{}")]
    assert consumed == 26
    assert split(b"12345678\r\n", limit=8)[0] == [Line(0, 10, b"12345678")]


def test_no_more_lines_than_asked_for_are_taken():
    assert split(b"a\nb\nc\n", lines_max=2) == ([Line(0, 2, b"a"), Line(2, 2, b"b")], 4)


pieces = st.lists(
    st.sampled_from(
        [b"\n", b"\r\n", b"\n\n\n", b" ", b"\xef\xbb\xbf", b"{}", b'{"a":"b"}', b"\x00", b"\xff", b"x" * 30]
    ),
    max_size=40,
).map(b"".join)


@given(
    pieces | st.binary(max_size=200), st.lists(st.integers(1, 17), min_size=1, max_size=8), st.integers(1, 5)
)
def test_the_same_lines_come_out_whatever_the_chunking(content, steps, lines_max):
    whole, consumed = split(content, limit=20)
    lines: list[Line] = []
    position, have, turn = 0, 0, 0
    while have < len(content) or split_lines(content[:have], position, position, lines_max, 20).consumed:
        have = min(len(content), have + steps[turn % len(steps)])
        turn += 1
        found = split_lines(content[:have], position, position, lines_max, 20)
        lines += found.lines
        position += found.consumed
    assert (lines, position) == (whole, consumed)
    for line in lines:
        assert content[line.offset : line.offset + line.length].endswith(b"\n")
        assert line.raw in content[line.offset : line.offset + line.length]


@given(st.binary(max_size=300) | pieces)
@example(b'{"\\')
@example(b'{"task":"a","prompt":"b"}' * 40)
def test_random_bytes_never_raise(content):
    split(content)
    expects_value(content)
    glued = split_glued(content)
    assert glued is None or (glued[0] + glued[1] == content and is_task(glued[1]))


def value_is_expected(prefix: bytes) -> bool:
    """The slow and plain reference."""
    inside, last, skip = False, "", False
    for byte in prefix:
        char = chr(byte)
        if skip:
            skip = False
        elif inside:
            skip = char == "\\"
            inside = char != '"'
            last = '"'
        elif char == '"':
            inside, last = True, char
        elif char not in " \t\r\n":
            last = char
    return not inside and last in (":", "[", ",")


@given(st.lists(good_lines, min_size=1, max_size=3), good_lines, st.integers(1, 400))
def test_good_lines_cut_at_any_byte_and_glued_to_the_next_good_line_cost_only_themselves(before, after, cut):
    torn = before[-1][: min(cut, len(before[-1]))]
    lines, _ = split(b"".join(line + b"\n" for line in before[:-1]) + torn + after + b"\n")
    assert [line.raw for line in lines[:-1]] == before[:-1]
    raw = lines[-1].raw
    if value_is_expected(torn):
        assert split_glued(raw) is None
    else:
        assert split_glued(raw) == (torn, after)


@given(st.lists(good_lines, min_size=2, max_size=6), st.lists(st.integers(1, 60), min_size=6, max_size=6))
def test_several_torn_lines_in_a_row_never_yield_anything_but_the_last_good_one(lines, cuts):
    torn = b"".join(line[:cut] for line, cut in zip(lines[:-1], cuts, strict=False))
    assert split_glued(torn + lines[-1]) in (None, (torn, lines[-1]))


@pytest.mark.parametrize(
    "prefix",
    [
        b'{"task":"a","env":',
        b'{"task":"a", "labels": [',
        b'[{"task":"x"},  ',
        b'{"a":1,',
        b'{"a":"\\\\", "b" :\t',
        b'{"a":"\\\\\\", "b :',
    ],
)
def test_a_whole_task_where_the_torn_line_expects_a_value_is_not_taken(prefix):
    assert split_glued(prefix + b'{"task":"b","prompt":"c"}') is None


@pytest.mark.parametrize(
    "prefix",
    [b'{"task":"a","prompt":"hello [', b'{"task":"a","prompt":"x\\"y:', b'{"task"', b"\x00" * 5000, b'{"task":"a"}', b"\xff\xfe",
     b'{"task":"a","prompt":"end\\'],
)  # fmt: skip
def test_a_whole_task_behind_any_other_prefix_is_taken(prefix):
    assert split_glued(prefix + b'{"task":"b","prompt":"c"}') == (prefix, b'{"task":"b","prompt":"c"}')


@pytest.mark.parametrize(
    "suffix",
    [
        b'{"task":"b"}',
        b'{"task":"b","prompt":" "}',
        b'{"task":"b","prompt":"c","wat":1}',
        b'{"task":"b","prompt":"c',
    ],
)
def test_a_suffix_that_is_no_valid_task_is_not_taken(suffix):
    assert split_glued(b'{"task":"a","prom' + suffix) is None


@pytest.mark.parametrize(
    "raw",
    [b'{"' * (1 << 19), b'{"id":' * (1 << 17), b'{"task":"a","labels":["' * 40_000, b"{" * (1 << 20), b'"\\"' * 300_000,
     b'{"task":"' + b"\\" * (1 << 20), b'{"task":"a","prompt":"b"}' * 40_000, b'{"env":{"task":' * 60_000,
     b'{"labels":[' + b'"a",' * 250_000],
    ids=range(9),
)  # fmt: skip
def test_a_mebibyte_of_hostile_bytes_costs_under_a_second_and_never_grows_quadratically(raw):
    def cost_s(content: bytes) -> float:
        start = time.process_time()
        split_glued(content)
        return time.process_time() - start

    assert min(cost_s(raw + b"}") for _ in range(2)) < 1.0
    assert min(cost_s(raw + raw + b"}") for _ in range(2)) < 2.0
