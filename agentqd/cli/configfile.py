"""The config file as `config check` and `doctor` see it: offline, with the daemon's own reader (loaded only here)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

SYSTEM_CONFIG = "/etc/agentqd/agentqd.yaml"


def default_config(env: Mapping[str, str], uid: int) -> str:
    """The file that a daemon started like us would read (the same rule as agentqd's own)."""
    if named := env.get("AGENTQD_CONFIG"):
        return os.path.abspath(named)
    if uid == 0:
        return SYSTEM_CONFIG
    base = env.get("XDG_CONFIG_HOME", "")
    own = f"{base if base.startswith('/') else os.path.expanduser('~/.config')}/agentqd/agentqd.yaml"
    return own if os.path.exists(own) or not os.path.exists(SYSTEM_CONFIG) else SYSTEM_CONFIG


def check_config(path: str) -> Any:
    """The settings in that file. Raises ConfigError with `problems`."""
    return import_module("agentqd.storage.configfile").load_settings(path)


def running_config(status_or_config: Mapping[str, Any]) -> str | None:
    """The file that the running daemon uses, from its status or config object."""
    daemon = status_or_config.get("daemon")
    path = daemon.get("config") if isinstance(daemon, dict) else status_or_config.get("path")
    return path if isinstance(path, str) and os.path.isabs(path) else None
