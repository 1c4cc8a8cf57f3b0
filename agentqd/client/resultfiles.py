"""What a pulled row says of its files, and the small file work under `results`: pure where it can be, each with its errors."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from typing import Any

from agentqd.client.durable import fsync_file
from agentqd.client.errors import BadAnswer
from agentqd.client.localnames import LocalNames
from agentqd.client.transfer import Remote
from agentqd.core.errors import AgentqError

RESULT_BYTES_MAX = 64 * 1024 * 1024

Row = dict[str, Any]
Problem = dict[str, Any]


class CannotKeep(AgentqError):
    """This disk does not take it. Nothing was acknowledged."""

    code = "io_error"


def local_path(item: Remote, names: LocalNames) -> str:
    """Where a file of a result is kept. Raises BadAnswer: a daemon lists nothing that leads out of its folder."""
    if item.kind == "stream":
        if item.name not in ("stdout", "stderr"):
            raise BadAnswer(f"the daemon lists a stream {item.name[:80]!r}")
        return item.name
    try:
        return f"artifacts/{names.place(item.name)}"
    except ValueError as error:
        raise BadAnswer(
            f"task {item.task_id}: an artifact's name would lead out of its folder: {error}"
        ) from None


def remarks(item: Remote, local: str) -> list[Problem]:
    """What is not wrong but not plain either."""
    found: list[Problem] = []
    left_out = item.said.get("left_out_bytes")
    if left_out:
        text = f"{left_out} bytes were left out: the output passed limits.stdout_bytes_max"
        found.append(
            {
                **problem_of(item, "left_out", text),
                "at": item.said.get("left_out_at"),
                "left_out_bytes": left_out,
            }
        )
    if item.kind == "artifact" and local != f"artifacts/{item.name}":
        found.append({**problem_of(item, "renamed", "its name cannot be a file's name here"), "as": local})
    return found


def problem_of(item: Remote | None, reason: str, message: str) -> Problem:
    if item is None:
        return {"path": None, "reason": reason, "message": message}
    told = {"path": item.name, "kind": item.kind, "reason": reason, "message": message}
    return {**told, "bytes": item.bytes, "sha256": item.sha256}


def inline_content(row: Row) -> bytes | None:
    """An entry's content as the row holds it; JSON comes without the spaces that its worker wrote."""
    if "content_base64" in row:
        import base64

        try:
            return base64.b64decode(str(row["content_base64"]), validate=True)
        except ValueError:
            raise BadAnswer("an entry's content_base64 is not base64") from None
    if "content" not in row:
        return None
    content = row["content"]
    if isinstance(content, str) and not str(row["key"]).endswith(".json"):
        return content.encode("utf-8", "surrogatepass")
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def same_content(one: str, other: str) -> bool:
    if not stat.S_ISREG(os.lstat(other).st_mode) or os.stat(one).st_size != os.stat(other).st_size:
        return False
    with open(one, "rb") as left, open(other, "rb") as right:
        while piece := left.read(1 << 20):
            if piece != right.read(len(piece)):
                return False
    return True


def read_json(path: str) -> Any:
    """None where there is none, or nothing readable."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(fd, "rb") as file:
        try:
            return json.loads(file.read(RESULT_BYTES_MAX))
        except (ValueError, OSError, RecursionError):
            return None


def write_file(path: str, content: bytes) -> None:
    """The file has this content, fsynced; its name is its folder's concern."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with open(fd, "wb") as file:
        file.write(content)
        file.flush()
        fsync_file(fd)


@contextlib.contextmanager
def explained(folder: str) -> Iterator[None]:
    """An OSError of this machine's disk, in words."""
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else folder
        hint = {
            errno.ENOSPC: "make room",
            errno.EDQUOT: "make room",
            errno.EACCES: "choose a folder that you may write to",
            errno.EPERM: "choose a folder that you may write to",
            errno.EROFS: "choose a folder that you may write to",
        }.get(error.errno or 0, "mend it")
        raise CannotKeep(
            f"{where}: {error.strerror or error}; nothing of this row was acknowledged: {hint}, then pull again",
            path=where,
        ) from error
