"""What `requests` reads of an answer: its beginning, and no more.

That library reads a whole body into memory, whatever its size and whatever it is unpacked to; apprise asks for nothing else,
and neither has an option for it. So the adapter that each new session of it takes hands out answers that end after
ANSWER_BYTES_MAX, unpacked: the rest stays unread, and the connection is closed. The status is known by then and counts.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Final

from agentqd.core.limits import MIB

ANSWER_BYTES_MAX: Final = 1 * MIB


def be_brief() -> None:
    """For this process's every later session. Raises ImportError without the library; AttributeError if it is another by now."""
    sessions: Any = importlib.import_module("requests.sessions")
    whole = sessions.HTTPAdapter
    if getattr(whole, "is_brief", False):
        return

    class BriefAdapter(whole):  # type: ignore[misc, valid-type]
        is_brief = True

        def build_response(self, request: Any, raw: Any) -> Any:
            _end_early(raw)
            return super().build_response(request, raw)

    sessions.HTTPAdapter = BriefAdapter


def _end_early(raw: Any) -> None:
    """An answer of urllib3: both ways in which `requests` reads it."""
    stream, read = raw.stream, raw.read

    def brief_stream(amount: int, **options: Any) -> Iterator[bytes]:
        left = ANSWER_BYTES_MAX
        for piece in stream(amount, **options):
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                raw.close()
                return

    def brief_read(amt: int | None = None, **options: Any) -> bytes:
        """Without an amount it is all of it: what comes before a redirect, if it cannot be unpacked."""
        content: bytes = read(ANSWER_BYTES_MAX if amt is None else amt, **options)
        return content

    raw.stream, raw.read = brief_stream, brief_read
