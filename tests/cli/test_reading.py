from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

import pytest
from aiohttp import web

from agentqd.cli.text import width
from agentqd.client.ids import new_task_id

from .conftest import Ctl
from .standin import LATER, NOW, StandIn, a_row, a_sink, a_status, a_task, error

HOSTILE = (
    "evil \x1b[31mred\x1b]0;title\x07 \x9b2J \r\n\u202eabc\u2066 \ud800 ü 日本語の長い名前 👩‍👩‍👧 e\u0301"
)
READING = [
    ["status"], ["list"], ["show", "t1"], ["outbox"], ["outbox", "list"], ["outbox", "show", "d1"], ["sink"], ["sink", "list"], ["writes"], ["writes", "list"],
    ["writes", "conflicts"], ["audit", "show"], ["audit", "verify"], ["config", "show"], ["config", "schema"], ["doctor"],
    ["pull", "--no-ack"], ["wait", "t1"], ["version"],
]  # fmt: skip
COLOUR = re.compile("\x1b\\[[0-9;]*m")


def fill(daemon: StandIn, name: str = "fix the tests") -> None:
    daemon.tasks["t1"] = a_task(
        task=name,
        detail=name,
        reason=None,
        outbox=[a_row(name=name, last_error=name, state="dead", delivered_at=None)],
    )
    daemon.tasks["q" * 64] = a_task(
        "q" * 64,
        task=name,
        state="blocked",
        result=None,
        waiting_for={"reason": "write_conflict", "until": None, "text": name},
    )
    daemon.rows = [
        a_row(name=name, sink=name, last_error=name, state="dead", delivered_at=None),
        a_row("f" * 40),
    ]
    daemon.completions = [
        {
            "seq": 1,
            "task_id": "t1",
            "name": name,
            "status": "failed",
            "reason": name,
            "completed_at": LATER,
            "duration_s": 4.2,
            "pulled": False,
        }
    ]
    daemon.sinks = [
        a_sink(name, breaker="disabled", disabled=name, last_error=name),
        a_sink("f" * 64, in_config=False, type=None, breaker="closed", last_error="not in the config"),
        a_sink(breaker="open", next_probe_at=LATER, last_error=name),
    ]
    status = daemon.status
    status["running"][0]["task"] = name
    status["attention"][0]["text"] = name
    status["alerts"][0]["message"] = name
    status["queues"][name] = status["queues"]["slow"]
    status["sinks"][name] = {**status["sinks"]["hook"], "last_error": name}


@pytest.mark.parametrize("verb", READING, ids=" ".join)
def test_every_reading_verb_prints_one_json_value_with_json(
    ctl: Ctl, daemon: StandIn, verb: list[str]
) -> None:
    fill(daemon)
    done = ctl(*verb, "--json")
    assert done.code == (1 if verb == ["doctor"] else 0)
    assert isinstance(done.json, dict | list)
    assert done.err == ""


@pytest.mark.parametrize("columns", [80, *(pytest.param(n, marks=pytest.mark.slow) for n in (120, 60))])
@pytest.mark.parametrize("verb", READING, ids=" ".join)
def test_hostile_names_never_reach_the_terminal_and_every_line_fits(
    ctl: Ctl, daemon: StandIn, verb: list[str], columns: int
) -> None:
    fill(daemon, HOSTILE)
    done = ctl.on_terminal(*verb, columns=columns)
    text = COLOUR.sub("", done.out)
    bad = [
        char
        for char in text
        if char != "\n" and (unicodedata.category(char) in ("Cc", "Cf", "Cs") or char in "\u2028\u2029")
    ]
    assert not bad
    if verb not in (["config", "show"], ["config", "schema"], ["outbox", "show", "d1"]):
        too_long = [line for line in text.split("\n") if width(line) > columns]
        assert not too_long or (
            columns < 80 and all("q" * 64 in line or "f" * 40 in line for line in too_long)
        )


def test_columns_from_the_environment_beats_the_terminal(ctl: Ctl, daemon: StandIn) -> None:
    ctl.env["COLUMNS"] = "50"
    assert (
        max(width(line) for line in COLOUR.sub("", ctl.on_terminal("status", columns=200).out).split("\n"))
        <= 50
    )


