"""Runners: how a task becomes an argv, an environment and a way to hand over the prompt. Presets as data.

What the presets rest on (facts seen in the real programs and their issue threads) stands beside each. Everything is an argv
list; nothing goes through a shell unless the runner IS a shell. stdin is the prompt file or /dev/null, never an open pipe.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from agentqd.core.errors import InvalidTask
from agentqd.core.settings import PromptWay, Runner

ARGUMENT_BYTES_MAX: Final = 128 * 1024 - 1  # the kernel's MAX_ARG_STRLEN, its final NUL not counted
PATH_DEFAULT: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PLACEHOLDERS: Final = ("{prompt}", "{prompt_file}", "{workdir}", "{task_id}", "{session_id}")

# What every worker inherits: where programs and home are, language and time zone, how to reach the network.
BASE_ENV: Final = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "TMPDIR", "XDG_*", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "http_proxy", "https_proxy", "no_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
)  # fmt: skip


class RunnerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A runner with nothing left open. The last three fields are for the verdict."""

    name: str
    argv: tuple[str, ...]  # empty: the task's own command
    prompt: PromptWay
    allow_command: bool = False
    prompt_needed: bool = True
    inherit_env: tuple[str, ...] = ()  # on top of BASE_ENV
    env: dict[str, str] = {}
    env_files: tuple[str, ...] = ()
    result: str = "text"
    limit_signs: tuple[str, ...] = ()  # texts that say: usage limit, try again later (core/usage_limit.py)
    no_work_signs: tuple[str, ...] = ()


PRESETS: Final[dict[str, RunnerSpec]] = {
    # The prompt is a script on stdin. -s: what follows on the command line can never be taken for a script's name.
    "shell": RunnerSpec(name="shell", argv=("/bin/sh", "-s"), prompt="stdin"),
    # The task brings its argv; a prompt, if there is one, is its stdin.
    "command": RunnerSpec(name="command", argv=(), prompt="stdin", allow_command=True, prompt_needed=False),
    # Prompt on stdin (argument and stdin would be appended). --session-id fixes the session before the spawn, so that a person
    # can resume it by hand. stream-json needs --verbose; its last record is the result.
    "claude": RunnerSpec(
        name="claude",
        argv=("claude", "-p", "--output-format", "stream-json", "--verbose", "--permission-mode", "acceptEdits",
              "--session-id", "{session_id}"),
        prompt="stdin",
        inherit_env=("ANTHROPIC_*", "CLAUDE_*", "IS_SANDBOX"),  # AWS_* and the like only where a runner asks
        env={"DISABLE_AUTOUPDATER": "1"},
        result="claude-stream-json",
        limit_signs=("rate_limit_event", "usage limit", "rate limit", "limit reached", "hit your*limit", "out of*usage"),
        no_work_signs=("permission_denials", "empty_result"),
    ),
    # `-` reads the prompt from stdin; beside a prompt argument an open stdin hangs it. Its default sandbox is read-only: an editing
    # task would "succeed" with no change. Outside a git repository it refuses without --skip-git-repo-check.
    "codex": RunnerSpec(
        name="codex",
        argv=("codex", "exec", "--json", "--skip-git-repo-check", "-s", "workspace-write", "-"),
        prompt="stdin",
        inherit_env=("OPENAI_*", "CODEX_*", "AZURE_OPENAI_*"),
        result="codex-jsonl",
        limit_signs=("usage limit", "rate limit"),
        no_work_signs=("zero_items",),
    ),
    # exit 42 is bad input, 53 the turn limit. One word with its `=`: after a bare -p, a prompt that begins with `--` is taken for
    # an option (seen with 0.61: the prompt `--version` prints the version and exits 0).
    "gemini": RunnerSpec(
        name="gemini",
        argv=("gemini", "--output-format", "json", "--prompt={prompt}"),
        prompt="argument",
        inherit_env=("GEMINI_*", "GOOGLE_*"),
        result="gemini-json",
        limit_signs=("RESOURCE_EXHAUSTED", "quota"),
    ),
    # Reads stdin to its end: it must be /dev/null. `--`: the prompt `--help` is a prompt (seen with 1.18: it printed the help).
    "opencode": RunnerSpec(
        name="opencode",
        argv=("opencode", "run", "--format", "json", "--", "{prompt}"),
        prompt="argument",
        inherit_env=("OPENCODE_*", "ANTHROPIC_*", "OPENAI_*", "GEMINI_*", "OPENROUTER_*"),
        result="opencode-jsonl",
        limit_signs=("usage limit", "rate limit", "quota"),
    ),
    # Exits 0 even when no model was reached: only evidence tells.
    "aider": RunnerSpec(
        name="aider",
        argv=("aider", "--message-file", "{prompt_file}", "--yes-always", "--no-pretty", "--no-stream"),
        prompt="file",
        inherit_env=("AIDER_*", "ANTHROPIC_*", "OPENAI_*", "GEMINI_*", "OPENROUTER_*", "DEEPSEEK_*"),
        result="text",
        limit_signs=("RateLimitError",),
        no_work_signs=("litellm.",),
    ),
}  # fmt: skip


