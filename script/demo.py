"""The mission, played with real processes in a folder of its own. Exits 0 only if every claim was seen to hold.

Invariants:
1. Whatever happens (a failed check, Ctrl-C, SIGTERM, SIGHUP), every process that carries this folder's name is ended, and the
   folder is removed.
2. Only what agentqd itself wrote is shown: its files, and the output of agentqctl.
"""
# ruff: noqa: T201 - printing is what a demo is for

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

PROGRAMS = Path(sys.executable).parent
WAIT_S = 20.0
BOLD, DIM, GREEN, RED, PLAIN = (
    ("\033[1m", "\033[2m", "\033[32m", "\033[31m", "\033[0m") if sys.stdout.isatty() else ("",) * 5
)


class DemoFailed(Exception):
    """A step did not show what it claims."""


class Demo:
    """One state folder, its daemon, and what is shown of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.log = folder / "daemon.log"
        self.daemon: subprocess.Popen[bytes] | None = None
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("AGENTQ", "NOTIFY_"))
        }
        self.env = {
            **clean,
            "AGENTQD_STATE_DIR": str(self.state),
            "AGENTQD_RUNTIME_DIR": str(folder / "run"),
            "AGENTQD_CONFIG": str(folder / "agentqd.yaml"),
            "PATH": f"{PROGRAMS}:{os.environ.get('PATH', os.defpath)}",
        }
        # The defaults, whatever this machine's own config says.
        (folder / "agentqd.yaml").write_text("log:\n  format: json\n")

    # --- the steps ---------------------------------------------------------------------------------------

    def play(self) -> None:
        self.step("A daemon on an empty state folder.")
        print(f"{DIM}${PLAIN} DEMO={self.folder}")
        self.start_daemon()

        self.step("1. One line appended with >> is a task; its result is delivered.")
        self.append({"task": "hello", "prompt": "echo Hello from $AGENTQ_TASK_ID, on $(uname -s)."})
        hello = self.result("hello")
        self.show_line(hello, "task_id", "name", "status", "duration_s", "stdout_tail")
        check(hello["status"] == "success", "the task ended well")
        check(hello["stdout_tail"] == f"Hello from {hello['task_id']}, on Linux.\n", "its output came back")

        self.step("2. A worker is to write four replies. Its timeout kills it after two. Both are delivered.")
        replies = "for n in 1 2 3 4; do echo reply $n > $AGENTQ_OUTBOX/$n.txt; sleep 2; done"
        self.append({"task": "replies", "prompt": replies, "run_timeout": "3s", "kill_grace": "1s"})
        killed = self.result("replies")
        entries = self.entries("replies")
        for entry in entries:
            self.show_line(entry, "type", "name", "key", "content")
        self.show_line(killed, "name", "status", "reason", "duration_s")
        check(
            [entry["key"] for entry in entries] == ["1.txt", "2.txt"], "two replies were delivered, once each"
        )
        check(
            killed["status"] == "timeout" and killed["reason"] == "run_timeout",
            "the result says that it was the timeout",
        )

        self.step("3. The daemon is killed with SIGKILL in mid-task. The worker goes on; its result arrives.")
        go = self.folder / "go"
        self.append(
            {"task": "survivor", "prompt": f"until [ -e {go} ]; do sleep 0.1; done; echo pid $$ has finished"}
        )
        pid = self.worker_pid("survivor")
        born = start_time(pid)
        assert self.daemon is not None
        self.shell(f"kill -9 {self.daemon.pid}", f"the daemon; the worker has pid {pid}")
        self.daemon.wait()
        check(born is not None and start_time(pid) == born, f"worker {pid} goes on without a daemon")
        self.start_daemon()
        check(
            self.worker_pid("survivor") == pid and start_time(pid) == born,
            f"the new daemon has the same worker, {pid}",
        )
        go.touch()
        survivor = self.result("survivor")
        self.show_line(survivor, "name", "status", "attempt", "exit_code", "stdout_tail")
        check(survivor["stdout_tail"] == f"pid {pid} has finished\n", f"the result is that of process {pid}")
        check(survivor["status"] == "success" and survivor["attempt"] == 1, "it ran once")

        self.step("4. Exit 0 proves nothing: a worker that did no work is called out.")
        self.append({"task": "lazy", "prompt": "true"})
        lazy = self.result("lazy")
        self.show_line(lazy, "name", "status", "exit_code", "detail")
        check(lazy["status"] == "no_work" and lazy["exit_code"] == 0, "exit 0 without work is not success")
        alerts = wait_for("an alert", lambda: self.alerts(lazy["task_id"]))
        check("agentq.alert.no_work" in alerts, "and it is an alert")

        self.step("5. What a person sees.")
        self.ctl("status")
        lines = [line["name"] for line in self.completions() if "status" in line]
        check(
            sorted(lines) == ["hello", "lazy", "replies", "survivor"], "four tasks, four results, none twice"
        )

    def start_daemon(self) -> None:
        command = [
            PROGRAMS / "agentqd",
            "run",
            "--state-dir",
            self.state,
            "--runtime-dir",
            self.folder / "run",
        ]
        print(f"{DIM}${PLAIN} agentqd run --state-dir $DEMO/state --runtime-dir $DEMO/run &")
        before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        daemon = self.daemon

        def started() -> bool:
            if daemon.poll() is not None:
                raise DemoFailed(
                    f"the daemon ended with {daemon.returncode}:\n{self.log.read_text()[-2000:]}"
                )
            return b'"started"' in self.log.read_bytes()[before:]

        wait_for("the daemon", started)

    def append(self, task: dict[str, Any]) -> None:
        line = shlex.quote(json.dumps(task))
        self.shell(f"echo {line} >> $DEMO/state/queue/tasks.jsonl")

    def shell(self, command: str, remark: str = "") -> None:
        """A line for a real shell, shown as it is run."""
        print(f"{DIM}${PLAIN} {command}{f'   {DIM}# {remark}{PLAIN}' if remark else ''}", flush=True)
        subprocess.run(["/bin/sh", "-c", command], check=True, env={**self.env, "DEMO": str(self.folder)})

    def ctl(self, *words: str) -> None:
        print(f"{DIM}${PLAIN} agentqctl {' '.join(words)}", flush=True)
        done = subprocess.run([PROGRAMS / "agentqctl", *words], env=self.env, check=False)
        check(done.returncode == 0, "", f"agentqctl {words[0]} exited with {done.returncode}")

    # --- what is there -----------------------------------------------------------------------------------

    def completions(self) -> list[dict[str, Any]]:
        try:
            text = (self.state / "completions.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def result(self, name: str) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            return next(
                (line for line in self.completions() if line["name"] == name and "status" in line), None
            )

        found = wait_for(f"the result of {name}", look)
        assert found is not None
        return found

    def entries(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.completions() if line["name"] == name and "status" not in line]

    def worker_pid(self, name: str) -> int:
        def look() -> int:
            tasks = [task for task in self.ask("list", "--json") if task["task"] == name]
            if not tasks:
                return 0
            attempts = self.ask("show", tasks[0]["id"], "--json")["attempts"]
            return int(attempts[-1]["pid"] or 0) if attempts else 0

        return wait_for(f"the worker of {name}", look)

    def alerts(self, task_id: str) -> list[str]:
        return [
            alert["type"]
            for alert in self.ask("status", "--json")["alerts"]
            if alert.get("task_id") == task_id
        ]

    def ask(self, *words: str) -> Any:
        done = subprocess.run(
            [PROGRAMS / "agentqctl", *words], env=self.env, capture_output=True, check=False, timeout=WAIT_S
        )
        if done.returncode:
            raise DemoFailed(f"agentqctl {' '.join(words)}: {(done.stderr or done.stdout).decode()}")
        return json.loads(done.stdout)

    # --- showing -----------------------------------------------------------------------------------------

    def step(self, title: str) -> None:
        print(f"\n{BOLD}{title}{PLAIN}", flush=True)

    def show_line(self, line: dict[str, Any], *fields: str) -> None:
        """Some fields of one line of completions.jsonl; the others are left out, none is changed."""
        chosen = ", ".join(f'"{name}": {json.dumps(line[name])}' for name in fields)
        print(f"  completions.jsonl: {{{chosen}, ...}}", flush=True)

    # --- the end -----------------------------------------------------------------------------------------

    def clean_up(self) -> None:
        """End every process of this folder, then remove it. Raises DemoFailed if one will not go."""
        for number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            deadline = time.monotonic() + patience_s
            told: set[int] = set()
            while (pids := self.own_pids()) and time.monotonic() < deadline:
                for pid in pids - told:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                told |= pids
                if self.daemon is not None:
                    self.daemon.poll()
                time.sleep(0.02)
        left = self.own_pids()
        shutil.rmtree(self.folder, ignore_errors=True)
        if left or self.folder.exists():
            raise DemoFailed(f"left behind: processes {sorted(left)}, folder {self.folder.exists()}")

    def own_pids(self) -> set[int]:
        """Daemon, supervisor and workers carry the folder's (random) name in their environment or arguments."""
        mark = str(self.folder).encode()
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in (entry / "environ").read_bytes() or mark in (entry / "cmdline").read_bytes():
                        found.add(int(entry.name))
        return found


