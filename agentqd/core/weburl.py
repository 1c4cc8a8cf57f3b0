"""A receiver's URL, taken apart and checked. Pure. What stands in it never goes into a message: it may hold a secret."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import SplitResult, quote, urlsplit

import msgspec

_PORTS: Final = {"http": 80, "https": 443}
_UNFIT: Final = re.compile(r"[\x00-\x20\x7f]")
_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252})")
_ADDRESS: Final = re.compile(r"[0-9A-Fa-f:.]{2,45}")
_SAFE: Final = "/?:@!$&'()*+,;=%-._~[]"


class WebUrl(msgspec.Struct, frozen=True):
    tls: bool
    host: str  # a name in ASCII, or an address without brackets
    port: int
    target: str  # path and query, as the request line has them

    @property
    def where(self) -> str:
        """For people: host and port, nothing that may be a secret."""
        return f"{_bracketed(self.host)}:{self.port}"

    @property
    def host_header(self) -> str:
        default = _PORTS["https" if self.tls else "http"]
        return _bracketed(self.host) if self.port == default else self.where


def read_url(url: str) -> WebUrl:
    """Raises ValueError, which says what is wrong and does not show the URL."""
    if _UNFIT.search(url):
        raise ValueError("has a space or a control character in it")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("is no URL (its host or port cannot be read)") from None
    if parts.scheme not in _PORTS:
        raise ValueError("begins neither with http:// nor with https://")
    if parts.username is not None or parts.password is not None:
        raise ValueError("has a user or password in it; secrets come from files")
    if "#" in url:
        raise ValueError("has a fragment (#...), which is never sent")
    if port == 0:
        raise ValueError("has no port that can be connected to")
    host = _host(parts)
    path = quote(parts.path or "/", safe=_SAFE)
    query = f"?{quote(parts.query, safe=_SAFE)}" if parts.query else ""
    return WebUrl(parts.scheme == "https", host, port or _PORTS[parts.scheme], path + query)


def _host(parts: SplitResult) -> str:
    host = parts.hostname or ""
    if ":" in host:
        if not _ADDRESS.fullmatch(host):
            raise ValueError("has no address between its brackets")
        return host
    try:
        host = host.encode("ascii" if host.isascii() else "idna").decode("ascii")
    except UnicodeError:
        host = ""
    labels = host.removesuffix(".").split(".")
    if not _NAME.fullmatch(host) or not all(0 < len(label) < 64 for label in labels):
        raise ValueError("has no host")
    return host


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
