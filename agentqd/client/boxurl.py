"""`ssh://USER@HOST[:PORT]`."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

_URL: Final = r"(?P<user>[^@/\s]+@)?(?P<host>\[[^\]\s]+\]|[^:@/\s\[\]]+)(?P<port>:[^/]*)?/?"
_USER: Final = r"[A-Za-z0-9_][A-Za-z0-9_.\\+-]{0,63}"
_HOST: Final = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}|[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?"


class Address(NamedTuple):
    """Whom to log in to; what is None is asked of ~/.ssh/config, then the usual."""

    host: str
    user: str | None = None
    port: int | None = None


def parse_box_url(text: str) -> Address:
    """Raises ValueError with what is wrong."""
    rest = text.removeprefix("ssh://")
    if rest == text:
        raise ValueError(f"{_short(text)} is not ssh://USER@HOST[:PORT]")
    found = re.fullmatch(_URL, rest)
    if found is None:
        raise ValueError(f"{_short(text)} is not ssh://USER@HOST[:PORT]")
    user = (found["user"] or "").removesuffix("@") or None
    if user is not None and ":" in user:
        raise ValueError("a password has no place in a URL; use a key (ssh-copy-id)")
    if user is not None and not re.fullmatch(_USER, user):
        raise ValueError(f"{_short(user)} cannot be a user")
    host = found["host"].strip("[]")
    if not re.fullmatch(_HOST, host):
        raise ValueError(f"{_short(host)} cannot be a host")
    return Address(host, user, _port(found["port"]))


def _port(text: str | None) -> int | None:
    if not text:
        return None
    digits = text[1:]
    if not digits.isascii() or not digits.isdigit() or len(digits) > 5 or not 0 < int(digits) < 65536:
        raise ValueError(f"{_short(digits)} is not a port (1 to 65535)")
    return int(digits)


def _short(text: str) -> str:
    return repr(text[:80])
