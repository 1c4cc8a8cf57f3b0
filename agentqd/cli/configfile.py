"""The config file as `config check` and `doctor` see it: offline, with the daemon's own reader (loaded only here)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

SYSTEM_CONFIG = "/etc/agentqd/agentqd.yaml"


def default_config(env: Mapping[str, str]) -> str:
    """The file that a daemon started like us would read."""
    return env.get("AGENTQD_CONFIG") or SYSTEM_CONFIG


def check_config(path: str) -> Any:
    """The settings in that file. Raises ConfigError with `problems`."""
    return import_module("agentqd.storage.configfile").load_settings(path)


def running_config(status_or_config: Mapping[str, Any]) -> str | None:
    """The file that the running daemon uses, from its status or config object."""
    daemon = status_or_config.get("daemon")
    path = daemon.get("config") if isinstance(daemon, dict) else status_or_config.get("path")
    return path if isinstance(path, str) and os.path.isabs(path) else None
