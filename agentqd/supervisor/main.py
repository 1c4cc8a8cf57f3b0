"""The command line of agentqd-supervisor.

Exit codes: 0 left as told (or idle), 1 could not start (the lock is held, a folder cannot be used), 2 usage.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import selectors
import sys
from collections.abc import Sequence

from agentqd import __version__
from agentqd.core.errors import EXIT_OK, AgentqError
from agentqd.core.folders import Folders, choose_folders
from agentqd.storage.lock import take_lock
from agentqd.storage.state_id import load_state_id
from agentqd.supervisor.context import Context
from agentqd.supervisor.deadlines import Deadlines
from agentqd.supervisor.limits import LINGER_S
from agentqd.supervisor.logs import StderrLog
from agentqd.supervisor.places import bind_socket, make_folders
from agentqd.supervisor.procfs import boot_id
from agentqd.supervisor.ready import ReadyFolders
from agentqd.supervisor.spawn import seal_descriptors
from agentqd.supervisor.supervisor import Options, Supervisor, log_crash, tell_nobody
from agentqd.supervisor.tree import Trees
from agentqd.system.clock import SystemClock
from agentqd.system.notify import Notifier, watchdog_interval_s

_PR_SET_CHILD_SUBREAPER = 36


def main(argv: Sequence[str] | None = None) -> int:
    """Run until told to leave."""
    arguments = _parse(argv)
    folders = choose_folders(os.environ, os.geteuid(), arguments.state_dir, arguments.runtime_dir)
    folders = Folders(os.path.abspath(folders.state), os.path.abspath(folders.runtime))
    linger_s = arguments.linger
    if linger_s is None and not os.environ.get("NOTIFY_SOCKET"):
        linger_s = LINGER_S
    try:
        return _serve(folders, Options(linger_s, watchdog_interval_s(os.environ, os.getpid())))
    except AgentqError as problem:
        sys.stderr.write(f"agentqd-supervisor: {problem.message}\n")
        return problem.exit_code


def _serve(folders: Folders, options: Options) -> int:
    seal_descriptors()
    os.chdir("/")
    clock = SystemClock()
    tasks_fd = make_folders(folders)
    lock_fd = take_lock(folders.supervisor_lock, "supervisor")
    state_id = load_state_id(folders.state_id)
    _become_subreaper()
    context = Context(
        clock=clock,
        deadlines=Deadlines(),
        selector=selectors.DefaultSelector(),
        trees=Trees(state_id),
        log=StderrLog(clock),
        instance=os.urandom(16).hex(),
        boot_id=boot_id(),
        state_id=state_id,
        state_folder=folders.state,
        tasks_fd=tasks_fd,
        tell=tell_nobody,
    )
    ready = ReadyFolders(context)
    ready.open()
    context.take_ready = ready.take
    listener = bind_socket(folders.supervisor_socket)
    notifier = Notifier.from_environment(os.environ)
    try:
        Supervisor(context, listener, notifier, options).serve()
    except BaseException as problem:
        log_crash(context, problem)
        raise
    finally:
        os.unlink(folders.supervisor_socket)  # before the lock goes: the path is still ours
        os.close(lock_fd)
    return EXIT_OK


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="agentqd-supervisor", description="Runs agentqd's workers and ends them in time."
    )
    parser.add_argument(
        "--state-dir", metavar="DIR", help="default: $AGENTQD_STATE_DIR, then the usual place"
    )
    parser.add_argument(
        "--runtime-dir", metavar="DIR", help="default: $AGENTQD_RUNTIME_DIR, then the usual place"
    )
    parser.add_argument(
        "--linger",
        metavar="S",
        type=float,
        help="leave S seconds after the last worker and daemon (default: 60; never under systemd)",
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser.parse_args(argv)


def _become_subreaper() -> None:
    """Orphans of workers become our children, so that they are found and reaped. Raises AgentqError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise AgentqError(f"cannot become a subreaper: {os.strerror(ctypes.get_errno())}")
