"""Markdown as a person writes it in a plain mail. Line by line, no line is joined or wrapped; what is no Markdown stays as it is.

Headings are underlined, **strong** becomes *strong*, *emphasis* _emphasis_ (underscores stay: names have them), links `text (url)`, bullets `-`; code blocks are
indented and otherwise untouched. Every pattern is linear in its line; longer lines than LINE_CHARS_MAX are left alone.
"""

from __future__ import annotations

import re
from typing import Final

LINE_CHARS_MAX: Final = 10_000
_FENCE: Final = re.compile(r" {0,3}(`{3,}|~{3,})")
_HEADING: Final = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*))?")
_BULLET: Final = re.compile(r"(\s{0,40})[*+-]([ \t]+)(?=\S)")
_RULE: Final = re.compile(r" {0,3}(?:(?:\*[ \t]*){3,200}|(?:-[ \t]*){3,200}|(?:_[ \t]*){3,200})")
# One pass, leftmost first: code spans and escapes guard what is in them.
_INLINE: Final = re.compile(
    r"(?P<code>`[^`\n]{1,1000}`)"
    r"|\\(?P<escaped>[\\`*_{}\[\]()#+.!|<>~-])"
    r"|<(?P<auto>(?:https?|mailto):[^\s<>]{1,2000})>"
    r"|(?P<image>!?)\[(?P<text>[^\[\]\n]{0,1000})\]\((?P<url>[^()\s]{1,2000})(?:[ \t]+\"[^\"\n]{0,300}\")?\)"
    r"|(?<![*\w])\*\*(?=[^\s*])(?P<strong>[^*\n]{0,1000}[^\s*])\*\*(?![*\w])"
    r"|(?<![*\w])\*(?=[^\s*])(?P<soft>[^*\n]{0,1000}[^\s*])\*(?![*\w])"
)


def plain(markdown: str) -> str:
    """The same text, readable without a Markdown viewer. Never raises."""
    out: list[str] = []
    fence: str | None = None
    for line in markdown.split("\n"):
        opened = _FENCE.match(line)
        if fence is not None:
            if opened and opened[1].startswith(fence) and not line[opened.end() :].strip():
                fence = None
            else:
                out.append(f"    {line}" if line else line)
        elif opened and "`" not in line[opened.end() :]:
            fence = opened[1]
        else:
            out += _line(line)
    return "\n".join(out)


def _line(line: str) -> list[str]:
    if len(line) > LINE_CHARS_MAX or line.startswith(("    ", "\t")):
        return [line]  # an indented code block, or the inside of a list: both may stand as they are
    if _RULE.fullmatch(line):
        return ["-" * 40]
    heading = _HEADING.fullmatch(line)
    if heading:
        text = _inline((heading[2] or "").strip().rstrip("#").rstrip())
        under = {1: "=", 2: "-"}.get(len(heading[1]))
        return [text, under * min(len(text), 78)] if under and text else [text]
    bullet = _BULLET.match(line)
    if bullet:
        return [f"{bullet[1]}-{bullet[2]}{_inline(line[bullet.end() :])}"]
    return [_inline(line)]


def _inline(text: str) -> str:
    return _INLINE.sub(_shown, text)


def _shown(match: re.Match[str]) -> str:
    kind = match.lastgroup
    if match["url"] is not None:
        text, url = _inline(match["text"]).strip(), match["url"]
        return url if text in {"", url, url.removeprefix("mailto:")} else f"{text} ({url})"
    if kind == "strong":
        return f"*{_inline(match[kind])}*"
    if kind == "soft":
        return f"_{_inline(match[kind])}_"
    return match[kind] if kind in {"escaped", "auto"} and kind else match[0]
