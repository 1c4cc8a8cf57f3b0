"""The only way to stdout and stderr.

Promises:
1. stdout carries data only; notes and errors go to stderr. Colour and headings only where a person looks at it.
2. Text is made safe (`text.safe`) before it is written; JSON is one line when piped and never has a raw control character.
3. A closed pipe is `OutputClosedError`, so that nothing is acknowledged that nobody read.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from agentqd.cli.table import Cell, Column, Drawn, Row, draw, tab_lines
from agentqd.cli.text import safe, wrap
from agentqd.core.errors import AgentqError

WIDTH_DEFAULT = 80
WIDTH_MIN = 40
WIDTH_MAX = 1000
STYLES = {
    "title": "1",
    "strong": "1",
    "dim": "2",
    "good": "32",
    "bad": "31",
    "warn": "33",
    "busy": "36",
}
# json.dumps leaves these as they are: DEL, C1 controls (0x9b starts an escape sequence), separators, bidi overrides.
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


class OutputClosedError(Exception):
    """Nobody reads stdout any more."""


class Output:
    def __init__(self, *, as_json: bool, env: Mapping[str, str] | None = None) -> None:
        self.as_json = as_json
        self._env = os.environ if env is None else env
        self._out: BinaryIO = sys.stdout.buffer
        self.is_terminal = sys.stdout.isatty()
        self._encoding = sys.stdout.encoding or "utf-8"
        self._colour = self.is_terminal and not self._env.get("NO_COLOR") and self._env.get("TERM") != "dumb"

    @property
    def width(self) -> int:
        """Cells a line; COLUMNS beats the terminal."""
        given = self._env.get("COLUMNS", "")
        if given.isascii() and given.isdigit() and int(given) > 0:
            return max(WIDTH_MIN, min(int(given), WIDTH_MAX))
        if self.is_terminal:
            try:
                return max(WIDTH_MIN, os.get_terminal_size(sys.stdout.fileno()).columns or WIDTH_DEFAULT)
            except OSError:
                pass
        return WIDTH_DEFAULT

    def json(self, value: Any) -> None:
        """One value: a line when piped, indented for a person."""
        text = json.dumps(value, ensure_ascii=False, indent=2 if self.is_terminal else None)
        self.raw(_UNSAFE_IN_JSON.sub(_escaped, text).encode("utf-8") + b"\n")

    def json_line(self, value: Any, *, newline: bool = True) -> None:
        """One value on one line, whoever reads."""
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        self.raw(_UNSAFE_IN_JSON.sub(_escaped, text).encode("utf-8") + (b"\n" if newline else b""))

    def pretty(self, value: Any) -> None:
        """JSON inside a page for people: indented, whoever reads."""
        text = json.dumps(value, ensure_ascii=False, indent=2)
        self.raw(_UNSAFE_IN_JSON.sub(_escaped, text).encode("utf-8") + b"\n")

    def line(self, text: str = "", style: str = "") -> None:
        """One line of text, made safe."""
        self._text(self.styled(safe(text), style) + "\n")

    def lines(self, text: str, style: str = "", indent: str = "", hang: str | None = None) -> None:
        """The same, wrapped to the width; later lines begin with `hang`."""
        first, later = indent, indent if hang is None else hang
        for number, piece in enumerate(wrap(safe(text), max(20, self.width - len(later)))):
            self._text((later if number else first) + self.styled(piece, style) + "\n")

    def heading(self, text: str) -> None:
        self.line(text, "strong")

    def drawn(self, line: Drawn) -> None:
        """A line of a table, whose cells are safe already."""
        if not self._colour:
            self._text(line.plain + "\n")
            return
        self._text("".join(self.styled(part.text, part.style) for part in line.parts) + "\n")

    def table(
        self, columns: Sequence[Column], rows: Sequence[Row], indent: str = "", *, header: bool = True
    ) -> None:
        """A table within the width. For text that stays text in a pipe too (status, show)."""
        for line in draw(columns, rows, self.width, indent)[0 if header else 1 :]:
            self.drawn(line)

    def rows(self, columns: Sequence[Column], rows: Sequence[Row], empty: str) -> None:
        """A listing: a table on a terminal, tab-separated lines without a header in a pipe."""
        if not self.is_terminal:
            for line in tab_lines(rows):
                self._text(line + "\n")
        elif rows:
            self.table(columns, rows)
        else:
            self.note(empty)

    def styled(self, text: str, style: str) -> str:
        if not self._colour or not style or not text:
            return text
        return f"\x1b[{STYLES[style]}m{text}\x1b[0m"

    def clear(self) -> None:
        """An empty screen for the next picture; nothing in a pipe."""
        if self.is_terminal:
            self._text("\x1b[H\x1b[2J\x1b[3J")

    def raw(self, data: bytes) -> None:
        """Bytes as they are."""
        try:
            self._out.write(data)
        except BrokenPipeError:
            raise OutputClosedError from None

    def flush(self) -> None:
        try:
            self._out.flush()
        except BrokenPipeError:
            raise OutputClosedError from None

    def make_durable(self) -> None:
        """Flushed, and fsynced where stdout is a file: what was printed may now be acknowledged."""
        self.flush()
        fd = sys.stdout.fileno()
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.fsync(fd)

    def note(self, text: str) -> None:
        """Something a person should know; never on stdout, but after what was printed before it."""
        self.flush()
        write_error(f"{safe(text)}\n")

    def error(self, error: AgentqError) -> None:
        """JSON on stdout with --json, else text on stderr."""
        if self.as_json:
            self.json(error.as_json())
            return
        write_error(f"agentqctl: {safe(error.message)}\n")
        for conflict in error.fields.get("conflicts") or ():
            if isinstance(conflict, dict):
                parts = [safe(conflict.get(name) or "") for name in ("task_id", "task", "path")]
                write_error(f"  {parts[0]} ({parts[1]}) writes {parts[2]}\n")

    def _text(self, text: str) -> None:
        self.raw(text.encode(self._encoding, "backslashreplace"))


def write_error(text: str) -> None:
    """To stderr, if anybody is there."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def _escaped(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


__all__ = ["Cell", "Column", "Output", "OutputClosedError", "Row", "write_error"]