@pytest.mark.parametrize("verb", READING, ids=" ".join)
def test_nothing_but_data_is_on_stdout_when_piped(ctl: Ctl, daemon: StandIn, verb: list[str]) -> None:
    fill(daemon, HOSTILE)
    done = ctl(*verb)
    assert "\x1b" not in done.out
    if verb[0] in ("list", "outbox", "writes") and "show" not in verb:
        assert "ID\t" not in done.out
        assert len({line.count("\t") for line in done.out.splitlines()}) == 1


def test_colour_is_for_terminals_and_not_with_no_color(ctl: Ctl, daemon: StandIn) -> None:
    assert COLOUR.search(ctl.on_terminal("status").out)
    ctl.env["NO_COLOR"] = "1"
    assert not COLOUR.search(ctl.on_terminal("status").out)


def test_status_names_first_what_needs_attention_errors_before_warnings(ctl: Ctl, daemon: StandIn) -> None:
    lines = ctl("status").out.splitlines()
    assert lines[0] == "Needs attention"
    assert lines[1].startswith("! 1 delivery is dead")
    assert lines.index("- queue slow is paused") < next(
        place for place, line in enumerate(lines) if line.startswith("agentqd 0.1.0")
    )
    assert "agentqctl resume slow" in "\n".join(lines)


def test_status_of_a_young_daemon_without_a_supervisor_is_drawn_too(ctl: Ctl, daemon: StandIn) -> None:
    daemon.status = a_status(
        supervisor=None,
        tasks={},
        results={},
        queues={},
        outbox={},
        sinks={},
        alerts=[],
        attention=[],
        running=[],
        intake={},
        disk={},
    )
    out = ctl("status").out
    assert out.startswith("Nothing needs attention.")
    assert "no supervisor" in out


def test_status_counts_in_words_that_fit_and_shows_what_is_held_only_if_something_is(
    ctl: Ctl, daemon: StandIn
) -> None:
    daemon.status["intake"]["rejected"] = 1
    page = ctl("status").out
    assert "1 line rejected" in page
    assert "HELD" not in page
    daemon.status["intake"]["rejected"] = 2
    daemon.status["sinks"]["hook"]["held"] = 17
    page = ctl.on_terminal("status", columns=140).out
    assert "2 lines rejected" in page
    assert "HELD" in page
    assert "17" in page


def test_status_watch_goes_on_until_it_is_interrupted(ctl: Ctl, daemon: StandIn) -> None:
    import signal

    with ctl.popen("status", "--watch", "--every", "0.1", "--json") as process:
        assert process.stdout is not None
        assert [json.loads(process.stdout.readline())["box"] for _ in range(3)] == ["box1"] * 3
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 130


def test_list_sends_its_filters_and_pages_to_the_end(ctl: Ctl, daemon: StandIn) -> None:
    daemon.tasks = {f"t{number}": a_task(f"t{number}") for number in range(1500)}
    done = ctl("list", "--state", "queued,running", "--label", "a b&c", "--all", "--json")
    assert [task["id"] for task in done.json] == [f"t{number}" for number in range(1500)]
    (first, _), (second, _) = daemon.requests("GET", "/v1/tasks")
    assert (first["state"], first["label"], second["before"]) == ("queued,running", "a b&c", "1000")
    some = ctl("list", "--limit", "3")
    assert len(some.out.splitlines()) == 3
    assert "--all" in some.err


def test_show_is_one_timeline_from_the_lines_offset_to_the_delivery(ctl: Ctl, daemon: StandIn) -> None:
    daemon.tasks["t1"] = a_task()
    out = ctl("show", "t1").out
    timeline = out[out.index("Timeline") :]
    order = ["submitted", "at byte 4096", "accepted", "claimed", "finished", "delivered to completions"]
    places = [timeline.index(word) for word in order]
    assert places == sorted(places)


