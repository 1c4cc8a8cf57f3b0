"""agentqctl that stops itself right where `writes claim` forks, in the process that `AGENTQ_TEST_STOP` names: parent or child."""

from __future__ import annotations

import os
import runpy
import signal

fork = os.fork


def fork_and_stop() -> int:
    stops = os.environ["AGENTQ_TEST_STOP"]
    if stops == "parent":
        os.kill(os.getpid(), signal.SIGSTOP)
    child = fork()
    if child == 0 and stops == "child":
        os.kill(os.getpid(), signal.SIGSTOP)
    return child


if __name__ == "__main__":
    os.fork = fork_and_stop
    runpy.run_module("agentqd.cli.main", run_name="__main__", alter_sys=True)
