"""A Unix-socket proxy between agentqctl and a real daemon that cuts connections where a test says: after so many bytes up
(request) or down (answer). What has passed before the cut has truly passed."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import NamedTuple, Self


class Cut(NamedTuple):
    """Connection `number` (from 0) ends after `count` bytes in this direction. `up` 0: before the request. `hang`: after
    so many bytes down nothing more comes, and nobody says so."""

    number: int
    way: str  # "up", "down" or "hang"
    count: int


class Seen(NamedTuple):
    up: bytes
    down: int

    @property
    def what(self) -> str:
        return self.up.split(b" HTTP/")[0].decode("latin-1")


class CutProxy:
    """`cuts(number)` says where that connection is cut (None: nowhere); `on_cut` is called at that instant."""

    def __init__(self, path: str, target: str) -> None:
        self.path = path
        self.cuts: Callable[[int], Cut | None] = lambda _: None
        self.on_cut: Callable[[], None] = lambda: None
        self.seen: list[Seen] = []  # in the order in which connections ended
        self.cut_count = 0
        self._target = target
        self._number = 0
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen(64)

    def begin(self, cuts: Callable[[int], Cut | None], on_cut: Callable[[], None] = lambda: None) -> None:
        """From now on: connections are counted from 0 again."""
        with self._lock:
            self.cuts, self.on_cut, self._number, self.cut_count = cuts, on_cut, 0, 0
            self.seen.clear()

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in self._threads:
            thread.join(10)
        os.unlink(self.path)

    def _start(self, what: Callable[[], None]) -> None:
        thread = threading.Thread(target=what, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            with self._lock:
                cut = self.cuts(self._number)
                self._number += 1
            self._start(lambda client=client, cut=cut: self._serve(client, cut))  # type: ignore[misc]

    def _serve(self, client: socket.socket, cut: Cut | None) -> None:
        up, down, is_cut = bytearray(), 0, False
        with client, socket.socket(socket.AF_UNIX) as box, contextlib.suppress(OSError):
            is_cut = cut is not None and cut.way == "up" and cut.count == 0
            if not is_cut:
                box.connect(self._target)
            while not is_cut:
                ready, _, _ = select.select([client, box], [], [], 30)
                if not ready:
                    break
                source, sink = (client, box) if client in ready else (box, client)
                way = "up" if source is client else "down"
                passed = len(up) if way == "up" else down
                limited = cut is not None and (cut.way == way or (cut.way, way) == ("hang", "down"))
                most = min(65536, cut.count - passed) if cut is not None and limited else 65536
                data = source.recv(most) if most else b""
                if not data and most:
                    break
                sink.sendall(data)
                if way == "up":
                    up += data
                else:
                    down += len(data)
                is_cut = cut is not None and cut.way == way and passed + len(data) >= cut.count
            if is_cut:
                with self._lock:
                    self.cut_count += 1
                self.on_cut()
        with self._lock:
            self.seen.append(Seen(bytes(up), down))


def points(seen: list[Seen]) -> list[Cut]:
    """Every class of place in every one of these connections: before, in and behind the request; before the answer, in its
    status line, in its headers, at their end, in the body, one byte before its end."""
    found = []
    for number, each in enumerate(seen):
        request = len(each.up)
        found += [Cut(number, "up", count) for count in (0, 1, request // 2, request)]
        head = min(each.down, 180)
        places = {0: 1, 5: 1, 60: 1, head: 1, (head + each.down) // 2: 1, each.down - 1: 1}
        found += [Cut(number, "down", count) for count in places if 0 < count < each.down]
    return found
