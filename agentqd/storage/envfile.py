"""Environment files: KEY=VALUE lines, where a runner's secrets live. No error ever shows a value.

One assignment a line; blank lines and lines that begin with `#` are skipped; a leading `export ` is allowed.
`'...'` is taken as it stands; in `"..."` the escapes are \\n, \\t, \\", \\\\ and \\$. A bare value ends before a `#`
that follows a blank. Nothing is expanded: a `$` is a `$`. A value never spans lines.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence
from typing import Final

from agentqd.core.errors import ConfigError
from agentqd.core.limits import MIB

ENV_FILE_BYTES_MAX: Final = 1 * MIB

_LINE: Final = re.compile(r"\s*(?:export\s+)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)=(?P<rest>.*)", re.DOTALL)
_SINGLE: Final = re.compile(r"'(?P<value>[^']*)'\s*(?:#.*)?")
_DOUBLE: Final = re.compile(r'"(?P<value>(?:[^"\\]|\\.)*)"\s*(?:#.*)?')
_ESCAPE: Final = re.compile(r"\\(.)")
_ESCAPED: Final = {"n": "\n", "t": "\t", '"': '"', "\\": "\\", "$": "$"}


def read_env_files(paths: Sequence[str]) -> dict[str, str]:
    """The variables of all files; a later file wins. Raises ConfigError."""
    env: dict[str, str] = {}
    for path in paths:
        env |= read_env_file(path)
    return env


def read_env_file(path: str) -> dict[str, str]:
    """The variables of one file. Raises ConfigError that names path and line, and all problems at once."""
    text, problem = read_text(path, ENV_FILE_BYTES_MAX)
    if text is None:
        raise _error(path, [(0, problem)])
    return parse_env(text, path)


def parse_env(text: str, path: str) -> dict[str, str]:
    """The same from text already read."""
    env: dict[str, str] = {}
    problems: list[tuple[int, str]] = []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        try:
            name, value = _assignment(stripped)
            if name in env:
                raise ValueError(f"{name} is set twice")  # noqa: TRY301 - caught with the other problems of its line
            env[name] = value
        except ValueError as error:
            problems.append((number, str(error)))
    if problems:
        raise _error(path, problems)
    return env


def read_text(path: str, bytes_max: int) -> tuple[str | None, str]:
    """The text of a regular file, or (None, what is wrong and what to do). Never blocks on a pipe or a device."""
    try:
        raw = read_regular_file(path, bytes_max)
        return raw.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 (byte {error.start})"
    except (OSError, ValueError) as error:
        return None, why_unreadable(error)


def read_regular_file(path: str, bytes_max: int) -> bytes:
    """Raises OSError, or ValueError with what is wrong: not a regular file, more than `bytes_max`."""
    # O_NONBLOCK: opening a fifo that nobody writes must not hang the daemon.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("is not a regular file; give the path of a plain file")
        raw = file.read(bytes_max + 1)
    if len(raw) > bytes_max:
        raise ValueError(f"has more than {bytes_max} bytes, which is more than such a file ever needs")
    return raw


def why_unreadable(error: OSError | ValueError) -> str:
    """What went wrong with opening a file, and what to do about it."""
    if not isinstance(error, OSError):
        return str(error) if "null byte" not in str(error) else "is not a path: it has a NUL character"
    if error.errno == errno.ENOENT:
        return "is not there: create it, or correct the path"
    if error.errno == errno.EACCES:
        return f"cannot be read: permission denied; let uid {os.geteuid()} read it and enter the folders above it"
    return f"cannot be read: {error.strerror or error}"


def _assignment(line: str) -> tuple[str, str]:
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError("is not NAME=VALUE (a name: letters, digits and _; no blank around the =)")
    name, rest = match["name"], match["rest"]
    if name.startswith("AGENTQ_"):
        raise ValueError(f"{name} is set by agentqd itself")
    if "\x00" in rest:
        raise ValueError(f"the value of {name} has a NUL character")
    if rest.startswith("'"):
        quoted = _SINGLE.fullmatch(rest)
        if quoted is None:
            raise ValueError(f"the quote of {name} is not closed, or something follows it")
        return name, quoted["value"]
    if rest.startswith('"'):
        quoted = _DOUBLE.fullmatch(rest)
        if quoted is None:
            raise ValueError(f"the quote of {name} is not closed, or something follows it")
        return name, _ESCAPE.sub(lambda one: _ESCAPED.get(one[1], one[0]), quoted["value"])
    return name, re.split(r"(?:^|\s)#", rest, maxsplit=1)[0].strip()


def _error(path: str, problems: list[tuple[int, str]]) -> ConfigError:
    found = [{"path": path, "line": line, "key": "", "message": message} for line, message in problems]
    lines = [f"{path}:{line}: {message}" if line else f"{path}: {message}" for line, message in problems]
    return ConfigError("\n".join(lines), problems=found)
