"""Text that may go to a terminal: names, reasons and errors come from strangers.

Promise: what `safe` returns has no control character, no escape sequence, no bidirectional override, no line break;
`width` is how many cells it takes.
"""

from __future__ import annotations

import time
import unicodedata
from datetime import datetime

from agentqd.core.units import format_duration

ELLIPSIS = "…"
VARIATION_SELECTORS = "\ufe0e\ufe0f"  # they change a width behind our back; the plain form is shown


def safe(value: object) -> str:
    """One printable line. Whatever is not printable is shown as its escape, so that nothing is hidden."""
    text = value if isinstance(value, str) else str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_safe_char(char) for char in text)


def _safe_char(char: str) -> str:
    if char in VARIATION_SELECTORS:
        return ""
    if char.isprintable() or char == " ":
        return char
    if char in "\t\n":
        return {"\t": "\\t", "\n": "\\n"}[char]
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def width(text: str) -> int:
    """Cells on a terminal: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    return sum(_char_width(char) for char in text)


def _char_width(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def cut(text: str, cells: int) -> str:
    """The text within so many cells, with an ellipsis where something is missing."""
    if width(text) <= cells:
        return text
    kept, used = "", 0
    for char in text:
        used += _char_width(char)
        if used > cells - 1:
            break
        kept += char
    return kept + ELLIPSIS if cells > 0 else ""


def wrap(text: str, cells: int) -> list[str]:
    """The text in lines of so many cells, broken at spaces where there are any."""
    lines: list[str] = []
    line = ""
    for word in text.split(" "):
        piece = word
        while width(piece) > cells:
            room = cells - width(line) - 1 if line else cells
            if room < cells // 3:
                lines.append(line)
                line = ""
                continue
            head = _head(piece, room)
            lines.append(f"{line} {head}" if line else head)
            line, piece = "", piece[len(head) :]
        if line and width(line) + 1 + width(piece) > cells:
            lines.append(line)
            line = piece
        else:
            line = f"{line} {piece}" if line else piece
    return [*lines, line] if line or not lines else lines


def _head(text: str, cells: int) -> str:
    used = 0
    for place, char in enumerate(text):
        used += _char_width(char)
        if used > cells:
            return text[: max(place, 1)]
    return text


def duration(value: object) -> str:
    """Seconds as people read them; nothing for what is not a number."""
    return format_duration(float(value)) if isinstance(value, int | float) else ""


def size(value: object) -> str:
    """Bytes as people read them."""
    if not isinstance(value, int | float):
        return ""
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def moment(value: object) -> datetime | None:
    if not isinstance(value, str):
        return None
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        return None
    return found if found.tzinfo is not None else None


def local_time(value: object, *, date: bool = True) -> str:
    """A record's time in the reader's zone; the value itself where it is not a time."""
    found = moment(value)
    if found is None:
        return safe(value) if isinstance(value, str) else ""
    return found.astimezone().strftime("%Y-%m-%d %H:%M:%S" if date else "%H:%M:%S")


def age(value: object, now_s: float | None = None) -> str:
    """How long ago: `3m05s`."""
    found = moment(value)
    if found is None:
        return ""
    return format_duration(max(0.0, (time.time() if now_s is None else now_s) - found.timestamp()))
