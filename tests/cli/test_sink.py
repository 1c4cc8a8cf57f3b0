"""`agentqctl sink` and the verbs of `outbox` that move many rows."""

from __future__ import annotations

import pytest
from aiohttp import web

from .conftest import Ctl
from .standin import LATER, StandIn, a_row, a_sink

HOSTILE = "\x1b[31mred\x1b]0;title\x07 \u202eabc"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "ok"),
        ({"breaker": "open", "next_probe_at": LATER}, "resting until "),
        ({"left_alone_until": LATER}, "asked to be left alone until "),
        ({"breaker": "half_open"}, "probing"),
        (
            {
                "breaker": "disabled",
                "disabled": "by a person (uid 7): full",
                "disabled_by": "person",
            },
            "disabled by a person (uid 7): full",
        ),
        (
            {"breaker": "disabled", "disabled": "HTTP 410: gone", "disabled_by": "receiver"},
            "disabled: HTTP 410: gone",
        ),
        ({"in_config": False, "type": None}, "not in the config"),
        ({"rate": "10/s", "rate_limited": True}, "rate-limited (10/s)"),
        ({"rate": "10/s"}, "ok, at most 10/s"),
    ],
)
def test_the_list_says_in_words_what_keeps_a_sink(
    ctl: Ctl, daemon: StandIn, changes: dict[str, object], said: str
) -> None:
    daemon.sinks = [a_sink(**changes)]
    cells = ctl("sink").out.rstrip("\n").split("\t")
    assert cells[2].startswith(said)
    assert (cells[0], cells[3], cells[5], cells[7], cells[8], cells[9]) == ("hook", "3", "1", "4/20/205", "1/1/2", "1 of 5 (20)")  # fmt: skip
    assert ctl("sink", "list", "--json").json == daemon.sinks


@pytest.mark.parametrize(
    ("outcome", "code"), [("delivered", 0), ("deferred", 75), ("rejected", 1), ("disabled", 1)]
)
def test_a_test_exits_as_it_went_and_prints_the_receivers_answer(
    ctl: Ctl, daemon: StandIn, outcome: str, code: int
) -> None:
    daemon.outcome = outcome
    done = ctl("sink", "test", "hook")
    assert (done.code, done.err) == (code, "")
    word = "refused" if outcome == "disabled" else outcome
    assert done.out.startswith(f"{word} in 0.2s: HTTP 200")
    assert ("a real delivery would disable" in done.out) is (outcome == "disabled")
    assert "\x1b" not in done.out
    assert "d9 (agentq.test) to hook" in done.out
    assert ctl("sink", "test", "hook", "--json").code == code


def test_a_test_says_how_long_the_receiver_asks_to_be_left_alone(ctl: Ctl, daemon: StandIn) -> None:
    daemon.outcome, daemon.retry_after_s = "deferred", 120.0
    assert "left alone for 2m" in ctl("sink", "test", "hook").out
    daemon.retry_after_s = 0.0  # a Retry-After in the past
    assert "left alone" not in ctl("sink", "test", "hook").out


def test_enable_says_how_many_rows_go_on(ctl: Ctl, daemon: StandIn) -> None:
    _answers(daemon, "/v1/sinks/hook/enable", {"sink": "hook", "disabled": False, "changed": True, "releasing": 3})  # fmt: skip
    assert ctl("sink", "enable", "hook").out == "hook  enabled, 3 held rows being released\n"


def _answers(daemon: StandIn, path: str, answer: dict[str, object]) -> None:
    async def say(_: web.Request) -> web.StreamResponse:
        return web.json_response(answer)

    daemon.answers[("POST", path)] = say


def test_failures_stay_in_the_list_longer_than_successes(ctl: Ctl, daemon: StandIn) -> None:
    daemon.sinks = [a_sink(last_error="connect to https://example.org/hook: connection refused")]
    page = ctl.on_terminal("sink").out
    assert "FAILED" in page
    assert "1/1/2" in page


def test_what_a_retry_leaves_is_said_with_what_mends_it(ctl: Ctl, daemon: StandIn) -> None:
    _answers(daemon, "/v1/outbox/retry", {"changed": 0, "left": 2, "stay_held": {"hook": 1}, "waiting": {"retryable": 4, "held": 1}})  # fmt: skip
    done = ctl("outbox", "retry", "ALL", "--sink", "hook")
    assert (done.code, done.out) == (0, "0 rows changed\n")
    assert "hook is disabled: 1 row stays held; agentqctl sink enable hook" in done.err
    assert "2 rows left" in done.err
    assert "agentqctl outbox retry ALL --sink hook --state retryable" in done.err
    assert "agentqctl outbox list --sink hook --state held" in done.err
    by_id = ctl("outbox", "retry", "d1")
    assert by_id.code == 1
    assert "hook is disabled: 1 row stays held" in by_id.err


