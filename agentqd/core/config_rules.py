"""Rules between the options of a config that its types cannot say. Pure; each problem names its key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

from agentqd.core.config_problem import Problem, at_least_one, nearest
from agentqd.core.lifecycle import Result
from agentqd.core.limits import USAGE_LIMIT_SIGN_CHARS_MAX, USAGE_LIMIT_SIGNS_MAX
from agentqd.core.resolve import ALWAYS_RUNNERS
from agentqd.core.routing import COMPLETIONS
from agentqd.core.runners import PLACEHOLDERS, PRESETS, RunnerSpec, runner_spec
from agentqd.core.settings import Defaults, Match, Queue, Runner, Settings
from agentqd.core.sink_places import check_places
from agentqd.core.sink_rules import check_sink
from agentqd.core.task import ENV_NAME, SIGNALS

NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
RESULT_FORMATS: Final = tuple(sorted({preset.result for preset in PRESETS.values()} | {"claude-json"}))


def effective_queue(settings: Settings, name: str) -> Queue | None:
    """The queue's options; `default` always exists."""
    return settings.queues.get(name) or (Queue() if name == "default" else None)


def effective_runner(settings: Settings, name: str) -> RunnerSpec | None:
    """The runner with its preset filled in; `shell` and `command` always exist."""
    options = settings.runners.get(name)
    if options is None:
        return PRESETS[name] if name in ALWAYS_RUNNERS else None
    return runner_spec(name, options)


def check_settings(settings: Settings) -> list[Problem]:
    """Everything that is wrong, in the order of the file's parts; empty if it can be used."""
    return [*_check_all(settings)]


def _check_all(settings: Settings) -> Iterator[Problem]:
    yield from at_least_one(("max_workers",), settings.max_workers)
    yield from _check_defaults(settings, ("defaults",), settings.defaults)
    for name, queue in settings.queues.items():
        yield from _check_name(("queues", name), name)
        yield from at_least_one(("queues", name, "concurrency"), queue.concurrency)
        yield from at_least_one(("queues", name, "waiting_max"), queue.waiting_max)
        yield from _check_allowed(settings, ("queues", name, "allow_deliver_to"), queue.allow_deliver_to)
        yield from _check_defaults(settings, ("queues", name, "defaults"), queue.defaults)
    for name, runner in settings.runners.items():
        yield from _check_name(("runners", name), name)
        yield from _check_runner(settings, name, runner)
    for name, sink in settings.sinks.items():
        yield from _check_name(("sinks", name), name)
        yield from check_sink(name, sink)
    yield from check_places(settings)
    for n, route in enumerate(settings.routes):
        yield from _known(settings, ("routes", n, "deliver_to"), route.deliver_to)
    yield from _known(settings, ("alerts", "deliver_to"), settings.alerts.deliver_to)
    if settings.canary.queue not in {"default", *settings.queues}:
        yield Problem(("canary", "queue"), f"there is no queue {settings.canary.queue!r}")
    if settings.alerts.stalled_loop < 60:
        yield Problem(
            ("alerts", "stalled_loop"), "must be at least 60s: a loop with nothing to do turns every 30s"
        )
    if settings.canary.every is not None:
        yield Problem(("canary", "every"), "the canary comes with a later version; leave it out")
    for n, root in enumerate(settings.limits.prompt_roots):
        if not root.startswith("/"):
            yield Problem(("limits", "prompt_roots", n), f"{root!r} is not an absolute path")
    yield from _check_numbers(settings)
    for n, route in enumerate(settings.routes):
        yield from _check_match(settings, n, route.match)
    if settings.control.mode is not None and settings.control.mode not in {"0600", "600", "0660", "660"}:
        yield Problem(
            ("control", "mode"), f"{settings.control.mode!r} is neither 0600 nor 0660 (with control.group)"
        )


def _check_numbers(settings: Settings) -> Iterator[Problem]:
    """Zero would mean a loop without a pause, or everything gone or refused at once."""
    durations = {
        "alerts": ("oldest_queued", "repeat_every"),
        "canary": ("within",),
        "retention": ("tasks", "events", "unpulled"),
        "limits": ("rescan_every",),
    }
    for part, names in durations.items():
        for name in names:
            if getattr(getattr(settings, part), name) <= 0:
                yield Problem((part, name), "must be more than zero")
    for name in ("line_bytes_max", "prompt_bytes_max", "stdout_bytes_max", "entry_bytes_max",
                 "queue_file_bytes_max", "completions_bytes_max"):  # fmt: skip
        if getattr(settings.limits, name) < 1024:
            yield Problem(("limits", name), "must be at least 1KiB")


def _check_match(settings: Settings, n: int, match: Match) -> Iterator[Problem]:
    """A plain name that nothing has would never match: a typo. Patterns are not looked at."""
    known = {
        "queue": {"default", *settings.queues},
        "runner": {*ALWAYS_RUNNERS, *settings.runners},
        "result": {each.value for each in Result},
        "type": {"agentq.task.entry", *(f"agentq.task.{each.value}" for each in Result)},
    }
    for field, names in known.items():
        given = getattr(match, field)
        for name in [given] if isinstance(given, str) else given or ():
            alert = field == "type" and name.startswith("agentq.alert.")
            if name not in names and not alert and not set(name) & set("*?["):
                yield Problem(
                    ("routes", n, "match", field), f"there is no {field} {name!r}{nearest(name, names)}"
                )


