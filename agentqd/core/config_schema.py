"""The config's JSON schema (for editors), and the settings as they may be shown (no secret, no environment value)."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import inspect

from agentqd.core.settings import Settings
from agentqd.core.units import Backoff, Duration, Rate, Size, encode_unit

HIDDEN: Final = "***"
_DURATION: Final = {
    "oneOf": [
        {"type": "number", "minimum": 0},
        {"type": "string", "pattern": r"^(\d+(\.\d+)?(ms|s|m|h|d|w)?)+$"},
    ],
    "description": "45m, 10s, 500ms, 1h30m, or seconds",
}
_SIZE: Final = {
    "oneOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^\d+(\.\d+)?\s*([kKMGT]i?B?|B)?$"},
    ],
    "description": "64KiB, 10MB, or bytes",
}


_BACKOFF: Final = {"oneOf": [_DURATION, {"type": "array", "items": _DURATION, "minItems": 1}]}
_RATE: Final = {
    "type": "string",
    "pattern": r"^\d{1,7}\s*/\s*[smhd]$",
    "description": "10/s, 100/m, 1000/h, 50/d",
}
_CUSTOM: Final[dict[type, dict[str, Any]]] = {
    Duration: _DURATION,
    Size: _SIZE,
    Backoff: _BACKOFF,
    Rate: _RATE,
}
_PLAIN: Final[tuple[tuple[type[inspect.Type], str], ...]] = (
    (inspect.BoolType, "boolean"),
    (inspect.IntType, "integer"),
    (inspect.StrType, "string"),
    (inspect.NoneType, "null"),
)


def config_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the config file, from the settings' own types: it cannot drift from them."""
    schema = _of(inspect.type_info(Settings))
    parts = schema["properties"]
    for name in ("queues", "runners"):
        parts[name]["additionalProperties"] = _or_empty(parts[name]["additionalProperties"])
    schema["properties"] = {name: _or_empty(part) for name, part in parts.items()}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "agentqd.yaml", **schema}


def _or_empty(schema: dict[str, Any]) -> dict[str, Any]:
    """A part with nothing but comments in it is null to YAML, and an empty one to the reader."""
    return {"anyOf": [schema, {"type": "null"}]} if schema.get("type") in {"object", "array"} else schema


def _of(kind: inspect.Type) -> dict[str, Any]:
    if isinstance(kind, inspect.StructType):
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {field.encode_name: _field(field) for field in kind.fields},
            "required": [field.encode_name for field in kind.fields if field.required],
        }
    if isinstance(kind, inspect.DictType):
        return {"type": "object", "additionalProperties": _of(kind.value_type)}
    if isinstance(kind, inspect.ListType):
        return {"type": "array", "items": _of(kind.item_type)}
    if isinstance(kind, inspect.LiteralType):
        return {"enum": list(kind.values)}
    if isinstance(kind, inspect.UnionType):
        return {"anyOf": [_of(each) for each in kind.types]}
    if isinstance(kind, inspect.CustomType):
        return _CUSTOM[kind.cls]
    return {"type": next(name for each, name in _PLAIN if isinstance(kind, each))}


def _field(field: inspect.Field) -> dict[str, Any]:
    schema = _of(field.type)
    if (
        field.default is msgspec.NODEFAULT
        or field.default is None
        or isinstance(field.default, msgspec.Struct)
    ):
        return schema
    return {**schema, "default": msgspec.to_builtins(field.default, enc_hook=encode_unit)}


def settings_as_json(settings: Settings) -> dict[str, Any]:
    """Durations in seconds, sizes in bytes; values of `env` and `headers` are never shown."""
    shown: dict[str, Any] = msgspec.to_builtins(settings, enc_hook=encode_unit)
    for runner in shown["runners"].values():
        runner["env"] = dict.fromkeys(runner["env"], HIDDEN)
    for sink in shown["sinks"].values():
        if sink.get("headers"):
            sink["headers"] = dict.fromkeys(sink["headers"], HIDDEN)
    return shown
