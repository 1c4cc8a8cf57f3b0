"""What an ended attempt left behind, read from disk: the evidence for the verdict, and made durable before it counts.

Blocking file work; called on the evidence thread. Everything a worker wrote is hostile: opened without following links, regular
files only, bounded. Rule (crash-states 18): result files and their folders are fsynced before the finishing commit.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from agentqd.core import limits
from agentqd.core.task import Expect
from agentqd.core.verdict import FileSeen
from agentqd.storage.files import printable_name

_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_HASH_CHUNK: Final = 1024 * 1024


class Artifact(msgspec.Struct, frozen=True):
    path: str
    bytes: int
    sha256: str | None  # None: past the hashing limit


class Seen(msgspec.Struct, frozen=True):
    """Everything that was found."""

    stdout_tail: str
    work_files: int
    expected: tuple[FileSeen, ...]
    artifacts: list[Artifact]
    artifacts_truncated: bool
    problems: list[str]


NOTHING: Final = Seen("", 0, (), [], artifacts_truncated=False, problems=[])


class Found(msgspec.Struct, frozen=True):
    """Of an attempt whose end nobody saw."""

    started_at: int  # microseconds UTC: when its `started` got its name
    stdout_bytes: int
    stderr_bytes: int


def look_around(folder: str) -> Found | None:
    """None: it was never started."""
    try:
        started = os.stat(f"{folder}/started", follow_symlinks=False).st_ctime_ns // 1000
    except OSError:
        return None
    return Found(started, _size(f"{folder}/stdout"), _size(f"{folder}/stderr"))


def _size(path: str) -> int:
    """0 for what is no regular file."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


class Asked(msgspec.Struct, frozen=True):
    """What to look at."""

    folder: str
    workdir: str | None  # None: the attempt's own work/
    expect: Expect | None
    stdout_bytes: int
    stderr_bytes: int


def collect(asked: Asked) -> Seen:
    """Read and fsync. Raises OSError only where durability failed (fsync): then nothing may be called done."""
    problems: list[str] = []
    tail = _tail(asked, problems)
    work = f"{asked.folder}/work"
    found = list(_regular_files(work)) if asked.workdir is None else []
    expected = _expected(asked)
    artifacts, truncated = _artifacts(asked, work, found, expected, problems)
    if asked.stdout_bytes or asked.stderr_bytes or found:
        for name, size in (("stdout", asked.stdout_bytes), ("stderr", asked.stderr_bytes)):
            if size:
                _fsync(f"{asked.folder}/{name}", problems)
        _fsync_folders(asked, work, found)
    return Seen(tail, len(found), tuple(expected), artifacts, truncated, problems)


def last_words(folder: str, stdout_bytes: int, stderr_bytes: int) -> tuple[str, str]:
    """The ends of stdout and stderr, for what the worker's own program says of its failure."""
    most, problems = limits.USAGE_LIMIT_TAIL_BYTES, list[str]()
    stdout = _tail_of(f"{folder}/stdout", most, problems) if stdout_bytes else ""
    return stdout, _tail_of(f"{folder}/stderr", most, problems) if stderr_bytes else ""


def _tail(asked: Asked, problems: list[str]) -> str:
    if not asked.stdout_bytes:
        return ""
    return _tail_of(f"{asked.folder}/stdout", limits.STDOUT_TAIL_BYTES, problems)


def _tail_of(path: str, most: int, problems: list[str]) -> str:
    try:
        descriptor = os.open(path, _READ | os.O_NOFOLLOW)
    except OSError as error:
        problems.append(f"{os.path.basename(path)}: {error.strerror}")
        return ""
    try:
        size = os.fstat(descriptor).st_size
        raw = os.pread(descriptor, most, max(0, size - most))
    finally:
        os.close(descriptor)
    if size > most:
        raw = raw.lstrip(bytes(range(0x80, 0xC0)))  # do not begin inside a character
    return raw.decode("utf-8", "replace")


