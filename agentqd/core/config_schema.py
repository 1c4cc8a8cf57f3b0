"""The config's JSON schema (for editors), and the settings as they may be shown (no secret, no environment value)."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from agentqd.core.settings import Settings
from agentqd.core.units import Backoff, Duration, Size, encode_unit

HIDDEN: Final = "***"
_DURATION: Final = {
    "oneOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": r"^(\d+(\.\d+)?(ms|s|m|h|d|w)?)+$"}],
    "description": "45m, 10s, 500ms, 1h30m, or seconds",
}
_SIZE: Final = {
    "oneOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)?\s*([kKMGT]i?B?|B)?$"}],
    "description": "64KiB, 10MB, or bytes",
}


def _schema_hook(kind: type) -> dict[str, Any]:
    if kind is Duration:
        return dict(_DURATION)
    if kind is Size:
        return dict(_SIZE)
    if kind is Backoff:
        return {"oneOf": [dict(_DURATION), {"type": "array", "items": dict(_DURATION), "minItems": 1}]}
    raise NotImplementedError(f"no schema for {kind}")


def config_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the config file."""
    schema = msgspec.json.schema(Settings, schema_hook=_schema_hook)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "agentqd.yaml",
        **schema,
    }


def settings_as_json(settings: Settings) -> dict[str, Any]:
    """Durations in seconds, sizes in bytes; values of `env` and `headers` are never shown."""
    shown: dict[str, Any] = msgspec.to_builtins(settings, enc_hook=encode_unit)
    for runner in shown["runners"].values():
        runner["env"] = dict.fromkeys(runner["env"], HIDDEN)
    for sink in shown["sinks"].values():
        if sink.get("headers"):
            sink["headers"] = dict.fromkeys(sink["headers"], HIDDEN)
    return shown
