"""What msgspec says of a value of a wrong kind, as a person would say it: for the config and for tasks."""

from __future__ import annotations

import difflib
import re
from typing import Any, Final

import msgspec

Key = tuple[str | int, ...]
_GIVEN_CHARS_MAX: Final = 80
_PLAIN: Final = {
    "str": "a text", "int": "a whole number", "float": "a number", "bool": "true or false", "array": "a list",
    "object": "a mapping of options", "null": "nothing",
}  # fmt: skip


def plain(message: str, key: Key, of: type) -> str:
    """msgspec's message on the value at `key` of a struct, in plain words; an unknown word is told with those that are known."""
    if (enum := re.fullmatch(r"Invalid enum value (?:'(.*)'|(\S+))", message, re.DOTALL)) is not None:
        given = (enum[1] if enum[1] is not None else enum[2])[:_GIVEN_CHARS_MAX]
        choices = _choices(key, of)
        near = difflib.get_close_matches(given, choices, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"there is no {key[-1]} {given!r}; it is one of {', '.join(choices)}{hint}"
    kinds = re.fullmatch(r"Expected `([a-z| ]+)`, got `([a-z]+)`", message)
    if kinds is not None:
        wanted = [each for each in kinds[1].split(" | ") if each != "null"] or ["null"]
        said = " or ".join(_PLAIN.get(each, each) for each in wanted)
        return f"expected {said}, got {_PLAIN.get(kinds[2], kinds[2])}"
    return f"{message[:1].lower()}{message[1:]}"


def _choices(key: Key, of: type) -> list[str]:
    """The words that the option at `key` takes."""
    kinds: list[Any] = [msgspec.inspect.type_info(of)]
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
