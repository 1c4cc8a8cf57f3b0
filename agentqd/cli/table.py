"""Tables that fit the terminal. Cells are made safe here; a script gets tab-separated lines instead.

Narrow terminals: optional columns go first (the highest `drop` first), then flexible ones shrink, the widest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from agentqd.cli.text import cut, safe, width

GAP = "  "
FLEX_MIN = 6


class Column(NamedTuple):
    """`flex`: may be cut. `drop`: may be left out (0: never; higher goes first). `right`: numbers."""

    title: str
    flex: bool = False
    drop: int = 0
    right: bool = False


class Cell(NamedTuple):
    """A text with a style of `Output.style`."""

    text: str
    style: str = ""


Row = Sequence[Cell | str]


class Drawn(NamedTuple):
    """A line as parts, each with its style, already padded and cut."""

    parts: tuple[Cell, ...]

    @property
    def plain(self) -> str:
        return "".join(part.text for part in self.parts).rstrip()


def tab_lines(rows: Sequence[Row]) -> list[str]:
    """For pipes: every cell whole, tabs between, no header."""
    return ["\t".join(safe(_cell(item).text) for item in row) for row in rows]


def draw(columns: Sequence[Column], rows: Sequence[Row], cells: int, indent: str = "") -> list[Drawn]:
    """The header and the rows, within `cells`."""
    texts = [[Cell(safe(_cell(item).text), _cell(item).style) for item in row] for row in rows]
    natural = [
        max([width(column.title), *(width(row[place].text) for row in texts)])
        for place, column in enumerate(columns)
    ]
    empty = [
        place
        for place, column in enumerate(columns)
        if column.drop and texts and not any(row[place].text for row in texts)
    ]
    kept, widths = _fit(columns, natural, empty, cells - len(indent))
    lines = [_line(columns, kept, widths, [Cell(column.title, "title") for column in columns], indent)]
    lines += [_line(columns, kept, widths, row, indent) for row in texts]
    return lines


def _cell(item: Cell | str) -> Cell:
    return item if isinstance(item, Cell) else Cell(item)


def _fit(
    columns: Sequence[Column], natural: list[int], empty: list[int], cells: int
) -> tuple[list[int], list[int]]:
    """Which columns stay, and how wide each is."""
    kept = [place for place in range(len(columns)) if place not in empty]
    widths = list(natural)

    def too_wide(least: bool) -> int:
        taken = sum(
            min(widths[place], FLEX_MIN) if least and columns[place].flex else widths[place] for place in kept
        )
        return taken + len(GAP) * (len(kept) - 1) - cells

    while too_wide(least=False) > 0:
        roomy = [
            place for place in kept if columns[place].flex and widths[place] > _comfortable(natural[place])
        ]
        if roomy:
            widths[max(roomy, key=lambda place: widths[place])] -= 1
            continue
        optional = [place for place in kept if columns[place].drop]
        if optional:
            kept.remove(max(optional, key=lambda place: columns[place].drop))
            widths = list(natural)
            continue
        shrinkable = [place for place in kept if widths[place] > FLEX_MIN and columns[place].flex]
        shrinkable = shrinkable or [place for place in kept if widths[place] > FLEX_MIN]
        if not shrinkable:
            break
        widths[max(shrinkable, key=lambda place: widths[place])] -= 1
    return kept, widths


def _comfortable(natural: int) -> int:
    """How narrow a flexible column gets before an optional one is given up for it."""
    return min(natural, 16)


def _line(
    columns: Sequence[Column], kept: list[int], widths: list[int], row: Sequence[Cell], indent: str
) -> Drawn:
    parts = [Cell(indent)]
    for place in kept:
        text = cut(row[place].text, widths[place])
        space = Cell(" " * (widths[place] - width(text)))
        cell = Cell(text, row[place].style)
        parts += [space, cell] if columns[place].right else [cell, space]
        parts.append(Cell(GAP))
    while parts and not parts[-1].text.strip():
        parts.pop()
    return Drawn(tuple(parts))
