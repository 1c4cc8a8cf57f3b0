"""One logged-in connection with what hangs on it, made at first use: SFTP, the box's folders, its control socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import asyncssh

from agentqd.client.boxes import BoxEntry
from agentqd.client.keeper.control import ControlSocket, Joined
from agentqd.client.keeper.folders import candidate_folders, open_sftp, used_folders
from agentqd.client.keeper.trouble import UNREACHABLE, Trouble
from agentqd.core.folders import Folders

T = TypeVar("T")
NOT_CHROOTED = "/etc/passwd"  # what an SFTP that sees the whole disk can stat


class Session:
    """Every method raises Trouble."""

    def __init__(self, entry: BoxEntry, connection: asyncssh.SSHClientConnection) -> None:
        self.entry = entry
        self.connection = connection
        self._sftp: asyncssh.SFTPClient | None = None
        self._control: ControlSocket | None = None
        self._candidates: list[Folders] | None = None
        self._making = asyncio.Lock()

    async def control(self) -> Joined:
        """A channel to the control socket."""
        return await self._guarded(self._open_control)

    async def sftp(self) -> asyncssh.SFTPClient:
        async with self._making:
            if self._sftp is None:
                self._sftp = await open_sftp(self.connection)
            return self._sftp

    async def candidates(self) -> list[Folders]:
        """Where agentqd may live on the box."""
        if self._candidates is None:
            entry = self.entry
            if entry.state_dir and entry.runtime_dir:
                self._candidates = [Folders(entry.state_dir, entry.runtime_dir)]
            else:
                sftp = await self.sftp()
                self._candidates = await self._guarded(lambda: candidate_folders(entry, sftp))
        return self._candidates

    async def folders(self) -> Folders:
        """Where agentqd lives, as far as the box lets us see it."""
        candidates = await self.candidates()
        if len(candidates) == 1:
            return candidates[0]
        sftp = await self.sftp()
        answered = self._control.answered if self._control is not None else None
        return await self._guarded(lambda: used_folders(candidates, answered, sftp))

    async def about(self) -> dict[str, Any]:
        folders = await self.folders()
        version = self.connection.get_extra_info("server_version")
        return {
            "server": version if isinstance(version, str) else None,
            "user": self.connection.get_extra_info("username"),
            "state_dir": folders.state,
            "runtime_dir": folders.runtime,
        }

    async def _open_control(self) -> Joined:
        if self._control is None:
            self._control = ControlSocket(self.connection, await self.candidates(), self._sees_no_socket)
        return await self._control.open()

    async def _sees_no_socket(self, paths: list[str]) -> bool:
        try:
            sftp = await self.sftp()
        except Trouble:
            return False
        if not await sftp.exists(NOT_CHROOTED):
            return False
        return not any([await sftp.exists(path) for path in paths])

    async def _guarded(self, act: Callable[[], Awaitable[T]]) -> T:
        """What the connection's end looks like to whoever asks."""
        try:
            return await act()
        except asyncssh.SFTPError as error:
            raise Trouble(UNREACHABLE, f"the box's SFTP failed: {error.reason or error}") from error
        except (asyncssh.Error, OSError) as error:
            raise Trouble(UNREACHABLE, f"the connection was lost: {error}") from error
