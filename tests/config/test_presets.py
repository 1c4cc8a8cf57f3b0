"""Each preset, really started, with a stand-in on PATH that records what it was given."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentqd.core.config_rules import effective_runner
from agentqd.core.errors import InvalidTask
from agentqd.core.runners import PRESETS, RunnerSpec, worker_argv, worker_env
from agentqd.core.settings import Runner, Settings

AGENTS = ("claude", "codex", "gemini", "opencode", "aider")
OPTION_LIKE = "--help me {task_id} {prompt}\nsecond line"
SECRETS = {
    "SSH_AUTH_SOCK": "/s",
    "NOTIFY_SOCKET": "/n",
    "MY_TOKEN": "t",
    "LD_PRELOAD": "/l",
    "DATABASE_URL": "d",
}
RECORDER = """#!{python} -IS
import json, os, sys
print(json.dumps({{"argv": sys.argv[1:], "stdin": sys.stdin.read(), "env": dict(os.environ)}}))
"""


def _spec(**options: Any) -> RunnerSpec:
    spec = effective_runner(Settings(runners={"mine": Runner(**options)}), "mine")
    assert spec is not None
    return spec


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in AGENTS:
        program = folder / name
        program.write_text(RECORDER.format(python=sys.executable))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


def _run(
    spec: RunnerSpec, bin_folder: Path, prompt: str, parent: dict[str, str] | None = None
) -> dict[str, Any]:
    """As the supervisor does it: argv, the whole environment, stdin the prompt file or /dev/null."""
    folder = bin_folder.parent / "attempt-1"
    folder.mkdir()
    (folder / "prompt").write_text(prompt)
    argv = worker_argv(spec, None, prompt, f"{folder}/prompt", str(folder), "t1")
    whole = {"PATH": f"{bin_folder}:/usr/bin:/bin", "HOME": "/h", **(parent or {})}
    env = worker_env(spec, whole, {"MINE": "1"}, {"AGENTQ_TASK_ID": "t1"})
    source = f"{folder}/prompt" if spec.prompt == "stdin" else os.devnull
    with open(source, "rb") as stdin:
        done = subprocess.run(
            argv, env=env, stdin=stdin, capture_output=True, cwd=folder, timeout=20, check=True
        )
    return json.loads(done.stdout)


@pytest.mark.parametrize("preset", AGENTS)
def test_an_agent_gets_the_whole_prompt_once(bin_folder: Path, preset: str) -> None:
    seen = _run(_spec(preset=preset), bin_folder, OPTION_LIKE)
    files = [Path(item).read_text() for item in seen["argv"] if item.endswith("/prompt")]
    words = [item.partition("=")[2] if item.startswith("--prompt=") else item for item in seen["argv"]]
    assert [seen["stdin"], *files, *words].count(OPTION_LIKE) == 1


@pytest.mark.parametrize("preset", AGENTS)
def test_a_prompt_is_never_a_word_that_could_be_an_option(bin_folder: Path, preset: str) -> None:
    for options in ({}, {"prompt": "argument"}):
        if preset == "aider" and options:
            continue  # its file way is the only one that the preset has
        argv = worker_argv(_spec(preset=preset, **options), None, "--version", "/f/a/prompt", "/w", "t1")
        assert "--version" not in argv or argv[argv.index("--version") - 1] == "--"


@pytest.mark.parametrize("preset", AGENTS)
def test_only_listed_variables_are_inherited(bin_folder: Path, preset: str) -> None:
    parent = {
        **SECRETS,
        "LC_ALL": "C",
        "AGENTQ_TASK_ID": "old",
        "AGENTQ_OUTBOX": "/old",
        "https_proxy": "http://p",
    }
    env = _run(_spec(preset=preset, env={"FIXED": "x"}), bin_folder, "hello", parent)["env"]
    assert not set(SECRETS) & set(env)
    assert env["AGENTQ_TASK_ID"] == "t1"
    assert (env["LC_ALL"], env["HOME"], env["https_proxy"], env["MINE"], env["FIXED"]) == (
        "C",
        "/h",
        "http://p",
        "1",
        "x",
    )


def test_nobody_but_agentqd_sets_agentq_variables() -> None:
    env = worker_env(
        _spec(command=["x"], inherit_env=["AGENTQ_*"]), {"AGENTQ_OUTBOX": "/old"}, {"AGENTQ_TASK": "x"}, {}
    )
    assert not [name for name in env if name.startswith("AGENTQ_")]


def test_claude_gets_its_own_variables_and_codex_does_not(bin_folder: Path) -> None:
    parent = {"ANTHROPIC_API_KEY": "k", "OPENAI_API_KEY": "o"}
    claude = worker_env(_spec(preset="claude"), parent, {}, {})
    codex = worker_env(_spec(preset="codex"), parent, {}, {})
    assert ("ANTHROPIC_API_KEY" in claude, "OPENAI_API_KEY" in claude) == (True, False)
    assert ("ANTHROPIC_API_KEY" in codex, "OPENAI_API_KEY" in codex) == (False, True)


def test_codex_with_a_prompt_argument_has_no_second_prompt_on_stdin(bin_folder: Path) -> None:
    seen = _run(_spec(preset="codex", prompt="argument"), bin_folder, "do it")
    assert seen["stdin"] == ""
    assert seen["argv"][-2:] == ["--", "do it"]
    assert "-" not in seen["argv"]


@pytest.mark.parametrize("parent", [{}, {"PATH": ""}])
def test_there_is_always_a_path(parent: dict[str, str]) -> None:
    assert "/usr/bin" in worker_env(PRESETS["shell"], parent, {}, {})["PATH"]


def test_the_shell_runs_its_prompt(bin_folder: Path) -> None:
    script = """printf '{"argv": [], "env": {}, "stdin": "%s"}' "$((6 * 7))"\n"""
    assert _run(PRESETS["shell"], bin_folder, script)["stdin"] == "42"


def test_a_placeholder_in_a_prompt_is_only_text() -> None:
    argv = worker_argv(
        _spec(command=["x", "a{prompt}b", "{task_id}"]), None, "{task_id}{prompt}", "/f/a/prompt", "/w", "t1"
    )
    assert argv == ["x", "a{task_id}{prompt}b", "t1"]


def test_an_argument_runner_without_a_placeholder_appends_the_prompt() -> None:
    assert worker_argv(_spec(command=["x"], prompt="argument"), None, "p", "/f/a/prompt", "/w", "t1") == [
        "x",
        "p",
    ]


@pytest.mark.parametrize("prompt", ["a\x00b", "x" * 128 * 1024, "\u20ac" * 50_000])
@pytest.mark.parametrize("options", [{"prompt": "argument"}, {"prompt": None}])
def test_a_prompt_that_no_argument_can_carry_is_refused(prompt: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidTask, match="stdin"):
        worker_argv(_spec(command=["x", "{prompt}"], **options), None, prompt, "/f/a/prompt", "/w", "t1")


@pytest.mark.parametrize(
    ("name", "command", "prompt", "code"),
    [
        ("shell", ["x"], "p", "command_not_allowed"),
        ("command", None, "p", "command_needed"),
        ("shell", None, None, "prompt_needed"),
    ],
)
def test_what_does_not_fit_the_runner_is_refused(
    name: str, command: list[str] | None, prompt: str | None, code: str
) -> None:
    with pytest.raises(InvalidTask) as caught:
        worker_argv(PRESETS[name], command, prompt, "/f/a/prompt", "/w", "t1")
    assert caught.value.code == code