def test_show_of_an_unknown_task_exits_66(ctl: Ctl, daemon: StandIn) -> None:
    done = ctl("show", "../status", "--json")
    assert (done.code, done.json["error"]) == (66, "no_such_task")
    assert daemon.seen[0][1] == "/v1/tasks/../status"  # quoted: one segment, decoded by the stand-in


def test_audit_show_pages_and_a_broken_chain_exits_1(ctl: Ctl, daemon: StandIn) -> None:
    assert [event["seq"] for event in ctl("audit", "show", "--all", "--json").json] == list(range(1, 2501))
    assert len(ctl("audit", "show", "--after", "10", "--limit", "5", "--json").json) == 5

    async def broken(_: web.Request) -> web.StreamResponse:
        return web.json_response(
            {"ok": False, "events": 9, "first_seq": 1, "last_seq": 9, "broken_at": 4, "reason": "hash"}
        )

    daemon.answers[("GET", "/v1/audit/verify")] = broken
    done = ctl("audit", "verify")
    assert (done.code, done.out) == (1, "BROKEN at event 4: hash\n")


def test_outbox_drop_needs_explicit_ids_or_the_word_all(ctl: Ctl, daemon: StandIn) -> None:
    daemon.rows = [a_row("d1"), a_row("d2")]
    assert ctl("outbox", "drop").code == 2
    assert ctl("outbox", "drop", "ALL", "d1").code == 2
    assert not daemon.seen
    assert ctl("outbox", "drop", "d1", "--sink", "hook").out == "1 row changed\n"
    assert ctl("outbox", "drop", "ALL").out == "2 rows changed\n"
    assert [body for _, body in daemon.requests("POST", "/v1/outbox/drop")] == [
        {"delivery_ids": ["d1"], "sink": "hook"},
        {"all": True, "state": "dead"},
    ]
    assert ctl("outbox", "retry", "unknown").code == 66


@pytest.mark.parametrize(
    ("verb", "state"), [("cancel", "stopping"), ("hold", "held"), ("release", "queued"), ("retry", "queued")]
)
def test_task_actions_say_the_new_state_and_the_first_failure_decides(
    ctl: Ctl, daemon: StandIn, verb: str, state: str
) -> None:
    daemon.tasks["t1"] = a_task(state="running", result=None)
    assert ctl(verb, "t1", "--json").json == {"id": "t1", "state": state, "result": None}
    assert ctl(verb, "t1").out == f"t1  {state}\n"
    both = ctl(verb, "nope", "t1", "--json")
    assert both.code == 66
    assert [item.get("error") for item in both.json] == ["no_such_task", None]


def test_a_retry_that_lifts_a_usage_limit_says_that_the_whole_runner_is_open(
    ctl: Ctl, daemon: StandIn
) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.json_response({"id": "n5", "state": "queued", "result": None, "runner_opened": "claude"})

    daemon.answers["POST", "/v1/tasks/n5/retry"] = handler
    assert (
        ctl("retry", "n5").out == "n5  queued; runner claude is open again, its tasks start in their order\n"
    )


def test_an_outside_claim_shows_its_process_and_user(ctl: Ctl, daemon: StandIn) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        claim = {"path": "/srv", "task_id": "claim-1", "task": "deploy", "state": "held", "kind": "outside"}
        return web.json_response({"claims": [{**claim, "pid": 4711, "user": "ann"}]})

    daemon.answers["GET", "/v1/writes"] = handler
    assert "4711 (ann)" in ctl("writes").out


def test_queues_drain_and_reload_speak_to_their_paths(ctl: Ctl, daemon: StandIn) -> None:
    assert ctl("pause", "q", "--json").json == {"queue": "q", "paused": True}
    assert ctl("resume", "q").out == "q  running\n"
    begun = ctl("drain")
    assert "agentqctl drain --off" in begun.out
    assert "restart" in begun.out, "it says that a restart does not end it"
    assert begun.code == ctl("drain", "--off").code == ctl("reload").code == 0
    assert [body for _, body in daemon.requests("POST", "/v1/drain")] == [{"on": True}, {"on": False}]


