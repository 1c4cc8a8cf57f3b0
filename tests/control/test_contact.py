"""`AgentQ-Client: CLIENT_ID HOSTNAME`: a hint from outside, so anything may stand there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentqd.control.contact import read_contact
from agentqd.core.settings import Settings, Sink

from .harness import Daemon


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("c0ffee Laptop.Home.Arpa.", {"c0ffee", "laptop.home.arpa"}),
        ("  a-b_C   x ", {"a-b_c", "x"}),
        ("onlyone", set()),
        ("a b c", set()),
        ("", set()),
        (None, set()),
        ("a/b host", set()),
        ("id host\x1b[31m", set()),
        ("id -host..x", set()),
        ("id ..", set()),
        ("ïd host", set()),
        ("id hóst", set()),
        ("x" * 65 + " host", set()),
        ("id " + "h" * 254, set()),
        ("id\thost", set()),
        ("id " + "h" * 600, set()),
    ],
)
def test_only_a_client_id_and_a_host_name_are_taken(value: str | None, names: set[str]) -> None:
    assert read_contact(value) == names


@given(st.text(max_size=600))
def test_whatever_stands_there_is_short_and_harmless_or_nothing(value: str) -> None:
    names = read_contact(value)
    assert len(names) <= 2
    assert all(
        name.isascii() and name.isprintable() and " " not in name and len(name) <= 253 for name in names
    )


@pytest.mark.parametrize("settings", [Settings(sinks={"hook": Sink(type="file", path="/x/y")})])
async def test_a_request_with_the_header_is_heard_and_one_that_is_refused_is_not(daemon: Daemon) -> None:
    heard: list[frozenset[str]] = []
    daemon.delivery.hears_of = heard.append  # type: ignore[method-assign]
    for value in ("client-1 laptop", "nonsense", "client-2 laptop"):
        status, _ = await daemon.ask("GET", "/v1/status", headers={"AgentQ-Client": value})
        assert status == 200
    assert heard == [frozenset({"client-1", "laptop"}), frozenset({"client-2", "laptop"})]
