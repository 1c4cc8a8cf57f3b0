"""The laptop's config: which boxes there are. Strict: every problem with path, line and nearest name.

    boxes:
      NAME:
        url: ssh://USER@HOST[:PORT]
        state_dir: /var/lib/agentqd      # otherwise by who logs in
        runtime_dir: /run/agentqd
        keep: 10m                        # how long the connection outlives its last use

Loaded by `agentqctl box`, by `--box all` and by a keeper; an ordinary verb never reads it (yaml takes longer than the verb).
"""

from __future__ import annotations

import difflib
from typing import Any, Final, NamedTuple

import yaml

from agentqd.client.boxname import check_box_name
from agentqd.client.boxurl import Address, parse_box_url
from agentqd.client.errors import NoSuchBox
from agentqd.core.errors import ConfigError
from agentqd.core.units import parse_duration

BYTES_MAX: Final = 256 * 1024
BOXES_MAX: Final = 1000
KEEP_DEFAULT_S: Final = 600.0
BOX_OPTIONS: Final = ("url", "state_dir", "runtime_dir", "keep")
_TEXT_TAGS: Final = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class BoxEntry(NamedTuple):
    """One box as the config has it."""

    name: str
    url: str
    address: Address
    state_dir: str | None = None
    runtime_dir: str | None = None
    keep_s: float = KEEP_DEFAULT_S

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "url": self.url,
            "state_dir": self.state_dir,
            "runtime_dir": self.runtime_dir,
            "keep_s": self.keep_s,
        }


def load_boxes(path: str) -> dict[str, BoxEntry]:
    """Every box by its name, in the order of the file; none without a file. Raises ConfigError with all its problems."""
    text = read_text(path)
    return {} if text is None else parse_boxes(path, text)


def find_box(path: str, name: str) -> BoxEntry:
    """Raises NoSuchBox with the nearest name, or ConfigError."""
    boxes = load_boxes(path)
    if name in boxes:
        return boxes[name]
    near = difflib.get_close_matches(name, boxes, n=1)
    if near:
        hint = f"did you mean {near[0]}?"
    elif boxes:
        hint = f"there is {', '.join(list(boxes)[:20])}."
    else:
        hint = f"{path} names none."
    raise NoSuchBox(f"no box {name[:64]!r}: {hint} Add one: agentqctl box add NAME ssh://USER@HOST", box=name)


def read_text(path: str) -> str | None:
    """The file's text, None where there is none. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            raw = file.read(BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _error(path, [(None, "", error.strerror or str(error))]) from None
    if len(raw) > BYTES_MAX:
        raise _error(path, [(None, "", f"larger than {BYTES_MAX} bytes")])
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _error(path, [(line, "", f"not UTF-8: byte 0x{raw[error.start]:02x}")]) from None


def parse_boxes(path: str, text: str) -> dict[str, BoxEntry]:
    """The boxes in this text. Raises ConfigError."""
    reader = _Reader()
    boxes = reader.boxes(compose(path, text))
    if reader.problems:
        raise _error(path, sorted(reader.problems, key=lambda item: item[0] or 0))
    return boxes


def compose(path: str, text: str) -> yaml.Node | None:
    """The document's nodes, with the places where they stand. Raises ConfigError."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        raise _error(path, [(line, "", f"not YAML: {error.problem or error.context}")]) from None
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, ArithmeticError) as error:
        raise _error(path, [(None, "", f"not YAML: {error}"[:300])]) from None


def _error(path: str, problems: list[tuple[int | None, str, str]]) -> ConfigError:
    lines = []
    for line, key, message in problems:
        where = path if line is None else f"{path}:{line}"
        lines.append(f"{where}: {key}: {message}" if key else f"{where}: {message}")
    listed = [{"path": path, "line": line, "key": key, "message": message} for line, key, message in problems]
    return ConfigError("\n".join(lines), problems=listed)


class _Reader:
    """Walks the nodes and collects every problem."""

    def __init__(self) -> None:
        self.problems: list[tuple[int | None, str, str]] = []

    def boxes(self, root: yaml.Node | None) -> dict[str, BoxEntry]:
        if root is None or _is_empty(root):
            return {}
        found: dict[str, BoxEntry] = {}
        for name, _, value in self._pairs(root, "", ("boxes",)):
            if name == "boxes" and not _is_empty(value):
                for box, key_node, entry in self._pairs(value, "boxes", None):
                    self._take(found, box, key_node, entry)
        if len(found) > BOXES_MAX:
            self._add(root, "boxes", f"more than {BOXES_MAX}")
        return found

    def _take(self, found: dict[str, BoxEntry], box: str, key_node: yaml.Node, entry: yaml.Node) -> None:
        before = len(self.problems)
        try:
            check_box_name(box)
        except ValueError as error:
            self._add(key_node, f"boxes.{box[:64]}", str(error))
        given = self._options(f"boxes.{box[:64]}", key_node, entry)
        if len(self.problems) == before:
            found[box] = BoxEntry(box, **given)

    def _options(self, key: str, key_node: yaml.Node, node: yaml.Node) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for name, _, value in self._pairs(node, key, BOX_OPTIONS):
            here = f"{key}.{name}"
            if not isinstance(value, yaml.ScalarNode) or value.tag not in _TEXT_TAGS:
                self._add(value, here, "is a text")
                continue
            try:
                given |= _option(name, str(value.value))
            except ValueError as error:
                self._add(value, here, str(error))
        if isinstance(node, yaml.MappingNode) and all(name.value != "url" for name, _ in node.value):
            self._add(key_node, key, "needs url: ssh://USER@HOST[:PORT]")
        return given

    def _pairs(
        self, node: yaml.Node, key: str, known: tuple[str, ...] | None
    ) -> list[tuple[str, yaml.Node, yaml.Node]]:
        """(name, key node, value node); wrong, double and unknown names are problems."""
        if not isinstance(node, yaml.MappingNode):
            self._add(node, key, "is a mapping of names")
            return []
        pairs: dict[str, tuple[str, yaml.Node, yaml.Node]] = {}
        for name_node, value in node.value:
            name = str(name_node.value) if isinstance(name_node, yaml.ScalarNode) else ""
            here = f"{key}.{name[:64]}" if key else name[:64]
            if not name:
                self._add(name_node, key, "a key must be a plain word")
            elif name in pairs:
                self._add(name_node, here, f"stands here twice (first in line {_line(pairs[name][1])})")
            elif known is not None and name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
                self._add(name_node, here, f"unknown option; {hint}")
            else:
                pairs[name] = (name, name_node, value)
        return list(pairs.values())

    def _add(self, node: yaml.Node, key: str, message: str) -> None:
        self.problems.append((_line(node), key, message))


def _option(name: str, text: str) -> dict[str, Any]:
    if name == "url":
        return {"url": text, "address": parse_box_url(text)}
    if name == "keep":
        return {"keep_s": parse_duration(text)}
    if not text.startswith("/") or "\x00" in text:
        raise ValueError(f"{text[:80]!r} is not an absolute path")
    return {name: text.rstrip("/") or "/"}


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"