def check(holds: bool, claim: str, otherwise: str = "") -> None:
    if not holds:
        raise DemoFailed(otherwise or f"not so: {claim}")
    if claim:
        print(f"  {GREEN}✓{PLAIN} {claim}", flush=True)


def wait_for(what: str, look: Callable[[], T]) -> T:
    deadline = time.monotonic() + WAIT_S
    while not (seen := look()):
        if time.monotonic() > deadline:
            raise DemoFailed(f"waited {WAIT_S:g} s for {what}")
        time.sleep(0.02)
    return seen


def start_time(pid: int) -> str | None:
    """With the pid, the identity of a process; None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _interrupted(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> int:
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in signals:
        signal.signal(number, _interrupted)
    began = time.monotonic()
    demo = Demo(Path(tempfile.mkdtemp(prefix="agentqd-demo-")))
    status = 0
    try:
        demo.play()
    except DemoFailed as failure:
        print(f"\n{RED}The demo failed: {failure}{PLAIN}", file=sys.stderr)
        print(
            f"The daemon's log:\n{demo.log.read_text()[-3000:] if demo.log.exists() else '(none)'}",
            file=sys.stderr,
        )
        status = 1
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        demo.clean_up()
    if status == 0:
        print(
            f"\n{BOLD}All of it held, in {time.monotonic() - began:.0f} s. Nothing was left running, and no file.{PLAIN}"
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
