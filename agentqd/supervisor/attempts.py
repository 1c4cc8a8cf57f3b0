"""The life of one attempt: folder, spawn, clocks, end, exit.json.

Invariants:
1. Nothing is forked before `started` exists, renamed into place with RENAME_NOREPLACE: whoever does that is the only one who ever runs it.
2. After a signal of ours only the first intent counts; an end before any signal of ours is the worker's own.
3. exit.json is written and Exited is told only when the whole tree is gone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from agentqd.supervisor.child import Child, Ended, Hooks, Program, launch
from agentqd.supervisor.clocks import AttemptClocks
from agentqd.supervisor.context import Context
from agentqd.supervisor.deadlines import Timer
from agentqd.supervisor.folder import AttemptFolder, Started, make_folder, mark_started, write_started
from agentqd.supervisor.limits import OUTPUT_POLL_MIN_S
from agentqd.supervisor.output import OutputCap, SignsOfLife
from agentqd.supervisor.spawn import SpawnError
from agentqd.supervisor.tree import MARK_ATTEMPT, MARK_EXEC, MARK_STATE, MARK_TASK
from agentqd.supervisor.wire import Clocks, Ending, Exited, Run, Running, Stuck
from agentqd.system.failpoints import failpoint
from agentqd.system.fsops import open_folder_at


class StartError(Exception):
    """Nothing runs. `folder` is there (and open) if the attempt got as far as its `started` file."""

    def __init__(self, message: str, folder: AttemptFolder | None = None) -> None:
        super().__init__(message)
        self.folder = folder


class Attempt:
    """A running attempt. The prompt, the arguments and the environment are not kept."""

    def __init__(
        self,
        context: Context,
        run: Run,
        received_s: float,
        over: Callable[[Attempt, Exited], None],
        folder: AttemptFolder | None = None,
    ) -> None:
        """Start it, in a folder that was made ready or is made now. Raises StartError, or AlreadyStartedError with nothing changed."""
        self._context = context
        self._over = over
        self.task = run.task
        self.attempt = run.attempt
        self.intent: str | None = None
        self.started_at = context.clock.now_us()
        self.ended_at = 0
        self._ends_later: list[Timer] = []
        self._clock_timer: Timer | None = None
        self.clocks = AttemptClocks(run.clocks, received_s, context.clock.monotonic_s())
        self.folder = self._enter_folder(run, folder)
        self._stdout = OutputCap(self.folder.stdout_fd, run.stdout_bytes_max, self._no_holes)
        self._stderr = OutputCap(self.folder.stderr_fd, run.stdout_bytes_max, self._no_holes)
        self._signs = SignsOfLife(self.folder.fd, self.folder.stdout_fd, self.folder.stderr_fd)
        self.child = self._launch(run)
        self._output_pace_s = OUTPUT_POLL_MIN_S
        self._output_timer = context.after(self._output_pace_s, self._look_at_output)
        self._arm()

    def running(self) -> Running:
        return Running(
            task=self.task,
            attempt=self.attempt,
            pid=self.child.pid,
            pid_start=self.child.start,
            started_at=self.started_at,
            intent=self.intent,
        )

    def set_clocks(self, clocks: Clocks) -> None:
        """New deadlines from now on; one that has passed already ends the attempt at once."""
        if self.ended_at:
            return
        self.clocks.replace(clocks, self._context.clock.monotonic_s())
        self._look_at_clocks()

    def end_later(self, intent: str, after_s: float) -> None:
        """End it unless it ends by itself first."""
        if after_s <= 0:
            self.end(intent)
        else:
            self._ends_later.append(self._context.after(after_s, lambda: self.end(intent)))

    def end(self, intent: str) -> None:
        """SIGTERM, grace, SIGKILL. The first intent wins; an attempt that is dead already keeps its own end."""
        if self.intent is not None or self.child.main_has_ended:
            return
        self.intent = intent
        self._cancel_clocks()
        self._context.log("info", "attempt_ending", task=self.task, attempt=self.attempt, intent=intent)
        self._context.tell(Ending(self.task, self.attempt, intent))
        self.child.end()

    def _enter_folder(self, run: Run, folder: AttemptFolder | None) -> AttemptFolder:
        context = self._context
        try:
            if folder is None and run.attempt == 1:
                folder = context.take_ready(run.task, run.prompt)
            if folder is None:
                folder = make_folder(context.tasks_fd, run.task, run.attempt, run.prompt)
        except (OSError, ValueError) as problem:
            raise StartError(f"cannot make the folder {run.folder}: {problem}") from problem
        failpoint("folder_made")
        try:
            if folder.started_fd >= 0:
                write_started(folder, Started(context.instance, context.boot_id, self.started_at))
            mark_started(folder)
        except OSError as problem:
            folder.close()
            raise StartError(f"cannot create {run.folder}/started: {problem}") from problem
        return folder

    def _launch(self, run: Run) -> Child:
        folder = self.folder
        env = {**run.env, MARK_STATE: self._context.state_id}
        env[MARK_TASK], env[MARK_ATTEMPT] = run.task, str(run.attempt)
        env.pop(MARK_EXEC, None)
        hooks = Hooks(lambda: self.clocks.kill_grace_s, self._main_ended, self._gone, self._stuck)
        work_fd = -1
        failpoint("started_made")
        try:
            if run.cwd is None:
                work_fd = open_folder_at("work", folder.fd)
            program = Program(
                argv=run.argv,
                env=env,
                cwd=work_fd if run.cwd is None else run.cwd,
                stdin_fd=_open_stdin(run, folder.fd),
                stdout_fd=folder.stdout_fd,
                stderr_fd=folder.stderr_fd,
            )
            return launch(self._context, (run.task, str(run.attempt)), program, hooks)
        except SpawnError as problem:
            raise StartError(str(problem), folder) from problem
        except OSError as problem:
            raise StartError(f"cannot start in {run.folder}: {problem}", folder) from problem
        finally:
            if work_fd >= 0:
                os.close(work_fd)

    def _arm(self) -> None:
        if self._clock_timer is not None:
            self._clock_timer.cancel()
            self._clock_timer = None
        next_s = self.clocks.next_s(self._context.clock.monotonic_s())
        if next_s is not None:
            self._clock_timer = self._context.deadlines.at(next_s, self._look_at_clocks)

    def _look_at_clocks(self) -> None:
        if self.intent is not None or self.ended_at:
            return
        now_s = self._context.clock.monotonic_s()
        if self.clocks.needs_polling and self._signs.changed():
            self.clocks.saw_activity(now_s)
        intent = self.clocks.expired(now_s)
        if intent is not None:
            self.end(intent)
            return
        warning = self.clocks.take_warning(now_s)
        if warning is not None:
            with contextlib.suppress(
                OSError
            ):  # a number that is no signal: the config's fault, not the worker's
                self.child.signal_main(warning)
        self._arm()

    def _look_at_output(self) -> None:
        grown = max(self._stdout.look(), self._stderr.look())
        fastest = self._stdout if self._stdout.size >= self._stderr.size else self._stderr
        self._output_pace_s = fastest.next_look_s(grown, self._output_pace_s)
        self._output_timer = self._context.after(self._output_pace_s, self._look_at_output)

    def _cancel_clocks(self) -> None:
        if self._clock_timer is not None:
            self._clock_timer.cancel()
        for timer in self._ends_later:
            timer.cancel()

    def _main_ended(self) -> None:
        self.ended_at = self._context.clock.now_us()
        self._cancel_clocks()

    def _stuck(self, pids: list[int]) -> None:
        self._context.log("error", "tree_will_not_die", task=self.task, attempt=self.attempt, pids=pids[:50])
        self._context.tell(Stuck(self.task, self.attempt, pids or [self.child.pid]))

    def _no_holes(self) -> None:
        self._context.log_once("warning", "no_hole_punching", folder=self._context.state_folder)

    def _gone(self, ended: Ended) -> None:
        self._output_timer.cancel()
        self._stdout.look()
        self._stderr.look()
        exited = Exited(
            task=self.task,
            attempt=self.attempt,
            instance=self._context.instance,
            boot_id=self._context.boot_id,
            pid=self.child.pid,
            started_at=self.started_at,
            ended_at=self.ended_at,
            exit_code=ended.exit_code,
            signal=ended.signal,
            intent=self.intent,
            stdout_bytes=self._stdout.size,
            stderr_bytes=self._stderr.size,
            stdout_truncated=self._stdout.truncated,
            stderr_truncated=self._stderr.truncated,
            left_behind=self.child.left_behind,
            user_cpu_s=ended.user_cpu_s,
            system_cpu_s=ended.system_cpu_s,
            max_rss_bytes=ended.max_rss_bytes,
        )
        self._over(self, exited)


def _open_stdin(run: Run, folder_fd: int) -> int:
    if run.stdin == "prompt" and run.prompt is not None:
        return os.open("prompt", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder_fd)
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