def test_ids_that_are_no_deliverys_are_said_at_once(ctl: Ctl, daemon: StandIn) -> None:
    daemon.rows = [a_row("d1")]
    for ids in (["dnope"], ["all", "--dry-run"]):
        done = ctl("outbox", "retry", *ids)
        assert (done.code, done.out) == (66, "")
        assert f"there is no delivery '{ids[0]}'" in done.err
    _answers(daemon, "/v1/outbox/retry", {"changed": 1, "unknown": ["dnope"]})
    done = ctl("outbox", "retry", "d1", "dnope")
    assert (done.code, done.out) == (66, "1 row changed\n")
    assert "there is no delivery 'dnope'" in done.err


def test_a_row_that_cannot_take_it_says_what_it_is(ctl: Ctl, daemon: StandIn) -> None:
    daemon.rows = [a_row("d1")]
    _answers(daemon, "/v1/outbox/retry", {"changed": 0})
    done = ctl("outbox", "retry", "d1")
    assert done.code == 1
    assert "completions delivered" in done.err
    assert "--sink NAME" in done.err


def test_hold_takes_what_has_been_tried_too_and_ids_go_with_a_state(ctl: Ctl, daemon: StandIn) -> None:
    daemon.rows = [a_row("d1")]
    assert ctl("outbox", "hold", "ALL").code == 0
    assert ctl("outbox", "hold", "d1", "--state", "retryable").code == 0
    assert [body for _, body in daemon.requests("POST", "/v1/outbox/hold")] == [
        {"all": True, "state": "pending,retryable"},
        {"delivery_ids": ["d1"], "state": "retryable"},
    ]


def test_show_never_cuts_a_reason(ctl: Ctl, daemon: StandIn) -> None:
    reason = "HTTP 400: " + " ".join(f"word{n}" for n in range(40))
    daemon.rows = [a_row("d1", state="dead", last_error=reason, delivered_at=None)]
    said = " ".join(ctl("outbox", "show", "d1").out.split())
    assert f"error: {reason}" in said


def test_disable_and_enable_say_what_they_did(ctl: Ctl, daemon: StandIn) -> None:
    assert ctl("sink", "disable", "hook", "--reason", "it floods us").out == "hook  disabled\n"
    assert ctl("sink", "enable", "hook").out == "hook  enabled\n"
    assert daemon.requests("POST", "/v1/sinks/hook/disable") == [({}, {"reason": "it floods us"})]
    done = ctl("sink", "disable", "nope")
    assert (done.code, done.out) == (66, "")
    assert "there is no sink nope" in done.err
    assert ctl("sink", "disable").code == 2


def test_rows_are_picked_by_time_state_and_sink_and_counted_before(ctl: Ctl, daemon: StandIn) -> None:
    daemon.rows = [a_row("d1"), a_row("d2")]
    picked = ["--since", "2h", "--until", "2026-01-01T00:00:00Z", "--sink", "hook"]
    assert ctl("outbox", "retry", "ALL", *picked, "--state", "delivered,dead").out == "2 rows changed\n"
    assert ctl("outbox", "drop", "ALL", "--dry-run").out == "2 rows would change\n"
    assert ctl("outbox", "list", "--since", "2h").code == 0
    assert [body for _, body in daemon.requests("POST", "/v1/outbox/retry")] == [
        {
            "all": True,
            "state": "delivered,dead",
            "since": "2h",
            "until": "2026-01-01T00:00:00Z",
            "sink": "hook",
        }
    ]
    assert [body for _, body in daemon.requests("POST", "/v1/outbox/drop")] == [
        {"all": True, "state": "dead", "dry_run": True}
    ]
    assert daemon.requests("GET", "/v1/outbox")[0][0]["since"] == "2h"
    assert ctl("outbox", "hold", "d1", "--since", "2h").code == 2


def test_rows_move_to_another_sinks_name_and_what_is_there_already_is_said(ctl: Ctl, daemon: StandIn) -> None:
    daemon.rows = [a_row("d1"), a_row("d2")]
    done = ctl("outbox", "move", "ALL", "--from", "old", "--to", "hook")
    assert done.out == "2 rows moved\n"
    assert "1 row kept: hook has the same entry already" in done.err
    assert daemon.requests("POST", "/v1/outbox/move") == [({}, {"all": True, "from": "old", "to": "hook"})]
    assert ctl("outbox", "move", "ALL", "--to", "hook").code == 2


def test_a_row_of_a_sink_that_is_not_in_the_config_says_so(ctl: Ctl, daemon: StandIn) -> None:
    daemon.rows = [a_row("d1", sink="old", sink_in_config=False, state="pending", delivered_at=None)]
    assert "old (not in the config)" in ctl("outbox").out
    daemon.status["sinks"]["old"] = a_sink(in_config=False, last_error="not in the config")
    daemon.status["sinks"]["slow"] = a_sink(rate_limited=True)
    page = ctl("status").out
    assert "not in config" in page
    assert "rate-limited" in page


def test_what_a_sink_is_called_and_says_never_reaches_the_terminal_raw(ctl: Ctl, daemon: StandIn) -> None:
    daemon.sinks = [a_sink(HOSTILE, breaker="disabled", disabled=HOSTILE, last_error=HOSTILE)]
    for done in (ctl("sink"), ctl("sink", "--json")):
        assert "\x1b" not in done.out
        assert "\u202e" not in done.out
