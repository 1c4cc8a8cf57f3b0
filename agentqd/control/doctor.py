"""`GET /v1/doctor`: what the daemon itself finds wrong with this box, and the command that mends it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import sqlite3
import stat
import time
from collections.abc import AsyncIterator, Iterator
from shlex import quote
from typing import Any, Final
from urllib.parse import quote as url_quote

from aiohttp import web

from agentqd.control import queries
from agentqd.control.attention import under_systemd
from agentqd.control.room import Room
from agentqd.control.route import Call, Route, answer
from agentqd.control.socketfile import mode_for
from agentqd.core.limits import MIB
from agentqd.core.routing import COMPLETIONS
from agentqd.core.units import format_duration, format_time

QUICK_CHECK_S: Final = 3.0
_PROGRESS_OPCODES: Final = 20_000
WATCHES_MIN: Final = 1024
INSTANCES_MIN: Final = 16
DESCRIPTORS_FREE_MIN: Final = 128
SLOW_COMMIT_S: Final = 1.0
CLOCK_BACK_US: Final = 60 * 1_000_000
YEAR_2025_US: Final = 1_735_689_600 * 1_000_000
Check = dict[str, Any]


def check(name: str, level: str, message: str, fix: str | None = None) -> Check:
    return {"name": name, "ok": level == "ok", "level": level, "message": message, "fix": fix}


async def run_checks(call: Call) -> web.StreamResponse:
    return answer({"checks": [found async for found in _checks(call.room)]})


async def _checks(room: Room) -> AsyncIterator[Check]:
    """In the order in which a person would look."""
    yield await _journal_writes(room)
    yield await asyncio.to_thread(_journal_whole, room.box.journal.path)
    for found in (
        *_disk(room),
        *_queue_folder(room),
        *_supervisor(room),
        *_draining(room),
        *_config(room),
        *_control(room),
    ):
        yield found
    for found in (*_inotify(), *_descriptors(), *await _clock(room), *await _sinks(room)):
        yield found


async def _journal_writes(room: Room) -> Check:
    began = time.monotonic()
    await room.box.journal.commit(lambda _: None)  # a failure answers the whole request: 503
    took = time.monotonic() - began
    level = "ok" if took < SLOW_COMMIT_S else "warning"
    return check("journal", level, f"{room.box.journal.path}: a commit takes {took * 1000:.1f} ms", None)


def _journal_whole(path: str) -> Check:
    """SQLite's own look at its pages, on a connection of its own that can write nothing; cut off after a few seconds."""
    deadline = time.monotonic() + QUICK_CHECK_S
    try:
        uri = f"file:{url_quote(os.path.abspath(path))}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
            connection.set_progress_handler(lambda: int(time.monotonic() > deadline), _PROGRESS_OPCODES)
            said = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if said != "ok":
                # SQLite 3.40.0 to 3.41.0: quick_check sees a NULL in a key of a WITHOUT ROWID table whose columns stand in
                # another order than its key's. The full check does not, and reads the indexes too.
                said = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
            text = f"large; nothing wrong was found in the first {QUICK_CHECK_S:g} s"
            return check("journal pages", "ok", text)
        return check("journal pages", "error", f"{path}: cannot be checked: {error}")
    if said == "ok":
        return check("journal pages", "ok", "whole")
    text = f"{path} is damaged: {str(said)[:200]}; stop agentqd and restore the state folder from a backup"
    return check("journal pages", "error", text)


def _disk(room: Room) -> Iterator[Check]:
    state = room.box.folders.state
    try:
        found = os.statvfs(state)
    except OSError as error:
        yield check("disk", "error", f"{state}: {error.strerror}")
        return
    free, least = found.f_bavail * found.f_frsize, int(room.box.settings.limits.disk_free_min)
    text = (
        f"{free // MIB} MiB free below {state}; intake stops below {least // MIB} MiB (limits.disk_free_min)"
    )
    look = f"du -xh --max-depth=2 {quote(state)} | sort -h | tail"
    level = "error" if free < least else "warning" if free < 2 * least else "ok"
    yield check("disk", level, text, None if level == "ok" else look)
    if found.f_files and found.f_favail < 1000:
        yield check(
            "inodes",
            "error",
            f"only {found.f_favail} inodes are free below {state}",
            f"du --inodes -x {quote(state)} | sort -n | tail",
        )


def _queue_folder(room: Room) -> Iterator[Check]:
    folder, file = room.box.folders.queue, room.box.folders.queue_file
    group = room.box.settings.control.group
    for path, kind, is_kind in ((folder, "folder", stat.S_ISDIR), (file, "regular file", stat.S_ISREG)):
        try:
            found = os.lstat(path)
        except OSError as error:
            yield check("queue folder", "error", f"{path}: {error.strerror}")
            return
        if not is_kind(found.st_mode):
            yield check(
                "queue folder", "error", f"{path} is no {kind}", f"mv {quote(path)} {quote(path)}.aside"
            )
            return
        if stat.S_IMODE(found.st_mode) & 0o002:
            text = f"anybody may write {path}, and so run commands as this daemon's user"
            yield check("queue folder", "error", text, f"chmod o-w {quote(path)}")
            return
        if stat.S_IMODE(found.st_mode) & 0o020 and group is None:
            text = f"a group may write {path}, but control.group is not set"
            yield check("queue folder", "warning", text, f"chmod g-w {quote(path)}")
            return
    yield check("queue folder", "ok", folder)


