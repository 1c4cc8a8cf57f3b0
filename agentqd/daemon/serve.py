"""Wiring only: one journal, one Box, one TaskGroup over all loops; signals; what happens when the journal fails.

A failed journal (any I/O error: outcome unknown) ends the TaskGroup; everything is opened anew and starts again from what is
found on disk, as after a SIGKILL. Workers notice nothing of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, Final

from agentqd import __version__
from agentqd.control.server import ControlServer, Parts
from agentqd.core.errors import ConfigError, JournalError
from agentqd.core.folders import Folders
from agentqd.core.settings import Settings
from agentqd.core.units import format_time
from agentqd.daemon.folders import group_id, make_ready
from agentqd.daemon.logs import make_log
from agentqd.loops.box import Box, Log
from agentqd.loops.claimwatch import ClaimWatch
from agentqd.loops.delivery import DeliveryLoop
from agentqd.loops.intake import Intake
from agentqd.loops.liveness import Liveness
from agentqd.loops.outside import OutsideClaims
from agentqd.loops.reconcile import reconciler
from agentqd.loops.reload import Reload
from agentqd.loops.retention import Retention
from agentqd.loops.supervision import Supervision
from agentqd.loops.waking import Waker
from agentqd.storage import sources
from agentqd.storage.configfile import load_settings
from agentqd.storage.journal import Journal
from agentqd.storage.lock import take_lock
from agentqd.storage.state_id import load_state_id
from agentqd.storage.transaction import Transaction
from agentqd.supervisor import wire
from agentqd.system.clock import SystemClock
from agentqd.system.inotify import Inotify, InotifyUnavailable, NoInotify, Watcher
from agentqd.system.notify import Notifier, watchdog_interval_s

_REOPEN_S: Final = (0.2, 1.0, 5.0, 15.0)
_STOP_WORKERS_MAX_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    folders: Folders
    config: str
    config_needed: bool
    stop_workers: bool


class _Stop(Exception):
    """SIGTERM or SIGINT."""


class _Daemon:
    """What outlives a reopened journal."""

    def __init__(self, options: Options, settings: Settings, sha256: str, log: Log) -> None:
        self.options = options
        self.settings = settings
        self.sha256 = sha256
        self.log = log
        self.clock = SystemClock()
        self.notifier = Notifier.from_environment(os.environ)
        self.stop = asyncio.Event()
        self.hangup = asyncio.Event()
        self.started_s = self.clock.monotonic_s()
        self.state_id = load_state_id(options.folders.state_id)
        self.opened = 0


async def serve(options: Options) -> int:
    """Until a signal. Raises ConfigError, StateFolderError, SchemaTooNew."""
    path = options.config if options.config_needed or os.path.exists(options.config) else None
    loaded = load_settings(path, options.folders.state)
    log = make_log(loaded.settings.log)
    gid = group_id(loaded.settings.control.group)
    make_ready(options.folders, gid)
    lock = take_lock(options.folders.daemon_lock, "agentqd")
    daemon = _Daemon(options, loaded.settings, loaded.sha256, log)
    _handle_signals(daemon)
    try:
        await _serve_for_ever(daemon, gid)
    finally:
        daemon.notifier.stopping()
        os.close(lock)
    log.info("stopped")
    return 0


def _handle_signals(daemon: _Daemon) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.stop.set)
    loop.add_signal_handler(signal.SIGHUP, daemon.hangup.set)


async def _serve_for_ever(daemon: _Daemon, gid: int | None) -> None:
    failures = 0
    while not daemon.stop.is_set():
        began = daemon.clock.monotonic_s()
        try:
            await _serve_once(daemon, gid)
        except BaseExceptionGroup as group:
            _, others = group.split((_Stop, asyncio.CancelledError))
            if others is None:
                return
            error = _journal_error(others)
            if error is None:
                raise
            failures = failures + 1 if daemon.clock.monotonic_s() - began < 60 else 1
            wait_s = _REOPEN_S[min(failures, len(_REOPEN_S)) - 1]
            daemon.log.error("journal_failed", error=str(error), reopen_in_s=wait_s)
            daemon.notifier.status(f"the journal failed ({error}); opening it again")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await daemon.stop.wait()


def _journal_error(group: BaseExceptionGroup[BaseException]) -> JournalError | None:
    """The journal's failure, if everything in the group is one; anything else is a bug and ends the daemon loudly."""
    failures, others = group.split(JournalError)
    if failures is None or others is not None:
        return None
    first: BaseException = failures
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    assert isinstance(first, JournalError)
    return first


def _inotify(log: Log) -> Watcher:
    try:
        return Inotify()
    except InotifyUnavailable as error:
        log.error("inotify_unavailable", error=error.message, effect="the slow rescan does the work")
        return NoInotify()


