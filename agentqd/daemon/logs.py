"""structlog: readable on a terminal, one JSON object a line elsewhere; event names are stable, texts are not.

No prompt, secret, environment or payload is ever handed to a log call; `_drop_unsafe` is the last net under that rule.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final, cast

_rich_was_there = "rich" in sys.modules
if not _rich_was_there:
    sys.modules["rich"] = None  # type: ignore[assignment]  # wherever it happens to be installed, structlog loads it: 5 MB

import structlog  # noqa: E402

if not _rich_was_there:
    del sys.modules["rich"]

from agentqd.core.settings import Log as LogSettings  # noqa: E402
from agentqd.loops.box import Log  # noqa: E402

_NEVER: Final = frozenset(
    {"prompt", "env", "environment", "payload", "secret", "password", "content", "spec", "raw", "argv"}
)
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_VALUE_CHARS_MAX: Final = 2000


def _drop_unsafe(_: Any, __: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in list(fields):
        if name in _NEVER:
            fields[name] = "***"
        elif isinstance(fields[name], str) and len(fields[name]) > _VALUE_CHARS_MAX:
            fields[name] = fields[name][:_VALUE_CHARS_MAX] + "..."
    return fields


def _ordered(_: Any, __: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """time, level, event first: what a person greps for stands in front."""
    head = {name: fields.pop(name) for name in ("time", "level", "event") if name in fields}
    return {**head, **fields}


def make_log(settings: LogSettings) -> Log:
    """The process's log on stderr. Called again after a config edit."""
    as_json = settings.format == "json" or (settings.format == "auto" and not sys.stderr.isatty())
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        _drop_unsafe,
        _ordered,
    ]
    renderer: Any
    if as_json:
        import msgspec

        encode = msgspec.json.Encoder(enc_hook=repr).encode
        renderer = structlog.processors.JSONRenderer(serializer=lambda fields, **_: encode(fields).decode())
    else:
        renderer = structlog.dev.ConsoleRenderer(
            timestamp_key="time", colors=sys.stderr.isatty(), sort_keys=False
        )
    logger = structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[settings.level]),
        cache_logger_on_first_use=True,
    )
    return cast("Log", logger)
