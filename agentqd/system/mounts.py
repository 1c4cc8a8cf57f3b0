"""Which file system a folder lies on, from /proc/self/mountinfo."""

from __future__ import annotations

import os
from typing import Final

_NETWORK: Final = frozenset({
    "nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "beegfs", "gfs2", "ocfs2",
    "ncpfs", "coda", "pvfs2", "orangefs", "davfs", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.rclone",
    "fuse.gcsfuse", "fuse.davfs", "fuse.juicefs", "virtiofs",
})  # fmt: skip


def file_system_of(path: str) -> str | None:
    """The type of the mount that holds `path` (`ext4`, `nfs4`, ...), or None if it cannot be told."""
    try:
        device = os.stat(path).st_dev
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
    except OSError:
        return None
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in reversed(lines):  # a later mount hides an earlier one
        left, _, right = line.partition(" - ")
        if left.split(" ")[2] == wanted and right:
            return right.split(" ")[0]
    return None


def is_network(file_system: str | None) -> bool:
    """SQLite's locks and our fsync rules cannot be relied on there."""
    return file_system in _NETWORK
