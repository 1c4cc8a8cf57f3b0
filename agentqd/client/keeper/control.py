"""Channels to the box's control socket: forwarded by sshd, or through a relay where it forbids that.

sshd does not say why it will not forward (forbidden, no socket, nobody serves it): all are "connect failed". So the
relay is asked, which knows the errno; what it says is remembered, so that only the first verb pays for the question.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import asyncssh

from agentqd.client.keeper.relay import HELLO_COMMAND, NO_PROGRAM, parse_mark, relay_command
from agentqd.client.keeper.trouble import (
    BOX_FAILED,
    FORWARDING_FORBIDDEN,
    NO_DAEMON,
    NOT_PERMITTED,
    UNREACHABLE,
    Trouble,
)
from agentqd.core.folders import Folders

FORWARD = "forward"
RELAY = "relay"
NOISE_LINES_MAX = 200  # what a login script may print before the relay speaks
WINDOW_BYTES = 4 * 1024 * 1024
ABSENT = (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR)


class Joined(NamedTuple):
    """Bytes to and from the control socket."""

    reader: asyncssh.SSHReader[bytes]
    writer: asyncssh.SSHWriter[bytes]
    way: str


class ControlSocket:
    """The control socket of one box; the first of `candidates` that answers, and from then on that one."""

    def __init__(
        self,
        connection: asyncssh.SSHClientConnection,
        candidates: list[Folders],
        sees_no_socket: Callable[[list[str]], Awaitable[bool]],
    ) -> None:
        self._connection = connection
        self._sees_no_socket = sees_no_socket  # whether SFTP knows that none of these is there
        self._candidates = candidates
        self._runs_commands: bool | None = None
        self._forbidden = False  # forwarding was refused where a relay got through
        self.answered: Folders | None = None

    @property
    def paths(self) -> list[str]:
        return [folders.control_socket for folders in self._folders()]

    def _folders(self) -> list[Folders]:
        return [self.answered] if self.answered is not None else self._candidates

    async def open(self) -> Joined:
        """A new channel. Raises Trouble; then nothing was sent."""
        if not self._forbidden:
            for folders in self._folders():
                joined = await self._forward(folders.control_socket)
                if joined is not None:
                    self.answered = folders
                    return joined
        if await self._sees_no_socket(
            self.paths
        ):  # the usual case of a daemon that is down: no relay is tried
            raise self._trouble([(path, errno.ENOENT) for path in self.paths])
        return await self._relayed()

    async def _forward(self, path: str) -> Joined | None:
        try:
            reader, writer = await self._connection.open_unix_connection(path, window=WINDOW_BYTES)
        except asyncssh.ChannelOpenError as error:
            if self._connection.is_closed():
                raise Trouble(UNREACHABLE, f"the connection was lost: {error}") from error
            return None
        return Joined(reader, writer, FORWARD)

    async def _relayed(self) -> Joined:
        failures: list[tuple[str, int]] = []
        for folders in self._folders():
            found = await self._relay_or_none(folders.control_socket)
            if isinstance(found, Joined):
                self._forbidden = True
                self.answered = folders
                return found
            failures.append((folders.control_socket, found))
        raise self._trouble(failures)

    async def _relay_or_none(self, path: str) -> Joined | int:
        """The relay, and beside it (the first time) the question whether the box runs commands for us at all: with
        `ForceCommand internal-sftp` a command is taken for something else, and the relay would never say a word."""
        if self._runs_commands:
            return await self._relay(path)
        if self._runs_commands is None:
            relay = asyncio.ensure_future(self._relay(path))
            try:
                self._runs_commands = await self._can_run_commands()
                if self._runs_commands:
                    return await relay
            finally:
                relay.cancel()
                await asyncio.wait({relay})
        return NO_PROGRAM

    async def _can_run_commands(self) -> bool:
        try:
            process = await self._process(HELLO_COMMAND)
        except Trouble:
            return False
        try:
            process.stdin.write_eof()
            return await _first_word(process) == 0
        finally:
            process.close()

    async def _relay(self, path: str) -> Joined | int:
        """A channel, or the errno of the socket; NO_PROGRAM where the box has nothing to relay with."""
        process = await self._process(relay_command(path))
        code = None
        try:
            code = await _first_word(process)
        finally:
            if code != 0:
                process.close()
        return Joined(process.stdout, process.stdin, RELAY) if code == 0 else code

    async def _process(self, command: str) -> asyncssh.SSHClientProcess[bytes]:
        try:
            return await self._connection.create_process(
                command, encoding=None, window=WINDOW_BYTES, stderr=asyncssh.DEVNULL
            )
        except asyncssh.ChannelOpenError as error:
            if self._connection.is_closed():
                raise Trouble(UNREACHABLE, f"the connection was lost: {error}") from error
            raise Trouble(
                BOX_FAILED,
                f"the box's sshd opens no session for a relay ({error}); its limit is MaxSessions",
            ) from error

    def _trouble(self, failures: list[tuple[str, int]]) -> Trouble:
        """What tells most: a socket that is closed to us, then one that nobody serves, then why nobody can look."""
        path = failures[0][0]
        for denied, code in failures:
            if code in (errno.EACCES, errno.EPERM):
                return Trouble(
                    NOT_PERMITTED,
                    f"{denied}: permission denied on the box; log in as the daemon's user or join its control.group",
                )
        for dead, code in failures:
            if code == errno.ECONNREFUSED:
                return Trouble(NO_DAEMON, f"nobody serves {dead} on the box any more: agentqd has died there")
        if all(code in ABSENT for _, code in failures):
            sockets = " or ".join(path for path, _ in failures)
            return Trouble(NO_DAEMON, f"agentqd is not running on the box: no socket at {sockets}")
        if all(code == NO_PROGRAM for _, code in failures):
            return Trouble(
                FORWARDING_FORBIDDEN,
                f"{path} on the box cannot be reached: its sshd forwards nothing to it and runs no command for us. If agentqd runs "
                "there, its sshd_config needs `AllowStreamLocalForwarding yes` (or no ForceCommand); submit by the queue file still works",
            )
        why = next((os.strerror(code) for _, code in failures if code > 0), "unknown")
        return Trouble(NO_DAEMON, f"{path} on the box cannot be reached: {why}")


async def _first_word(process: asyncssh.SSHClientProcess[bytes]) -> int:
    for _ in range(NOISE_LINES_MAX):
        try:
            line = await process.stdout.readline()
        except (asyncssh.Error, OSError, asyncio.LimitOverrunError, ValueError):
            return NO_PROGRAM
        if not line:
            return NO_PROGRAM
        code = parse_mark(line)
        if code is not None:
            return code
    return NO_PROGRAM
