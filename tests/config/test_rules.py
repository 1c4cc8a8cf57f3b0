"""Rules between options."""

from __future__ import annotations

import pytest

from agentqd.core.config_rules import check_settings, effective_queue, effective_runner
from agentqd.core.runners import PRESETS
from agentqd.core.settings import (
    Alerts,
    Control,
    Defaults,
    Limits,
    Match,
    Queue,
    Route,
    Runner,
    Settings,
    Sink,
)  # fmt: skip
from agentqd.core.units import Duration, Size


def test_the_defaults_break_no_rule() -> None:
    assert check_settings(Settings()) == []


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_each_preset_makes_a_runner_that_breaks_no_rule(preset: str) -> None:
    settings = Settings(runners={"mine": Runner(preset=preset)})
    assert check_settings(settings) == []
    assert effective_runner(settings, "mine") is not None


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (Settings(defaults=Defaults(queue="nope")), ("defaults", "queue")),
        (Settings(defaults=Defaults(runner="nope")), ("defaults", "runner")),
        (Settings(defaults=Defaults(deliver_to=["nope"])), ("defaults", "deliver_to")),
        (Settings(alerts=Alerts(deliver_to=["nope"])), ("alerts", "deliver_to")),
        (Settings(routes=[Route(deliver_to=["nope"])]), ("routes", 0, "deliver_to")),
        (Settings(routes=[Route(match=Match(queue="nope"))]), ("routes", 0, "match", "queue")),
        (Settings(routes=[Route(match=Match(result=["sucess"]))]), ("routes", 0, "match", "result")),
        (Settings(queues={"a b": Queue()}), ("queues", "a b")),
        (Settings(queues={"a": Queue(concurrency=0)}), ("queues", "a", "concurrency")),
        (Settings(max_workers=0), ("max_workers",)),
        (Settings(limits=Limits(rescan_every=Duration(0))), ("limits", "rescan_every")),
        (Settings(limits=Limits(line_bytes_max=Size(0))), ("limits", "line_bytes_max")),
        (Settings(control=Control(mode="0777")), ("control", "mode")),
        (Settings(runners={"r": Runner()}), ("runners", "r")),
        (Settings(runners={"r": Runner(preset="cloude")}), ("runners", "r", "preset")),
        (Settings(runners={"r": Runner(command=["x", "{promt}"])}), ("runners", "r", "command")),
        (Settings(runners={"r": Runner(command=["x"], result="xml")}), ("runners", "r", "result")),
        (
            Settings(runners={"r": Runner(command=["x"], inherit_env=["*"])}),
            ("runners", "r", "inherit_env", 0),
        ),
        (
            Settings(runners={"r": Runner(command=["x"], env={"AGENTQ_TASK_ID": "x"})}),
            ("runners", "r", "env"),
        ),
        (Settings(sinks={"s": Sink(type="file")}), ("sinks", "s")),
        (Settings(sinks={"s": Sink(type="file", path="/x", url="http://x")}), ("sinks", "s", "url")),
        (Settings(sinks={"s": Sink(type="fiel", path="/x")}), ("sinks", "s", "type")),
        (Settings(sinks={"s": Sink(type="webhook")}), ("sinks", "s")),
        (Settings(sinks={"s": Sink(type="webhook", url="ftp://x")}), ("sinks", "s", "url")),
        (Settings(sinks={"s": Sink(type="webhook", url="http://u:p@x/")}), ("sinks", "s", "url")),
        (
            Settings(sinks={"s": Sink(type="webhook", url="http://x", secret_file="rel")}),
            ("sinks", "s", "secret_file"),
        ),
        (
            Settings(sinks={"s": Sink(type="webhook", url="http://x", secret_file=["/a", "b"])}),
            ("sinks", "s", "secret_file"),
        ),
        (
            Settings(sinks={"s": Sink(type="webhook", url="http://x", secret_file=[])}),
            ("sinks", "s", "secret_file"),
        ),
    ],
)
def test_a_broken_rule_names_its_option(settings: Settings, key: tuple[str | int, ...]) -> None:
    assert [problem.key for problem in check_settings(settings)] == [key]


@pytest.mark.parametrize(
    "headers",
    [{"Webhook-Id": "x"}, {"webhook-anything": "x"}, {"HOST": "x"}, {"content-type": "x"}, {"Content-Length": "1"}, {"Connection": "x"}, {"Expect": "x"}, {"a b": "x"}, {"": "x"},
     {"A:": "x"}, {"A": "x\r\nB: y"}, {"A": "\u00e9"}, {"A": "x\x00"}, {"A": "x" * 5000}, {"A": "1", "a": "2"}],
)  # fmt: skip
def test_a_webhooks_headers_override_none_of_ours_and_are_one_line_each(headers: dict[str, str]) -> None:
    sink = Sink(type="webhook", url="http://x", headers=headers)
    assert [problem.key for problem in check_settings(Settings(sinks={"s": sink}))] == [
        ("sinks", "s", "headers")
    ]


def test_a_webhook_as_the_page_shows_it_breaks_no_rule() -> None:
    sink = Sink(type="webhook", url="https://hooks.example/a?b=c", secret_file=["/new", "$CREDENTIALS_DIRECTORY/old"], headers={"Authorization": "x", "X-A": "$B ${C}"})  # fmt: skip
    assert list(check_settings(Settings(sinks={"s": sink}))) == []


def test_completions_is_a_sink_that_everybody_knows() -> None:
    assert check_settings(Settings(defaults=Defaults(deliver_to=["completions"]))) == []


def test_a_route_may_match_by_pattern() -> None:
    assert (
        check_settings(Settings(routes=[Route(match=Match(queue="night*", result=["success", "fail*"]))]))
        == []
    )


def test_default_shell_and_command_are_always_there() -> None:
    settings = Settings(queues={"a": Queue()}, runners={"r": Runner(preset="claude")})
    assert effective_queue(settings, "default") == Queue()
    assert effective_queue(settings, "nope") is None
    assert {effective_runner(settings, name) is None for name in ("shell", "command", "r")} == {False}
    assert effective_runner(settings, "claude") is None