def _supervisor(room: Room) -> Iterator[Check]:
    link = room.parts.supervision.link
    unit = under_systemd()
    if link.welcome is None:
        said = f": {link.refusal}" if link.refusal else ""
        fix = "systemctl start agentqd-supervisor" if unit else None
        yield check(
            "supervisor",
            "error",
            f"not connected{said}; its log: {room.box.folders.runtime}/supervisor.log or the journal",
            fix,
        )
    elif link.welcome.version != room.parts.version:
        text = f"runs version {link.welcome.version}, this daemon {room.parts.version}; restart it when no worker runs"
        yield check("supervisor", "warning", text, "systemctl restart agentqd-supervisor" if unit else None)
    else:
        yield check("supervisor", "ok", f"pid {link.welcome.pid}, version {link.welcome.version}")


def _draining(room: Room) -> Iterator[Check]:
    box = room.box
    if box.draining:
        text = f"since {format_time(box.draining_since_us)}: nothing new is accepted over the socket or started; a restart does not end it"
        yield check("draining", "warning", text, "agentqctl drain --off")


def _config(room: Room) -> Iterator[Check]:
    reload = room.parts.reload
    if reload.last_error is not None:
        fix = f"agentqctl config check {quote(reload.path)}"
        yield check("config", "error", f"the last edit is not applied: {reload.last_error.message}", fix)
    else:
        yield check(
            "config",
            "ok",
            f"{room.config_path or 'no file, the defaults'}, applied {format_time(reload.applied_at)}",
        )


def _control(room: Room) -> Iterator[Check]:
    """Can the members of control.group reach the socket at all?"""
    group, runtime = room.box.settings.control.group, room.box.folders.runtime
    if group is None:
        return
    wanted = mode_for(room.box.settings.control)
    if wanted.gid is None:
        yield check(
            "control group", "error", f"control.group: there is no group {group}", f"groupadd {quote(group)}"
        )
        return
    with contextlib.suppress(OSError):
        found = os.stat(runtime)
        mode = stat.S_IMODE(found.st_mode)
        if not (mode & 0o001 or (found.st_gid == wanted.gid and mode & 0o010)):
            fix = f"chgrp {quote(group)} {quote(runtime)} && chmod g+x {quote(runtime)}"
            yield check(
                "control group",
                "warning",
                f"members of {group} cannot enter {runtime}, where the socket is",
                fix,
            )


def _inotify() -> Iterator[Check]:
    for name, least in (("max_user_watches", WATCHES_MIN), ("max_user_instances", INSTANCES_MIN)):
        try:
            with open(f"/proc/sys/fs/inotify/{name}", encoding="ascii") as file:
                value = int(file.read())
        except (OSError, ValueError):
            yield check(
                "inotify",
                "warning",
                f"fs.inotify.{name} cannot be read; without inotify only the slow rescan works",
            )
            return
        if value < least:
            text = f"fs.inotify.{name} is {value}; new lines may be seen only by the slow rescan"
            yield check("inotify", "warning", text, f"sysctl -w fs.inotify.{name}={least * 64}")
            return
    yield check("inotify", "ok", "limits are sufficient")


def _descriptors() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    text = f"{used} of {soft} file descriptors in use"
    level = "ok" if soft - used >= DESCRIPTORS_FREE_MIN else "warning"
    fix = None if level == "ok" else f"prlimit --pid {os.getpid()} --nofile={max(soft, min(hard, 65536))}"
    yield check("file descriptors", level, text, fix)


async def _clock(room: Room) -> list[Check]:
    now = room.box.clock.now_us()
    last = await room.box.journal.read(lambda c: c.execute(queries.LAST_EVENT).fetchone())
    if now < YEAR_2025_US:
        return [check("clock", "error", f"the clock says {format_time(now)}", "timedatectl set-ntp true")]
    if last is not None and last[1] > now + CLOCK_BACK_US:
        back = format_duration((last[1] - now) / 1_000_000)
        text = f"the clock says {format_time(now)}, but the newest event is {back} ahead: it was set back"
        return [check("clock", "warning", text, "timedatectl set-ntp true")]
    return [check("clock", "ok", str(format_time(now)))]


async def _sinks(room: Room) -> list[Check]:
    read = room.box.journal.read
    sums, aside = (await read(queries.counts)).outbox, (await read(queries.dead_seen)).aside_rows
    dead = {sink: n for sink, state, n in sums if state == "dead"}
    revived = await read(queries.revived) if dead else set()
    found = []
    for name in sorted({COMPLETIONS, *room.box.settings.sinks, *dead}):
        runner = room.parts.delivery.runners.get(name)
        many = _many_dead(dead.get(name, 0), aside.get(name, 0))
        fix = f"agentqctl outbox list --sink {quote(name)} --state dead" if name in dead else None
        if runner is None:
            known = name in room.box.settings.sinks or name == COMPLETIONS
            why = "cannot be used; the daemon's log says why" if known else "is not in the config"
            found.append(check(f"sink {name}", "error", f"{many}{why}", fix if known else None))
        elif disabled := runner.health().get("disabled"):
            fix = f"agentqctl sink enable {quote(name)}"
            found.append(check(f"sink {name}", "warning", f"{many}disabled ({disabled})", fix))
        elif runner.last_error:
            found.append(
                check(
                    f"sink {name}",
                    "error" if many else "warning",
                    f"{many}last error: {runner.last_error}",
                    fix,
                )
            )
        elif many:
            now = "it works now" if name in revived else "nothing is known to have arrived there since"
            found.append(check(f"sink {name}", "warning", f"{many}{now}", fix))
        else:
            found.append(check(f"sink {name}", "ok", "no errors"))
    return found


def _many_dead(dead: int, aside: int) -> str:
    """`aside`: those of them that no receiver was asked to take."""
    letters = f"{dead - aside} dead letters; " if dead > aside else ""
    return letters + (f"{aside} set aside; " if aside else "")


ROUTES: Final = (
    Route(
        "GET", "/v1/doctor", "Checks of this box, each with the command that mends what it found.", run_checks
    ),
)