def test_a_bad_config_is_told_line_by_line(ctl: Ctl, daemon: StandIn) -> None:
    async def invalid(_: web.Request) -> web.StreamResponse:
        return error(
            422,
            "invalid_config",
            "2 problems",
            problems=[{"path": "/c.yaml", "line": 3, "key": "quues", "message": "did you mean queues?"}],
        )

    daemon.answers[("POST", "/v1/reload")] = invalid
    text = ctl("reload")
    assert (text.code, text.out, text.err) == (65, "", "/c.yaml:3: quues: did you mean queues?\n")
    assert ctl("reload", "--json").json["problems"][0]["line"] == 3


def test_doctor_merges_what_the_daemon_finds_and_works_without_it(ctl: Ctl, daemon: StandIn) -> None:
    daemon.status["daemon"]["state_dir"] = ctl.state
    checks = {item["name"]: item for item in ctl("doctor", "--json").json["checks"]}
    assert checks["canary"]["level"] == "warning"
    assert checks["control socket"]["ok"]
    assert not checks["supervisor socket"]["ok"]
    daemon.stop()
    down = ctl("doctor", "--json")
    checks = {item["name"]: item for item in down.json["checks"]}
    assert (down.code, down.json["ok"]) == (1, False)
    assert "not running" in checks["control socket"]["message"]
    assert checks["control socket"]["fix"]
    assert checks["state folder"]["ok"]


def test_doctor_sees_a_queue_file_that_anybody_may_append_to(ctl: Ctl) -> None:
    import os

    with open(ctl.queue_file, "wb"):
        os.chmod(ctl.queue_file, 0o666)
    checks: dict[str, Any] = {item["name"]: item for item in ctl("doctor", "--json").json["checks"]}
    assert checks["queue file"]["fix"] == f"chmod o-w {ctl.queue_file}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_that_asks_the_program(ctl: Ctl, shell: str) -> None:
    assert "_AGENTQCTL_COMPLETE" in ctl("completion", shell).out


def test_the_shell_completes_verbs_options_and_task_ids(ctl: Ctl, daemon: StandIn) -> None:
    daemon.tasks = {name: a_task(name) for name in ("abc1", "abc2", "xyz")}
    ctl.env = {"_AGENTQCTL_COMPLETE": "bash_complete", "COMP_WORDS": "agentqctl st", "COMP_CWORD": "1"}
    assert ctl().out == "plain,status\n"
    ctl.env |= {"COMP_WORDS": "agentqctl show abc", "COMP_CWORD": "2"}
    assert ctl().out == "plain,abc1\nplain,abc2\n"
    daemon.stop()
    assert ctl().out.strip() == ""


def test_ids_sort_by_time_and_never_repeat() -> None:
    ids = [
        new_task_id(now_ms) for now_ms in (1, 1000, 1_700_000_000_000, 1_700_000_000_001, 4_000_000_000_000)
    ]
    assert ids == sorted(ids)
    assert all(re.fullmatch(r"[0-9a-z]{20}", task_id) for task_id in ids)
    assert len({new_task_id(5) for _ in range(1000)}) == 1000


@pytest.mark.parametrize(("state", "said"), [("running", "kept: alive"), ("queued", "kept")])
def test_a_claim_that_outlived_its_ttl_is_not_called_lapsed(
    ctl: Ctl, daemon: StandIn, state: str, said: str
) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        claim = {
            "path": "/srv",
            "task_id": "t1",
            "task": "t",
            "state": state,
            "expires_at": "2026-01-01T00:00:00Z",
        }
        return web.json_response({"claims": [claim]})

    daemon.answers["GET", "/v1/writes"] = handler
    assert ctl("writes").out.split("\t")[5] == said


def test_a_death_by_signal_is_no_exit_code(ctl: Ctl, daemon: StandIn) -> None:
    died = {**a_task()["attempts"][0], "exit_code": None, "signal": 9, "result": "failed", "reason": "signal"}
    exited = {**died, "attempt": 2, "exit_code": 9, "signal": None, "reason": "exit_code"}
    daemon.tasks["t1"] = {**a_task(), "attempts": [died, exited]}
    page = ctl("show", "t1").out.splitlines()
    exits = page[page.index(next(line for line in page if line.startswith("ATTEMPT"))) + 1 :][:2]
    assert re.search(r" signal 9 ", exits[0])
    assert re.search(r"[^l] +9 ", exits[1])


