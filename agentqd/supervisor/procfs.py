"""Reading /proc: one process, its children, its environment. Every answer may be out of date a moment later.

A process is named by (pid, start): the pid alone is reused, the pair is not within one boot.
"""

from __future__ import annotations

import os
import signal
from typing import NamedTuple

from agentqd.supervisor.limits import ENVIRON_BYTES_MAX


class Process(NamedTuple):
    """What /proc/PID/stat says."""

    pid: int
    start: int  # clock ticks after boot (field 22)
    parent: int
    group: int
    session: int
    state: str
    name: str

    @property
    def identity(self) -> tuple[int, int]:
        return self.pid, self.start


def read_process(pid: int) -> Process | None:
    """None if there is no such process (any more)."""
    content = _read(f"/proc/{pid}/stat", 4096)
    if content is None:
        return None
    name_end = content.rindex(b")")
    name = content[content.index(b"(") + 1 : name_end].decode(errors="replace")
    fields = content[name_end + 2 :].split(None, 20)
    return Process(
        pid, int(fields[19]), int(fields[1]), int(fields[2]), int(fields[3]), fields[0].decode(), name
    )


def children_of(pid: int) -> list[int]:
    """The pids of a process's children, those of all its threads."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    found: list[int] = []
    for thread in threads:
        content = _read(f"/proc/{pid}/task/{thread}/children", 1 << 20)
        if content:
            found.extend(map(int, content.split()))
    return found


def environment_of(pid: int) -> dict[bytes, bytes] | None:
    """The environment a process was started with (it may have overwritten it); None if that cannot be read."""
    content = _read(f"/proc/{pid}/environ", ENVIRON_BYTES_MAX)
    if content is None:
        return None
    pairs = (entry.partition(b"=") for entry in content.split(b"\0") if entry)
    return {name: value for name, _, value in pairs}


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def signal_process(process: Process, number: int) -> None:
    """Send a signal to exactly this process: a pid that was reused meanwhile gets nothing. Gone or not ours: no error."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        return
    try:
        # The order matters: the descriptor pins whoever has the pid now, then we ask who that is.
        current = read_process(process.pid)
        if current is not None and current.start == process.start:
            signal.pidfd_send_signal(pidfd, number)
    except (ProcessLookupError, PermissionError):
        pass
    finally:
        os.close(pidfd)


def _read(path: str, bytes_max: int) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        parts = []
        while bytes_max > 0 and (part := os.read(fd, min(bytes_max, 65536))):
            parts.append(part)
            bytes_max -= len(part)
        return b"".join(parts)
    except OSError:
        return None
    finally:
        os.close(fd)
