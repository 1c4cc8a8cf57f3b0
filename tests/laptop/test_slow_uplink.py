"""A large request over a slow line takes longer than a small one may."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentqd.client.channel import UnixTransport
from agentqd.client.connection import Connection
from agentqd.client.errors import AnswerLost

BODY = b'"' + b"x" * 2_000_000 + b'"'
TIMEOUT_S = 0.3
ANSWER = b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"ok": true}'


class SlowServer:
    """Takes one request at `bytes_per_s`, then answers; with 0 it takes nothing and says nothing."""

    def __init__(self, folder: Path, bytes_per_s: int) -> None:
        self.path = str(folder / "slow.sock")
        self._pace = bytes_per_s
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            got = b""
            while not got.endswith(BODY) and not self._end.is_set():
                if not self._pace:
                    self._end.wait(30)
                    return
                piece = connection.recv(65536)
                got += piece
                self._end.wait(len(piece) / self._pace)
            connection.sendall(ANSWER)

    def close(self) -> None:
        self._end.set()
        self._thread.join(10)
        self._listener.close()


@contextlib.contextmanager
def slow_server(folder: Path, bytes_per_s: int) -> Iterator[SlowServer]:
    server = SlowServer(folder, bytes_per_s)
    try:
        yield server
    finally:
        server.close()


def test_a_large_body_that_takes_longer_than_the_timeout_of_a_small_one_is_sent(tmp_path: Path) -> None:
    with slow_server(tmp_path, 2_000_000) as server:
        began = time.monotonic()
        connection = Connection(UnixTransport([server.path]), timeout_s=TIMEOUT_S)
        assert connection.post_raw("tasks", body=BODY) == {"ok": True}
        assert time.monotonic() - began > TIMEOUT_S


def test_a_small_body_that_is_not_answered_is_given_up_in_time(tmp_path: Path) -> None:
    with slow_server(tmp_path, 0) as server:
        began = time.monotonic()
        with pytest.raises(AnswerLost):
            Connection(UnixTransport([server.path]), timeout_s=TIMEOUT_S).post_raw("tasks", body=b"{}")
        assert time.monotonic() - began < 15
