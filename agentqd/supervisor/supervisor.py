"""The loop: exits first, then requests, then timers, then what is to be told."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from dataclasses import dataclass
from typing import Final

from agentqd import __version__
from agentqd.supervisor.context import Context
from agentqd.supervisor.execs import Execs
from agentqd.supervisor.limits import IDLE_WAKE_S
from agentqd.supervisor.logs import traceback_text
from agentqd.supervisor.procfs import signal_process
from agentqd.supervisor.registry import Registry
from agentqd.supervisor.server import Server
from agentqd.supervisor.survivors import Survivors
from agentqd.supervisor.wire import (
    PROTOCOL,
    End,
    Exec,
    ExecCancel,
    Forget,
    Go,
    Leave,
    Ping,
    Pong,
    Report,
    Request,
    Run,
    SetClocks,
    Welcome,
)
from agentqd.system.notify import Notifier

_HANDLED: Final = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LAST_WORDS_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Options:
    linger_s: float | None  # None: stay for ever
    watchdog_s: float | None


class Supervisor:
    """Everything, wired together. `context.tell` is ours to set."""

    def __init__(
        self, context: Context, listener: socket.socket, notifier: Notifier, options: Options
    ) -> None:
        self._context = context
        self._notifier = notifier
        self._options = options
        self._survivors = Survivors(context, self._survivors_changed)
        self._registry = Registry(context, self._survivors.has_task)
        self._execs = Execs(context)
        self._server = Server(context, listener, self._welcome, self._act, self._cut_off)
        context.tell = self._server.tell
        self._idle_since_s = context.clock.monotonic_s()
        self._stop_signals = 0
        self._unclear_logged: set[tuple[int, int]] = set()
        self._signals = _catch_signals()
        context.selector.register(self._signals, selectors.EVENT_READ, self._take_signals)

    def serve(self) -> None:
        """Until told to leave or idle for too long."""
        self._survivors.begin()
        self._notifier.ready("waiting for the daemon")
        self._feed_watchdog()
        self._context.log("info", "supervisor_ready", version=__version__, instance=self._context.instance)
        while not self._is_done():
            self._turn()
        self._notifier.stopping()
        self._say_last_words()
        self._context.log("info", "supervisor_left")

    def _turn(self) -> None:
        ready = self._context.selector.select(self._sleep_s())
        # Pidfds before sockets and timers: who is dead already has ended by itself, whatever comes next.
        ready.sort(key=lambda event: not isinstance(event[0].fileobj, int))
        for key, _ in ready:
            key.data()
        self._server.work_backlog()
        self._context.deadlines.run_due(self._context.clock.monotonic_s())
        self._server.flush()

    def _sleep_s(self) -> float:
        if self._server.has_backlog:
            return 0.0
        next_s = self._context.deadlines.next_s()
        until_s = IDLE_WAKE_S
        if self._options.linger_s is not None:
            until_s = min(until_s, max(self._options.linger_s, 0.05))
        if next_s is not None:
            until_s = min(until_s, next_s - self._context.clock.monotonic_s())
        return max(until_s, 0.0)

    def _is_done(self) -> bool:
        if self._registry.leaving:
            return not self._registry.runs and not self._execs.busy
        now_s = self._context.clock.monotonic_s()
        busy = self._registry.busy or self._execs.busy or self._survivors.any or self._server.has_daemon
        if busy or self._options.linger_s is None:
            self._idle_since_s = now_s
            return False
        return now_s - self._idle_since_s >= self._options.linger_s

    def _welcome(self) -> Welcome:
        return Welcome(
            protocol=PROTOCOL,
            version=__version__,
            instance=self._context.instance,
            boot_id=self._context.boot_id,
            pid=os.getpid(),
            running=self._registry.running(),
            exited=self._registry.exited(),
            survivors=self._survivors.listed(),
        )

    def _act(self, request: Request, received_s: float) -> None:
        match request:
            case Run():
                self._registry.run(request, received_s)
            case Go():
                self._registry.go(request.task, request.attempt)
            case SetClocks():
                self._registry.set_clocks(request.task, request.attempt, request.clocks)
            case End():
                self._registry.end(request.task, request.attempt, request.reason, request.after_s)
            case Forget():
                self._registry.forget(request.task, request.attempt)
            case Exec():
                self._execs.start(request)
            case ExecCancel():
                self._execs.cancel(request.ref)
            case Ping():
                self._context.tell(Pong(request.n))
            case Leave():
                self._leave(stop_workers=request.stop_workers)

    def _leave(self, *, stop_workers: bool) -> None:
        self._context.log("info", "leaving", stop_workers=stop_workers)
        self._registry.leaving = True
        if stop_workers:
            self._registry.end_all("shutdown")

    def _cut_off(self) -> None:
        self._registry.drop_deferred()
        self._execs.abandon_all()

    def _survivors_changed(self) -> None:
        self._registry.survivors_changed()

    def _take_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            numbers = set(self._signals.recv(4096))
            if signal.SIGCHLD in numbers:
                self._children_changed()
            if numbers & {signal.SIGTERM, signal.SIGINT}:
                self._told_to_stop()

    def _told_to_stop(self) -> None:
        self._stop_signals += 1
        self._leave(stop_workers=True)
        self._execs.abandon_all()
        if self._stop_signals > 1:  # whoever asks twice wants no more grace
            self._registry.kill_all()
            self._execs.kill_all()

    def _children_changed(self) -> None:
        trees = self._context.trees
        has_orphans = bool(trees.orphans())
        self._registry.children_changed()
        self._execs.children_changed()
        trees.forget_gone()
        if has_orphans:
            for process in trees.strays():
                self._context.log("warning", "stray_ended", pid=process.pid, name=process.name)
                signal_process(process, signal.SIGKILL)
        for identity, process in trees.unclear.items():
            if identity not in self._unclear_logged:
                self._context.log("warning", "unattributed_process", pid=process.pid, name=process.name)
        self._unclear_logged = set(trees.unclear)

    def _feed_watchdog(self) -> None:
        if self._options.watchdog_s is not None:
            self._notifier.watchdog()
            self._context.after(self._options.watchdog_s, self._feed_watchdog)

    def _say_last_words(self) -> None:
        """The last reports, if the daemon reads them soon; they are on disk anyway."""
        until = time.monotonic() + _LAST_WORDS_S
        while self._server.has_daemon and self._server.has_pending and time.monotonic() < until:
            self._server.flush()
            time.sleep(0.01)


def _catch_signals() -> socket.socket:
    """Signals become bytes on a socket. The handlers do nothing, but unlike SIG_IGN they are not inherited."""
    receiving, sending = socket.socketpair()
    receiving.setblocking(False)
    sending.setblocking(False)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in _HANDLED:
        signal.signal(number, _noted)
    signal.set_wakeup_fd(sending.detach(), warn_on_full_buffer=False)
    return receiving


def _noted(_number: int, _frame: object) -> None:
    """The wakeup descriptor has told the loop."""


def log_crash(context: Context, problem: BaseException) -> None:
    """A bug: say where, before everything ends."""
    context.log("critical", "supervisor_crashed", traceback=traceback_text(problem))


def tell_nobody(_report: Report) -> None:
    """Until there is a server."""
