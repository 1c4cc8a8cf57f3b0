"""What `doctor` can see without a daemon. Each finding is `{"name", "ok", "level", "message", "fix"}` as in GET /v1/doctor."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from shlex import quote
from typing import Any

from agentqd.core.errors import AgentqError, ConfigError
from agentqd.core.folders import Folders
from agentqd.core.limits import MIB

DISK_FREE_MIN_BYTES = 256 * MIB
SYSTEMCTL_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0
UNITS = ("agentqd-supervisor.service", "agentqd.service")

Finding = dict[str, Any]


def finding(name: str, level: str, message: str, fix: str | None = None) -> Finding:
    """One finding; `level` is ok, warning or error."""
    assert level in ("ok", "warning", "error")
    return {"name": name, "ok": level == "ok", "level": level, "message": message, "fix": fix}


def local_checks(folders: Folders, socket_path: str, config: str) -> list[Finding]:
    """All of them, in the order in which a person would look."""
    return [
        *check_state_folder(folders),
        *check_queue_file(folders),
        *check_disk(folders),
        *check_socket("control socket", socket_path, _start_daemon()),
        *check_socket("supervisor socket", folders.supervisor_socket, _start_supervisor()),
        *check_config_file(config),
        *check_units(),
    ]


def check_state_folder(folders: Folders) -> Iterator[Finding]:
    try:
        found = os.stat(folders.state)
    except FileNotFoundError:
        yield finding(
            "state folder",
            "error",
            f"{folders.state} is not there: no agentqd has run here yet",
            _start_daemon(),
        )
        return
    except OSError as error:
        yield finding("state folder", "error", f"{folders.state}: {error.strerror}", None)
        return
    if not stat.S_ISDIR(found.st_mode):
        yield finding("state folder", "error", f"{folders.state} is not a folder")
    elif found.st_uid not in (os.getuid(), 0) and os.getuid() != 0:
        yield finding("state folder", "ok", f"{folders.state} belongs to uid {found.st_uid}, not to you")
    elif stat.S_IMODE(found.st_mode) & 0o007:
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        yield finding(
            "state folder",
            "warning",
            f"{folders.state} is open to everybody ({mode})",
            f"chmod o= {quote(folders.state)}",
        )
    else:
        yield finding("state folder", "ok", f"{folders.state}")


def check_queue_file(folders: Folders) -> Iterator[Finding]:
    try:
        found = os.lstat(folders.queue_file)
    except FileNotFoundError:
        return
    except OSError as error:
        yield finding("queue file", "warning", f"{folders.queue_file}: {error.strerror}")
        return
    if not stat.S_ISREG(found.st_mode):
        yield finding(
            "queue file",
            "error",
            f"{folders.queue_file} is not a regular file",
            f"mv {quote(folders.queue_file)} {quote(folders.queue_file)}.aside",
        )
    elif not os.access(folders.queue_file, os.W_OK):
        yield finding("queue file", "warning", f"{folders.queue_file}: you may not append to it")
    elif stat.S_IMODE(found.st_mode) & 0o002:
        yield finding(
            "queue file",
            "error",
            "anybody may append to the queue file and so run commands",
            f"chmod o-w {quote(folders.queue_file)}",
        )
    else:
        yield finding("queue file", "ok", f"{folders.queue_file}, {found.st_size} bytes")


def check_disk(folders: Folders) -> Iterator[Finding]:
    try:
        found = os.statvfs(folders.state)
    except OSError:
        return
    free = found.f_bavail * found.f_frsize
    text = f"{free // MIB} MiB free below {folders.state}"
    if free < DISK_FREE_MIN_BYTES:
        look = f"du -xh --max-depth=2 {quote(folders.state)} | sort -h | tail"
        yield finding(
            "disk",
            "error",
            f"{text}; intake stops below limits.disk_free_min (default {DISK_FREE_MIN_BYTES // MIB} MiB)",
            look,
        )
    else:
        yield finding("disk", "ok", text)
    if found.f_files and found.f_favail < 1000:
        yield finding("disk", "error", f"only {found.f_favail} inodes free below {folders.state}")


def check_socket(name: str, path: str, fix: str) -> Iterator[Finding]:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(CONNECT_TIMEOUT_S)
            probe.connect(path)
    except FileNotFoundError:
        yield finding(name, "error", f"{path} is not there: it is not running", fix)
    except ConnectionRefusedError:
        yield finding(name, "error", f"{path}: nobody serves it any more: it has died", fix)
    except PermissionError:
        yield finding(
            name, "error", f"{path}: permission denied; you are neither its user nor in control.group"
        )
    except OSError as error:
        yield finding(name, "error", f"{path}: {error.strerror or error}", fix)
    else:
        yield finding(name, "ok", path)


def check_config_file(path: str) -> Iterator[Finding]:
    from agentqd.cli.configfile import check_config

    if not os.path.exists(path):
        yield finding("config", "ok", f"{path} is not there: the defaults serve")
        return
    try:
        check_config(path)
    except ConfigError as error:
        problems = error.fields.get("problems") or []
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        yield finding("config", "error", f"{error.message}{more}", f"agentqctl config check {quote(path)}")
    except AgentqError as error:
        yield finding("config", "error", error.message)
    else:
        yield finding("config", "ok", f"{path} is valid")


def check_units() -> Iterator[Finding]:
    """The systemd units, where they are installed. Silent where there is no systemd."""
    if not os.path.isdir("/run/systemd/system"):
        return
    scope = [] if os.getuid() == 0 else ["--user"]
    for unit in UNITS:
        state = _unit_state([*scope], unit) or _unit_state([], unit)
        if state is None:
            continue
        active, enabled = state
        if active == "active":
            yield finding(
                unit,
                "ok" if enabled else "warning",
                "active" if enabled else "active, but does not start at boot",
                None if enabled else f"systemctl enable {unit}",
            )
        else:
            yield finding(
                unit,
                "error",
                f"is {active}; its last words: journalctl -u {unit} -n 20",
                f"systemctl restart {unit}",
            )


def _unit_state(scope: list[str], unit: str) -> tuple[str, bool] | None:
    """(ActiveState, enabled), or None where the unit is not installed or systemd cannot be asked."""
    argv = ["systemctl", *scope, "show", unit, "--property=LoadState,ActiveState,UnitFileState"]
    try:
        answer = subprocess.run(
            argv, capture_output=True, text=True, timeout=SYSTEMCTL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    facts = dict(line.partition("=")[::2] for line in answer.stdout.splitlines())
    if facts.get("LoadState") != "loaded":
        return None
    return facts.get("ActiveState", "unknown"), facts.get("UnitFileState") in (
        "enabled",
        "static",
        "linked",
        "enabled-runtime",
    )


def _start_daemon() -> str:
    return "systemctl start agentqd" if _has_unit("agentqd.service") else "agentqd"


def _start_supervisor() -> str:
    return "systemctl start agentqd-supervisor" if _has_unit("agentqd-supervisor.service") else "agentqd"


def _has_unit(name: str) -> bool:
    return any(
        os.path.exists(f"{folder}/{name}")
        for folder in ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
    )