def _check_name(key: tuple[str | int, ...], name: str) -> Iterator[Problem]:
    if not NAME.fullmatch(name):
        yield Problem(key, "a name is 1 to 64 of A-Z a-z 0-9 _ -")


def _check_defaults(settings: Settings, key: tuple[str | int, ...], defaults: Defaults) -> Iterator[Problem]:
    queues = {"default", *settings.queues}
    if defaults.queue is not None and defaults.queue not in queues:
        yield Problem(
            (*key, "queue"), f"there is no queue {defaults.queue!r}{nearest(defaults.queue, queues)}"
        )
    runners = {*ALWAYS_RUNNERS, *settings.runners}
    if defaults.runner is not None and defaults.runner not in runners:
        yield Problem(
            (*key, "runner"), f"there is no runner {defaults.runner!r}{nearest(defaults.runner, runners)}"
        )
    if defaults.workdir is not None and not defaults.workdir.startswith(("/", "~")):
        yield Problem((*key, "workdir"), f"{defaults.workdir!r} is not an absolute path; write /... or ~/...")
    yield from at_least_one((*key, "max_attempts"), defaults.max_attempts)
    for name in ("run_timeout", "total_timeout", "first_output_timeout", "silence_timeout"):
        value = getattr(defaults, name)
        if value is not None and value <= 0:
            yield Problem((*key, name), "must be more than zero; leave it out for the default")
    if defaults.warning_signal is not None and defaults.warning_signal not in SIGNALS:
        yield Problem((*key, "warning_signal"), f"is one of {', '.join(SIGNALS)}")
    yield from _known(settings, (*key, "deliver_to"), defaults.deliver_to or ())


def _known(settings: Settings, key: tuple[str | int, ...], names: Iterable[str]) -> Iterator[Problem]:
    known = {COMPLETIONS, *settings.sinks}
    for name in names:
        if name not in known:
            yield Problem(key, f"there is no sink {name!r}{nearest(name, known)}")


def _check_allowed(
    settings: Settings, key: tuple[str | int, ...], allowed: list[str] | None
) -> Iterator[Problem]:
    """A plain name that no sink has allows nothing: a typo. Patterns are not looked at."""
    yield from _known(settings, key, [name for name in allowed or () if not set(name) & set("*?[")])


def _check_runner(settings: Settings, name: str, runner: Runner) -> Iterator[Problem]:
    key: tuple[str | int, ...] = ("runners", name)
    if runner.preset is not None and runner.preset not in PRESETS:
        yield Problem(
            (*key, "preset"), f"there is no preset {runner.preset!r}{nearest(runner.preset, PRESETS)}"
        )
    if runner.preset is None and name not in PRESETS and runner.command is None and not runner.allow_command:
        yield Problem(key, f"needs a preset ({', '.join(PRESETS)}) or a command")
    if runner.command is not None and (not runner.command or not runner.command[0]):
        yield Problem((*key, "command"), "is an argv list; its first item is the program")
    if runner.result is not None and runner.result not in RESULT_FORMATS:
        near = nearest(runner.result, RESULT_FORMATS)
        yield Problem((*key, "result"), f"there is no result format {runner.result!r}{near}")
    for n, pattern in enumerate(runner.inherit_env or ()):
        if not ENV_NAME.fullmatch(pattern.removesuffix("*")):
            yield Problem((*key, "inherit_env", n), f"{pattern!r} is neither a name nor PREFIX_*")
    for n, item in enumerate(runner.command or ()):
        if "\x00" in item:
            yield Problem((*key, "command", n), "has a NUL character, which no argument can carry")
    for item in runner.command or ():
        for found in re.findall(r"\{[a-z_]+\}", item):
            if found not in PLACEHOLDERS:
                near = nearest(found, PLACEHOLDERS)
                yield Problem((*key, "command"), f"there is no placeholder {found}{near}")
    for variable in runner.env:
        if not ENV_NAME.fullmatch(variable) or variable.startswith("AGENTQ_"):
            yield Problem((*key, "env"), f"{variable!r} cannot be set")
    for n, path in enumerate(runner.env_files):
        if not path.startswith("/"):
            yield Problem((*key, "env_files", n), f"{path!r} is not an absolute path")
    yield from _check_allowed(settings, (*key, "allow_deliver_to"), runner.allow_deliver_to)
    if len(runner.usage_limit or ()) > USAGE_LIMIT_SIGNS_MAX:
        yield Problem((*key, "usage_limit"), f"has more than {USAGE_LIMIT_SIGNS_MAX} texts")
    for n, sign in enumerate(runner.usage_limit or ()):
        letters = sum(char.isalnum() for char in sign)
        if letters < 3 or len(sign) > USAGE_LIMIT_SIGN_CHARS_MAX or not sign.isprintable():
            text = f"is a text of at most {USAGE_LIMIT_SIGN_CHARS_MAX} characters within a line, with at least 3 letters"
            yield Problem((*key, "usage_limit", n), text)
    yield from _check_defaults(settings, (*key, "defaults"), runner.defaults)
