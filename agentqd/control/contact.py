"""Who contacts the box: `AgentQ-Client: CLIENT_ID HOSTNAME` on a request wakes the sinks that lead to that machine.

Only a hint, and it comes from outside: it proves nothing and opens nothing. At most it has a sink try a little sooner, and
that at most once in CONTACT_EVERY_S.
"""

from __future__ import annotations

import re
from typing import Final

from agentqd.core.limits import CONTACT_HEADER_CHARS_MAX

HEADER: Final = "AgentQ-Client"
_CLIENT_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_HOSTNAME: Final = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", re.ASCII)
_HOSTNAME_CHARS_MAX: Final = 253
_NOBODY: Final[frozenset[str]] = frozenset()


def read_contact(value: str | None) -> frozenset[str]:
    """The client id and the host name (without a dot at its end) in lower case; none of a header that is not exactly these two."""
    if value is None or len(value) > CONTACT_HEADER_CHARS_MAX:
        return _NOBODY
    client_id, _, hostname = value.strip(" ").partition(" ")
    hostname = hostname.strip(" ").removesuffix(".")
    if not _CLIENT_ID.fullmatch(client_id) or len(hostname) > _HOSTNAME_CHARS_MAX:
        return _NOBODY
    if not _HOSTNAME.fullmatch(hostname):
        return _NOBODY
    return frozenset({client_id.lower(), hostname.lower()})
