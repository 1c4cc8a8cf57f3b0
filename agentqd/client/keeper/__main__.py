"""`python -m agentqd.client.keeper NAME CONFIG SOCKET LOCK LOG READY_FD`: started by a verb, never by a person.

It listens before it loads asyncssh, so that the verb's request waits in the socket while we connect. The one word on
READY_FD says that the socket is there (`listening`), or that another keeper has the lock (`other`).
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from contextlib import suppress

from agentqd.client.keeperplace import Place

BACKLOG = 128
FDS_MAX = 65536


def main(argv: list[str]) -> int:
    """One keeper, from its start to its end."""
    name, config, place, ready = argv[0], argv[1], Place(argv[2], argv[3], argv[4]), int(argv[5])
    _close_inherited(ready)
    lock = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.write(ready, b"other")
        return 0
    listener = _listen(place.socket)
    os.write(ready, b"listening")
    os.close(ready)
    with suppress(OSError):
        os.ftruncate(2, 0)  # the log: what the keeper before us said
    _run(name, config, place, listener, lock)
    return 0


def _run(name: str, config: str, place: Place, listener: socket.socket, lock: int) -> None:
    import asyncio

    from agentqd.client.keeper.serve import Keeper

    tty = None
    with suppress(OSError):
        tty = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)

    async def serve() -> None:
        await Keeper(name, config, place, listener, lock, tty).run()

    asyncio.run(serve())


def _listen(path: str) -> socket.socket:
    """The lock is ours, so a socket that is there belongs to nobody any more."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(before)
    listener.listen(BACKLOG)
    return listener


def _close_inherited(ready: int) -> None:
    """A lock or a pipe that the verb's own caller left open must not live as long as we do."""
    limit = os.sysconf("SC_OPEN_MAX")  # -1 where there is none
    top = FDS_MAX if limit < 0 else min(limit, FDS_MAX)
    os.closerange(3, ready)
    os.closerange(ready + 1, top)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
