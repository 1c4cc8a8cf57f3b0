"""The config file: YAML, strict. Every problem of a file is told at once, each with path, line and nearest name."""

from __future__ import annotations

import hashlib
import os.path
import re
from typing import Any, Final

import msgspec
import yaml

from agentqd.core.config_rules import check_settings
from agentqd.core.errors import ConfigError
from agentqd.core.settings import Settings
from agentqd.core.sink_places import in_state
from agentqd.core.units import decode_unit
from agentqd.storage.configtexts import msgspec_problem, unknown_keys
from agentqd.storage.envfile import read_regular_file, why_unreadable

BYTES_MAX: Final = 1024 * 1024
NODES_MAX: Final = 100_000
DEPTH_MAX: Final = 50
PROBLEMS_MAX: Final = 100
Key = tuple[str | int, ...]


class Loaded(msgspec.Struct, frozen=True):
    """A config that can be used. `sha256` of the file's bytes; empty where there is no file."""

    settings: Settings
    path: str | None
    sha256: str = ""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of plain words: `on`, `yes`, `1:30` and `0660` are what they look like, not booleans or numbers."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp"}]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}  # fmt: skip
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]{0,400})$"), list("-+0123456789")
)


def load_settings(path: str | None, state: str | None = None) -> Loaded:
    """The settings of the file, or the defaults without one. Raises ConfigError with all its problems.

    `state` is the daemon's state folder, where it is known: no file sink may write into it.
    """
    if path is None:
        return Loaded(Settings(), None)
    raw = _read(path)
    document = _Document(path, raw, state)
    settings = document.settings()
    return Loaded(settings, path, hashlib.sha256(raw).hexdigest())


def _read(path: str) -> bytes:
    try:
        return read_regular_file(path, BYTES_MAX)
    except (OSError, ValueError) as error:
        raise _error(path, [(None, "", why_unreadable(error))]) from error


def _error(path: str, problems: list[tuple[int | None, str, str]]) -> ConfigError:
    lines = []
    for line, key, message in problems:
        where = f"{path}:{line}" if line is not None else path
        lines.append(f"{where}: {key}: {message}" if key else f"{where}: {message}")
    listed = [{"path": path, "line": line, "key": key, "message": message} for line, key, message in problems]
    return ConfigError("; ".join(lines), problems=listed)


class _Document:
    """One file, read: values with the line of each key."""

    def __init__(self, path: str, raw: bytes, state: str | None) -> None:
        self.path = path
        self.state = state
        self.lines: dict[Key, int] = {}
        self.problems: list[tuple[int | None, str, str]] = []
        self._nodes = 0
        self._text = self._decoded(raw)

    def _decoded(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise _error(self.path, [(line, "", f"not UTF-8: byte 0x{raw[error.start]:02x}")]) from error

    def settings(self) -> Settings:
        value = self._value()
        if not self.problems:
            for key, message in list(unknown_keys(value, Settings, ())):
                self._add(key, message)
                _prune(value, key)
        settings = self._convert(value)
        if self.problems:
            self.problems.sort(key=lambda item: item[0] or 0)
            raise _error(self.path, self.problems)
        return settings

    def _value(self) -> Any:
        loader = None
        try:
            loader = _Loader(self._text)
            try:
                node = loader.get_single_node()
                value = None if node is None else self._construct(loader, node, (), 0)
            finally:
                loader.dispose()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark is not None else None
            column = f" (column {mark.column + 1})" if mark is not None else ""
            raise _error(
                self.path, [(line, "", f"not YAML: {error.problem or error.context}{column}")]
            ) from error
        except (
            yaml.YAMLError,
            RecursionError,
            ValueError,
            ArithmeticError,
            LookupError,
            TypeError,
            AttributeError,
        ) as error:
            # pyyaml lets its own errors out: OverflowError (an escape beyond Unicode), IndexError (`!!int` with nothing).
            # Where its reader stood is the nearest line.
            raise _error(self.path, [(loader_line(loader), "", f"not YAML: {error}"[:300])]) from error
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise _error(self.path, [(1, "", "the top level is not a mapping of options")])
        return value

    def _construct(self, loader: _Loader, node: yaml.Node, key: Key, depth: int) -> Any:
        self._nodes += 1
        if self._nodes > NODES_MAX or depth > DEPTH_MAX:
            raise _error(self.path, [(node.start_mark.line + 1, "", "too many values, or nested too deeply")])
        self.lines.setdefault(key, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(loader, node, key, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self._construct(loader, item, (*key, n), depth + 1) for n, item in enumerate(node.value)]
        return loader.construct_object(node, deep=True)

    def _mapping(self, loader: _Loader, node: yaml.MappingNode, key: Key, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            if not isinstance(name_node, yaml.ScalarNode):
                self.problems.append((line, _dotted(key), "a key must be a plain word"))
                continue
            name = str(name_node.value)
            here = (*key, name)
            if name in found:
                self.problems.append(
                    (line, _dotted(here), f"stands here twice (first in line {self.lines[here]})")
                )
                continue
            self.lines[here] = line
            found[name] = self._construct(loader, value_node, here, depth + 1)
        return found

    def _convert(self, value: Any) -> Settings:
        value = _mended(value)
        while len(self.problems) < PROBLEMS_MAX:
            try:
                settings = msgspec.convert(value, Settings, dec_hook=_decode_unit, str_keys=True)
            except (msgspec.ValidationError, ValueError) as error:
                # msgspec tells the first only: tell it, take the value out, look again.
                key, message = msgspec_problem(str(error), value)
                self._add(key, message)
                if not key or not _prune(value, key):
                    return Settings()
                continue
            if not self.problems:  # with values taken out, rules between options would blame the wrong ones
                problems = check_settings(settings)
                if self.state is not None:
                    problems += in_state(settings, self.state, os.path.realpath)
                for problem in problems:
                    self._add(problem.key, problem.message)
            return settings
        return Settings()

    def _add(self, key: Key, message: str) -> None:
        line = None
        for length in range(len(key), 0, -1):
            if key[:length] in self.lines:
                line = self.lines[key[:length]]
                break
        self.problems.append((line, _dotted(key), message))


def _prune(value: Any, key: Key) -> bool:
    """Take the value at `key` out; False if it is not there."""
    for part in key[:-1]:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return False
    if isinstance(value, dict):
        return value.pop(key[-1], value) is not value
    if isinstance(value, list) and isinstance(key[-1], int) and key[-1] < len(value):
        value[key[-1]] = ""  # an item keeps its place, so that the lines of those behind it stay right
        return False
    return False


def loader_line(loader: _Loader | None) -> int:
    """The line that was being read; 1 if reading never began."""
    return 1 if loader is None else int(loader.line) + 1


def _decode_unit(wanted: type, value: Any) -> Any:
    """decode_unit, with a number too large for a float as the bad value that it is."""
    try:
        return decode_unit(wanted, value)
    except OverflowError:
        raise ValueError("the number is far too large") from None


def _mended(value: dict[str, Any]) -> dict[str, Any]:
    """A part with nothing but comments in it is an empty one; `mode: 660` and `mode: 0660` mean the same as "0660"."""
    mended = {name: part for name, part in value.items() if part is not None}
    for name in ("queues", "runners"):
        if isinstance(mended.get(name), dict):
            mended[name] = {
                each: {} if options is None else options for each, options in mended[name].items()
            }
    control = mended.get("control")
    if isinstance(control, dict) and isinstance(control.get("mode"), int):
        mended["control"] = {**control, "mode": str(control["mode"])}
    return mended


def _dotted(key: Key) -> str:
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
