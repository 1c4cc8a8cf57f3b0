"""The daemon and the supervisor of a box, as processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from realbox import RealBox, wait_for

from agentqd.supervisor.limits import READY_FOLDERS


def daemon_died(box: RealBox) -> bool:
    assert box.daemon is not None
    return box.daemon.poll() is not None


def reap_killed(box: RealBox) -> None:
    """It died of SIGKILL; the test has sent none."""
    daemon, box.daemon = box.daemon, None
    assert daemon is not None
    status = daemon.wait(30)
    assert status == -signal.SIGKILL, f"ended with {status}, not by SIGKILL:\n{box.log_text()[-3000:]}"


def start_supervisor(box: RealBox) -> subprocess.Popen[bytes]:
    """Beside the daemon and not by it: with an environment of its own, and no child of a traced daemon."""
    command = [
        sys.executable,
        "-m",
        "agentqd.supervisor",
        "--state-dir",
        str(box.state),
        "--runtime-dir",
        str(box.runtime),
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AGENTQ", "NOTIFY_"))}
    with (box.folder / "supervisor.log").open("ab") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**clean, **box.env}
        )
    wait_for(
        "the supervisor's socket",
        lambda: (box.runtime / "supervisor.sock").exists() and box.supervisor_pid() == child.pid,
    )
    return child


def connected(box: RealBox) -> bool:
    """The supervisor that holds the lock is the one the daemon talks to."""
    try:
        status, answer = box.api("GET", "/v1/status")
        told = answer["supervisor"] if status == 200 else None
        return told is not None and told["connected"] and told["pid"] == box.supervisor_pid()
    except (OSError, ValueError, IndexError):
        return False


def without_a_stock(box: RealBox) -> None:
    """Folders are made by hand: there can be no `.ready`. To be called before the first start."""
    box.state.mkdir()
    (box.state / ".ready").touch()


def is_idle(box: RealBox) -> bool:
    """Connected, and its stock of folders is full (or there can be none): it makes no call of its own accord now."""
    stock = box.state / ".ready"
    full = stock.is_file() or len(list(stock.glob("*/attempt-1/stderr"))) >= READY_FOLDERS
    return full and connected(box)


def holders(path: Path) -> list[int]:
    """Living processes that have this file open."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if any(os.readlink(fd) == str(path) for fd in (entry / "fd").iterdir()):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in {"T", "t"}
