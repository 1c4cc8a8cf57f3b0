"""An entry's content that is too large for its envelope: a file in blobs/, whose name begins with its sha256, which is looked at before each send.

A plug with `checks_content = True` has nothing checked for it: it hashes what it sends while it sends it, or it sends no
content and says the sum.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from agentqd.core.limits import MIB
from agentqd.storage.blobs import digest_of

DAMAGED: Final = "the stored content does not match its sha256: it was damaged on disk and is not sent"
MISSING: Final = "the stored content is gone from blobs/: somebody has removed it, and it cannot be sent"
_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CHUNK_BYTES: Final = 1 * MIB
_AT_ONCE: Final = 2  # of the whole box: a disk and its cores have other work


class ContentLost(Exception):
    """It will never be what was handed over. The message is the reason that the row keeps."""


def open_content(path: str) -> int:
    """A descriptor. Raises ContentLost; OSError for what may pass (too many open files, a disk that does not answer)."""
    try:
        descriptor = os.open(path, _OPEN)
    except FileNotFoundError:
        raise ContentLost(MISSING) from None
    except OSError as problem:
        if problem.errno == errno.ELOOP:  # a symlink stands in its place
            raise ContentLost(DAMAGED) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ContentLost(DAMAGED)
    return descriptor


def is_whole(path: str, sha256_hex: str) -> bool:
    """The file at `path` has this sum: is it what was handed over? Its name says."""
    return digest_of(path) == sha256_hex


def check(path: str) -> None:
    """Blocking, a MiB at a time. Raises as `open_content`."""
    descriptor = open_content(path)
    try:
        digest, offset = hashlib.sha256(), 0
        while block := os.pread(descriptor, _CHUNK_BYTES, offset):
            digest.update(block)
            offset += len(block)
    finally:
        os.close(descriptor)
    if not is_whole(path, digest.hexdigest()):
        raise ContentLost(DAMAGED)


async def check_aside(path: str) -> None:
    """`check`, off the event loop, at most two at once. Raises as it does."""
    await asyncio.get_running_loop().run_in_executor(_threads(), check, path)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="content")
