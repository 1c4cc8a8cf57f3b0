"""agentqctl with boxes that are reached through a `Link` of this test: `AGENTQ_TEST_BOXES={NAME: {link, state}}`."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass

from agentqd.cli import main, warm
from agentqd.client import box as boxes
from agentqd.client.box import Box
from agentqd.client.channel import SocketChannel
from agentqd.client.connection import Connection
from agentqd.client.errors import BoxUnreachable, NoSuchBox
from agentqd.client.queuefile import QueueFile
from agentqd.core.errors import Unreachable
from agentqd.core.folders import Folders

TIMEOUT_S = 5.0


@dataclass
class LinkTransport:
    """A control socket behind a link, which first says whether there is a daemon: Y or N."""

    link: str

    @property
    def name(self) -> str:
        return "the box"

    def greet(self) -> tuple[socket.socket, bytes]:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(TIMEOUT_S)
        try:
            sock.connect(self.link)
            return sock, sock.recv(1)
        except OSError:
            return sock, b""

    def open(self) -> SocketChannel:
        sock, said = self.greet()
        if said == b"Y":
            return SocketChannel(sock)
        sock.close()
        if said == b"N":
            raise Unreachable("the box has no daemon")
        raise BoxUnreachable("the box is not reachable")


class ShortLines(QueueFile):
    def __init__(self, folders: Folders) -> None:
        super().__init__(folders)
        self.line_bytes_max = 16 * 1024 - 1


def far_box(link: str, state: str) -> Box:
    transport = LinkTransport(link)
    folders = Folders(state, f"{state}/run")

    def queue() -> QueueFile:
        sock, said = transport.greet()
        sock.close()
        if not said:
            raise BoxUnreachable("the box is not reachable")
        return ShortLines(folders)

    return Box(Connection(transport, TIMEOUT_S), queue, lambda: folders, reconnect_s=float("inf"))


def remote_box(name: str, *_: object) -> Box:
    known = json.loads(os.environ["AGENTQ_TEST_BOXES"])
    if name not in known:
        raise NoSuchBox(f"there is no box {name}")
    return far_box(**known[name])


if __name__ == "__main__":
    boxes.remote_box = remote_box
    warm.warm_up = lambda *_: None  # type: ignore[assignment]
    sys.exit(main.main())
