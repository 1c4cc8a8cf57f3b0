"""The command line of `agentqd`.

Exit codes: 0 stopped as told, 1 could not start or failed, 2 usage, 78 the config cannot be used (sysexits EX_CONFIG).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Final

from agentqd import __version__
from agentqd.core.errors import AgentqError, ConfigError
from agentqd.core.folders import Folders, choose_folders

EX_CONFIG: Final = 78
SYSTEM_CONFIG: Final = "/etc/agentqd/agentqd.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run in the foreground until told to stop."""
    arguments = _parse(argv)
    folders = choose_folders(os.environ, os.geteuid(), arguments.state_dir, arguments.runtime_dir)
    folders = Folders(os.path.abspath(folders.state), os.path.abspath(folders.runtime))
    config, needed = _config_path(arguments.config)
    try:
        from agentqd.daemon.serve import Options, serve

        options = Options(folders, config, needed, stop_workers=arguments.stop_workers)
        return asyncio.run(serve(options))
    except ConfigError as error:
        told = error.message.replace(f"; {config}:", f"\n{config}:")  # one problem a line
        sys.stderr.write(f"agentqd: {told}\n")
        return EX_CONFIG
    except AgentqError as error:
        sys.stderr.write(f"agentqd: {error.message}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _config_path(argument: str | None) -> tuple[str, bool]:
    """(path, whether it must exist): --config, AGENTQD_CONFIG, else the system's or the user's file if there is one."""
    named = argument or os.environ.get("AGENTQD_CONFIG")
    if named:
        return os.path.abspath(named), True
    unit = os.environ.get("CONFIGURATION_DIRECTORY", "").split(":")[0]  # systemd's ConfigurationDirectory=
    if unit.startswith("/"):
        return f"{unit}/agentqd.yaml", False
    if os.geteuid() == 0:
        return SYSTEM_CONFIG, False
    base = os.environ.get("XDG_CONFIG_HOME", "")
    if not base.startswith("/"):
        base = os.path.expanduser("~/.config")
    own = f"{base}/agentqd/agentqd.yaml"
    return (own if os.path.exists(own) or not os.path.exists(SYSTEM_CONFIG) else SYSTEM_CONFIG), False


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="agentqd",
        description="A durable queue in, a durable outbox out, for long agent jobs. Runs in the foreground; logs on stderr.",
    )
    parser.add_argument("verb", nargs="?", choices=["run"], default="run", help="run (the default)")
    parser.add_argument(
        "--config", metavar="FILE", help=f"default: $AGENTQD_CONFIG, then {SYSTEM_CONFIG} or the user's own"
    )
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        help="default: $AGENTQD_STATE_DIR, then /var/lib/agentqd or the user's own",
    )
    parser.add_argument(
        "--runtime-dir",
        metavar="DIR",
        help="default: $AGENTQD_RUNTIME_DIR, then /run/agentqd or the user's own",
    )
    parser.add_argument(
        "--stop-workers", action="store_true", help="end running workers too when the daemon is stopped"
    )
    parser.add_argument("--version", action="version", version=f"agentqd {__version__}")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