def _regular_files(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """(path, status) of the regular files below `folder`; links are not followed; at most the artifact limit + 1."""
    count = 0
    waiting = [folder]
    while waiting:
        try:
            entries = sorted(os.scandir(waiting.pop()), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    yield entry.path, entry.stat(follow_symlinks=False)
                    count += 1
            except OSError:
                continue
            if count > limits.ARTIFACTS_MAX:
                return


def _expected(asked: Asked) -> list[FileSeen]:
    """Each expected file as it is now; changed: its ctime is not older than the attempt's own `started` file.

    Both times come from the same kernel's clock, so no daemon's clock takes part; a link counts as what it points to.
    """
    if asked.expect is None or not asked.expect.files:
        return []
    try:
        began_ns = os.stat(f"{asked.folder}/started", follow_symlinks=False).st_ctime_ns
    except OSError:
        began_ns = 0
    seen = []
    base = asked.workdir or f"{asked.folder}/work"
    for wanted in asked.expect.file_list():
        try:
            status = os.stat(os.path.join(base, wanted.path))
        except OSError:
            seen.append(FileSeen(wanted.path, None, changed=False))
            continue
        if not stat.S_ISREG(status.st_mode):
            seen.append(FileSeen(wanted.path, None, changed=False))
            continue
        seen.append(FileSeen(wanted.path, status.st_size, changed=status.st_ctime_ns >= began_ns))
    return seen


def _artifacts(
    asked: Asked,
    work: str,
    found: list[tuple[str, os.stat_result]],
    expected: list[FileSeen],
    problems: list[str],
) -> tuple[list[Artifact], bool]:
    base = asked.workdir or work
    paths = {printable_name(os.path.relpath(path, work)): path for path, _ in found[: limits.ARTIFACTS_MAX]}
    for item in expected:
        if item.bytes is not None:
            paths.setdefault(item.path, os.path.join(base, item.path))
    truncated = len(found) > limits.ARTIFACTS_MAX
    artifacts, hashed = [], 0
    for name, path in paths.items():
        own = path.startswith(work + "/")  # links inside work/ are not followed; an expected file may be one
        try:
            descriptor = os.open(path, _READ | (os.O_NOFOLLOW if own else 0))
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
            continue
        try:
            artifact, hashed = _hash(name, descriptor, hashed)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        finally:
            os.close(descriptor)
        truncated = truncated or artifact.sha256 is None
        artifacts.append(artifact)
    return artifacts, truncated


def _hash(name: str, descriptor: int, hashed: int) -> tuple[Artifact, int]:
    """Hash and fsync one artifact. Raises ValueError if it is none, OSError if it cannot be made durable."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    os.fsync(descriptor)  # what is too large to be hashed must be durable too
    if hashed + status.st_size > limits.ARTIFACT_HASH_BYTES_MAX:
        return Artifact(name, status.st_size, None), hashed
    digest = hashlib.sha256()
    left = status.st_size
    while left > 0 and (chunk := os.read(descriptor, min(_HASH_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    return Artifact(name, status.st_size, digest.hexdigest()), hashed + status.st_size


def _fsync(path: str, problems: list[str]) -> None:
    """fsync by path. A file that the worker removed is told; a failing disk raises OSError."""
    try:
        descriptor = os.open(path, _READ | os.O_NOFOLLOW)
    except OSError as error:
        problems.append(f"{os.path.basename(path)}: {error.strerror}")
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_folders(asked: Asked, work: str, found: list[tuple[str, os.stat_result]]) -> None:
    folders = {os.path.dirname(path) for path, _ in found}
    task = os.path.dirname(asked.folder)
    for folder in (
        *sorted(folders | ({work} if found else set())),
        asked.folder,
        task,
        os.path.dirname(task),
    ):
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            continue  # the worker removed its own folder: there is nothing left to keep
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def as_json(seen: Seen) -> list[dict[str, Any]]:
    """The artifacts as they stand in a result."""
    return [{"path": item.path, "bytes": item.bytes, "sha256": item.sha256} for item in seen.artifacts]
