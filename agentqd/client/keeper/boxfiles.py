"""The queue file and the prompts of a box, over SFTP.

Invariants (those of client/queuefile.py, kept across a network):
1. One append is ONE write packet on a handle opened for append: sshd makes one `write()` of it, so that the kernel never
   mixes it with another writer's. Its body is at most 16 KiB of whole lines.
2. Whatever an earlier writer left torn, our first line stands on a line of its own: a last byte that is not a newline
   (or cannot be read) gets one in front of ours, inside the same packet.
3. The file is never truncated; where it is absent it is made with 0600.
4. Nothing is reported as written before fsync@openssh.com has returned, of the file and, where an entry is new, of its folder.
"""

from __future__ import annotations

import re
import secrets
import stat
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import asyncssh
from asyncssh import FXF_APPEND, FXF_CREAT, FXF_EXCL, FXF_READ, FXF_WRITE

from agentqd.client.keeper.trouble import (
    BAD_REQUEST,
    BOX_FAILED,
    DISK_FULL,
    NO_FOLDER,
    NOT_PERMITTED,
    UNREACHABLE,
    Trouble,
)
from agentqd.client.remotelines import APPEND_BYTES_MAX
from agentqd.core.folders import Folders

FILE_MODE = 0o600
FREE_BYTES_MIN = 64 * 1024  # below it a write that failed is called a full disk
PUT_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")


async def append_lines(sftp: asyncssh.SFTPClient, folders: Folders, body: bytes) -> None:
    """Durably appends whole lines (each ends in a newline). Raises Trouble; `unknown` once the packet was sent."""
    if not body.endswith(b"\n") or len(body) > APPEND_BYTES_MAX:
        raise Trouble(BAD_REQUEST, f"an append is whole lines, at most {APPEND_BYTES_MAX} bytes")
    path = folders.queue_file
    try:
        file, size = await _open_queue(sftp, path)
    except asyncssh.SFTPError as error:
        raise await _explained(error, sftp, folders, path, "cannot open") from error
    sent = False
    try:
        torn = bool(size) and await _last_byte(file, size or 0) != b"\n"
        sent = True
        # block_size=0: asyncssh does not cut it. What the box cuts short (a full disk) is a torn line, which the next
        # writer closes (invariant 2).
        await file.write(b"\n" + body if torn else body)
        await file.fsync()
        if size is None:
            await sync_folder(sftp, folders.queue)
    except asyncssh.SFTPError as error:
        lost = sent and isinstance(error, asyncssh.SFTPConnectionLost | asyncssh.SFTPNoConnection)
        raise await _explained(error, sftp, folders, path, "cannot append to", unknown=lost) from error
    finally:
        await _closed(file)


async def put_prompt(
    sftp: asyncssh.SFTPClient, folders: Folders, name: str, pieces: AsyncIterator[bytes]
) -> None:
    """Stores a payload as prompts/NAME: a temporary name, fsync, rename, fsync of the folder. Raises Trouble."""
    if not PUT_NAME.fullmatch(name):
        raise Trouble(BAD_REQUEST, f"{name[:80]!r} cannot name a payload")
    draft = f"{folders.prompts}/.{name}.{secrets.token_hex(6)}"
    attrs = asyncssh.SFTPAttrs(permissions=FILE_MODE)
    try:
        file = await sftp.open(draft, FXF_WRITE | FXF_CREAT | FXF_EXCL, attrs, encoding=None)
    except asyncssh.SFTPError as error:
        raise await _explained(error, sftp, folders, draft, "cannot create") from error
    try:
        try:
            async for piece in pieces:
                await file.write(piece)
            await file.fsync()
        finally:
            await _closed(file)
        await sftp.posix_rename(draft, f"{folders.prompts}/{name}")
        await sync_folder(sftp, folders.prompts)
    except asyncssh.SFTPError as error:
        await _removed(sftp, draft)
        raise await _explained(error, sftp, folders, f"{folders.prompts}/{name}", "cannot write") from error
    except BaseException:
        await _removed(sftp, draft)
        raise