def test_config_check_needs_no_daemon_and_names_path_line_and_nearest_key(ctl: Ctl) -> None:
    with open(f"{ctl.root}/good.yaml", "w") as file:
        file.write("max_workers: 3\n")
    with open(f"{ctl.root}/bad.yaml", "w") as file:
        file.write("max_workers: 3\nquues: {}\n")
    assert ctl("config", "check", "good.yaml", "--json").json == {"ok": True, "path": f"{ctl.root}/good.yaml"}
    bad = ctl("config", "check", "bad.yaml")
    assert (bad.code, bad.out) == (65, "")
    assert f"{ctl.root}/bad.yaml:2" in bad.err
    assert "queues" in bad.err
    assert ctl("config", "check", "bad.yaml", "--json").json["problems"][0]["line"] == 2
    assert ctl("config", "check", "absent.yaml").code == 65
    assert ctl("config", "schema").json["$schema"]


def test_show_tells_a_delivery_once(ctl: Ctl, daemon: StandIn) -> None:
    task = a_task()
    task["events"].append(
        {
            "seq": 10,
            "at": LATER,
            "event": "delivered",
            "data": {"sink": "completions", "delivery_id": "d1f0c2"},
        }
    )
    daemon.tasks["t1"] = task
    timeline = ctl("show", "t1").out.partition("Timeline")[2]
    assert timeline.count("delivered") == 1


def test_audit_verify_offline_without_a_journal_says_so(ctl: Ctl) -> None:
    done = ctl("audit", "verify", "--offline", "--json")
    assert (done.code, done.json["error"]) == (1, "state_folder")


def test_show_says_why_a_task_waits_once_and_what_was_declared(ctl: Ctl, daemon: StandIn) -> None:
    daemon.tasks["t1"] = a_task(
        state="blocked", result=None, reason="write_conflict",
        waiting_for={"reason": "write_conflict", "until": None, "text": "waits for A (A)"},
        declared={"writes_to": ["/srv/a", "/srv/b"], "after": ["t0"], "not_before": NOW, "expires_at": None},
    )  # fmt: skip
    out = ctl("show", "t1").out
    assert "waiting   waits for A (A)" in out
    assert "waits for waits for" not in out
    assert "writes to /srv/a, /srv/b" in out
    assert "after     t0" in out
    assert "starts at " in out
    assert "expires" not in out


def test_an_empty_id_is_told_before_anything_is_asked(ctl: Ctl, daemon: StandIn) -> None:
    for verb in ("show", "cancel", "wait"):
        done = ctl(verb, "")
        assert (done.code, "a task's id is needed" in done.err) == (2, True)
    assert not daemon.seen


def test_resume_of_a_queue_that_was_taken_from_the_config_says_so(ctl: Ctl, daemon: StandIn) -> None:
    async def removed(_: web.Request) -> web.StreamResponse:
        return web.json_response({"queue": "one", "paused": False, "in_config": False})

    daemon.answers[("POST", "/v1/queues/one/resume")] = removed
    assert ctl("resume", "one").out == "one  running (not in the config: nothing of it starts)\n"


def test_a_time_that_is_none_is_told_with_both_ways_to_say_one(ctl: Ctl, daemon: StandIn) -> None:
    done = ctl("writes", "conflicts", "--since", "nope")
    assert (done.code, "or 2h for two hours ago" in done.err) == (2, True)
    assert not daemon.seen
    assert ctl("writes", "conflicts", "--since", "2h").code == 0


def test_json_may_stand_before_the_verb_of_a_family(ctl: Ctl, daemon: StandIn) -> None:
    fill(daemon)
    assert ctl("writes", "--json", "conflicts").json == ctl("writes", "conflicts", "--json").json
    assert ctl("writes", "--json").json == ctl("writes", "list", "--json").json
