"""Bytes both ways between a verb and a channel of the box, half-closes passed on."""

from __future__ import annotations

import asyncio

import asyncssh

PIECE_BYTES = 64 * 1024


async def join(
    here: asyncio.StreamReader,
    to_here: asyncio.StreamWriter,
    there: asyncssh.SSHReader[bytes],
    to_there: asyncssh.SSHWriter[bytes],
) -> None:
    """Returns when the box has said everything, or the verb is gone."""
    up = asyncio.ensure_future(_up(here, to_there))
    try:
        while piece := await there.read(PIECE_BYTES):
            to_here.write(piece)
            await to_here.drain()
        if to_here.can_write_eof():
            to_here.write_eof()
    except (asyncssh.Error, OSError):
        pass  # either side is gone: both end
    finally:
        up.cancel()
        to_there.close()
        await asyncio.wait({up})


async def _up(here: asyncio.StreamReader, to_there: asyncssh.SSHWriter[bytes]) -> None:
    try:
        while piece := await here.read(PIECE_BYTES):
            to_there.write(piece)
            await to_there.drain()
        to_there.write_eof()
    except (asyncssh.Error, OSError):
        pass
