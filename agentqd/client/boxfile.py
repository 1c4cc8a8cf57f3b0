"""Writes to the laptop's config: one box added or taken out, everything else as a person left it, atomically."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import yaml

from agentqd.client.boxes import BoxEntry, compose, load_boxes, parse_boxes, read_text
from agentqd.client.errors import NoSuchBox
from agentqd.core.errors import AgentqError

INDENT = 2


def add_box(path: str, name: str, options: dict[str, Any], *, replace: bool) -> BoxEntry:
    """Raises AgentqError where the name is taken, ConfigError where the file or the options are wrong."""
    text = read_text(path) or ""
    boxes = parse_boxes(path, text)
    if name in boxes:
        if not replace:
            raise AgentqError(
                f"the box {name} is there already ({boxes[name].url}); --force replaces it", code="box_exists"
            )
        text = _without(path, text, name)
    wanted = parse_boxes(path, yaml.safe_dump({"boxes": {name: options}}, sort_keys=False))[name]
    others = {other: entry for other, entry in boxes.items() if other != name}
    _write(path, _with(path, text, name, options), {**others, name: wanted})
    return wanted


def remove_box(path: str, name: str) -> None:
    """Raises NoSuchBox, ConfigError."""
    boxes = load_boxes(path)
    if name not in boxes:
        raise NoSuchBox(f"no box {name[:64]!r} in {path}", box=name)
    left = {other: entry for other, entry in boxes.items() if other != name}
    _write(path, _without(path, read_text(path) or "", name), left)


def _with(path: str, text: str, name: str, options: dict[str, Any]) -> str:
    """The text with this box behind the last one."""
    block = yaml.safe_dump({name: options}, sort_keys=False, allow_unicode=True)
    mapping = _boxes_node(path, text)
    if text and not text.endswith("\n"):
        text += "\n"
    if mapping is None:
        return f"{text}boxes:\n{_indented(block, INDENT)}"
    lines = text.splitlines(keepends=True)
    key, value = mapping
    if not isinstance(value, yaml.MappingNode) or not value.value:
        at = key.start_mark.line
        lines[at] = f"boxes:\n{_indented(block, INDENT)}"
        return "".join(lines)
    last = value.value[-1]
    at = _end_of(last, lines)
    lines.insert(at, _indented(block, last[0].start_mark.column))
    return "".join(lines)


def _without(path: str, text: str, name: str) -> str:
    """The text without this box's lines; `boxes: {}` where it was the only one."""
    if not text.endswith("\n"):
        text += "\n"
    mapping = _boxes_node(path, text)
    assert mapping is not None
    lines = text.splitlines(keepends=True)
    pairs = mapping[1].value
    pair = next(pair for pair in pairs if pair[0].value == name)
    del lines[pair[0].start_mark.line : _end_of(pair, lines)]
    if len(pairs) == 1:
        lines[mapping[0].start_mark.line] = "boxes: {}\n"
    return "".join(lines)


def _boxes_node(path: str, text: str) -> tuple[yaml.Node, Any] | None:
    root = compose(path, text)
    if not isinstance(root, yaml.MappingNode):
        return None
    return next(((key, value) for key, value in root.value if key.value == "boxes"), None)


def _end_of(pair: tuple[yaml.Node, yaml.Node], lines: list[str]) -> int:
    """The line behind a box. A block ends where the next thing begins, so blank lines and comments in between stay."""
    start = int(pair[0].start_mark.line) + 1
    value = pair[1]
    is_block = isinstance(value, yaml.MappingNode) and not value.flow_style
    end = max(start, int(value.end_mark.line) + (0 if is_block else 1))  # an alias ends where its anchor does
    while end > start and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
        end -= 1
    return min(end, len(lines))


def _indented(block: str, columns: int) -> str:
    return "".join(" " * columns + line for line in block.splitlines(keepends=True))


def _write(path: str, text: str, wanted: dict[str, BoxEntry]) -> None:
    """Replaces the file (behind a link, if it is one). A text that does not mean `wanted` (written in one line, with
    anchors) is written anew: a comment may be lost, a box never."""
    try:
        good = parse_boxes(path, text) == wanted
    except AgentqError:
        good = False
    if not good:
        text = _rewritten(wanted)
    real = os.path.realpath(path)
    folder = os.path.dirname(real)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        fd, draft = tempfile.mkstemp(prefix=".config.", dir=folder)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(text.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, real)
        except BaseException:
            os.unlink(draft)
            raise
    except OSError as error:
        raise AgentqError(f"cannot write {real}: {error.strerror or error}", code="io_error") from error


def _rewritten(wanted: dict[str, BoxEntry]) -> str:
    boxes = {}
    for name, entry in wanted.items():
        given = {"url": entry.url, "state_dir": entry.state_dir, "runtime_dir": entry.runtime_dir}
        boxes[name] = {key: value for key, value in given.items() if value is not None}
        boxes[name]["keep"] = f"{entry.keep_s:g}s"
    return yaml.safe_dump({"boxes": boxes}, sort_keys=False, allow_unicode=True)
