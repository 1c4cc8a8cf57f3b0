"""Rules between options."""

from __future__ import annotations

from typing import Any

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
from agentqd.core.sink_places import in_state
from agentqd.core.units import Backoff, Duration, Size


def test_the_defaults_break_no_rule() -> None:
    assert check_settings(Settings()) == []


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_each_preset_makes_a_runner_that_breaks_no_rule(preset: str) -> None:
    settings = Settings(runners={"mine": Runner(preset=preset)})
    assert check_settings(settings) == []
    assert effective_runner(settings, "mine") is not None


def test_a_runner_may_have_its_own_texts_for_a_usage_limit_or_none() -> None:
    for own, signs in ((["budget spent"], ("budget spent",)), ([], ()), (None, PRESETS["codex"].limit_signs)):
        settings = Settings(runners={"r": Runner(preset="codex", usage_limit=own)})
        assert check_settings(settings) == []
        spec = effective_runner(settings, "r")
        assert spec is not None
        assert spec.limit_signs == signs


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (Settings(defaults=Defaults(queue="nope")), ("defaults", "queue")),
        (Settings(defaults=Defaults(workdir="rel/a")), ("defaults", "workdir")),
        (Settings(defaults=Defaults(runner="nope")), ("defaults", "runner")),
        (Settings(defaults=Defaults(deliver_to=["nope"])), ("defaults", "deliver_to")),
        (Settings(alerts=Alerts(deliver_to=["nope"])), ("alerts", "deliver_to")),
        (Settings(routes=[Route(deliver_to=["nope"])]), ("routes", 0, "deliver_to")),
        (
            Settings(routes=[Route(match=Match(queue="nope"), deliver_to=["completions"])]),
            ("routes", 0, "match", "queue"),
        ),
        (
            Settings(routes=[Route(match=Match(result=["sucess"]), deliver_to=["completions"])]),
            ("routes", 0, "match", "result"),
        ),
        (
            Settings(routes=[Route(match=Match(type="agentq.task.entri"), deliver_to=["completions"])]),
            ("routes", 0, "match", "type"),
        ),
        (
            Settings(queues={"a": Queue(allow_deliver_to=["nope", "no*"])}),
            ("queues", "a", "allow_deliver_to"),
        ),
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
            Settings(runners={"r": Runner(preset="claude", usage_limit=["ok then", "*"])}),
            ("runners", "r", "usage_limit", 1),
        ),
        (
            Settings(runners={"r": Runner(preset="claude", usage_limit=["two\nlines"])}),
            ("runners", "r", "usage_limit", 0),
        ),
        (
            Settings(runners={"r": Runner(preset="claude", usage_limit=["limit"] * 33)}),
            ("runners", "r", "usage_limit"),
        ),
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
        check_settings(
            Settings(
                routes=[
                    Route(
                        match=Match(
                            queue="night*", result=["success", "fail*"], type=["agentq.alert.new", "*"]
                        ),
                        deliver_to=["completions"],
                    )
                ]
            )
        )
        == []
    )


def test_default_shell_and_command_are_always_there() -> None:
    settings = Settings(queues={"a": Queue()}, runners={"r": Runner(preset="claude")})
    assert effective_queue(settings, "default") == Queue()
    assert effective_queue(settings, "nope") is None
    assert {effective_runner(settings, name) is None for name in ("shell", "command", "r")} == {False}
    assert effective_runner(settings, "claude") is None


def _keys(settings: Settings) -> list[tuple[str | int, ...]]:
    return [problem.key for problem in check_settings(settings)]


def test_two_file_sinks_on_one_path_are_refused_and_both_are_named() -> None:
    sinks = {"a": Sink(type="file", path="/x/y"), "b": Sink(type="file", path="/x/./y")}
    [problem] = check_settings(Settings(sinks=sinks))
    assert problem.key == ("sinks", "b", "path")
    assert "the sink a" in problem.message


@pytest.mark.parametrize(
    ("path", "wrong"),
    [("/s/completions.jsonl", True), ("/s/../s/queue/tasks.jsonl", True), ("/s2/x", False), ("/x/s", False)],
)
def test_a_file_sink_in_the_state_folder_is_refused(path: str, wrong: bool) -> None:
    settings = Settings(sinks={"a": Sink(type="file", path=path)})
    assert [problem.key for problem in in_state(settings, "/s")] == [("sinks", "a", "path")] * wrong


@pytest.mark.parametrize("route", [Route(), Route(match=Match(queue="default"), deliver_to=[])])
def test_a_route_that_leads_nowhere_is_refused(route: Route) -> None:
    assert _keys(Settings(routes=[route])) == [("routes", 0, "deliver_to")]


@pytest.mark.parametrize("field", ["type", "queue", "runner", "result", "label"])
def test_an_empty_list_in_a_match_is_refused(field: str) -> None:
    route = Route(match=Match(**{field: []}), deliver_to=["completions"])
    assert _keys(Settings(routes=[route])) == [("routes", 0, "match", field)]


def _mail(**more: object) -> Settings:
    sinks = {
        "mail": Sink(type="email", host="h", from_="a@example.org"),
        "mine": Sink(type="email", host="h", from_="a@example.org", to="b@example.org"),
    }
    return Settings(sinks=sinks, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("sink", ["mail", "mine"])
def test_alerts_lead_to_no_email_sink_without_to(sink: str) -> None:
    found = _keys(_mail(alerts=Alerts(deliver_to=[sink])))
    assert found == ([("alerts", "deliver_to")] if sink == "mail" else [])


def test_a_route_may_lead_to_an_email_sink_without_to() -> None:
    """Entries that address themselves go; what names nobody is a dead letter that says so."""
    assert _keys(_mail(routes=[Route(deliver_to=["mail"])], defaults=Defaults(deliver_to=["mail"]))) == []


@pytest.mark.parametrize(
    ("more", "option"),
    [
        ({"lifetime": Duration(0)}, "lifetime"),
        ({"timeout": Duration(0)}, "timeout"),
        ({"ordered": True, "concurrency": 5}, "concurrency"),
        ({"concurrency": 1_000_000}, "concurrency"),
        ({"backoff": Backoff((60.0,), doubles=True), "backoff_max": Duration(5)}, "backoff_max"),
    ],
)
def test_a_pace_that_cannot_be_meant_is_refused(more: dict[str, Any], option: str) -> None:
    settings = Settings(sinks={"s": Sink(type="command", command=["x"], **more)})
    assert _keys(settings) == [("sinks", "s", option)]


def test_an_ordered_sink_may_say_that_it_sends_one_at_a_time() -> None:
    sink = Sink(type="command", command=["x"], ordered=True, concurrency=1, backoff=Backoff((5.0,), doubles=True), backoff_max=Duration(5))  # fmt: skip
    assert _keys(Settings(sinks={"s": sink})) == []