async def sync_folder(sftp: asyncssh.SFTPClient, path: str) -> None:
    """An entry of this folder is durable. A server that cannot open a folder for it (not OpenSSH's) is left in peace."""
    try:
        handle = await sftp.open(path, FXF_READ, encoding=None)
    except asyncssh.SFTPError:
        return
    try:
        await handle.fsync()
    finally:
        await _closed(handle)


async def _open_queue(sftp: asyncssh.SFTPClient, path: str) -> tuple[asyncssh.SFTPClientFile, int | None]:
    """A handle and the file's size; None where the file was made just now, -1 where its last byte cannot be read."""
    size: int | None
    try:
        found = await sftp.lstat(path)
    except asyncssh.SFTPNoSuchFile:
        size = None
    else:
        if found.permissions is not None and not stat.S_ISREG(found.permissions):
            raise Trouble(BOX_FAILED, f"{path} on the box is not a regular file; move it away")
        size = found.size if found.size is not None else -1
    flags = FXF_WRITE | FXF_APPEND | FXF_CREAT
    attrs = asyncssh.SFTPAttrs(permissions=FILE_MODE)
    try:
        return await sftp.open(path, flags | FXF_READ, attrs, encoding=None, block_size=0), size
    except asyncssh.SFTPPermissionDenied:
        if size is None:
            raise
        return await sftp.open(path, flags, attrs, encoding=None, block_size=0), -1  # append only for a group


async def _last_byte(file: asyncssh.SFTPClientFile, size: int) -> bytes:
    """Not knowing counts as torn: a blank line is harmless."""
    if size < 1:
        return b""
    try:
        data: Any = await file.read(1, size - 1)  # bytes, since it was opened without an encoding
    except asyncssh.SFTPError:
        return b""
    return bytes(data)


async def _closed(file: asyncssh.SFTPClientFile) -> None:
    with suppress(asyncssh.Error, OSError):
        await file.close()


async def _removed(sftp: asyncssh.SFTPClient, path: str) -> None:
    with suppress(asyncssh.Error, OSError):
        await sftp.remove(path)


async def _explained(
    error: asyncssh.SFTPError,
    sftp: asyncssh.SFTPClient,
    folders: Folders,
    path: str,
    what: str,
    *,
    unknown: bool = False,
) -> Trouble:
    said = f"{what} {path} on the box"
    if isinstance(error, asyncssh.SFTPConnectionLost | asyncssh.SFTPNoConnection):
        return Trouble(UNREACHABLE, f"{said}: the connection was lost", unknown=unknown)
    if isinstance(error, asyncssh.SFTPPermissionDenied | asyncssh.SFTPWriteProtect):
        return Trouble(
            NOT_PERMITTED,
            f"{said}: permission denied; log in as the daemon's user or join its control.group",
            path=path,
        )
    if isinstance(error, asyncssh.SFTPNoSuchFile | asyncssh.SFTPNoSuchPath):
        return Trouble(
            NO_FOLDER,
            f"{said}: there is no such folder. Start agentqd there once (it makes {folders.state}), or say where it is: "
            "agentqctl box add --force NAME URL --state-dir DIR",
            path=path,
        )
    full = isinstance(error, asyncssh.SFTPNoSpaceOnFilesystem | asyncssh.SFTPQuotaExceeded)
    if full or await _is_full(sftp, folders):
        return Trouble(
            DISK_FULL,
            f"{said}: its disk is full; free some space there, then say it again with the same --id",
            path=path,
        )
    return Trouble(
        BOX_FAILED, f"{said}: {error.reason or type(error).__name__} (a quota? a broken disk?)", path=path
    )


async def _is_full(sftp: asyncssh.SFTPClient, folders: Folders) -> bool:
    """SFTP calls ENOSPC just `failure`: the file system is asked."""
    try:
        found = await sftp.statvfs(folders.state)
    except (asyncssh.Error, OSError):
        return False
    return found.bavail * (found.frsize or found.bsize) < FREE_BYTES_MIN or (
        found.files > 0 and found.favail == 0
    )
