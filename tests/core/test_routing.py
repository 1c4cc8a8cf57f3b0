"""Which sinks an entry goes to: the rules of core.routing, one by one and all at once."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentqd.core.routing import COMPLETIONS, Subject, alert_sinks, forbidden, sinks_for
from agentqd.core.settings import Alerts, Match, Queue, Route, Runner, Settings, Sink

RESULT = Subject("agentq.task.failed", "agents", "claude", "failed", ("nightly", "team=web"))
ENTRY = Subject("agentq.task.entry", "agents", "claude", "", ("nightly",))
PLAIN = Subject("agentq.task.success", "default", "shell", "success")
ALERT = Subject("agentq.alert.no_work", "agents", "claude", "", ("nightly",))
BOX_ALERT = Subject("agentq.alert.disk_low")


@pytest.mark.parametrize(
    ("match", "fits"),
    [
        ({}, [RESULT, ENTRY, PLAIN]),
        ({"type": "agentq.task.*"}, [RESULT, ENTRY, PLAIN]),
        ({"type": "agentq.task.entry"}, [ENTRY]),
        ({"type": ["agentq.task.entry", "agentq.task.failed"]}, [RESULT, ENTRY]),
        ({"type": "agentq.alert.*"}, [ALERT, BOX_ALERT]),
        ({"type": "agentq.alert.*", "queue": "*"}, [ALERT]),
        ({"type": "agentq.alert.*", "label": "night*"}, [ALERT]),
        ({"type": "*", "result": "*"}, [RESULT, PLAIN]),
        ({"queue": "agents"}, [RESULT, ENTRY]),
        ({"queue": "AGENTS"}, []),
        ({"runner": ["cl*", "shell"]}, [RESULT, ENTRY, PLAIN]),
        ({"result": "failed"}, [RESULT]),
        ({"result": ["failed", "success"]}, [RESULT, PLAIN]),
        ({"result": "*"}, [RESULT, PLAIN]),
        ({"result": "[!s]*"}, [RESULT]),
        ({"label": "nightly"}, [RESULT, ENTRY]),
        ({"label": "night"}, []),
        ({"label": "team"}, []),
        ({"label": "team=web"}, [RESULT]),
        ({"label": "team=*"}, [RESULT]),
        ({"label": "*"}, [RESULT, ENTRY]),
        ({"label": []}, []),
        ({"queue": "agents", "result": "success"}, []),
        ({"queue": "agents", "runner": "claude", "result": "failed", "label": "nightly", "type": "agentq.task.f*"}, [RESULT]),
    ],
)  # fmt: skip
def test_a_route_matches(match: dict[str, Any], fits: list[Subject]) -> None:
    settings = Settings(routes=[Route(match=Match(**match), deliver_to=["s"])])
    matched = [subject for subject in (RESULT, ENTRY, PLAIN) if "s" in sinks_for(settings, subject, None, ())]
    matched += [subject for subject in (ALERT, BOX_ALERT) if "s" in alert_sinks(settings, subject)]
    assert matched == fits


def test_the_tasks_word_beats_the_routes_and_they_beat_the_defaults() -> None:
    routes = [
        Route(match=Match(queue="agents"), deliver_to=["a", "b"]),
        Route(match=Match(label="nightly"), deliver_to=["b", "c"]),
    ]
    settings = Settings(routes=routes)
    assert sinks_for(settings, RESULT, None, ["d"]) == [COMPLETIONS, "a", "b", "c"]
    assert sinks_for(settings, RESULT, ["x", "x"], ["d"]) == [COMPLETIONS, "x"]
    assert sinks_for(settings, RESULT, [], ["d"]) == [COMPLETIONS]
    assert sinks_for(settings, PLAIN, None, ["d"]) == [COMPLETIONS, "d"]


def test_alerts_go_where_the_config_says_and_where_a_route_names_their_type() -> None:
    routes = [Route(match=Match(queue="agents"), deliver_to=["a"]), Route(match=Match(type="agentq.alert.no_*"), deliver_to=["b"])]  # fmt: skip
    settings = Settings(routes=routes, alerts=Alerts(deliver_to=["c"]))
    assert alert_sinks(settings, ALERT) == ["c", "b"]
    assert alert_sinks(settings, BOX_ALERT) == ["c"]


WORDS = st.sampled_from(["a", "b", "ab", "a=b", "*", "a*", "?", "[ab]", ""])
PATTERNS = st.none() | WORDS | st.lists(WORDS, max_size=3)
MATCHES = st.builds(Match, type=PATTERNS, queue=PATTERNS, runner=PATTERNS, result=PATTERNS, label=PATTERNS)
SUBJECTS = st.builds(Subject, WORDS, WORDS, WORDS, WORDS, st.lists(WORDS, max_size=3).map(tuple))
SINKS = st.lists(st.sampled_from(["s", "t", "u", COMPLETIONS]), max_size=3)


def fits(match: Match, subject: Subject) -> bool:
    """The rules again, the plainest way."""
    have = {"type": [subject.type], "queue": [subject.queue], "runner": [subject.runner], "result": [subject.result],
            "label": list(subject.labels)}  # fmt: skip
    for field, values in have.items():
        wanted = getattr(match, field)
        patterns = [wanted] if isinstance(wanted, str) else wanted
        if patterns is None:
            continue
        if not any(value != "" and fnmatchcase(value, pattern) for value in values for pattern in patterns):
            return False
    return True


@given(
    st.lists(st.builds(Route, match=MATCHES, deliver_to=SINKS), max_size=4),
    SUBJECTS,
    st.none() | SINKS,
    SINKS,
)
def test_routing_is_its_rules(
    routes: list[Route], subject: Subject, task_says: list[str] | None, defaults: list[str]
) -> None:
    settings = Settings(routes=routes)
    found = sinks_for(settings, subject, task_says, defaults)
    routed = {sink for route in routes if fits(route.match, subject) for sink in route.deliver_to}
    wanted = set(task_says) if task_says is not None else routed or set(defaults)
    assert set(found) == wanted | {COMPLETIONS}
    assert found[0] == COMPLETIONS
    assert len(found) == len(set(found))
    alerted = {sink for route in routes if route.match.type and fits(route.match, subject) for sink in route.deliver_to}  # fmt: skip
    assert set(alert_sinks(settings, subject)) == alerted


@pytest.mark.parametrize(
    ("queue", "runner", "name", "by"),
    [
        (None, None, "any", None),
        (["mail"], None, "mail", None),
        (["mail"], None, "pager", "the queue q"),
        (["mail", "team-*"], None, "team-web", None),
        ([], None, "mail", "the queue q"),
        ([], [], COMPLETIONS, None),
        (["*"], ["mail"], "pager", "the runner r"),
        (None, ["mail"], "pager", "the runner r"),
        (["mail"], ["pager"], "mail", "the runner r"),
        (["mail"], ["pager"], "pager", "the queue q"),
    ],
)
def test_both_the_queue_and_the_runner_must_allow_a_sink(
    queue: list[str] | None, runner: list[str] | None, name: str, by: str | None
) -> None:
    settings = Settings(
        queues={"q": Queue(allow_deliver_to=queue)},
        runners={"r": Runner(preset="shell", allow_deliver_to=runner)},
        sinks={each: Sink(type="file", path="/x") for each in ("any", "mail", "pager", "team-web")},
    )
    found = [*forbidden(settings, "q", "r", [name])]
    assert [(each.sink, each.by) for each in found] == ([] if by is None else [(name, by)])
    if by is not None:
        allowed = ", ".join([COMPLETIONS, *((queue if by == "the queue q" else runner) or ())])
        assert str(found[0]) == f"{by} does not allow {name!r}; it allows {allowed}"
    assert not [*forbidden(settings, "gone", "gone", [name])]
