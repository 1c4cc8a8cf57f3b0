"""Mail addresses, as few of them as possible: `local@domain` in ASCII, nothing else. Pure.

No display names, groups, lists in one string, quoted local parts, comments, address literals and no Unicode: what a mail
server may read in two ways, or a person may take for another address, is no address here. A domain with other letters is
written in its `xn--` form. Of RFC 5322's characters `%` and `!` are left out (old servers take them for a route to another
host), and `*`, `|` and the backtick.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

ADDRESS_CHARS_MAX: Final = 254  # RFC 5321, 4.5.3.1.3
_ATOM: Final = r"[A-Za-z0-9#$&'+/=?^_{}~-]+"
_LOCAL: Final = re.compile(rf"{_ATOM}(?:\.{_ATOM})*")
_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DOMAIN: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_NAMED: Final = re.compile(r"([^<>\"\\,;:@]{1,100}?)\s*<([^<>]{1,300})>")
_MESSAGE_ID: Final = re.compile(r"<[!#-;=?A-Z^-~\[\]]+@[!#-;=?A-Z^-~\[\]]+>")
MESSAGE_ID_CHARS_MAX: Final = 250


def address(text: str) -> str:
    """The address, its domain in lower case. Raises ValueError, which says why it is none."""
    if len(text) > ADDRESS_CHARS_MAX:
        raise ValueError(f"{text[:40]!r}... is longer than {ADDRESS_CHARS_MAX} characters")
    if not text.isascii():
        raise ValueError(f"{text!a} is not ASCII (a domain with other letters is written as xn--...)")
    local, at, domain = text.rpartition("@")
    if not at or len(local) > 64 or not _LOCAL.fullmatch(local) or not _DOMAIN.fullmatch(domain):
        raise ValueError(f"{text!a} is no mail address; it is written name@example.org, one a string")
    return f"{local}@{domain.lower()}"


def named_address(text: str) -> tuple[str, str]:
    """(display name or "", address) of `address` or `Name <address>`. Raises ValueError."""
    match = _NAMED.fullmatch(text.strip())
    if match is None:
        return "", address(text)
    name = match[1].strip()
    if not name.isprintable():
        raise ValueError(f"{text!a} has a name with control characters")
    return name, address(match[2])


def pattern(text: str) -> str:
    """A checked pattern of `allow_to`: an address, `*@domain`, `*@*.domain` or `*`. Raises ValueError."""
    if text == "*":
        return text
    local, at, domain = text.rpartition("@")
    sample = f"{'x' if local == '*' else local}{at}{'x' + domain[1:] if domain.startswith('*.') else domain}"
    try:
        address(sample)
    except ValueError:
        raise ValueError(f"{text!a} is neither an address nor *@example.org, *@*.example.org or *") from None
    return f"{local}@{domain.lower()}"


def allowed(checked: str, patterns: Sequence[str]) -> bool:
    """May mail go to this address? Both are as `address` and `pattern` give them."""
    return any(_matches(checked, each) for each in patterns)


def _matches(checked: str, wanted: str) -> bool:
    if wanted in {"*", checked}:
        return True
    local, _, domain = wanted.rpartition("@")
    has_local, _, has_domain = checked.rpartition("@")
    if local not in {"*", has_local}:
        return False
    return has_domain == domain or (domain.startswith("*.") and has_domain.endswith(domain[1:]))


def message_id(text: str) -> str:
    """A Message-ID in its angle brackets. Raises ValueError."""
    word = text.strip(" ")
    word = word if word.startswith("<") else f"<{word}>"
    if len(word) > MESSAGE_ID_CHARS_MAX or not _MESSAGE_ID.fullmatch(word):
        raise ValueError(f"{text[:80]!a} is no Message-ID (it is written <left@right>)")
    return word
