"""From a claim to the supervisor's `Run`: argv, environment, folder, prompt and clocks, with the newest settings."""

from __future__ import annotations

import os
from functools import lru_cache

from agentqd.core.config_rules import effective_runner
from agentqd.core.errors import ConfigError, InvalidTask
from agentqd.core.resolve import Resolved, resolve
from agentqd.core.runners import inherited_env, worker_argv
from agentqd.core.task import TaskRequest
from agentqd.core.units import format_time
from agentqd.core.waking import total_deadline_us
from agentqd.loops.box import Box
from agentqd.storage.envfile import read_env_files
from agentqd.storage.paths import expand_workdir
from agentqd.storage.tasks import TaskRow
from agentqd.supervisor import wire

US = 1_000_000


class LaunchError(Exception):
    """This attempt cannot be started as the task and the config now stand; the text says why."""


def clocks(resolved: Resolved, task: TaskRow, now_us: int) -> wire.Clocks:
    deadline = total_deadline_us(resolved, task.run_at)
    return wire.Clocks(
        run_s=resolved.run_timeout_s,
        total_s=None if deadline is None else max(0.0, (deadline - now_us) / US),
        first_output_s=resolved.first_output_timeout_s,
        silence_s=resolved.silence_timeout_s,
        kill_grace_s=resolved.kill_grace_s,
        warning_signal=resolved.warning_signal,
        result_grace_s=resolved.result_grace_s,
    )


@lru_cache(maxsize=64)
def _inherited(names: tuple[str, ...]) -> dict[str, str]:
    """What workers see of this process's environment, which does not change while it runs."""
    return inherited_env(names, os.environ)


def build_run(box: Box, task: TaskRow, request: TaskRequest, prompt_file_content: bytes | None) -> wire.Run:
    """Raises LaunchError."""
    runner = effective_runner(box.settings, task.runner)
    if runner is None:
        raise LaunchError(f"the runner {task.runner} is no longer in the config")
    resolved = resolve(request, task.queue, task.runner, box.settings)
    folder = box.folders.attempt(task.id, task.attempt)
    prompt = request.prompt
    if prompt is None and prompt_file_content is not None:
        prompt = prompt_file_content.decode("utf-8")
    workdir = expand_workdir(resolved.workdir)
    if workdir is not None and not os.path.isabs(workdir):
        raise LaunchError(f"workdir: {workdir!r} is not an absolute path")
    now = box.clock.now_us()
    limit_us = now + int(resolved.run_timeout_s * US)
    total = total_deadline_us(resolved, task.run_at)
    try:
        argv = worker_argv(
            runner, request.command, prompt, f"{folder}/prompt", workdir or f"{folder}/work", task.id
        )
        env = {
            **_inherited(runner.inherit_env),
            **runner.env,
            **(read_env_files(runner.env_files) if runner.env_files else {}),
            **(request.env or {}),
            "AGENTQ_TASK_ID": task.id,
            "AGENTQ_TASK": task.name,
            "AGENTQ_ATTEMPT": str(task.attempt),
            "AGENTQ_TASK_DIR": folder,
            "AGENTQ_PROMPT_FILE": f"{folder}/prompt",
            "AGENTQ_OUTBOX": f"{folder}/outbox",
            "AGENTQ_HEARTBEAT": f"{folder}/heartbeat",
            "AGENTQ_DEADLINE": format_time(limit_us if total is None else min(limit_us, total)) or "",
        }
    except (InvalidTask, ConfigError) as error:
        raise LaunchError(error.message) from error
    return wire.Run(
        task=task.id,
        attempt=task.attempt,
        folder=folder,
        argv=argv,
        env=env,
        clocks=clocks(resolved, task, now),
        cwd=workdir,
        prompt=prompt,
        stdin="prompt" if prompt is not None and runner.prompt == "stdin" else "null",
        stdout_bytes_max=int(box.settings.limits.stdout_bytes_max),
    )
