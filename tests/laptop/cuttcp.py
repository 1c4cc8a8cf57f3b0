"""A TCP link that a test can cut at any byte: between a real SSH client and a real sshd."""

from __future__ import annotations

import contextlib
import select
import socket
import threading


class CutTcp:
    """Forwards `port` to `target`. Once `cut_sent` or `cut_received` bytes have gone over, nothing goes over any more."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cut_sent: int | None = None
        self.cut_received: int | None = None
        self.sent = self.received = 0
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    def clear(self) -> None:
        self.cut_sent = self.cut_received = None
        self.sent = self.received = 0

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut_sent = 0
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _spawn(self, work: object, *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self._spawn(self._carry, peer)

    def _is_cut(self) -> bool:
        return (self.cut_sent is not None and self.sent >= self.cut_sent) or (
            self.cut_received is not None and self.received >= self.cut_received
        )

    def _carry(self, laptop: socket.socket) -> None:
        with laptop:
            if self._is_cut():
                return
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as box:
                while not self._is_cut():
                    readable, _, _ = select.select([laptop, box], [], [], 0.2)
                    for source in readable:
                        data = source.recv(65536)
                        if not data or not self._pass_on(
                            source is laptop, data, box if source is laptop else laptop
                        ):
                            return

    def _pass_on(self, is_laptop: bool, data: bytes, to: socket.socket) -> bool:
        limit, before = (self.cut_sent, self.sent) if is_laptop else (self.cut_received, self.received)
        kept = data if limit is None else data[: max(0, limit - before)]
        if is_laptop:
            self.sent += len(kept)
        else:
            self.received += len(kept)
        to.sendall(kept)
        return not self._is_cut()
