"""Rules between the options of a config that its types cannot say. Pure; each problem names its key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from agentqd.core.lifecycle import Result
from agentqd.core.resolve import ALWAYS_RUNNERS
from agentqd.core.routing import COMPLETIONS, REJECTED
from agentqd.core.runners import PLACEHOLDERS, PRESETS, RunnerSpec, runner_spec
from agentqd.core.settings import SINK_TYPES, Defaults, Match, Queue, Runner, Settings, Sink
from agentqd.core.task import ENV_NAME, SIGNALS

NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_WORD: Final = re.compile(r"[A-Za-z0-9_\[\]:.%@][A-Za-z0-9_\[\]:.%@+-]{0,254}")
READY_SINK_TYPES: Final = ("file", "command", "ssh")  # the other plugs come with the delivery issue
RESULT_FORMATS: Final = tuple(sorted({preset.result for preset in PRESETS.values()} | {"claude-json"}))
_COMMON: Final = frozenset(
    {"type", "timeout", "backoff", "backoff_max", "lifetime", "concurrency", "ordered"}
)
_KEYS: Final[dict[str, tuple[frozenset[str], frozenset[str]]]] = {  # type: (needed, allowed besides)
    "completions": (frozenset(), frozenset()),
    "file": (frozenset({"path"}), frozenset()),
    "command": (frozenset({"command"}), frozenset()),
    "webhook": (frozenset({"url"}), frozenset({"secret_file", "headers"})),
    "email": (
        frozenset({"host", "from"}),
        frozenset({"port", "tls", "username", "password_file", "to", "allow_to"}),
    ),
    "ssh": (
        frozenset({"host", "path"}),
        frozenset({"port", "user", "identity_file", "known_hosts", "mode", "peer"}),
    ),
    "notify": (frozenset({"urls_file"}), frozenset()),
}


class Problem(msgspec.Struct, frozen=True):
    """`key` is the path of names in the file: ("queues", "default", "concurrency")."""

    key: tuple[str | int, ...]
    message: str


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
    yield from _at_least_one(("max_workers",), settings.max_workers)
    yield from _check_defaults(settings, ("defaults",), settings.defaults)
    for name, queue in settings.queues.items():
        yield from _check_name(("queues", name), name)
        yield from _at_least_one(("queues", name, "concurrency"), queue.concurrency)
        yield from _at_least_one(("queues", name, "waiting_max"), queue.waiting_max)
        yield from _check_defaults(settings, ("queues", name, "defaults"), queue.defaults)
    for name, runner in settings.runners.items():
        yield from _check_name(("runners", name), name)
        yield from _check_runner(settings, name, runner)
    for name, sink in settings.sinks.items():
        yield from _check_name(("sinks", name), name)
        yield from _check_sink(name, sink)
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
    }
    for field, names in known.items():
        given = getattr(match, field)
        for name in [given] if isinstance(given, str) else given or ():
            if name not in names and not set(name) & set("*?["):
                yield Problem(
                    ("routes", n, "match", field), f"there is no {field} {name!r}{_nearest(name, names)}"
                )


def _check_name(key: tuple[str | int, ...], name: str) -> Iterator[Problem]:
    if not NAME.fullmatch(name):
        yield Problem(key, "a name is 1 to 64 of A-Z a-z 0-9 _ -")


def _at_least_one(key: tuple[str | int, ...], value: int | None) -> Iterator[Problem]:
    if value is not None and value < 1:
        yield Problem(key, "must be at least 1")


def _check_defaults(settings: Settings, key: tuple[str | int, ...], defaults: Defaults) -> Iterator[Problem]:
    queues = {"default", *settings.queues}
    if defaults.queue is not None and defaults.queue not in queues:
        yield Problem(
            (*key, "queue"), f"there is no queue {defaults.queue!r}{_nearest(defaults.queue, queues)}"
        )
    runners = {*ALWAYS_RUNNERS, *settings.runners}
    if defaults.runner is not None and defaults.runner not in runners:
        yield Problem(
            (*key, "runner"), f"there is no runner {defaults.runner!r}{_nearest(defaults.runner, runners)}"
        )
    yield from _at_least_one((*key, "max_attempts"), defaults.max_attempts)
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
            yield Problem(key, f"there is no sink {name!r}{_nearest(name, known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there is {', '.join(sorted(known))}"


def _check_runner(settings: Settings, name: str, runner: Runner) -> Iterator[Problem]:
    key: tuple[str | int, ...] = ("runners", name)
    if runner.preset is not None and runner.preset not in PRESETS:
        yield Problem(
            (*key, "preset"), f"there is no preset {runner.preset!r}{_nearest(runner.preset, PRESETS)}"
        )
    if runner.preset is None and name not in PRESETS and runner.command is None and not runner.allow_command:
        yield Problem(key, f"needs a preset ({', '.join(PRESETS)}) or a command")
    if runner.command is not None and (not runner.command or not runner.command[0]):
        yield Problem((*key, "command"), "is an argv list; its first item is the program")
    if runner.result is not None and runner.result not in RESULT_FORMATS:
        near = _nearest(runner.result, RESULT_FORMATS)
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
                near = _nearest(found, PLACEHOLDERS)
                yield Problem((*key, "command"), f"there is no placeholder {found}{near}")
    for variable in runner.env:
        if not ENV_NAME.fullmatch(variable) or variable.startswith("AGENTQ_"):
            yield Problem((*key, "env"), f"{variable!r} cannot be set")
    for n, path in enumerate(runner.env_files):
        if not path.startswith("/"):
            yield Problem((*key, "env_files", n), f"{path!r} is not an absolute path")
    yield from _check_defaults(settings, (*key, "defaults"), runner.defaults)


def _check_sink(name: str, sink: Sink) -> Iterator[Problem]:
    key: tuple[str | int, ...] = ("sinks", name)
    if name in {COMPLETIONS, REJECTED}:
        yield Problem(key, f"{name} is built in and always there")
        return
    if sink.type not in _KEYS:
        yield Problem((*key, "type"), f"there is no type {sink.type!r}{_nearest(sink.type, SINK_TYPES)}")
        return
    if sink.type not in READY_SINK_TYPES:
        ready = ", ".join(READY_SINK_TYPES)
        yield Problem((*key, "type"), f"the type {sink.type} is not in this version yet; there is {ready}")
        return
    needed, allowed = _KEYS[sink.type]
    given = {field for field in _given(sink) if field not in _COMMON}
    for field in sorted(needed - given):
        yield Problem(key, f"a sink of type {sink.type} needs {field}")
    for field in sorted(given - needed - allowed):
        types = [each for each, (a, b) in _KEYS.items() if field in a | b]
        yield Problem(
            (*key, field), f"a sink of type {sink.type} has no {field} (that is for {', '.join(types)})"
        )
    if sink.type == "ssh":
        yield from _check_ssh(key, sink)
    elif sink.path is not None and not sink.path.startswith("/"):
        yield Problem((*key, "path"), f"{sink.path!r} is not an absolute path")
    if sink.command is not None and (not sink.command or not sink.command[0]):
        yield Problem((*key, "command"), "is an argv list; its first item is the program")
    yield from _at_least_one((*key, "concurrency"), sink.concurrency)


def _check_ssh(key: tuple[str | int, ...], sink: Sink) -> Iterator[Problem]:
    """Its path is that machine's: absolute, or from the home of the user who logs in there."""
    for name in ("host", "user", "peer"):
        value = getattr(sink, name)
        if value is not None and not _WORD.fullmatch(value):
            yield Problem((*key, name), f"{value!r} is no name")
    if sink.path is not None and (not sink.path or "\x00" in sink.path or sink.path.startswith("~")):
        yield Problem(
            (*key, "path"),
            f"{sink.path!r} is no path (one without a / at its start begins at the home there)",
        )
    if sink.mode == "append" and (sink.path or "").endswith("/"):
        yield Problem((*key, "path"), f"{sink.path!r} is a folder; mode append needs a file")
    if sink.port is not None and not 1 <= sink.port <= 65535:
        yield Problem((*key, "port"), f"{sink.port} is no port")
    for name in ("identity_file", "known_hosts"):
        value = getattr(sink, name)
        if value is not None and not value.startswith("/"):
            yield Problem((*key, name), f"{value!r} is not an absolute path")
    if sink.concurrency is not None and sink.concurrency > 1:
        yield Problem((*key, "concurrency"), "a sink of type ssh sends one at a time")


def _given(sink: Sink) -> Iterator[str]:
    for field in msgspec.structs.fields(sink):
        if getattr(sink, field.name) is not None:
            yield field.encode_name
