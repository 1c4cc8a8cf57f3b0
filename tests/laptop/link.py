"""The way from the laptop to the box, which a test can cut at any byte."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from dataclasses import dataclass, field


@dataclass
class Link:
    """`path`: where the laptop connects. Up, down, or cut after so many bytes of either direction."""

    path: str
    daemon: str
    cut_sent: int | None = None
    cut_received: int | None = None
    connections: int = 0
    sent: int = 0  # bytes that went to the daemon since `clear`
    received: int = 0
    _listener: socket.socket | None = None
    _threads: list[threading.Thread] = field(default_factory=list)

    def up(self) -> None:
        assert self._listener is None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(64)
        self._spawn(self._accept, self._listener)

    def down(self) -> None:
        if self._listener is not None:
            os.unlink(self.path)
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self._threads.clear()

    def clear(self) -> None:
        """No cuts, counters at 0."""
        self.cut_sent = self.cut_received = None
        self.sent = self.received = 0

    def _spawn(self, work: object, *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            self._spawn(self._carry, peer)

    def _carry(self, laptop: socket.socket) -> None:
        with laptop, socket.socket(socket.AF_UNIX) as box:
            if self.cut_sent == 0:
                return  # cut before anything went over
            try:
                box.connect(self.daemon)
            except OSError:
                laptop.send(b"N")
                return
            with contextlib.suppress(OSError):
                laptop.send(b"Y")
                self._relay(laptop, box)

    def _relay(self, laptop: socket.socket, box: socket.socket) -> None:
        while True:
            readable, _, _ = select.select([laptop, box], [], [], 30)
            if not readable:
                return
            for source in readable:
                data = source.recv(65536)
                if not data:
                    return
                if source is laptop:
                    kept = data if self.cut_sent is None else data[: max(0, self.cut_sent - self.sent)]
                    self.sent += len(kept)
                    box.sendall(kept)
                    if self.cut_sent is not None and self.sent >= self.cut_sent:
                        return
                else:
                    if self.cut_received == 0:
                        return  # the box has answered, and nobody hears it
                    kept = (
                        data
                        if self.cut_received is None
                        else data[: max(0, self.cut_received - self.received)]
                    )
                    self.received += len(kept)
                    laptop.sendall(kept)
                    if self.cut_received is not None and self.received >= self.cut_received:
                        return
