"""The name of a task that nobody has named."""

from __future__ import annotations

import time

import pytest

from agentqd.client.taskname import name_from, name_from_argv

from .conftest import Ctl
from .standin import StandIn


@pytest.mark.parametrize(
    ("text", "name"), [("a\x1b[31m\nb", "a [31m b"), ("", "task"), ("x" * 500, "x" * 60), ("\u202e", "task"), ("one " * 20, "one " * 7 + "one")]
)  # fmt: skip
def test_names_are_short_and_printable(text: str, name: str) -> None:
    assert name_from(text) == name


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("API_KEY=sk-LEAKME123 curl x", "curl x"),
        ("API_KEY='sk LEAKME 123' B=\"LEAKME\" curl x", "curl x"),
        ("curl --token=LEAKME https://a.example/?key=LEAKME", "curl"),
        ("use sk-LEAKME1 for the tests", "use for the tests"),
        ("clone https://me:LEAKME@git.example/x.git", "clone"),
        ("clone https://git.example/LEAKME0123456789/x and build", "clone and build"),
        ("call it with --password LEAKME, then stop", "call it with --password then stop"),
        ("curl -H 'Authorization: Bearer LEAKME' x", "curl -H 'Authorization: Bearer x"),
        ("token:LEAKME password: LEAKME fetch", "password: fetch"),
        ("curl -H 'Authorization: Basic LEAKME' and basic checks", "curl -H 'Authorization: Basic and basic checks"),
        ("clone //LEAKME@git.example with actions/checkout@v4", "clone with actions/checkout@v4"),
        ('{"api-key": "LEAKME", "x": 1}', '{"api-key": "x": 1}'),
        ("7f3d2b10-aaaa-4bbb-8ccc-LEAKME000000", "task"),
        ("mend src/parser_2.py: the token is counted twice", "mend src/parser_2.py: the token is counted twice"),
        ("internationalisation of v2, 2026-01-01", "internationalisation of v2, 2026-01-01"),
    ],
)  # fmt: skip
def test_a_name_that_nobody_gave_holds_nothing_that_looks_like_a_secret(prompt: str, name: str) -> None:
    assert name_from(prompt) == name


def test_an_argument_with_a_secret_in_it_is_no_part_of_the_name() -> None:
    assert name_from_argv(["env", "PASS=a LEAKME", "make", "--jobs", "2"]) == "env make --jobs 2"
    assert name_from_argv(["sh", "-c", "X=1 LEAKME"]) == "sh -c"


def test_a_name_that_a_person_gave_is_theirs(ctl: Ctl, daemon: StandIn) -> None:
    assert ctl("submit", "--task", "A=1 sk-given00000000000", "true").code == 0
    assert ctl("submit", "A=LEAKME go").code == 0
    names = [body["task"] for _, body in daemon.requests("POST", "/v1/tasks")]
    assert names == ["A=1 sk-given00000000000", "go"]


@pytest.mark.parametrize("letter", ["-", ":", "a", "1", "=", '"', "'", "@", "/", "token:"])
def test_a_long_hostile_word_costs_no_time(letter: str) -> None:
    began = time.process_time()
    name_from(letter * 100_000)
    assert time.process_time() - began < 1.0
