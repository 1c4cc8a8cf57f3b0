"""Runners: what of a prompt and of the daemon's environment reaches a worker. (Presets, really started: tests/config.)"""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentqd.core.runners import (
    BASE_ENV,
    PATH_DEFAULT,
    PLACEHOLDERS,
    PRESETS,
    RunnerSpec,
    inherited_env,
    session_id,
    worker_argv,
    worker_env,
)

NAMES = st.from_regex(r"[A-Z_]{1,8}", fullmatch=True)
ENV = st.dictionaries(
    NAMES | st.sampled_from(["PATH", "HOME", "LC_ALL", "AGENTQ_TASK_ID"]), st.text(max_size=5)
)
PROMPTS = st.lists(st.text(max_size=5) | st.sampled_from(PLACEHOLDERS), max_size=6).map("".join)


@given(PROMPTS.filter(lambda text: "\x00" not in text))
def test_a_prompt_is_never_taken_for_a_placeholder(prompt: str) -> None:
    spec = RunnerSpec(name="r", argv=("x", "<{prompt}|{task_id}|{workdir}|{prompt_file}>"), prompt="argument")
    argv = worker_argv(spec, None, prompt, "/f/prompt", "/w", "t1")
    assert argv == ["x", f"<{prompt}|t1|/w|/f/prompt>"]


def test_a_command_of_the_task_is_taken_word_for_word() -> None:
    command = ["x", "{prompt}", "{task_id}", ""]
    assert worker_argv(PRESETS["command"], command, "p", "/f/prompt", "/w", "t1") == command


@given(ENV, st.lists(NAMES, max_size=3), ENV, ENV)
def test_only_listed_variables_leave_the_daemon_and_the_later_word_wins(
    parent: dict[str, str], inherit: list[str], fixed: dict[str, str], task: dict[str, str]
) -> None:
    spec = RunnerSpec(name="r", argv=("x",), prompt="stdin", inherit_env=tuple(inherit), env=fixed)
    own = {"AGENTQ_TASK_ID": "t1"}
    env = worker_env(spec, parent, task, own)
    listed = {*BASE_ENV, *inherit}
    for name, value in env.items():
        if name in own:
            assert value == "t1"
        elif name in task:
            assert value == task[name]
        elif name in fixed:
            assert value == fixed[name]
        elif value != parent.get(name):
            assert (name, value) == ("PATH", PATH_DEFAULT)
        else:
            assert name in listed or name.startswith(("LC_", "XDG_"))
    assert env["PATH"] or "PATH" in {*fixed, *task}


@pytest.mark.parametrize(
    ("inherit", "name", "passed"),
    [(["MY_*"], "MY_TOKEN", True), (["MY_*"], "MY", False), (["MY"], "MY_TOKEN", False), ([], "SSH_AUTH_SOCK", False), ([], "XDG_RUNTIME_DIR", True)],
)  # fmt: skip
def test_a_pattern_inherits_what_begins_like_it(inherit: list[str], name: str, passed: bool) -> None:
    assert (name in inherited_env(inherit, {name: "x"})) is passed


def test_an_empty_path_would_find_no_program() -> None:
    assert inherited_env([], {"PATH": ""})["PATH"] == PATH_DEFAULT


def test_a_session_is_the_same_for_every_look_and_another_for_every_attempt() -> None:
    spec = RunnerSpec(name="r", argv=("x", "{session_id}"), prompt="stdin")
    first, again, second = (
        worker_argv(spec, None, "p", f"/tasks/t1/attempt-{n}/prompt", "/w", "t1")[1] for n in (1, 1, 2)
    )
    assert first == again != second
    assert str(uuid.UUID(first)) == first
    assert session_id("a") != session_id("b")
