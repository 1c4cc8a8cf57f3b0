"""Do two declared paths overlap? Against a matcher that tries every path of a small world."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
from budget import tries
from hypothesis import given, settings
from hypothesis import strategies as st

from agentqd.core.intents import at_or_above, below, has_glob, head, overlap

ALPHABET = "ab"
NAMES = [*ALPHABET, *("".join(pair) for pair in product(ALPHABET, repeat=2))]
WORLD = [parts for depth in range(4) for parts in product(NAMES, repeat=depth)]


def _path(parts: tuple[str, ...] | list[str]) -> str:
    return "/" + "/".join(parts)


@cache
def _matches(name: str, pattern: str) -> bool:
    """`*` and `?` within one name, spelt out."""
    if not pattern:
        return not name
    if pattern[0] == "*":
        return any(_matches(name[n:], pattern[1:]) for n in range(len(name) + 1))
    return bool(name) and pattern[0] in ("?", name[0]) and _matches(name[1:], pattern[1:])


def _covers(pattern: tuple[str, ...], path: tuple[str, ...]) -> bool:
    """`pattern` matches the path itself or a folder above it."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_covers(pattern[1:], path[n:]) for n in range(len(path) + 1))
    return bool(path) and _matches(path[0], pattern[0]) and _covers(pattern[1:], path[1:])


PLAIN = st.lists(st.sampled_from(NAMES), max_size=3).map(tuple)
GLOB = st.lists(st.sampled_from([*ALPHABET, "ab", "*", "?", "a*", "*b", "?a", "**", "a?*"]), max_size=3).map(
    tuple
)


@settings(max_examples=tries(400))
@given(PLAIN | GLOB, PLAIN)
def test_a_plain_path_meets_a_glob_exactly_where_both_can_cover_a_path(
    pattern: tuple[str, ...], plain: tuple[str, ...]
) -> None:
    both = any(_covers(pattern, plain + below) for below in WORLD)
    assert overlap(_path(pattern), _path(plain)) == both


@settings(max_examples=tries(400))
@given(GLOB, GLOB)
def test_two_globs_that_can_meet_are_never_missed(left: tuple[str, ...], right: tuple[str, ...]) -> None:
    if any(_covers(left, path) and _covers(right, path) for path in WORLD):
        assert overlap(_path(left), _path(right))


TEXT = st.text(alphabet="ab/*?[]!.-", min_size=1, max_size=10).map(lambda text: "/" + text)


@given(TEXT, TEXT)
def test_overlap_is_symmetric(left: str, right: str) -> None:
    assert overlap(left, right) == overlap(right, left)


@given(PLAIN | GLOB)
def test_a_path_overlaps_itself_and_all_below_and_above_it(parts: tuple[str, ...]) -> None:
    path = _path(parts)
    assert overlap(path, path)
    assert overlap(path, path.rstrip("/") + "/below/it")
    assert overlap("/", path)


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ("/a", "/a/", True),
        ("/a", "/ab", False),
        ("/a/b", "/a/c", False),
        ("/a/*.py", "/a/x.py", True),
        ("/a/*.py", "/a/x.txt", False),
        ("/a/*.py", "/a/b/x.py", False),
        ("/a/**/*.py", "/a/b/c/x.py", True),
        ("/a/**", "/a", True),
        ("/a/**", "/b", False),
        ("/a/[xy]", "/a/x", True),
        ("/a/[xy]", "/a/z", False),
        ("/a/[!x]", "/a/x", False),
        ("/a/*.py", "/a/*.txt", True),  # a false alarm is a wait
        ("/a/*/c", "/a/b", True),
        ("/*", "/a/b/c", True),
        ("/a/x[", "/a/x[", True),
    ],
)
def test_known_pairs(left: str, right: str, expected: bool) -> None:
    assert overlap(left, right) is expected
    assert overlap(right, left) is expected


def test_many_stars_take_no_exponential_time() -> None:
    assert overlap("/" + "**/a/" * 20, "/" + "**/b/" * 20)
    assert not overlap("/" + "a/" * 200 + "x", "/" + "a/" * 200 + "y*")


def test_what_a_glob_is() -> None:
    assert [has_glob(text) for text in ("a", "a*", "?", "[a]", "{a}", "")] == [False, True, True, True, False, False]  # fmt: skip


# With sets and hidden names, and through the index: every pair that overlaps is found by its heads.

SETS = {"[ab]": "ab", "[!a]": "b.", "[.a]": ".a", "[a-b]": "ab"}
PIECE = st.sampled_from([*ALPHABET, ".", "*", "?", *SETS])
NAME_GLOB = st.lists(PIECE, min_size=1, max_size=3)


def _piece_matches(name: str, pieces: list[str]) -> bool:
    """A pattern given in pieces, spelt out."""
    if not pieces:
        return not name
    first, rest = pieces[0], pieces[1:]
    if first == "*":
        return any(_piece_matches(name[n:], rest) for n in range(len(name) + 1))
    letters = SETS.get(first, "ab." if first == "?" else first)
    return bool(name) and name[0] in letters and _piece_matches(name[1:], rest)


def _spelt(pattern: list[list[str]]) -> list[tuple[str, ...]]:
    """Every path of at most two names that it covers."""
    names = [*NAMES, ".a", "a.", ".b", "b.", "."]
    world = [(), *((name,) for name in names), *product(names, repeat=2)]
    return [
        path
        for path in world
        if len(path) >= len(pattern) and all(_piece_matches(name, each) for name, each in zip(path, pattern, strict=False))
    ]  # fmt: skip


@settings(max_examples=tries(300))
@given(st.lists(NAME_GLOB, max_size=2), st.lists(NAME_GLOB, max_size=2))
def test_patterns_with_sets_and_hidden_names_are_never_missed(
    left: list[list[str]], right: list[list[str]]
) -> None:
    one, other = (_path(tuple("".join(each) for each in pattern)) for pattern in (left, right))
    if set(_spelt(left)) & set(_spelt(right)):
        assert overlap(one, other)


@settings(max_examples=tries(500))
@given(PLAIN | GLOB | TEXT.map(lambda text: tuple(text.split("/"))), PLAIN | GLOB)
def test_whatever_overlaps_is_found_by_the_heads(left: tuple[str, ...], right: tuple[str, ...]) -> None:
    one, other = (_path(tuple(part for part in parts if part)) for parts in (left, right))
    if overlap(one, other):
        low, high = (each.encode() for each in below(head(one)))
        assert head(other) in at_or_above(head(one)) or low < head(other).encode() < high


def test_heads_by_hand() -> None:
    assert [head(path) for path in ("/", "/a/b", "/a/*", "/*", "/a/b[x]/c", "/a/**")] == ["/", "/a/b", "/a", "/", "/a", "/a"]  # fmt: skip
    assert at_or_above("/a/b") == ["/a/b", "/a", "/"]
    assert at_or_above("/") == ["/"]
    assert [below("/"), below("/a")] == [("/", "0"), ("/a/", "/a0")]