def runner_spec(name: str, options: Runner) -> RunnerSpec:
    """A runner of the config, its preset's gaps filled. `options` must have passed check_settings."""
    base = PRESETS.get(options.preset or name)
    if base is None:
        assert options.command is not None, (
            "check_settings lets no runner pass that has neither preset nor command"
        )
        base = RunnerSpec(name=name, argv=(), prompt="stdin")
    changes: dict[str, object] = {
        "name": name,
        "env": {**base.env, **options.env},
        "env_files": tuple(options.env_files),
    }
    if options.command is not None:
        changes["argv"] = tuple(options.command)
    for field in ("prompt", "allow_command", "result"):
        value = getattr(options, field)
        if value is not None:
            changes[field] = value
    if changes.get("prompt") == "argument" and base.argv[-1:] == ("-",) and options.command is None:
        # codex: `-` means stdin; beside an argument it would be a second prompt. `--`: the prompt is never an option.
        changes["argv"] = (*base.argv[:-1], "--", "{prompt}")
    elif (
        changes.get("prompt") == "argument"
        and base.prompt == "stdin"
        and base.argv
        and options.command is None
    ):
        changes["argv"] = (*base.argv, "--", "{prompt}")
    if options.usage_limit is not None:
        changes["limit_signs"] = tuple(options.usage_limit)
    if options.inherit_env is not None:
        changes["inherit_env"] = tuple(options.inherit_env)
    return msgspec.structs.replace(base, **changes)


def session_id(task_id: str) -> str:
    """A UUID that is the same for every look at this task."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"agentqd:{task_id}"))


def worker_argv(
    spec: RunnerSpec,
    task_command: Sequence[str] | None,
    prompt: str | None,
    prompt_file: str,
    workdir: str,
    task_id: str,
) -> list[str]:
    """What is executed. Raises InvalidTask: `command_not_allowed`, `command_needed`, `prompt_needed`, `prompt_as_argument`."""
    if task_command is not None and not spec.allow_command:
        raise InvalidTask(
            f"command: the runner {spec.name} takes none; use the runner command, or set allow_command for it",
            code="command_not_allowed",
            field="command",
        )
    template = tuple(task_command) if task_command is not None else spec.argv
    if not template:
        raise InvalidTask(
            f"command: the runner {spec.name} needs one", code="command_needed", field="command"
        )
    if prompt is None and spec.prompt_needed and task_command is None:
        raise InvalidTask(f"prompt: the runner {spec.name} needs one", code="prompt_needed", field="prompt")
    if task_command is not None:
        return list(task_command)
    if prompt is not None and any("{prompt}" in item for item in template):
        _check_argument(spec, prompt)
    elif spec.prompt == "argument" and prompt is not None:
        _check_argument(spec, prompt)
        if not any("{prompt}" in item for item in template):
            template = (*template, "{prompt}")
    values = {
        "{prompt}": prompt or "",
        "{prompt_file}": prompt_file,
        "{workdir}": workdir,
        "{task_id}": task_id,
        "{session_id}": session_id(task_id + os.path.basename(os.path.dirname(prompt_file))),
    }
    return [_filled(item, values) for item in template]


def _filled(item: str, values: Mapping[str, str]) -> str:
    """Fill placeholders in one pass: what a prompt says is never taken for a placeholder."""
    parts, rest = [], item
    while rest:
        found = [(at, name) for name in values if (at := rest.find(name)) >= 0]
        if not found:
            break
        at, name = min(found)
        parts += [rest[:at], values[name]]
        rest = rest[at + len(name) :]
    return "".join([*parts, rest])


def _check_argument(spec: RunnerSpec, prompt: str) -> None:
    if "\x00" in prompt:
        what = "has a NUL character, which no argument can carry"
    elif len(prompt.encode("utf-8", "surrogatepass")) > ARGUMENT_BYTES_MAX:
        what = f"is longer than {ARGUMENT_BYTES_MAX} bytes, the kernel's limit for one argument"
    else:
        return
    raise InvalidTask(
        f"prompt: it {what}, and the runner {spec.name} passes it as one; set `prompt: stdin` or `prompt: file` for it",
        code="prompt_as_argument",
        field="prompt",
    )


def worker_env(
    spec: RunnerSpec, parent: Mapping[str, str], task_env: Mapping[str, str], own: Mapping[str, str]
) -> dict[str, str]:
    """Allow-listed variables of the daemon, then the runner's, then the task's, then AGENTQ_*; the later one wins."""
    env = {**inherited_env(spec.inherit_env, parent), **spec.env, **task_env}
    return {**{name: value for name, value in env.items() if not name.startswith("AGENTQ_")}, **own}


def inherited_env(inherit: Sequence[str], parent: Mapping[str, str]) -> dict[str, str]:
    """What of the daemon's own environment a worker sees: BASE_ENV and what its runner inherits besides."""
    names = {name for name in (*BASE_ENV, *inherit) if not name.endswith("*")}
    prefixes = tuple(name[:-1] for name in (*BASE_ENV, *inherit) if name.endswith("*"))
    env = {name: value for name, value in parent.items() if name in names or name.startswith(prefixes)}
    if not env.get("PATH"):
        env["PATH"] = PATH_DEFAULT  # an empty one, too, would find no program
    return env
