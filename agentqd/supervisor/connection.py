"""One connection: bytes in, lines out, and a bound on both. Knows nothing of what the lines mean.

Invariants:
1. Never blocks. A peer that does not read is cut off when PENDING_REPORT_BYTES_MAX wait for it; nothing is lost by
   that, because everything is told again at the next Welcome.
2. No new bytes are taken while whole lines wait to be acted on: a fast sender is slowed by the kernel's own buffer.
"""

from __future__ import annotations

import contextlib
import selectors
import socket

from agentqd.supervisor.limits import (
    HELLO_LINE_BYTES_MAX,
    LOOK_AHEAD_BYTES,
    PENDING_REPORT_BYTES_MAX,
    RECEIVE_BYTES,
    SEND_BYTES,
)


class LineTooLongError(Exception):
    """The peer sent more than `line_bytes_max` bytes without a newline."""


class Connection:
    """`epoch` is None until a Hello was accepted."""

    def __init__(self, sock: socket.socket, pending_bytes_max: int = PENDING_REPORT_BYTES_MAX) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.epoch: int | None = None
        self.line_bytes_max = HELLO_LINE_BYTES_MAX
        self.ended = False  # the peer has closed or is unreachable
        self.closed = False
        self._pending_bytes_max = pending_bytes_max
        self._in = bytearray()
        self._searched = 0
        self._out = bytearray()
        self._allowance = 0

    @property
    def wants(self) -> int:
        """The selector's event mask."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)

    @property
    def pending_bytes(self) -> int:
        return len(self._out)

    def receive(self) -> None:
        """Take what has arrived. Sets `ended`; raises LineTooLongError."""
        try:
            part = self.sock.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.ended = True
            return
        if not part:
            self.ended = True
            return
        self._in += part

    def has_line(self) -> bool:
        """Whether a whole line waits. Raises LineTooLongError."""
        if self._in.find(b"\n", self._searched) >= 0:
            return True
        self._searched = len(self._in)
        if self._searched > self.line_bytes_max:
            raise LineTooLongError
        return False

    def take_line(self) -> bytes | None:
        """The next whole line without its newline; None if there is none yet. Raises LineTooLongError."""
        end = self._in.find(b"\n", self._searched)
        if end < 0:
            self.has_line()
            return None
        if end > self.line_bytes_max:
            raise LineTooLongError
        line = bytes(self._in[:end])
        del self._in[: end + 1]
        self._searched = 0
        return line

    def ahead(self) -> bytes:
        """What comes after the line that was taken last, as far as it has arrived. Takes nothing."""
        try:
            arrived = self.sock.recv(LOOK_AHEAD_BYTES, socket.MSG_PEEK)
        except OSError:
            arrived = b""
        return bytes(self._in) + arrived

    def queue(self, line: bytes, *, whatever_size: bool = False) -> bool:
        """Have this sent at the next `flush`. False: the peer has not read for too long and is to be cut off."""
        if whatever_size:
            self._allowance = len(line)
        self._out += line
        return len(self._out) <= self._pending_bytes_max + self._allowance

    def flush(self) -> None:
        """Send what the kernel takes now. Sets `ended` if the peer is gone."""
        sent = 0
        view = memoryview(self._out)
        try:
            while sent < len(view):
                sent += self.sock.send(view[sent : sent + SEND_BYTES])
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.ended = True
        view.release()
        del self._out[:sent]
        if not self._out:
            self._allowance = 0

    def close(self) -> None:
        self.closed = True
        with contextlib.suppress(OSError):
            self.sock.close()
