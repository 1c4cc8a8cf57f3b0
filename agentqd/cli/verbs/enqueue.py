"""`agentqctl enqueue`: task lines into the queue file, each with one write, whole at any size."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from agentqd.cli.verb import Call, verb
from agentqd.client.ids import new_task_id
from agentqd.client.queuefile import LINE_BYTES_USUAL_MAX
from agentqd.core.doubled import DoubledKey, only_once
from agentqd.core.errors import InvalidTask


@verb("enqueue")
@click.argument("file", default="-", metavar="[FILE|-]")
def command(call: Call, file: str) -> int:
    """Append task objects to the queue file: JSON, one or many, from FILE or stdin. Prints their ids.

    Nothing is written unless all of them are JSON objects. A line without an id gets one. Works with the daemon down
    (not if only --socket says which: then the daemon is asked where its queue file is).
    """
    lines = read_lines(_read(file))
    if not lines:
        raise InvalidTask("nothing to enqueue: the input is empty", code="empty_input")
    queue = call.box.queue()
    queue.append([line for _, line in lines])
    ids = [task_id for task_id, _ in lines]
    if call.as_json:
        call.out.json({"ids": ids, "where": call.box.kept_in, "queue_file": queue.path})
        return 0
    for task_id in ids:
        call.out.line(task_id)
    if call.out.is_terminal:
        call.out.note(f"appended to {queue.path}")
    for task_id, line in lines:
        if len(line) > LINE_BYTES_USUAL_MAX:
            call.out.note(
                f"{task_id}: {len(line)} bytes; the daemon refuses lines over its limits.line_bytes_max (default 1 MiB)"
            )
    return 0


def _read(file: str) -> bytes:
    if file == "-":
        return sys.stdin.buffer.read()
    try:
        with open(file, "rb") as source:
            return source.read()
    except OSError as error:
        raise InvalidTask(f"{file}: {error.strerror}", code="no_input") from None


def read_lines(raw: bytes) -> list[tuple[str, bytes]]:
    """(id, line) for each JSON object of the input. Raises InvalidTask with the line of the input that is wrong."""
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InvalidTask(f"line {line}: not UTF-8", code="invalid_utf8", line=line) from None
    found: list[tuple[str, bytes]] = []
    decoder = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=only_once)
    place = _skip_blank(text, 0)
    while place < len(text):
        try:
            value, end = decoder.raw_decode(text, place)
        except DoubledKey as error:
            raise _bad(text, place, str(error), code="duplicate_field") from None
        except (ValueError, RecursionError) as error:
            raise _bad(text, getattr(error, "pos", place), f"not JSON: {error}"[:200]) from None
        if not isinstance(value, dict):
            raise _bad(text, place, "a task is one JSON object")
        found.append(_line(value, text[place:end]))
        place = _skip_blank(text, end)
    return found


def _line(value: dict[str, Any], written: str) -> tuple[str, bytes]:
    """The object as it was written, or compact if it was on several lines; with an id."""
    task_id = value.get("id")
    one_line = (
        written if "\n" not in written and "\r" not in written else json.dumps(value, ensure_ascii=False)
    )
    if task_id is None:
        if "id" in value:
            value.pop("id")
            one_line = json.dumps(value, ensure_ascii=False)
        task_id = new_task_id()
        rest = one_line[1:].lstrip()
        comma = "" if rest.startswith("}") else ", "
        one_line = f'{{"id": "{task_id}"{comma}{rest}'
    try:
        return str(task_id), one_line.encode("utf-8")
    except UnicodeEncodeError:
        # Lone surrogates (`\ud800` in the input): JSON can carry them, UTF-8 cannot.
        return str(task_id), json.dumps({**value, "id": task_id}).encode("ascii")


def _skip_blank(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _bad(text: str, place: int, what: str, code: str = "invalid_json") -> InvalidTask:
    line = text.count("\n", 0, place) + 1
    return InvalidTask(f"line {line}: {what}; nothing was enqueued", code=code, line=line)
