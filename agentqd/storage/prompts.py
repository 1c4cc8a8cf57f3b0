"""Prompt files that lines point to with `prompt_ref`: read once, at admission, from allowed roots only.

A path is relative to `prompts/` in the state folder or to a configured root, or absolute inside one of them. What counts is
the file that was really opened: its own path, asked from the kernel after the open, must lie inside the root, so neither
`..` nor a symlink leads out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

import msgspec

from agentqd.core.errors import InvalidTask


class Missing(msgspec.Struct, frozen=True):
    """Not there (yet): the task waits for it for a while."""

    path: str


def read_prompt(ref: str, roots: Sequence[str], bytes_max: int) -> bytes | Missing:
    """The file's bytes, or Missing. Raises InvalidTask: `prompt_outside`, `prompt_unreadable`, `prompt_too_large`, `empty_prompt`, `prompt_not_text`."""
    escaped = False
    for path, root in _candidates(ref, roots):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise _bad("prompt_unreadable", f"{ref}: cannot be read: {error.strerror}") from error
        try:
            if not _inside(os.readlink(f"/proc/self/fd/{descriptor}"), root):
                escaped = True
                continue
            return _read(descriptor, ref, bytes_max)
        finally:
            os.close(descriptor)
    if escaped or not any(_inside(os.path.normpath(path), root) for path, root in _candidates(ref, roots)):
        raise _bad(
            "prompt_outside",
            f"{ref}: lies outside the folders that prompts may come from: {', '.join(roots)}",
        )
    return Missing(_candidates(ref, roots)[0][0])


def _candidates(ref: str, roots: Sequence[str]) -> list[tuple[str, str]]:
    if os.path.isabs(ref):
        return [(ref, os.path.realpath(root)) for root in roots]
    found = []
    for root in roots:
        real = os.path.realpath(root)
        found.append((os.path.join(real, ref), real))
        head, _, tail = ref.partition("/")
        if tail and head == os.path.basename(real):  # `prompts/x` as seen from the state folder
            found.append((os.path.join(real, tail), real))
    return found


def _inside(path: str, root: str) -> bool:
    return path.startswith(root.rstrip("/") + "/")


def _read(descriptor: int, ref: str, bytes_max: int) -> bytes:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise _bad("prompt_unreadable", f"{ref}: is not a regular file")
    if status.st_size > bytes_max:
        raise _bad(
            "prompt_too_large",
            f"{ref}: {status.st_size} bytes; the limit (limits.prompt_bytes_max) is {bytes_max}",
        )
    with open(descriptor, "rb", closefd=False) as file:
        content = file.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise _bad("prompt_too_large", f"{ref}: more than {bytes_max} bytes (limits.prompt_bytes_max)")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad("prompt_not_text", f"{ref}: not UTF-8 at byte {error.start}") from error
    if not text.strip():
        raise _bad("empty_prompt", f"{ref}: is empty or blank; an empty prompt is an error, not 'no work'")
    return content


def _bad(code: str, message: str) -> InvalidTask:
    return InvalidTask(f"prompt_ref: {message}", code=code, field="prompt_ref")
