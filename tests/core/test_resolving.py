"""Whose word counts, where an entry goes, when to try again, when to look again, where things lie."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentqd.core.envelope import data_of, delivery_id, seal
from agentqd.core.errors import InvalidTask
from agentqd.core.folders import Folders, choose_folders
from agentqd.core.limits import RETRY_AFTER_MAX_S
from agentqd.core.resolve import Placement, Resolved, placement, resolve
from agentqd.core.retry import JITTER, Schedule, next_try_s, wait_s
from agentqd.core.routing import Subject, alert_sinks, known_sink, sinks_for
from agentqd.core.settings import (
    BUILT_IN,
    Alerts,
    Defaults,
    Match,
    Queue,
    Route,
    Runner,
    Settings,
    Sink,
    Writes,
)
from agentqd.core.task import Expect, TaskRequest
from agentqd.core.units import Backoff, Duration, parse_time_us
from agentqd.core.waking import next_wake_us, total_deadline_us, wake_times

# Each: the name in a task and in `Defaults`, the name when resolved, five values for five layers, lowest first.
LAYERED: list[tuple[str, str, list[Any]]] = [
    (name, f"{name}_s", [Duration(n) for n in (1, 2, 3, 4)])
    for name in ("run_timeout", "total_timeout", "queue_timeout", "first_output_timeout", "silence_timeout", "kill_grace",
                 "result_grace", "intent_ttl", "deliver_within", "dedup_ttl")
] + [
    ("max_attempts", "max_attempts", [1, 2, 3, 4]),
    ("backoff", "backoff", [Backoff((float(n),), doubles=True) for n in range(4)]),
    ("on_lost", "on_lost", ["hold", "requeue", "fail", "hold"]),
    ("workdir", "workdir", ["/a", "/b", "/c", "/d"]),
]  # fmt: skip


def _settings(defaults: Any, runner: Any, queue: Any, name: str) -> Settings:
    def layer(value: Any) -> Defaults:
        return Defaults(**({} if value is None else {name: value}))

    return Settings(
        defaults=layer(defaults),
        runners={"r": Runner(command=["x"], defaults=layer(runner))},
        queues={"q": Queue(defaults=layer(queue))},
    )


def _task(**fields: Any) -> TaskRequest:
    return TaskRequest(task="t", prompt="p", **fields)


@pytest.mark.parametrize(("name", "resolved_name", "values"), LAYERED, ids=[each[0] for each in LAYERED])
def test_the_task_beats_its_queue_beats_its_runner_beats_the_defaults_beats_what_is_built_in(
    name: str, resolved_name: str, values: list[Any]
) -> None:
    low, runner, queue, task = values

    def found(settings: Settings, **fields: Any) -> Any:
        return getattr(resolve(_task(**fields), "q", "r", settings), resolved_name)

    built_in = getattr(BUILT_IN, name)
    assert found(_settings(None, None, None, name)) == built_in
    assert found(_settings(low, None, None, name)) == low
    assert found(_settings(low, runner, None, name)) == runner
    assert found(_settings(low, runner, queue, name)) == queue
    assert found(_settings(low, runner, queue, name), **{name: task}) == task


def test_every_resolved_value_is_tried() -> None:
    elsewhere = {"warning_signal", "on_conflict", "deliver_to", "allow_no_work"}
    assert {each[1] for each in LAYERED} | elsewhere == set(Resolved.__struct_fields__)


def test_a_value_of_the_task_beats_config_edits_and_a_value_of_the_config_follows_them() -> None:
    own, follows = _task(timeout=Duration(5)), _task()
    for seconds in (180, 600):
        edited = _settings(Duration(seconds), None, None, "run_timeout")
        assert resolve(own, "q", "r", edited).run_timeout_s == 5
        assert resolve(follows, "q", "r", edited).run_timeout_s == seconds


def test_zero_is_a_value_and_no_absence() -> None:
    settings = _settings(Duration(7), None, None, "kill_grace")
    assert resolve(_task(kill_grace=Duration(0)), "q", "r", settings).kill_grace_s == 0
    ttl = Settings(writes=Writes(ttl=Duration(60)))
    assert resolve(_task(intent_ttl=Duration(5)), "default", "shell", ttl).intent_ttl_s == 5
    assert resolve(_task(), "default", "shell", ttl).intent_ttl_s == 60
    assert resolve(_task(intent_ttl=Duration(0)), "default", "shell", ttl).intent_ttl_s is None  # off
    off = Settings(writes=Writes(ttl=Duration(0)))
    assert resolve(_task(), "default", "shell", off).intent_ttl_s is None


def test_a_queue_or_runner_that_is_gone_leaves_the_defaults() -> None:
    assert resolve(_task(), "gone", "gone too", Settings()).run_timeout_s == 3600


def test_a_signal_becomes_its_number() -> None:
    assert resolve(_task(warning_signal="SIGUSR1"), "default", "shell", Settings()).warning_signal == 10
    assert resolve(_task(), "default", "shell", Settings()).warning_signal is None


def test_on_conflict_is_the_tasks_then_the_queues_then_the_defaults_then_the_writes() -> None:
    writes = Settings(writes=Writes(on_conflict="queue"))
    assert resolve(_task(), "q", "r", writes).on_conflict == "queue"
    with_defaults = msgspec.structs.replace(writes, defaults=Defaults(on_conflict="refuse"))
    assert resolve(_task(), "q", "r", with_defaults).on_conflict == "refuse"
    with_queue = msgspec.structs.replace(with_defaults, queues={"q": Queue(on_conflict="warn")})
    assert resolve(_task(), "q", "r", with_queue).on_conflict == "warn"
    assert resolve(_task(on_conflict="queue"), "q", "r", with_queue).on_conflict == "queue"


def test_a_task_may_allow_no_work_or_forbid_it_against_the_config() -> None:
    allowed = Settings(defaults=Defaults(allow_no_work=True))
    assert resolve(_task(), "q", "r", allowed).allow_no_work is True
    assert resolve(_task(expect=Expect(allow_no_work=False)), "q", "r", allowed).allow_no_work is False
    assert resolve(_task(expect=Expect(allow_no_work=True)), "q", "r", Settings()).allow_no_work is True
    assert resolve(_task(expect=Expect()), "q", "r", allowed).allow_no_work is True


PLACES = Settings(
    defaults=Defaults(queue="day", priority=1),
    queues={"day": Queue(), "night": Queue(defaults=Defaults(runner="bot", priority=5))},
    runners={"bot": Runner(command=["x"], defaults=Defaults(priority=3))},
)


@pytest.mark.parametrize(
    ("task", "settings", "found"),
    [
        (_task(), Settings(), Placement("default", "shell", 0)),
        (TaskRequest(task="t", command=["x"]), Settings(), Placement("default", "command", 0)),
        (_task(), PLACES, Placement("day", "shell", 1)),
        (_task(queue="night"), PLACES, Placement("night", "bot", 5)),
        (_task(runner="bot"), PLACES, Placement("day", "bot", 3)),
        (_task(runner="bot", priority=0), PLACES, Placement("day", "bot", 0)),
        (_task(queue="default"), PLACES, Placement("default", "shell", 1)),
    ],
)
def test_a_task_is_placed(task: TaskRequest, settings: Settings, found: Placement) -> None:
    assert placement(task, settings) == found


@pytest.mark.parametrize(("fields", "code"), [({"queue": "nigth"}, "unknown_queue"), ({"runner": "b0t"}, "unknown_runner")])  # fmt: skip
def test_an_unknown_queue_or_runner_tells_what_there_is(fields: dict[str, str], code: str) -> None:
    with pytest.raises(InvalidTask, match=r"there is bot|there is .*night") as caught:
        placement(_task(**fields), PLACES)
    assert caught.value.code == code


# Routing.

ROUTED = Settings(
    sinks={name: Sink(type="file", path="/x") for name in "abc"},
    routes=[
        Route(match=Match(type="agentq.task.*", result=["failed", "time*"]), deliver_to=["a"]),
        Route(match=Match(queue="q", label="nightly"), deliver_to=["b", "a"]),
        Route(match=Match(type="agentq.alert.lost"), deliver_to=["c"]),
    ],
    alerts=Alerts(deliver_to=["a"]),
)


@pytest.mark.parametrize(
    ("subject", "own", "sinks"),
    [
        (Subject("agentq.task.success", "z", "r", "success"), None, ["completions", "d"]),
        (Subject("agentq.task.failed", "z", "r", "failed"), None, ["completions", "a"]),
        (Subject("agentq.task.timeout", "q", "r", "timeout", ("x", "nightly")), None, ["completions", "a", "b"]),
        (Subject("agentq.task.failed", "q", "r", "failed", ("nightly",)), ["c", "completions", "c"], ["completions", "c"]),
        (Subject("agentq.task.failed", "q", "r", "failed"), [], ["completions"]),
    ],
)  # fmt: skip
def test_the_tasks_word_beats_the_routes_beat_the_defaults_and_completions_has_all(
    subject: Subject, own: list[str] | None, sinks: list[str]
) -> None:
    assert sinks_for(ROUTED, subject, own, ["d"]) == sinks


def test_an_alert_goes_where_alerts_go_and_where_a_route_names_its_type_and_not_to_completions() -> None:
    assert alert_sinks(ROUTED, Subject("agentq.alert.lost")) == ["a", "c"]
    assert alert_sinks(ROUTED, Subject("agentq.alert.no_work", "q")) == ["a"]
    assert alert_sinks(Settings(), Subject("agentq.alert.lost")) == []


def test_only_completions_and_configured_sinks_are_known() -> None:
    assert [known_sink(ROUTED, name) for name in ("completions", "a", "z", "rejected")] == [True, True, False, False]  # fmt: skip


# The envelope.

NAMES = st.text(max_size=10)
DATA = st.dictionaries(
    NAMES, st.none() | st.integers(-(2**53), 2**53) | NAMES | st.lists(NAMES, max_size=2), max_size=4
)


def test_a_delivery_id_is_what_it_was_in_the_first_release() -> None:
    assert delivery_id("0" * 32, "t1", 1, "result", "result") == "da550bee9960fe0060912c4842b1cab7"


@given(NAMES, NAMES, st.integers(1, 9), st.sampled_from(["result", "entry", "alert"]), NAMES)
def test_a_delivery_id_is_stable_and_has_no_dot(state: str, task: str, run: int, kind: Any, key: str) -> None:
    made = delivery_id(state, task, run, kind, key)
    assert made == delivery_id(state, task, run, kind, key)
    assert len(made) == 32
    assert made.isalnum()
    assert (delivery_id(state, task, run + 1, kind, key) == made) is (kind == "entry")


def test_ids_of_other_tasks_runs_kinds_and_keys_are_others() -> None:
    ids = {
        delivery_id(state, task, run, kind, key)
        for state in ("a", "b")
        for task in ("", "t", "u")
        for run in (1, 2)
        for kind in ("result", "alert")
        for key in ("", "k", "kk")
    }  # fmt: skip
    assert len(ids) == 2 * 3 * 2 * 2 * 3


@given(DATA, NAMES, st.none() | NAMES, NAMES)
def test_the_data_of_a_sealed_envelope_are_the_very_bytes(
    data: dict[str, Any], box: str, subject: str | None, type_: str
) -> None:
    raw = seal("d1", type_, box, subject, 0, data)
    assert data_of(raw) == msgspec.json.encode(data)
    envelope = msgspec.json.decode(raw)
    assert envelope["data"] == data
    assert (envelope["id"], envelope["type"], envelope["source"]) == ("d1", type_, f"/agentqd/{box}")
    assert (envelope["specversion"], envelope["time"]) == ("1.0", "1970-01-01T00:00:00.000Z")
    assert envelope.get("subject") == subject


def test_a_box_with_a_treacherous_name_hides_no_data() -> None:
    raw = seal("d1", "t", '","data":{"x":1}', '","data":', 0, {"real": True})
    assert data_of(raw) == b'{"real":true}'


# When to try again.


@given(st.floats(0.001, 3600), st.integers(1, 100))
def test_a_backoff_doubles_to_its_cap(first: float, failures: int) -> None:
    backoff = Backoff((first,), doubles=True)
    assert wait_s(backoff, failures) == min(first * 2.0 ** (failures - 1), 3600)


def test_a_schedule_is_followed_and_its_last_step_repeats_uncapped() -> None:
    backoff = Backoff((5.0, 10.0, 7200.0), doubles=False)
    assert [wait_s(backoff, n) for n in (1, 2, 3, 4, 1000)] == [5, 10, 7200, 7200, 7200]


def test_a_million_failures_do_not_overflow() -> None:
    assert wait_s(Backoff((1.0,), doubles=True), 10**6) == 3600


@given(st.integers(1, 50), st.floats(0, 1, exclude_max=True), st.none() | st.floats(0, RETRY_AFTER_MAX_S))
def test_jitter_adds_a_fifth_at_most_and_retry_after_is_a_floor(
    failures: int, draw: float, retry_after: float | None
) -> None:
    schedule = Schedule((5.0,), doubles=True, max_s=60.0, lifetime_s=None)
    base = min(5.0 * 2 ** (failures - 1), 60)
    found = next_try_s(schedule, failures, draw, retry_after)
    floor = retry_after or 0.0
    assert max(base, floor) <= found <= max(base * (1 + JITTER), floor)
    if floor < base:
        assert found == base * (1 + JITTER * draw)


@given(st.floats() | st.sampled_from([math.inf, -math.inf, math.nan, 1e300, -5.0]))
def test_a_hostile_retry_after_is_never_before_the_schedule_nor_more_than_a_day(retry_after: float) -> None:
    schedule = Schedule((5.0,), doubles=True, max_s=60.0, lifetime_s=None)
    assert 5.0 <= next_try_s(schedule, 1, 0.0, retry_after) <= RETRY_AFTER_MAX_S


# When to look again.

NOW = parse_time_us("2026-04-07T18:30:00Z")


def _wakes(settings: Settings | None = None, **fields: Any) -> dict[str, int]:
    task = _task(**fields)
    resolved = resolve(task, "default", "shell", settings or Settings())
    return {what: at - NOW for at, what in wake_times(task, resolved, NOW)}


def test_a_plain_task_is_never_looked_at_again() -> None:
    assert _wakes() == {}
    assert next_wake_us([], NOW) is None


def test_each_clock_of_a_waiting_task_has_its_time() -> None:
    assert _wakes(
        not_before="2026-04-07T18:30:10Z", expires_at="2026-04-07T18:31:00Z", total_timeout=Duration(30), queue_timeout=Duration(5)
    ) == {"start_time": 10_000_000, "expires": 60_000_000, "total_timeout": 30_000_000, "queue_timeout": 15_000_000}  # fmt: skip


def test_queue_timeout_counts_from_acceptance_if_the_start_time_is_past() -> None:
    assert _wakes(not_before="2020-01-01T00:00:00Z", queue_timeout=Duration(5))["queue_timeout"] == 5_000_000


@given(st.lists(st.integers(-5, 5), max_size=6))
def test_the_next_wake_is_the_earliest_that_lies_ahead(offsets: list[int]) -> None:
    times: Any = [(NOW + n, "start_time") for n in offsets]
    ahead = [NOW + n for n in offsets if n > 0]
    assert next_wake_us(times, NOW) == (min(ahead) if ahead else None)


def test_the_total_deadline_counts_from_the_runs_acceptance() -> None:
    resolved = resolve(_task(total_timeout=Duration(1.5)), "default", "shell", Settings())
    assert total_deadline_us(resolved, NOW) == NOW + 1_500_000
    assert total_deadline_us(resolve(_task(), "default", "shell", Settings()), NOW) is None


# Where things lie.


@pytest.mark.parametrize(
    ("env", "uid", "args", "state", "runtime"),
    [
        ({}, 0, {}, "/var/lib/agentqd", "/run/agentqd"),
        ({"HOME": "/home/u"}, 7, {}, "/home/u/.local/state/agentqd", "/home/u/.local/state/agentqd/run"),
        ({}, 7, {}, "//.local/state/agentqd", None),
        ({"XDG_STATE_HOME": "/s/", "XDG_RUNTIME_DIR": "/r/"}, 7, {}, "/s/agentqd", "/r/agentqd"),
        ({"XDG_STATE_HOME": "rel", "XDG_RUNTIME_DIR": "rel", "HOME": "/h"}, 7, {}, "/h/.local/state/agentqd", "/h/.local/state/agentqd/run"),
        ({"XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/r"}, 0, {}, "/var/lib/agentqd", "/run/agentqd"),
        ({"AGENTQD_STATE_DIR": "/a/", "AGENTQD_RUNTIME_DIR": "/b//"}, 0, {}, "/a", "/b"),
        ({"AGENTQD_STATE_DIR": "", "AGENTQD_RUNTIME_DIR": ""}, 0, {}, "/var/lib/agentqd", "/run/agentqd"),
        ({"AGENTQD_STATE_DIR": "/a", "AGENTQD_RUNTIME_DIR": "/b"}, 7, {"state_dir": "/c", "runtime_dir": "/d/"}, "/c", "/d"),
        ({"AGENTQD_STATE_DIR": "/"}, 0, {}, "/", "/run/agentqd"),
    ],
)  # fmt: skip
def test_folders_are_chosen(
    env: dict[str, str], uid: int, args: dict[str, str], state: str, runtime: str | None
) -> None:
    found = choose_folders(env, uid, **args)
    assert found.state == state
    assert runtime is None or found.runtime == runtime


def test_all_well_known_paths_lie_in_the_two_folders() -> None:
    folders = Folders("/s", "/r")
    assert folders.attempt("t1", 2) == "/s/tasks/t1/attempt-2"
    paths = {name: getattr(folders, name) for name in dir(Folders) if isinstance(getattr(Folders, name), property)}  # fmt: skip
    assert len(set(paths.values())) == len(paths) >= 11
    for name, path in paths.items():
        assert path.startswith("/r/" if "socket" in name else "/s/")
    assert paths["journal"] == "/s/journal.db"
    assert paths["queue_file"] == "/s/queue/tasks.jsonl"
