"""The settings: every option with its type and default. What each is for stands in `config/agentqd.yaml`.

Reading a file, line numbers and nearest names are `storage.configfile`'s job; rules between options are
`check_settings`. A `Settings` is frozen: an edit makes a new one, and loops take the newest at each turn.
"""

from __future__ import annotations

import functools
import os
from typing import Literal

import msgspec

from agentqd.core.units import Backoff, Duration, Rate, Size

Conflict = Literal["refuse", "queue", "warn"]
OnLost = Literal["fail", "requeue", "hold"]
AfterPolicy = Literal["success", "any", "failure"]
PromptWay = Literal["stdin", "argument", "file"]


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """Base of every settings object: unknown keys are an error."""


class Defaults(Strict, frozen=True):
    """What a task that does not say gets. Also the `defaults` of one queue or runner (None: not set there)."""

    queue: str | None = None
    runner: str | None = None
    priority: int | None = None
    workdir: str | None = None
    run_timeout: Duration | None = None
    total_timeout: Duration | None = None
    queue_timeout: Duration | None = None
    first_output_timeout: Duration | None = None
    silence_timeout: Duration | None = None
    kill_grace: Duration | None = None
    warning_signal: str | None = None
    result_grace: Duration | None = None
    max_attempts: int | None = None
    backoff: Backoff | None = None
    on_lost: OnLost | None = None
    on_conflict: Conflict | None = None
    intent_ttl: Duration | None = None
    deliver_to: list[str] | None = None
    deliver_within: Duration | None = None
    dedup_ttl: Duration | None = None
    allow_no_work: bool | None = None


# What holds when neither the task, its runner, its queue nor `defaults` says otherwise.
BUILT_IN = Defaults(
    queue="default",
    runner="shell",
    priority=0,
    run_timeout=Duration(3600),
    kill_grace=Duration(10),
    result_grace=Duration(30),
    max_attempts=1,
    backoff=Backoff((1.0,), doubles=True),
    on_lost="fail",
    deliver_to=[],
    dedup_ttl=Duration(7 * 86400),
    allow_no_work=False,
)


class Queue(Strict, frozen=True):
    concurrency: int | None = None  # None: the number of CPUs, at least 4
    on_conflict: Conflict | None = None
    paused: bool = False
    waiting_max: int | None = None  # None: no limit but the disk
    allow_deliver_to: list[str] | None = (
        None  # sinks that its tasks may name, `*` as in file names; None: all
    )
    defaults: Defaults = Defaults()


class Runner(Strict, frozen=True):
    preset: str | None = None  # shell, command, claude, codex, gemini, opencode, aider
    command: list[str] | None = None  # argv; {prompt}, {prompt_file}, {workdir}, {task_id} are filled in
    prompt: PromptWay | None = None  # stdin, argument, file
    allow_command: bool | None = None  # the task may bring its own argv
    inherit_env: list[str] | None = None  # names or PREFIX_* taken from the daemon's environment
    env: dict[str, str] = {}
    env_files: list[str] = []  # KEY=VALUE lines: for secrets
    result: str | None = (
        None  # result format: text, claude-json, claude-stream-json, codex-jsonl, gemini-json, ...
    )
    allow_deliver_to: list[str] | None = None  # as a queue's; both must allow
    check_writes: bool = False  # name what changed below the workdir and was not declared
    usage_limit: list[str] | None = None  # texts; None: the preset's
    defaults: Defaults = Defaults()


class Sink(Strict, frozen=True):
    """One receiver. Which keys a type needs or allows is checked by `check_settings`."""

    type: str
    # file, ssh
    path: str | None = None
    # command
    command: list[str] | None = None
    # webhook
    url: str | None = None
    secret_file: list[str] | str | None = None
    headers: dict[str, str] | None = None
    # email, ssh
    host: str | None = None
    port: int | None = None
    tls: Literal["starttls", "tls", "none"] | None = None
    username: str | None = None
    password_file: str | None = None
    from_: str | None = msgspec.field(default=None, name="from")
    to: list[str] | str | None = None
    allow_to: list[str] | None = None
    user: str | None = None
    identity_file: str | None = None
    known_hosts: str | None = None
    mode: Literal["file", "append"] | None = None
    peer: str | None = None  # the client id or host name under which that machine contacts this box
    # notify
    urls_file: str | None = None
    # every type
    timeout: Duration | None = None
    backoff: Backoff | None = None
    backoff_max: Duration | None = None
    lifetime: Duration | None = None
    concurrency: int | None = None
    ordered: bool | None = None
    rate: Rate | None = None


class Match(Strict, frozen=True):
    """All that are given must match; a list matches any of its items; `*` as in file names (core.routing)."""

    type: str | list[str] | None = None
    queue: str | list[str] | None = None
    runner: str | list[str] | None = None
    result: str | list[str] | None = None
    label: str | list[str] | None = None


class Route(Strict, frozen=True):
    match: Match = Match()
    deliver_to: list[str] = []


class Writes(Strict, frozen=True):
    on_conflict: Conflict = "refuse"
    ttl: Duration | None = None


class Alerts(Strict, frozen=True):
    deliver_to: list[str] = []
    oldest_queued: Duration = Duration(300)  # a ready task older than this while slots are free
    repeat_every: Duration = Duration(3600)
    stalled_loop: Duration = Duration(90)


class Canary(Strict, frozen=True):
    every: Duration | None = None
    within: Duration = Duration(60)
    queue: str = "default"


class Retention(Strict, frozen=True):
    tasks: Duration = Duration(30 * 86400)
    events: Duration = Duration(90 * 86400)
    unpulled: Duration = Duration(30 * 86400)


class Limits(Strict, frozen=True):
    line_bytes_max: Size = Size(1024 * 1024)
    prompt_bytes_max: Size = Size(16 * 1024 * 1024)
    prompt_roots: list[str] = []
    stdout_bytes_max: Size = Size(64 * 1024 * 1024)
    entry_bytes_max: Size = Size(256 * 1024 * 1024)
    disk_free_min: Size = Size(256 * 1024 * 1024)
    reserve_bytes: Size = Size(16 * 1024 * 1024)
    queue_file_bytes_max: Size = Size(16 * 1024 * 1024)
    completions_bytes_max: Size = Size(64 * 1024 * 1024)
    rescan_every: Duration = Duration(5)
    late_prompt: Duration = Duration(60)


class Control(Strict, frozen=True):
    group: str | None = None
    mode: str | None = None


class Log(Strict, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"


class Settings(Strict, frozen=True):
    defaults: Defaults = Defaults()
    max_workers: int | None = None  # None: the number of CPUs, at least 4
    queues: dict[str, Queue] = {}
    runners: dict[str, Runner] = {}
    sinks: dict[str, Sink] = {}
    routes: list[Route] = []
    writes: Writes = Writes()
    alerts: Alerts = Alerts()
    canary: Canary = Canary()
    retention: Retention = Retention()
    limits: Limits = Limits()
    control: Control = Control()
    log: Log = Log()


@functools.cache
def slots_default() -> int:
    """Workers at once when nobody says: the CPUs this process may use, at least 4."""
    return max(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 4)
