"""Every attempt the supervisor knows: running, or ended and not yet forgotten.

What a `Run` finds, and what is answered (never a second start in any of them):
1. Known in memory: its current report again (Running or Exited), whoever asks.
2. Unknown in memory, exit.json on disk (another instance's, or ours and forgotten): Exited as that file tells it.
3. Unknown in memory, `started` without exit.json. It was started by an instance that is gone (ours would be in memory, and
   keeps the attempt until exit.json is claimed). It may have run for a second or for an hour, and how it ended nobody knows.
   While a process of it lives (survivors) the Run waits; after that Exited is answered with pid None, the error
   "started by another instance ..." and `instance` set to that of the `started` file: differing from the Welcome's, it
   says "lost", which is the daemon's to decide. Nothing is written to disk and nothing is remembered for such an answer.
4. A folder without `started`: a crash before the fork. Nothing ran in it; it is made anew and the attempt started.
5. Ended before it was started (survivors, or `End` right behind it): Exited with the error "not started: ..." and that intent.
6. No folder: started. An error on the way: Exited with `error`, kept until Forget like any other end; exit.json too if
   `started` had been created.
7. While the supervisor is leaving: Exited with the error "not started: ..."; nothing on disk, nothing remembered.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec

from agentqd.core.limits import LEFT_BEHIND_NAMED_MAX
from agentqd.supervisor.attempts import Attempt, StartError
from agentqd.supervisor.context import Context
from agentqd.supervisor.exitfile import read_exit, write_exit
from agentqd.supervisor.folder import (
    AlreadyStartedError,
    AttemptFolder,
    Started,
    check_name,
    make_folder,
    read_started,
    write_started,
)
from agentqd.supervisor.limits import DEFERRED_RUNS_MAX, EXIT_FILE_RETRY_S
from agentqd.supervisor.wire import NOT_STARTED, OTHER_INSTANCE, Clocks, Exited, Run, Running
from agentqd.system.failpoints import failpoint

AttemptKey = tuple[str, int]


class Registry:
    """`has_survivors(task)`: whether a process of an earlier instance still lives for this task."""

    def __init__(self, context: Context, has_survivors: Callable[[str], bool]) -> None:
        self._context = context
        self._has_survivors = has_survivors
        self._running: dict[AttemptKey, Attempt] = {}
        self._exited: dict[AttemptKey, Exited] = {}
        self._unwritten: dict[AttemptKey, AttemptFolder] = {}
        self._deferred: dict[AttemptKey, tuple[Run, float]] = {}
        self._held: dict[AttemptKey, tuple[Run, float, AttemptFolder | None]] = {}
        self.leaving = False

    @property
    def busy(self) -> bool:
        """Something runs, or an end is told nowhere but in memory."""
        return bool(self._running or self._unwritten)

    @property
    def runs(self) -> bool:
        return bool(self._running)

    def running(self) -> list[Running]:
        return [attempt.running() for attempt in self._running.values()]

    def exited(self) -> list[Exited]:
        return list(self._exited.values())

    def run(self, run: Run, received_s: float) -> None:
        """Start it, or say what is known of it (see above)."""
        key = (run.task, run.attempt)
        if key in self._running:
            self._context.tell(self._running[key].running())
        elif key in self._exited:
            self._context.tell(self._exited[key])
        elif run.hold:
            self._hold(key, run, received_s)
        elif self.leaving:
            self._context.tell(self._not_run(run, NOT_STARTED + "the supervisor is leaving"))
        elif self._has_survivors(run.task):
            if key in self._deferred or len(self._deferred) < DEFERRED_RUNS_MAX:
                self._deferred[key] = (run, received_s)
            else:
                self._context.tell(self._not_run(run, NOT_STARTED + "too many wait for survivors to end"))
        else:
            self._start(run, received_s)

    def go(self, task: str, number: int) -> None:
        """What was held becomes a Run like any other: started, made to wait for survivors, or handed back. Unknown: nothing."""
        held = self._held.pop((task, number), None)
        if held is None:
            return
        run, received_s, folder = held
        if folder is None or self.leaving or self._has_survivors(task):
            if folder is not None:
                folder.close()
            self.run(msgspec.structs.replace(run, hold=False), received_s)
        else:
            self._start(run, received_s, folder)

    def _hold(self, key: AttemptKey, run: Run, received_s: float) -> None:
        """Make its folder while the daemon's claim becomes durable. Nothing is answered before `Go`: the claim may not be
        there yet for the answer to meet. What goes wrong here goes wrong again, and is told, then."""
        folder = None
        try:
            check_name(run.task, run.attempt, run.folder, self._context.state_folder)
            folder = self._context.take_ready(run.task, run.prompt) if run.attempt == 1 else None
            if folder is None:
                folder = make_folder(self._context.tasks_fd, run.task, run.attempt, run.prompt)
            context = self._context
            write_started(folder, Started(context.instance, context.boot_id, context.clock.now_us()))
        except AlreadyStartedError as found:
            os.close(found.folder_fd)
        except (OSError, ValueError):
            if folder is not None:
                folder.close()
                folder = None
        self._held[key] = (run, received_s, folder)

    def survivors_changed(self) -> None:
        """Start what waited for survivors that are gone now."""
        for key, (run, received_s) in list(self._deferred.items()):
            if not self._has_survivors(run.task):
                del self._deferred[key]
                self.run(run, received_s)

    def drop_deferred(self) -> None:
        """Their daemon was cut off: what it sent and was not acted on counts no more."""
        self._deferred.clear()
        for _, _, folder in self._held.values():
            if folder is not None:
                folder.close()
        self._held.clear()

    def set_clocks(self, task: str, number: int, clocks: Clocks) -> None:
        attempt = self._running.get((task, number))
        if attempt is not None:
            attempt.set_clocks(clocks)
        else:
            self._tell_again(task, number)

    def end(self, task: str, number: int, intent: str, after_s: float) -> None:
        held = self._held.pop((task, number), None)
        waiting = self._deferred.pop((task, number), None)
        attempt = self._running.get((task, number))
        if attempt is not None:
            attempt.end_later(intent, after_s)
        elif waiting is not None:
            error = f"{NOT_STARTED}{intent} while survivors were ended"
            self._context.tell(self._not_run(waiting[0], error, intent))
        elif held is not None:
            if held[2] is not None:
                held[2].close()
            self._context.tell(self._not_run(held[0], f"{NOT_STARTED}{intent} before that", intent))
        else:
            self._tell_again(task, number)

    def end_all(self, intent: str) -> None:
        for attempt in list(self._running.values()):
            attempt.end(intent)

    def kill_all(self) -> None:
        for attempt in list(self._running.values()):
            attempt.child.kill_now()

    def forget(self, task: str, number: int) -> None:
        """Only what has ended can be forgotten."""
        key = (task, number)
        self._exited.pop(key, None)
        folder = self._unwritten.pop(key, None)
        if folder is not None:
            folder.close()

    def children_changed(self) -> None:
        for attempt in list(self._running.values()):
            attempt.child.children_changed()

    def _start(self, run: Run, received_s: float, folder: AttemptFolder | None = None) -> None:
        failpoint("run_received")
        try:
            check_name(run.task, run.attempt, run.folder, self._context.state_folder)
            attempt = Attempt(self._context, run, received_s, self._over, folder)
        except AlreadyStartedError as found:
            self._context.tell(self._started_before(run, found.folder_fd))
        except StartError as problem:
            self._failed(run, str(problem), problem.folder)
        except ValueError as problem:
            self._failed(run, str(problem), None)
        else:
            self._running[run.task, run.attempt] = attempt
            self._context.tell(attempt.running())

    def _started_before(self, run: Run, folder_fd: int) -> Exited:
        try:
            exited = read_exit(folder_fd)
            if exited is not None and (exited.task, exited.attempt) == (run.task, run.attempt):
                return exited
            started = read_started(folder_fd)
        finally:
            os.close(folder_fd)
        return Exited(
            task=run.task,
            attempt=run.attempt,
            instance=started.instance if started else "unknown",
            boot_id=started.boot_id if started else "unknown",
            started_at=started.at if started else None,
            ended_at=self._context.clock.now_us(),
            error=f"{OTHER_INSTANCE} of the supervisor, which left no exit.json: its end is not known",
        )

    def _failed(self, run: Run, error: str, folder: AttemptFolder | None) -> None:
        exited = self._not_run(run, error)
        self._context.log("warning", "spawn_failed", task=run.task[:80], attempt=run.attempt, error=error)
        self._record(exited, folder)

    def _not_run(self, run: Run, error: str, intent: str | None = None) -> Exited:
        return Exited(
            task=run.task,
            attempt=run.attempt,
            instance=self._context.instance,
            boot_id=self._context.boot_id,
            ended_at=self._context.clock.now_us(),
            intent=intent,
            error=error,
        )

    def _over(self, attempt: Attempt, exited: Exited) -> None:
        del self._running[exited.task, exited.attempt]
        if exited.left_behind:
            names = [process.name for process in exited.left_behind[:LEFT_BEHIND_NAMED_MAX]]
            self._context.log("warning", "left_behind", task=exited.task, attempt=exited.attempt, names=names)
        self._record(exited, attempt.folder)

    def _record(self, exited: Exited, folder: AttemptFolder | None) -> None:
        key = (exited.task, exited.attempt)
        self._exited[key] = exited
        if folder is not None and not self._write(exited, folder):
            self._unwritten[key] = folder
            self._context.after(EXIT_FILE_RETRY_S, lambda: self._write_again(key))
        self._context.tell(exited)

    def _write(self, exited: Exited, folder: AttemptFolder) -> bool:
        try:
            write_exit(folder.fd, exited)
        except OSError as problem:
            self._context.log(
                "error", "exit_file_failed", task=exited.task, attempt=exited.attempt, error=str(problem)
            )
            return False
        folder.close()
        return True

    def _write_again(self, key: AttemptKey) -> None:
        folder = self._unwritten.get(key)
        if folder is None:
            return  # forgotten meanwhile
        if self._write(self._exited[key], folder):
            del self._unwritten[key]
        else:
            self._context.after(EXIT_FILE_RETRY_S, lambda: self._write_again(key))

    def _tell_again(self, task: str, number: int) -> None:
        exited = self._exited.get((task, number))
        if exited is not None:
            self._context.tell(exited)
