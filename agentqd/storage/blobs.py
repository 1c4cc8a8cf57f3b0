"""`blobs/`: our own copies of large or attached files, each once, under its digest, durable before anything names it."""

from __future__ import annotations

import hashlib
import os
from typing import Final

import msgspec

from agentqd.storage.files import fsync_folder
from agentqd.system.fsops import write_all

_CHUNK: Final = 1024 * 1024


class Copy(msgspec.Struct, frozen=True):
    sha256: str
    path: str
    bytes: int


def copy_in(descriptor: int, size: int, blobs: str) -> Copy:
    """The first `size` bytes (fewer, if the file has shrunk), hashed while copied, fsynced with its folder. Raises OSError."""
    os.makedirs(blobs, mode=0o700, exist_ok=True)
    temporary = f"{blobs}/.tmp-{os.getpid()}-{os.urandom(6).hex()}"
    digest = hashlib.sha256()
    out = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        offset = 0
        while offset < size and (chunk := os.pread(descriptor, min(_CHUNK, size - offset), offset)):
            digest.update(chunk)
            write_all(out, chunk)
            offset += len(chunk)
        os.fsync(out)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(out)
    path = f"{blobs}/{digest.hexdigest()}"
    os.rename(temporary, path)
    fsync_folder(blobs)
    return Copy(digest.hexdigest(), path, offset)
