"""Secrets come from files, never from the config. Nothing is kept here: who keeps one looks whether its file has changed, so
that an exchanged secret counts from the next try on."""

from __future__ import annotations

import os
import stat
from typing import Final

from agentqd.core.errors import ConfigError

BYTES_MAX: Final = 64 * 1024
CREDENTIALS: Final = "$CREDENTIALS_DIRECTORY/"  # systemd.exec(5), LoadCredential=
_OPEN: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def secret_lines(path: str) -> list[str]:
    """The file's lines, stripped, without blank ones and comments (`#`); at least one. Raises ConfigError as `secret` does."""
    lines = [line.strip() for line in _read(path).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ConfigError(f"the secret file {place(path)} is empty")
    return lines


def secret(path: str) -> str:
    """The first line of a file that holds one secret, as it stands but for its line end.

    `path` is absolute or begins with `$CREDENTIALS_DIRECTORY/`. Raises ConfigError, which names the file and what to do and
    never its content: missing, unreadable, no regular file, too long, not UTF-8, empty.
    """
    line = _read(path).split("\n", maxsplit=1)[0].removesuffix("\r")
    if not line:
        raise ConfigError(f"the secret file {place(path)} is empty")
    return line


def open_since_ns(path: str) -> int | None:
    """If every user of this machine may read or write it: when it was last changed. It is used all the same; the daemon says so."""
    try:
        found = os.stat(place(path))
    except (OSError, ValueError, ConfigError):
        return None  # whoever reads it hears why not
    return found.st_ctime_ns if found.st_mode & 0o006 else None


def _read(path: str) -> str:
    found = place(path)
    try:
        descriptor = os.open(found, _OPEN)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the secret file {found} cannot be read: {_why(error)}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"the secret file {found} is no regular file")
        content = os.read(descriptor, BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"the secret file {found} cannot be read: {_why(error)}") from error
    finally:
        os.close(descriptor)
    if len(content) > BYTES_MAX:
        raise ConfigError(f"the secret file {found} is longer than {BYTES_MAX} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"the secret file {found} is not UTF-8") from None  # the cause would show the bytes


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def place(path: str) -> str:
    """The path itself. Raises ConfigError for a credential of a daemon that has none."""
    if not path.startswith(CREDENTIALS):
        return path
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise ConfigError(
            f"the secret file {path}: the daemon has no credentials; give its unit a LoadCredential= (systemd.exec(5))"
        )
    return folder + path[len(CREDENTIALS) - 1 :]
