"""Lines of the queue file, from bytes: hostile until `core.task` has read them. Pure.

Promises:
1. Whatever the chunking, the same bytes give the same lines: only whole lines (with their newline) are taken.
2. Nothing here raises on any bytes, and no input costs more than time linear in its length.
3. A torn line glued to a good one costs only itself, unless the good one could have been meant as its value.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Final, NamedTuple

import msgspec

from agentqd.core.doubled import DoubledKey, refuse_doubled_keys
from agentqd.core.errors import InvalidTask
from agentqd.core.task import FIELD_NAMES, TaskRequest, check_task
from agentqd.core.units import decode_unit

BOM: Final = b"\xef\xbb\xbf"
SPACE: Final = b" \t\r\n"
GLUED_CANDIDATES_MAX: Final = 32  # each costs at most one decode of the line

_OPEN_BRACE: Final = ord("{")
_CLOSE_BRACE: Final = ord("}")
_task_decoder: Final = msgspec.json.Decoder(TaskRequest, dec_hook=decode_unit)
_task_start: Final = re.compile(
    rb'\{[ \t\r]*"(?:%s)"[ \t\r]*:' % b"|".join(name.encode() for name in FIELD_NAMES)
)


class Line(msgspec.Struct, frozen=True, gc=False):
    """One non-blank line of a file.

    `offset` is where it starts and `length` what it takes there, its newline included. `raw` is its content without
    newline, CR and byte order mark; cut to the limit if `too_long`. `unfinished`: nobody can end this line any more
    (its file was deleted or rotated away and has no writer), so it must be rejected, even if it reads like a task.
    """

    offset: int
    length: int
    raw: bytes
    too_long: bool = False
    unfinished: bool = False


class Split(NamedTuple):
    """Whole lines, and how many bytes they and the blank lines between them took."""

    lines: list[Line]
    consumed: int


def split_lines(buffer: bytes, start: int, offset: int, lines_max: int, line_bytes_max: int) -> Split:
    """The whole lines of `buffer[start:]`, which stands at `offset` in its file. At most `lines_max` of them.

    Blank lines are consumed and not handed out; an incomplete last line is left for the next time.
    """
    end = buffer.rfind(b"\n", start) + 1
    if end <= start:
        return Split([], 0)
    begin = _after_blank_lines(buffer, start, end)
    parts = buffer[begin:end].split(b"\n", lines_max)
    left_over = len(parts.pop())  # behind the last newline that was taken: for the next call
    lines: list[Line] = []
    append = lines.append
    at = offset + begin - start
    longest, opening, closing = line_bytes_max + 1, _OPEN_BRACE, _CLOSE_BRACE
    for raw in parts:
        length = len(raw) + 1
        if length <= longest and raw and raw[-1] == closing and raw[0] == opening:
            append(Line(at, length, raw))
        elif (line := unusual_line(at, length, raw, line_bytes_max)) is not None:
            append(line)
        at += length
    return Split(lines, end - left_over - start)


def unusual_line(
    offset: int, length: int, raw: bytes, line_bytes_max: int, unfinished: bool = False
) -> Line | None:
    """A line that may have a byte order mark, a CR, nothing in it (None), or too much."""
    raw = raw.removeprefix(BOM).removesuffix(b"\r")
    if not raw.strip(SPACE):
        return None
    if len(raw) > line_bytes_max:
        return Line(offset, length, raw[:line_bytes_max], True, unfinished)
    return Line(offset, length, raw, False, unfinished)


def _after_blank_lines(buffer: bytes, start: int, end: int) -> int:
    """Where the first line that is not blank starts: megabytes of newlines must not become a million parts."""
    if buffer[start] not in SPACE:
        return start
    body = buffer[start:end]
    blank = len(body) - len(body.lstrip(SPACE))
    return start + body.rfind(b"\n", 0, blank) + 1


def split_glued(raw: bytes) -> tuple[bytes, bytes] | None:
    """(torn prefix, good task) of a line that is not a valid task itself, or None.

    The suffix is taken only if it is a whole valid task and the prefix does not expect a value where it stands
    (after `:`, `[` or `,` outside a string): there it may be a part of the torn line. Only the last
    GLUED_CANDIDATES_MAX places where a task may start are tried, the longest suffix first.
    """
    if raw.rstrip(SPACE)[-1:] != b"}":
        return None
    starts = deque((found.start() for found in _task_start.finditer(raw)), GLUED_CANDIDATES_MAX)
    for start in starts:
        if start and _is_task(raw[start:]):
            prefix = raw[:start]
            return None if expects_value(prefix) else (prefix, raw[start:])
    return None


def _is_task(raw: bytes) -> bool:
    """Whether `core.task.read_written_task` would take it; without the cost of saying why not."""
    try:
        check_task(_task_decoder.decode(raw))
        refuse_doubled_keys(raw)
    except (
        msgspec.DecodeError,
        msgspec.ValidationError,
        UnicodeDecodeError,
        RecursionError,
        InvalidTask,
        DoubledKey,
    ):
        return False
    return True


def expects_value(prefix: bytes) -> bool:
    """Whether a value belongs behind this beginning of a JSON text."""
    bare = prefix.replace(b"\\\\", b"").replace(b'\\"', b"")  # backslashes stand in strings only
    inside_a_string = bare.count(b'"') % 2 == 1
    return not inside_a_string and bare.rstrip(SPACE)[-1:] in (b":", b"[", b",")
