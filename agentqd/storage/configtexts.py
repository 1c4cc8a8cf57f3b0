"""What a config's mistakes are called: unknown options with the nearest known one, values of a wrong kind in plain words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from agentqd.core.settings import Settings, Sink
from agentqd.core.sink_rules import fields_of

Key = tuple[str | int, ...]
_PLAIN: Final = {
    "str": "a text", "int": "a whole number", "float": "a number", "bool": "true or false", "array": "a list",
    "object": "a mapping of options", "null": "nothing",
}  # fmt: skip


def unknown_keys(value: Any, wanted: Any, key: Key) -> Iterator[tuple[Key, str]]:
    """Every unknown key at every level, with the nearest known name."""
    kind = msgspec.inspect.type_info(wanted) if not isinstance(wanted, msgspec.inspect.Type) else wanted
    if isinstance(kind, msgspec.inspect.UnionType):
        for part in kind.types:
            if isinstance(
                part, (msgspec.inspect.StructType, msgspec.inspect.DictType, msgspec.inspect.ListType)
            ):
                yield from unknown_keys(value, part, key)
    elif isinstance(kind, msgspec.inspect.StructType) and isinstance(value, dict):
        fields = {field.encode_name: field.type for field in kind.fields}
        known = (fields_of(value.get("type")) if kind.cls is Sink else None) or fields
        for name, item in value.items():
            if name in fields:
                yield from unknown_keys(item, fields[name], (*key, name))
            else:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = (
                    f"did you mean {near[0]}?"
                    if near
                    else f"known here: {', '.join(f for f in fields if f in known)}"
                )
                yield (*key, name), f"unknown option; {hint}"
    elif isinstance(kind, msgspec.inspect.DictType) and isinstance(value, dict):
        for name, item in value.items():
            yield from unknown_keys(item, kind.value_type, (*key, name))
    elif isinstance(kind, msgspec.inspect.ListType) and isinstance(value, list):
        for n, item in enumerate(value):
            yield from unknown_keys(item, kind.item_type, (*key, n))


def msgspec_problem(text: str, value: Any) -> tuple[Key, str]:
    """msgspec's message with its path turned into ours (`$.queues[...].concurrency` names no key of a mapping)."""
    message, _, where = text.partition(" - at `")
    path = where.rstrip("`").lstrip("$")
    key: list[str | int] = []
    candidates: list[tuple[list[str | int], Any]] = [(key, value)]
    for name, index in re.findall(r"\.([A-Za-z_]+)|\[([^\]]*)\]", path):
        following: list[tuple[list[str | int], Any]] = []
        for so_far, item in candidates:
            if name and isinstance(item, dict) and name in item:
                following.append(([*so_far, name], item[name]))
            elif index == "..." and isinstance(item, dict):
                following += [([*so_far, each], inner) for each, inner in item.items()]
            elif index.isdigit() and isinstance(item, list) and int(index) < len(item):
                following.append(([*so_far, int(index)], item[int(index)]))
        candidates = following or candidates
    wrong = next((so_far for so_far, item in candidates if not _fits(item, message)), candidates[0][0])
    return tuple(wrong), _plain(message, tuple(wrong))


def _plain(message: str, key: Key) -> str:
    """msgspec's words as a person would say them."""
    if (enum := re.fullmatch(r"Invalid enum value (?:'(.*)'|(\S+))", message, re.DOTALL)) is not None:
        given = enum[1] if enum[1] is not None else enum[2]
        choices = _choices(key)
        near = difflib.get_close_matches(given, choices, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"there is no {key[-1]} {given!r}; it is one of {', '.join(choices)}{hint}"
    kinds = re.fullmatch(r"Expected `([a-z| ]+)`, got `([a-z]+)`", message)
    if kinds is not None:
        wanted = [each for each in kinds[1].split(" | ") if each != "null"] or ["null"]
        said = " or ".join(_PLAIN.get(each, each) for each in wanted)
        return f"expected {said}, got {_PLAIN.get(kinds[2], kinds[2])}"
    return f"{message[:1].lower()}{message[1:]}"


def _choices(key: Key) -> list[str]:
    """The words that the option at `key` takes."""
    kinds: list[Any] = [msgspec.inspect.type_info(Settings)]
    for part in key:
        below: list[Any] = []
        for kind in kinds:
            if isinstance(kind, msgspec.inspect.StructType):
                below += [field.type for field in kind.fields if field.encode_name == part]
            elif isinstance(kind, msgspec.inspect.DictType):
                below.append(kind.value_type)
            elif isinstance(kind, msgspec.inspect.ListType):
                below.append(kind.item_type)
        kinds = [
            one
            for kind in below
            for one in (kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,))
        ]
    return [
        str(value) for kind in kinds if isinstance(kind, msgspec.inspect.LiteralType) for value in kind.values
    ]


def _fits(item: Any, message: str) -> bool:
    """Could this value have caused another message than `message`? Narrows `[...]` down to one of a mapping's values."""
    got = re.search(r"got `([a-z]+)`", message)
    if got is not None:
        names = {
            "str": "str",
            "int": "int",
            "float": "float",
            "bool": "bool",
            "NoneType": "null",
            "list": "array",
            "dict": "object",
        }
        return names.get(type(item).__name__) != got[1]
    missing = re.search(r"missing required field `([^`]+)`", message)
    if missing is not None:
        return isinstance(item, dict) and missing[1] in item
    return isinstance(item, str) and repr(item) not in message and item not in message
