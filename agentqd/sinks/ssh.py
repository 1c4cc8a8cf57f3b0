"""Entries onto another machine's disk, by SFTP. Delivered means: written there, fsynced, and visible under its name.

mode file (default): one file an entry in the folder `path`: `DELIVERY_ID.json`, the envelope as stored. It is written
under a temporary name (`.DELIVERY_ID.RANDOM.part`), fsynced, and renamed; where the server allows it (OpenSSH does), the
folder is fsynced, too. Sent again, it takes the place of itself: one file by id.

mode append: one line an entry, the envelope, at the end of the file `path`: ONE write of at most 16 KiB on a handle
opened for append, which other writers cannot tear, fsynced. A larger envelope is written as a file beside it
(`NAME.DELIVERY_ID.json`), and the line says so: `{"specversion", "id", "type", "dataref": "NAME.DELIVERY_ID.json"}`. A file
that ends in the middle of a line (a full disk) gets a newline first. After a lost answer the line may stand there
twice: the receiver dedupes by `id`.

An entry's content that is too large for its envelope comes as a file of its own, before it: `DELIVERY_ID.content`
(append: `NAME.DELIVERY_ID.content`).

The temporary name is another one for each try: what an old, cut connection still has on its way can then never touch
a newer try's file. What a failed try left is removed at the next contact; after a crash of the daemon a `.part` file may
stay, and may be deleted when it is a day old.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import posixpath
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final, cast

import msgspec

from agentqd.core.errors import ConfigError
from agentqd.core.limits import KIB
from agentqd.sinks.base import Context, Deferred, Delivered, Delivery, Found, Outcome, Rejected
from agentqd.sinks.content import DAMAGED, ContentLost, is_whole, open_content
from agentqd.sinks.reason import bounded
from agentqd.sinks.sshlink import SshLink, Unreachable
from agentqd.system.failpoints import failpoint

if TYPE_CHECKING:
    from asyncssh import SFTPAttrs, SFTPClient, SFTPClientFile, SFTPError

    _Write = Callable[[SFTPClientFile], Awaitable[None]]

TIMEOUT_S: Final = 60.0  # without progress
WHOLE_S: Final = 3600.0  # of one delivery, however large
LINE_BYTES_MAX: Final = 16 * KIB
_CLEAR_S: Final = 5.0
_CHUNK_BYTES: Final = 256 * KIB
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_LEFT_OVER_MAX: Final = 64
_PRIVATE: Final = 0o600


class SshSink:
    batch_max = 1
    concurrency = 1
    timeout_s = WHOLE_S
    notice_kind = "host_key"
    checks_content = True

    def __init__(self, context: Context) -> None:
        settings = context.settings
        if not settings.host or not settings.path:
            raise ConfigError(f"the sink {context.name} is of type ssh and needs a host and a path")
        self.notices: list[str] = []
        self._path = settings.path
        self._append = settings.mode == "append"
        self._step_s = float(settings.timeout or TIMEOUT_S)
        self._link = SshLink(settings)
        self._left_over: list[str] = []
        self._told: str | None = None

    async def open(self, last_position: int) -> list[Found]:  # noqa: ARG002  (it keeps no positions)
        return []

    async def deliver(self, batch: Sequence[Delivery]) -> Sequence[Outcome]:
        return [await self._deliver(delivery) for delivery in batch]

    async def close(self) -> None:
        await self._link.close()

    async def _deliver(self, delivery: Delivery) -> Outcome:
        refused = _refusal(delivery)
        if refused is not None:
            return Rejected(refused)
        try:
            sftp = await self._link.session()
        except Unreachable as problem:
            self._tell(problem.about)
            return Deferred(bounded(problem.reason), connection=True)
        self._told = None
        try:
            outcome = await self._send(sftp, delivery)
        except BaseException:  # cancelled, most likely: nothing stays half open
            self._link.drop()
            raise
        if isinstance(outcome, Delivered):
            self._link.keep()
        else:  # its handles are closed with it
            self._link.drop()
        return outcome

    def _tell(self, about: str | None) -> None:
        """An unknown or changed host key, once: not with each of a thousand tries."""
        if about is not None and about != self._told:
            self._told = about
            self.notices.append(about)

    async def _send(self, sftp: SFTPClient, delivery: Delivery) -> Outcome:
        import asyncssh

        try:
            async with asyncio.timeout(self._step_s) as patience:
                await self._clear_away(sftp)
                if delivery.blob_path is not None:
                    await self._place_content(sftp, delivery, patience)
                if self._append:
                    await self._append_line(sftp, delivery, patience)
                else:
                    await self._place(sftp, f"{delivery.delivery_id}.json", delivery.payload, patience)
        except TimeoutError:
            where = self._link.where
            return Deferred(f"{where}: no progress for {self._step_s:g} s; is it asleep?", connection=True)
        except asyncssh.SFTPOpUnsupported as problem:
            reason = (
                f"{self._link.where}: its SFTP server lacks what a durable delivery needs: {problem.reason}"
            )
            return Deferred(bounded(reason))
        except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection) as problem:
            return Deferred(bounded(f"{self._link.where}: cut: {problem.reason}"), connection=True)
        except asyncssh.SFTPError as problem:
            await self._clear_quietly(sftp)
            return Deferred(bounded(f"{self._link.where}: {self._path}: {_explained(problem)}"))
        except (asyncssh.Error, ConnectionError) as problem:
            return Deferred(bounded(f"{self._link.where}: cut: {problem}"), connection=True)
        except ContentLost as lost:
            await self._clear_quietly(sftp)
            return Rejected(str(lost))
        except OSError as problem:  # our own copy of the content
            return Deferred(bounded(f"{delivery.blob_path}: {problem.strerror}"))
        failpoint("ssh_delivered")
        return Delivered(detail=self._link.where)

    # A file: temporary name, fsync, rename.

    def _beside(self, name: str) -> str:
        """The place of a file: in the folder, or (append) beside the file, with its name before it."""
        if not self._append:
            return posixpath.join(self._path, name)
        folder, own = posixpath.split(self._path)
        return posixpath.join(folder, f"{own}.{name}")

    async def _place(self, sftp: SFTPClient, name: str, content: bytes, patience: asyncio.Timeout) -> None:
        async def write(file: SFTPClientFile) -> None:
            for start in range(0, len(content), _CHUNK_BYTES):
                await file.write(content[start : start + _CHUNK_BYTES], start)
                self._progress(patience)

        await self._place_by(sftp, name, write, patience)

    async def _place_content(self, sftp: SFTPClient, delivery: Delivery, patience: asyncio.Timeout) -> None:
        """Hashed while it is sent; what is not as it was handed over gets no name there."""
        path = delivery.blob_path
        assert path is not None
        fd = open_content(path)

        async def write(file: SFTPClientFile) -> None:
            offset, digest = 0, hashlib.sha256()
            while block := await asyncio.to_thread(os.pread, fd, _CHUNK_BYTES, offset):
                digest.update(block)
                await file.write(block, offset)
                offset += len(block)
                self._progress(patience)
            if not is_whole(path, digest.hexdigest()):
                raise ContentLost(DAMAGED)

        try:
            await self._place_by(sftp, f"{delivery.delivery_id}.content", write, patience)
        finally:
            os.close(fd)

    async def _place_by(self, sftp: SFTPClient, name: str, write: _Write, patience: asyncio.Timeout) -> None:
        place = self._beside(name)
        folder, own = posixpath.split(place)
        part = posixpath.join(folder, f".{own}.{secrets.token_hex(6)}.part")
        self._left_over = [*self._left_over[-_LEFT_OVER_MAX:], part]
        file = await sftp.open(part, _flags("new"), _attributes(), encoding=None)
        await write(file)
        await file.fsync()
        await file.close()
        self._progress(patience)
        await sftp.posix_rename(part, place)
        self._left_over.remove(part)
        await self._sync_folder(sftp, folder or ".")

    async def _sync_folder(self, sftp: SFTPClient, folder: str) -> None:
        """OpenSSH opens a folder like a file; a server that does not has no way to say that the name is durable."""
        import asyncssh

        try:
            handle = await sftp.open(folder, asyncssh.FXF_READ, encoding=None)
        except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection):
            raise
        except asyncssh.SFTPError:
            return
        await handle.fsync()
        await handle.close()

    async def _clear_quietly(self, sftp: SFTPClient) -> None:
        """After a no: a half file must not keep a full disk full."""
        import asyncssh

        with contextlib.suppress(asyncssh.Error, OSError, TimeoutError):
            async with asyncio.timeout(_CLEAR_S):
                await self._clear_away(sftp)

    async def _clear_away(self, sftp: SFTPClient) -> None:
        """Temporary files of tries that failed."""
        import asyncssh

        while self._left_over:
            try:
                await sftp.remove(self._left_over[-1])
            except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection):
                raise
            except asyncssh.SFTPError:
                pass  # it is gone, or was never made
            self._left_over.pop()

    # A line: one write on a handle opened for append, fsynced.

    async def _append_line(self, sftp: SFTPClient, delivery: Delivery, patience: asyncio.Timeout) -> None:
        line = delivery.payload + b"\n"
        if len(line) > LINE_BYTES_MAX:
            name = f"{delivery.delivery_id}.json"
            await self._place(sftp, name, delivery.payload, patience)
            line = _reference(delivery, posixpath.basename(self._beside(name)))
        file = await sftp.open(self._path, _flags("append"), _attributes(), encoding=None, block_size=0)
        size = (await file.stat()).size or 0
        if size and cast("bytes", await file.read(1, size - 1)) != b"\n":
            line = b"\n" + line
        await file.write(
            line, size
        )  # OpenSSH appends whatever the offset; a server that does not must not overwrite
        await file.fsync()
        await file.close()
        if size == 0:
            await self._sync_folder(sftp, posixpath.dirname(self._path) or ".")

    def _progress(self, patience: asyncio.Timeout) -> None:
        patience.reschedule(asyncio.get_running_loop().time() + self._step_s)


def _refusal(delivery: Delivery) -> str | None:
    """Why it can never be sent, or None. The id becomes a file's name on another machine."""
    if not _ID.fullmatch(delivery.delivery_id):
        return "its delivery id cannot be a file's name"
    payload = delivery.payload
    if payload[:1] != b"{" or payload[-1:] != b"}" or b"\n" in payload:
        return "the payload is not a JSON object on one line"
    return None


def _reference(delivery: Delivery, name: str) -> bytes:
    shown = {"specversion": "1.0", "id": delivery.delivery_id, "type": delivery.type, "dataref": name}
    return msgspec.json.encode(shown) + b"\n"


def _flags(how: str) -> int:
    import asyncssh

    if how == "new":
        return int(asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | asyncssh.FXF_EXCL)
    return int(asyncssh.FXF_READ | asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | asyncssh.FXF_APPEND)


def _attributes() -> SFTPAttrs:
    import asyncssh

    return asyncssh.SFTPAttrs(permissions=_PRIVATE)


def _explained(problem: SFTPError) -> str:
    """SFTP version 3 has one word for a full disk, a quota and a broken one."""
    import asyncssh

    if isinstance(problem, asyncssh.SFTPFailure):
        return f"{problem.reason} (is the disk full there, or the folder not one?)"
    return problem.reason
