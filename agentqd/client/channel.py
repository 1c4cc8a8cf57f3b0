"""Bytes to and from one daemon: its Unix socket here; `kept.py` has the way over SSH.

`Transport` is the seam between the two: whoever can open a `Channel` can carry every verb.
"""

from __future__ import annotations

import errno
import socket
import time
from typing import Protocol

from agentqd.core.errors import NotPermitted, Unreachable

CONNECT_TIMEOUT_S = 5.0
BACKLOG_RETRY_S = 0.01


class Channel(Protocol):
    """One connection. Every call raises TimeoutError or OSError when it fails."""

    def send_all(self, data: bytes) -> None: ...

    def receive(self, bytes_max: int) -> bytes:
        """At least one byte, or none once the other side has ended."""

    def set_timeout(self, timeout_s: float) -> None: ...

    def close(self) -> None: ...


class Transport(Protocol):
    """How one box is reached. `name` is what error messages call it."""

    @property
    def name(self) -> str: ...

    def open(self) -> Channel:
        """A new channel. Raises Unreachable (nothing was sent) or NotPermitted."""


class SocketChannel:
    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def send_all(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self, bytes_max: int) -> bytes:
        return self._socket.recv(bytes_max)

    def set_timeout(self, timeout_s: float) -> None:
        self._socket.settimeout(timeout_s)

    def close(self) -> None:
        self._socket.close()


class UnixTransport:
    """The control socket of a daemon on this box; the first of `paths` that answers, and from then on that one."""

    def __init__(self, paths: list[str]) -> None:
        assert paths
        self._paths = paths

    @property
    def name(self) -> str:
        return self._paths[0]

    @property
    def paths(self) -> tuple[str, ...]:
        """Where the daemon is looked for; one path once it has been found."""
        return tuple(self._paths)

    def open(self) -> Channel:
        failures: list[tuple[str, OSError]] = []
        for path in self._paths:
            try:
                channel = SocketChannel(_connect(path))
            except OSError as error:
                failures.append((path, error))
                continue
            self._paths = [path]  # a restart must not move us to another daemon
            return channel
        raise _unreachable(failures)


def _connect(path: str) -> socket.socket:
    """A full backlog (EAGAIN at once, for a Unix socket) is a busy daemon, not an absent one: waited for."""
    give_up = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(CONNECT_TIMEOUT_S)
            sock.connect(path)
        except OSError as error:
            sock.close()
            if error.errno != errno.EAGAIN or time.monotonic() >= give_up:
                raise
            time.sleep(BACKLOG_RETRY_S)
        else:
            return sock


def _unreachable(failures: list[tuple[str, OSError]]) -> Unreachable | NotPermitted:
    """The failure that tells most: a socket that is there but closed to us, then one that nobody serves."""
    for path, error in failures:
        if error.errno in (errno.EACCES, errno.EPERM):
            return NotPermitted(
                f"{path}: permission denied; you are not the daemon's user nor in its control.group",
                socket=path,
            )
    for path, error in failures:
        if error.errno != errno.ENOENT:
            why = "AF_UNIX path too long" if error.errno is None else (error.strerror or str(error))
            return Unreachable(
                f"no agentqd answers at {path} ({why.lower()}); start it, or see: agentqctl doctor",
                socket=path,
            )
    sockets = " or ".join(path for path, _ in failures)
    return Unreachable(
        f"agentqd is not running: no socket at {sockets}; start it, or see: agentqctl doctor",
        socket=failures[0][0],
    )
