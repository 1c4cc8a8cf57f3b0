"""A SIGKILL (or an error) at exactly the N-th system call of one kind, by strace.

strace 6.1 counts `when=N` for each thread by itself, and with `--seccomp-bpf` it injects errors but no signals. So strace is
attached here to the threads in question, without a filter program, once the process is where the test wants it.
The signal comes on entry: the N-th call is not made, everything before it is.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from realbox import wait_for

# What changes something outside the process, or tells somebody. Reads, clocks, locks and memory are left out.
MUTATING = (
    "write", "pwrite64", "writev", "pwritev", "pwritev2", "sendto", "sendmsg", "openat", "ftruncate", "truncate", "fallocate",
    "fdatasync", "fsync", "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "unlink", "unlinkat", "rmdir",
    "mkdir", "mkdirat", "chmod", "fchmod", "fchmodat", "chown", "fchown", "inotify_add_watch", "bind", "connect", "listen", "flock",
    "clone", "clone3", "vfork", "fork", "pidfd_open", "waitid", "wait4", "kill", "pidfd_send_signal", "tgkill", "chdir", "fchdir",
)  # fmt: skip


def threads_of(pid: int) -> list[int]:
    """In the order in which they were started: the kernel lists them so. (Their numbers begin anew at pid_max.)"""
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


def _tracer(tid: int) -> int:
    try:
        for line in Path(f"/proc/{tid}/status").read_text().splitlines():
            if line.startswith("TracerPid:"):
                return int(line.split()[1])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


class Strace:
    """strace, attached to threads. `out` gets its lines."""

    def __init__(self, tids: Sequence[int], options: Sequence[str], out: Path) -> None:
        self.out = out
        out.unlink(missing_ok=True)
        pids = [word for tid in tids for word in ("-p", str(tid))]
        command = ["strace", "-q", "-ttt", "-o", str(out), *options, *pids]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            wait_for(f"strace on {list(tids)}", lambda: self._attached(tids), 10)
        except AssertionError:
            self._process.kill()
            self.wait()
            raise

    def _attached(self, tids: Sequence[int]) -> bool:
        if self._process.poll() is not None:
            assert self._process.stderr is not None
            raise AssertionError(f"strace ended: {self._process.stderr.read().decode()}")
        return all(_tracer(tid) == self._process.pid for tid in tids)

    def detach(self) -> None:
        """The traced go on, if they live. strace's own end, waited for."""
        self._process.send_signal(signal.SIGINT)
        self.wait()

    def wait(self) -> None:
        """Its end; the traced are dead, or it was told to detach."""
        assert self._process.stderr is not None
        if self._process.stderr.closed:
            return
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stderr.close()

    def lines(self) -> list[str]:
        return self.out.read_text(errors="replace").splitlines() if self.out.exists() else []


def kill_at(tids: Sequence[int], call: str, when: int, out: Path) -> Strace:
    """Each of these threads dies (with its process) at its `when`-th such call from now on."""
    return Strace(tids, ["-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={when}"], out)


def call_name(line: str) -> str | None:
    """The system call that begins in this line of a trace (`-f`: a pid stands first; then a time)."""
    for word in line.split()[1:3]:
        name, parenthesis, _ = word.partition("(")
        if parenthesis and name.replace("_", "").isalnum() and not name[0].isdigit():
            return name
    return None


def count_calls(lines: Sequence[str]) -> Counter[str]:
    return Counter(name for line in lines if (name := call_name(line)) in MUTATING)


def is_gone(pid: int) -> bool:
    """Dead, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):
        return True


def has_died(pid: int) -> bool:
    """Dead, or dying of a signal that was on its way when strace let go; then its end is waited for. (A process that is dying
    looks alive for as long as a busy machine does not run it, and whoever attaches to it is told EPERM.)"""
    if is_dying(pid):
        wait_for(f"the end of {pid}", lambda: is_gone(pid))
    return is_gone(pid)


def is_dying(pid: int) -> bool:
    """It is on its way out (PF_EXITING), or has a SIGKILL before it."""
    try:
        flags = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6])
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return True
    pending = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return bool(flags & 0x4) or any(mask & 1 << signal.SIGKILL - 1 for mask in pending)


def needs_strace() -> str | None:
    """Why strace cannot be used here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    found = subprocess.run(["which", "strace"], capture_output=True, check=False)
    return None if found.returncode == 0 else "strace is not installed"
