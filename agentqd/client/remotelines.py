"""What one append to a box's queue file may carry; known to both ends of the keeper's socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from agentqd.core.errors import InvalidTask
from agentqd.core.limits import KIB

# One SFTP packet with its newlines. OpenSSH takes 256 KiB, but promises whole only what it does in one write.
APPEND_BYTES_MAX: Final = 16 * KIB
LINE_BYTES_MAX: Final = APPEND_BYTES_MAX - 1


def packets(lines: list[bytes]) -> Iterator[bytes]:
    """The lines (without their newlines) as bodies of whole lines, each for one append. Raises InvalidTask before the
    first one where a line is too long for any."""
    for line in lines:
        if len(line) > LINE_BYTES_MAX:
            raise InvalidTask(
                f"a line of {len(line)} bytes; over SSH a line of the queue file is at most {LINE_BYTES_MAX} bytes "
                "(only then is it whole whoever else writes): put its prompt into a file and use `submit`; nothing was enqueued",
                code="line_too_long",
            )
    return _packed(lines)


def _packed(lines: list[bytes]) -> Iterator[bytes]:
    body = b""
    for line in lines:
        if len(body) + len(line) + 1 > APPEND_BYTES_MAX:
            yield body
            body = b""
        body += line + b"\n"
    if body:
        yield body
