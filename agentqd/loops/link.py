"""The daemon's end of the supervisor protocol: connect, greet, send, hand every report on; connect again for ever.

Promises:
1. `on_welcome` is called once for each connection, before any other report of it.
2. Under systemd no supervisor is started from here; it is waited for. Elsewhere one is started, detached, when the
   socket does not answer.
3. What was sent to a connection that broke is not remembered here: the next Welcome says what the supervisor knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Final

import msgspec

from agentqd.core.errors import SupervisorUnavailable
from agentqd.core.limits import WIRE_MESSAGE_BYTES_MAX
from agentqd.core.units import format_duration
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.supervisor import wire
from agentqd.supervisor.procfs import read_process

_RECONNECT_S: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_PING_EVERY_S: Final = 10.0
_SILENT_PINGS: Final = (
    3  # so many without an answer raise an alert; of a supervisor that a signal has stopped, one
)


class Link(asyncio.Protocol):
    """One connection after another; `run` is its loop."""

    def __init__(
        self,
        box: Box,
        on_welcome: Callable[[wire.Welcome], None],
        on_report: Callable[[wire.Report], None],
        on_lost: Callable[[], None],
        *,
        may_start: bool,
    ) -> None:
        self._box = box
        self._on_welcome = on_welcome
        self._on_report = on_report
        self._on_lost = on_lost
        self._may_start = may_start
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._closed = asyncio.Event()
        self._pongs = 0
        self._unanswered = 0  # pings since the last answer
        self._told = False  # of this silence
        self._heard_s = 0.0  # when it last said something
        self.welcome: wire.Welcome | None = None
        self.refusal: str | None = None

    @property
    def connected(self) -> bool:
        return self.welcome is not None

    @property
    def silent_s(self) -> int:
        """How long a connected supervisor has said nothing (at least 1), if a signal has stopped it or it has left a ping
        unanswered until the next one; else 0."""
        if self.welcome is None or (self._unanswered < 2 and not is_stopped(self.welcome.pid)):
            return 0
        return max(1, round(self._box.clock.monotonic_s() - self._heard_s))

    def send(self, message: wire.Request) -> None:
        """Raises SupervisorUnavailable without a welcomed connection; else it is on its way."""
        if self._transport is None or self.welcome is None:
            raise SupervisorUnavailable("the supervisor is not connected")
        self._transport.write(wire.encode(message))

    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        while True:
            self._box.beat("link")
            try:
                await self._connect()
                failures = 0
            except (OSError, SupervisorUnavailable) as error:
                if failures == 0:
                    self._box.log.info("supervisor_unreachable", error=str(error), will_start=self._may_start)
                if self._may_start and failures % 20 == 0:
                    self._start_supervisor()
                await asyncio.sleep(_RECONNECT_S[min(failures, len(_RECONNECT_S) - 1)])
                failures += 1
                continue
            await self._stay()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        self._closed = asyncio.Event()
        self._buffer.clear()
        self.refusal = None
        folder, name = os.path.split(self._box.folders.supervisor_socket)
        # Entered by descriptor, so that a long path does not hit the kernel's 107 bytes.
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            async with asyncio.timeout(10):
                await loop.create_unix_connection(lambda: self, f"/proc/self/fd/{folder_fd}/{name}")
        finally:
            os.close(folder_fd)
        assert self._transport is not None
        hello = wire.Hello(wire.PROTOCOL, self._box.journal.epoch, self._box.state_id, os.getpid())
        self._transport.write(wire.encode(hello))

    async def _stay(self) -> None:
        """While the connection lives: a ping now and then proves that the other side still turns."""
        self._unanswered, self._told = 0, False
        while not self._closed.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PING_EVERY_S):
                    await self._closed.wait()
            self._box.beat("link")
            if self._closed.is_set() or self.welcome is None:
                continue
            if self._unanswered:
                self._box.log.warning("supervisor_silent", seconds=self._unanswered * _PING_EVERY_S)
            enough = 1 if is_stopped(self.welcome.pid) else _SILENT_PINGS
            if self._unanswered >= enough and not self._told:
                self._told = True
                await self._tell_silence(self.welcome)
                if not self.connected:
                    continue
            self._unanswered += 1
            self.send(wire.Ping(self._pongs))
        if self.refusal is not None:
            self._box.log.error("supervisor_refused", message=self.refusal)
            await asyncio.sleep(1)

    async def _tell_silence(self, supervisor: wire.Welcome) -> None:
        """Once for each silence. Raises JournalError."""
        text = (
            f"the supervisor (pid {supervisor.pid}) has not answered for {format_duration(self.silent_s)}: nothing starts, and no end"
            f" is seen; {silence_advice(supervisor.pid)}"
        )
        key = f"{supervisor.instance}:{self._pongs}"
        await self._box.journal.commit(
            lambda tx: alert(tx, self._box, "supervisor_silent", text, key=key, pid=supervisor.pid)
        )

    def _start_supervisor(self) -> None:
        """Detached: its own session, no descriptor of ours; it outlives this daemon."""
        try:
            child = self._spawn_supervisor()
        except OSError as error:  # the box is short of something; the loop comes back
            self._box.log.error("supervisor_start_failed", error=str(error))
            return
        self._box.log.info("supervisor_started", supervisor_pid=child.pid)
        child.returncode = 0  # it is not ours to wait for in __del__; a zombie of it is reaped by `_reap`
        asyncio.get_running_loop().call_later(1.0, _reap, child.pid)

    def _spawn_supervisor(self) -> subprocess.Popen[bytes]:
        """Raises OSError."""
        folders = self._box.folders
        os.makedirs(folders.runtime, mode=0o700, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        log = os.open(f"{folders.runtime}/supervisor.log", flags, 0o600)
        command = [sys.executable, "-m", "agentqd.supervisor", "--state-dir", folders.state]
        try:
            return subprocess.Popen(
                [*command, "--runtime-dir", folders.runtime],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
            )
        finally:
            os.close(log)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=WIRE_MESSAGE_BYTES_MAX)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if b"\n" not in data:
            if len(self._buffer) > WIRE_MESSAGE_BYTES_MAX:
                self._cut("a report without an end")
            return
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer = bytearray(rest)
        for line in lines:
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            report = wire.decode_report(line)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            self._cut(f"a report that cannot be read: {error}")
            return
        self._heard_s = self._box.clock.monotonic_s()
        if isinstance(report, wire.Welcome):
            self.welcome = report
            self._on_welcome(report)
        elif isinstance(report, wire.Refuse):
            self.refusal = f"{report.code}: {report.message}"
        elif isinstance(report, wire.Pong):
            self._pongs += 1
            self._unanswered = 0
            self._told = False
        else:
            self._on_report(report)

    def _cut(self, why: str) -> None:
        self._box.log.error("supervisor_protocol_error", error=why)
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        was_welcome = self.welcome is not None
        self._transport = None
        self.welcome = None
        self._closed.set()
        if was_welcome:
            self._box.log.warning("supervisor_disconnected", error=str(exc) if exc else "closed")
            self._on_lost()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def is_stopped(pid: int) -> bool:
    """By a signal; not by a debugger, which lets it go on by itself."""
    process = read_process(pid)
    return process is not None and process.state == "T"


def silence_advice(pid: int) -> str:
    """What a person can do about a supervisor that does not answer."""
    if is_stopped(pid):
        return f"it has been stopped by a signal: kill -CONT {pid} lets it go on"
    return f"if that lasts, kill -KILL {pid}: another one is started, and what runs now is lost (on_lost)"


def _reap(pid: int) -> None:
    """A supervisor that we started and that has ended leaves no zombie behind."""
    with contextlib.suppress(ChildProcessError):
        if os.waitpid(pid, os.WNOHANG) == (0, 0):
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().call_later(5.0, _reap, pid)
