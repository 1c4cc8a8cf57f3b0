"""Types, plugs and schedules."""

from __future__ import annotations

import subprocess
import sys
from itertools import accumulate

import pytest

from agentqd.core.errors import ConfigError
from agentqd.core.retry import JITTER, Schedule, next_try_s, read_retry_after_s
from agentqd.core.settings import Sink as SinkSettings
from agentqd.core.sink_rules import _KEYS
from agentqd.core.units import Backoff, Duration
from agentqd.sinks.base import Context
from agentqd.sinks.registry import SCHEDULES, make_sink, schedule_for, sink_types

from .adapters import run_command

DAY = 86400.0


def waits(schedule: Schedule, count: int) -> list[float]:
    return [next_try_s(schedule, failures, 0.0, None) for failures in range(1, count + 1)]


def test_the_default_schedules_are_those_of_the_delivery_page() -> None:
    for type_ in ("completions", "rejected", "file"):
        schedule = schedule_for("x", None, type_)
        assert waits(schedule, 8) == [1, 2, 4, 8, 16, 32, 60, 60]
        assert schedule.lifetime_s is None
    command = schedule_for("x", None, "command")
    assert (waits(command, 12)[:2], waits(command, 12)[-1], command.lifetime_s) == ([5, 10], 3600, 3 * DAY)
    ssh = schedule_for("x", None, "ssh")
    assert (waits(ssh, 8), ssh.lifetime_s) == ([5, 10, 20, 40, 80, 160, 300, 300], 14 * DAY)
    email = schedule_for("x", None, "email")
    ages = [0.0, 300, 600, 1200, 2400, 4800, DAY]
    assert [next_try_s(email, 9, 0.0, None, age_s=age) for age in ages] == [
        300,
        300,
        600,
        1200,
        2400,
        4000,
        4000,
    ]
    assert email.lifetime_s == 5 * DAY
    own = SinkSettings(type="email", backoff=Backoff((2.0,), doubles=True), backoff_max=Duration(7))
    assert waits(schedule_for("x", own, "email"), 4) == [2, 4, 7, 7], (
        "who names a backoff gets it, whatever the age"
    )
    webhook = schedule_for("x", None, "webhook")
    assert waits(webhook, 9) == [5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400]


def test_a_webhook_has_ten_tries_whatever_the_jitter_and_is_dead_before_an_eleventh() -> None:
    webhook = schedule_for("x", None, "webhook")
    assert webhook.lifetime_s is not None
    at = list(accumulate(waits(webhook, 10)))
    assert at[8] * (1 + JITTER) < webhook.lifetime_s < at[9]


def test_a_sinks_own_settings_override_the_defaults() -> None:
    own = SinkSettings(
        type="command", backoff=Backoff((2.0,), doubles=True), backoff_max=Duration(7), lifetime=Duration(60)
    )
    schedule = schedule_for("x", own, "command")
    assert (waits(schedule, 4), schedule.lifetime_s) == ([2, 4, 7, 7], 60)
    listed = SinkSettings(type="file", backoff=Backoff((1.0, 500.0), doubles=False))
    assert waits(schedule_for("x", listed, "file"), 3) == [1, 500, 500]
    slow = SinkSettings(type="file", backoff=Backoff((120.0,), doubles=True))
    assert waits(schedule_for("x", slow, "file"), 2) == [120, 120], (
        "a default maximum does not cut what a person asked for"
    )
    assert schedule_for("x", SinkSettings(type="ssh"), "ssh") == schedule_for("x", None, "ssh")


def test_every_type_of_the_config_has_a_plug_and_a_schedule() -> None:
    assert set(sink_types()) == {*_KEYS, "completions", "rejected"} == set(SCHEDULES)


def test_what_has_no_plug_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match="mine cannot be used: pigeon is no type of sink"):
        make_sink(Context("mine", SinkSettings(type="pigeon"), "/", run_command, lambda: 0), 1)


def test_an_unknown_type_and_a_missing_path_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="carrier-pigeon is no type of sink"):
        schedule_for("x", None, "carrier-pigeon")
    with pytest.raises(ConfigError, match="needs a path"):
        make_sink(Context("mine", SinkSettings(type="file"), "/", run_command, lambda: 0), 1)


def test_a_plug_is_loaded_when_it_is_used_and_not_before() -> None:
    code = "import sys, agentqd.sinks.registry; print([m for m in sys.modules if m.startswith('agentqd.sinks.')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not any(f"agentqd.sinks.{type_}" in loaded for type_ in _KEYS)


def test_after_a_timeout_or_a_429_a_webhook_waits_a_minute_at_least() -> None:
    webhook, command = schedule_for("x", None, "webhook"), schedule_for("x", None, "command")
    assert next_try_s(webhook, 1, 0.0, None, busy=True) == 60
    assert next_try_s(webhook, 3, 0.0, None, busy=True) == 1800
    assert next_try_s(webhook, 1, 0.0, None) == 5
    assert next_try_s(command, 1, 0.0, None, busy=True) == 5
    own = schedule_for("x", SinkSettings(type="webhook", backoff=Backoff((1.0,), doubles=True)), "webhook")
    assert next_try_s(own, 1, 0.0, None, busy=True) == 60


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120), (" 7 ", 7), ("0", 0), ("-5", 0), ("1e400", DAY), ("99999999999999", DAY), ("nan", None), ("inf", DAY), ("", None), (None, None),
        ("soon", None), ("Sun, 06 Nov 1994 08:49:37 GMT", 0), ("Tue, 14 Nov 2023 22:14:20 GMT", 60), ("Fri, 31 Dec 9999 23:59:59 GMT", DAY),
        ("Fri, 31 Dec 99999 23:59:59 GMT", None), ("Thu, 01 Jan 1970 00:00:00 -9999", None), ("\x00", None), ("9" * 5000, DAY), ("1;2", None),
    ],
)  # fmt: skip
def test_retry_after_is_read_whatever_it_is(text: str | None, seconds: float | None) -> None:
    assert read_retry_after_s(text, 1_700_000_000_000_000) == seconds


@pytest.mark.parametrize("asked", [float("nan"), float("-inf"), -1e300, float("inf"), 1e300, 0.0])
def test_no_retry_after_breaks_the_next_try(asked: float) -> None:
    wait = next_try_s(schedule_for("x", None, "webhook"), 1, 0.5, asked)
    assert 5 <= wait <= DAY
