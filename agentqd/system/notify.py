"""systemd's notification protocol (sd_notify(3)): one datagram to the socket named in $NOTIFY_SOCKET.

Every call is a no-op when the variable is unset, and never raises: a service must not die of its own good news.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping


class Notifier:
    """Tells the service manager how this process fares.

    `address` is a path or, with a leading @, an abstract socket; None or "" switches everything off.
    """

    def __init__(self, address: str | None) -> None:
        self._socket: socket.socket | None = None
        self._address: str | bytes = address or ""
        if not address or address[0] not in "@/":
            return
        if address[0] == "@":
            self._address = b"\0" + os.fsencode(address[1:])
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Notifier:
        return cls(env.get("NOTIFY_SOCKET"))

    @property
    def on(self) -> bool:
        """Is a service manager listening?"""
        return self._socket is not None

    def send(self, *fields: str) -> bool:
        """One datagram with these KEY=VALUE lines. True if the manager's socket took it."""
        if self._socket is None:
            return False
        try:
            self._socket.sendto("\n".join(fields).encode(), self._address)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Nothing more will be said."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ready(self, status: str = "") -> bool:
        return self.send("READY=1", *([f"STATUS={status}"] if status else []))

    def stopping(self, status: str = "") -> bool:
        return self.send("STOPPING=1", *([f"STATUS={status}"] if status else []))

    def reloading(self) -> bool:
        """Type=notify-reload wants the time of the reload with it; `ready` ends the reload."""
        return self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def watchdog(self) -> bool:
        return self.send("WATCHDOG=1")

    def status(self, text: str) -> bool:
        return self.send("STATUS=" + text.replace("\n", " "))


def watchdog_interval_s(env: Mapping[str, str], pid: int) -> float | None:
    """How often to say WATCHDOG (half of what systemd allows), or None if it does not watch this process."""
    try:
        allowed_us = int(env.get("WATCHDOG_USEC", "0"))
        watched = int(env.get("WATCHDOG_PID", str(pid)))
    except ValueError:
        return None
    if allowed_us <= 0 or watched != pid:
        return None
    return allowed_us / 2_000_000