async def _serve_once(daemon: _Daemon, gid: int | None) -> None:
    """Open the journal and run every loop until a signal (_Stop) or a failure."""
    folders = daemon.options.folders
    journal = Journal(folders.journal, daemon.clock.now_us)
    await journal.open()
    daemon.opened += 1
    watchers = [_inotify(daemon.log) for _ in range(3)]
    box = Box(
        folders, journal, daemon.settings, daemon.state_id, socket.gethostname(), daemon.clock, daemon.log
    )
    supervision = Supervision(box, watchers[1], may_start_supervisor=not daemon.notifier.on)
    try:
        await _run_loops(daemon, box, supervision, watchers, gid)
    finally:
        supervision.link.close()
        supervision.close()
        for watcher in watchers:
            watcher.close()
        await journal.close()


async def _run_loops(
    daemon: _Daemon, box: Box, supervision: Supervision, watchers: list[Watcher], gid: int | None
) -> None:
    journal = box.journal
    intake = Intake(box, watchers[0], await journal.read(sources.load), gid)
    delivery = DeliveryLoop(box, supervision.execs)
    waker = Waker(box)
    reload = Reload(box, watchers[2], daemon.options.config, daemon.options.config_needed, daemon.sha256)
    liveness = Liveness(box, supervision)
    claims = ClaimWatch(box, supervision)
    outside = OutsideClaims(box)
    retention = Retention(box)
    await retention.look()
    await supervision.scheduler.load()

    def before_commit(tx: Transaction) -> None:
        supervision.scheduler.claim(tx)
        delivery.before_commit(tx)
        waker.before_commit(tx)

    journal.before_commit = before_commit

    def keep_settings() -> None:
        if box.settings.log != daemon.settings.log:
            box.log = daemon.log = make_log(box.settings.log)
        daemon.settings, daemon.sha256 = box.settings, reload.sha256

    box.on_settings.append(keep_settings)

    parts = Parts(
        supervision=supervision,
        delivery=delivery,
        intake=intake,
        reload=reload,
        started_monotonic_s=daemon.started_s,
        version=__version__,
        outside=outside,
    )
    control = ControlServer(box, parts)
    await control.start()
    try:
        async with asyncio.TaskGroup() as group:
            loops: dict[str, Awaitable[Any]] = {
                "journal": _failed(journal),
                "intake": intake.run(),
                "link": supervision.link.run(),
                "reconcile": reconciler(box, supervision),
                "finisher": supervision.finisher(),
                "handover": supervision.handover(),
                "watcher": supervision.watcher(),
                "delivery": delivery.run(),
                "waking": waker.run(),
                "claims": claims.run(),
                "outside_claims": outside.run(),
                "reload": reload.run(),
                "liveness": liveness.run(),
                "retention": retention.run(),
                "control": control.run(),
                "signals": _signals(daemon, box, supervision, reload),
                "watchdog": _watchdog(daemon, liveness),
            }
            for name, loop in loops.items():
                group.create_task(_as_coroutine(loop), name=name)
            _say_ready(daemon, box)
    finally:
        await control.close()


async def _as_coroutine(awaitable: Awaitable[Any]) -> None:
    await awaitable


async def _failed(journal: Journal) -> None:
    await journal.failed


def _say_ready(daemon: _Daemon, box: Box) -> None:
    daemon.log.info(
        "started",
        version=__version__,
        pid=os.getpid(),
        epoch=box.journal.epoch,
        state_dir=box.folders.state,
        config=daemon.options.config if daemon.sha256 else None,
        queue_file=box.folders.queue_file,
    )
    if box.draining:
        daemon.log.warning("still_draining", since=format_time(box.draining_since_us))
    daemon.notifier.ready(f"epoch {box.journal.epoch}")
    gc.collect()
    gc.freeze()  # what start-up made stays: later collections need not walk it


async def _signals(daemon: _Daemon, box: Box, supervision: Supervision, reload: Reload) -> None:
    """SIGHUP reloads; SIGTERM and SIGINT end the TaskGroup (workers go on, unless --stop-workers)."""
    while True:
        waits = [asyncio.ensure_future(daemon.stop.wait()), asyncio.ensure_future(daemon.hangup.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if daemon.stop.is_set():
            box.log.info("stopping", workers=len(supervision.live), stop_workers=daemon.options.stop_workers)
            if daemon.options.stop_workers:
                await _stop_workers(supervision)
            raise _Stop
        daemon.hangup.clear()
        daemon.notifier.reloading()
        with contextlib.suppress(ConfigError):
            await reload.now()
        daemon.notifier.ready(f"epoch {box.journal.epoch}")


async def _stop_workers(supervision: Supervision) -> None:
    """End every worker and wait for their ends to be recorded."""
    supervision.scheduler.target = None
    for live in list(supervision.live.values()):
        supervision.send_end(live.task.id, live.task.attempt, "shutdown")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_STOP_WORKERS_MAX_S):
            while supervision.live:  # noqa: ASYNC110 - at the end of a life, for a moment
                await asyncio.sleep(0.02)
    if supervision.link.connected:
        supervision.link.send(wire.Leave())


async def _watchdog(daemon: _Daemon, liveness: Liveness) -> None:
    """systemd's watchdog is fed by the loops that do the work: a stalled one starves it."""
    every_s = watchdog_interval_s(os.environ, os.getpid())
    while True:
        await asyncio.sleep(every_s or 3600.0)
        if every_s is not None and not liveness.stalled():
            daemon.notifier.watchdog()
