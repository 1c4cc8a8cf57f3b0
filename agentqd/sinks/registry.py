"""Which plug serves which type, and how often each type tries. A plug's module (and its library) is loaded when used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from agentqd.core import settings as config
from agentqd.core.errors import ConfigError
from agentqd.core.retry import Schedule
from agentqd.sinks.base import Context, Sink

MINUTE_S: Final = 60.0
HOUR_S: Final = 3600.0
DAY_S: Final = 86400.0

_APPENDING: Final = Schedule((1.0,), doubles=True, max_s=60.0, lifetime_s=None)
_BY_HAND: Final = Schedule((5.0,), doubles=True, max_s=HOUR_S, lifetime_s=3 * DAY_S)
_BUSY_MIN_S: Final = MINUTE_S  # Svix: after a time-out or a 429
_WEBHOOK_STEPS_S: Final = (
    5.0,
    5 * MINUTE_S,
    30 * MINUTE_S,
    *(hours * HOUR_S for hours in (2, 5, 10, 14, 20, 24)),
)

# Sources: docs/delivery.md. The webhook's lifetime lies between its tenth try at the latest jitter (90.7 h) and an
# eleventh at the earliest (99.6 h): after the tenth it is dead.
SCHEDULES: Final[dict[str, Schedule]] = {
    "completions": _APPENDING,
    "rejected": _APPENDING,
    "file": _APPENDING,
    "command": _BY_HAND,
    "notify": Schedule((5.0,), doubles=True, max_s=HOUR_S, lifetime_s=3 * DAY_S, busy_min_s=_BUSY_MIN_S),
    "webhook": Schedule(
        _WEBHOOK_STEPS_S, doubles=False, max_s=DAY_S, lifetime_s=4 * DAY_S, busy_min_s=_BUSY_MIN_S
    ),
    "ssh": Schedule((5.0,), doubles=True, max_s=5 * MINUTE_S, lifetime_s=14 * DAY_S),
    "email": Schedule((5 * MINUTE_S,), doubles=True, max_s=4000.0, lifetime_s=5 * DAY_S, by_age=True),
}


def _completions(context: Context, completions_bytes_max: int) -> Sink:
    from agentqd.sinks.completions import Completions

    return Completions(context, completions_bytes_max)


def _rejected(context: Context, _: int) -> Sink:
    from agentqd.sinks.rejected import RejectedFile

    return RejectedFile(context)


def _file(context: Context, _: int) -> Sink:
    from agentqd.sinks.file import FileSink

    return FileSink(context)


def _command(context: Context, _: int) -> Sink:
    from agentqd.sinks.command import CommandSink

    return CommandSink(context)


def _ssh(context: Context, _: int) -> Sink:
    from agentqd.sinks.ssh import SshSink

    return SshSink(context)


def _notify(context: Context, _: int) -> Sink:
    from agentqd.sinks.notify import NotifySink

    return NotifySink(context)


def _email(context: Context, _: int) -> Sink:
    from agentqd.sinks.email import EmailSink

    return EmailSink(context)


def _webhook(context: Context, _: int) -> Sink:
    from agentqd.sinks.webhook import WebhookSink

    return WebhookSink(context)


_PLUGS: Final[dict[str, Callable[[Context, int], Sink]]] = {
    "completions": _completions,
    "rejected": _rejected,
    "file": _file,
    "command": _command,
    "ssh": _ssh,
    "notify": _notify,
    "email": _email,
    "webhook": _webhook,
}


def sink_types() -> tuple[str, ...]:
    """The types that have a plug."""
    return tuple(_PLUGS)


def make_sink(context: Context, completions_bytes_max: int) -> Sink:
    """The plug for `context.settings.type`, not yet opened. Raises ConfigError."""
    plug = _PLUGS.get(context.settings.type)
    if plug is None:
        raise ConfigError(f"the sink {context.name} cannot be used: {_unusable(context.settings.type)}")
    return plug(context, completions_bytes_max)


def schedule_for(name: str, settings: config.Sink | None, type_: str) -> Schedule:
    """The type's defaults, with what the sink's settings say instead. Raises ConfigError for an unknown type."""
    default = SCHEDULES.get(type_)
    if default is None:
        raise ConfigError(f"the sink {name} has no schedule: {_unusable(type_)}")
    if settings is None:
        return default
    steps_s, doubles, max_s = default.steps_s, default.doubles, default.max_s
    if settings.backoff is not None:
        steps_s, doubles = settings.backoff.steps_s, settings.backoff.doubles
        max_s = max(max_s, *steps_s)  # what a person asked for is never cut to a default they did not see
    if settings.backoff_max is not None:
        max_s = float(settings.backoff_max)
    lifetime_s = default.lifetime_s if settings.lifetime is None else float(settings.lifetime)
    by_age = default.by_age and settings.backoff is None
    return Schedule(steps_s, doubles, max_s, lifetime_s, default.busy_min_s, by_age)


def _unusable(type_: str) -> str:
    return f"{type_} is no type of sink (these are: {', '.join(_PLUGS)})"
