"""Files of KEY=VALUE lines, for secrets that must not stand in the YAML. Errors name the line, never a value."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Final

from agentqd.core.errors import ConfigError
from agentqd.core.task import ENV_NAME

BYTES_MAX: Final = 1024 * 1024


def read_env_files(paths: Sequence[str]) -> dict[str, str]:
    """The variables of all files; a later file wins. Raises ConfigError."""
    env: dict[str, str] = {}
    for path in paths:
        env |= _read(path)
    return env


def _read(path: str) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(BYTES_MAX + 1)
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise ConfigError(f"{path}: env_files: {what}", problems=[{"path": path, "line": None}]) from error
    if len(text) > BYTES_MAX:
        raise ConfigError(
            f"{path}: env_files: larger than {BYTES_MAX} bytes", problems=[{"path": path, "line": None}]
        )
    env: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        name, equals, value = stripped.removeprefix("export ").partition("=")
        if not equals or not ENV_NAME.fullmatch(name.strip()) or name.strip().startswith("AGENTQ_"):
            raise ConfigError(
                f"{path}:{number}: env_files: not a KEY=VALUE line", problems=[{"path": path, "line": number}]
            )
        env[name.strip()] = _value(value.strip(), path, number)
    return env


def _value(text: str, path: str, number: int) -> str:
    if text[:1] not in {"'", '"'}:
        return text
    try:
        parts = shlex.split(text)
    except ValueError:
        parts = []
    if len(parts) != 1 or "\x00" in parts[0]:
        raise ConfigError(
            f"{path}:{number}: env_files: the quotes do not match", problems=[{"path": path, "line": number}]
        )
    return parts[0]
