"""`ssh://USER@HOST[:PORT]`, and what a box may be called."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

BOX_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
ALL_BOXES: Final = "all"
_URL: Final = re.compile(r"(?P<user>[^@/\s]+@)?(?P<host>\[[^\]\s]+\]|[^:@/\s\[\]]+)(?P<port>:[^/]*)?/?")
_USER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\\+-]{0,63}")
_HOST: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}|[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?")


class Address(NamedTuple):
    """Whom to log in to; what is None is asked of ~/.ssh/config, then the usual."""

    host: str
    user: str | None = None
    port: int | None = None


def check_box_name(name: str) -> str:
    """The name. Raises ValueError with what is wrong."""
    if name == ALL_BOXES:
        raise ValueError("`all` means every box and cannot be a name")
    if not BOX_NAME.fullmatch(name):
        raise ValueError(
            f"{name[:64]!r} cannot name a box: letters, digits, - and _, at most 32, a letter or digit first"
        )
    return name


def parse_box_url(text: str) -> Address:
    """Raises ValueError with what is wrong."""
    rest = text.removeprefix("ssh://")
    if rest == text:
        raise ValueError(f"{_short(text)} is not ssh://USER@HOST[:PORT]")
    found = _URL.fullmatch(rest)
    if found is None:
        raise ValueError(f"{_short(text)} is not ssh://USER@HOST[:PORT]")
    user = (found["user"] or "").removesuffix("@") or None
    if user is not None and ":" in user:
        raise ValueError("a password has no place in a URL; use a key (ssh-copy-id)")
    if user is not None and not _USER.fullmatch(user):
        raise ValueError(f"{_short(user)} cannot be a user")
    host = found["host"].strip("[]")
    if not _HOST.fullmatch(host):
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
