"""Stands between a sender and its web receiver, and loses answers: before the receiver has the request, or after it has answered."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import Counter
from typing import Literal, Self

How = Literal["before", "after"]


class LosingProxy:
    """`lose` is used up first, one a request; then it passes everything on. One request a connection."""

    def __init__(self, port: int) -> None:
        self._to = port
        self.lose: list[How] = []
        self.requests: Counter[str] = Counter()  # by webhook-id
        self.lost: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                sender, _ = self._listener.accept()
            except OSError:
                return
            with sender, contextlib.suppress(OSError):
                sender.settimeout(20)
                self._pass_on(sender)

    def _pass_on(self, sender: socket.socket) -> None:
        request = _message(sender)
        if not request:
            return
        name = _header(request, b"webhook-id").decode()
        self.requests[name] += 1
        how = self.lose.pop(0) if self.lose else None
        if how != "before":
            with socket.create_connection(("127.0.0.1", self._to), 20) as receiver:
                receiver.sendall(request)
                answer = _message(receiver)
            assert answer.startswith(b"HTTP/1.1 200"), answer
        if how is None:
            sender.sendall(answer.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
            return
        self.lost[how] += 1
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _message(wire: socket.socket) -> bytes:
    """Head and body."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = wire.recv(65536)
        if not more:
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    parts, left = [data], int(_header(head, b"content-length")) - len(body)
    while left > 0:
        more = wire.recv(min(left, 1 << 20))
        if not more:
            return b""
        parts.append(more)
        left -= len(more)
    return b"".join(parts)


def _header(message: bytes, name: bytes) -> bytes:
    head = message.partition(b"\r\n\r\n")[0]
    return next(
        line.split(b":", 1)[1].strip()
        for line in head.split(b"\r\n")[1:]
        if line.lower().startswith(name + b":")
    )
