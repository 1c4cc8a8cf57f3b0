"""`agentqctl box install-sync`: a systemd timer of the user that flushes the spool, so that nobody has to think of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping

import click

from agentqd.cli.verb import Call, verb
from agentqd.client.keeperplace import spool_root
from agentqd.client.spool import Spool
from agentqd.core.errors import AgentqError

UNIT = "agentqctl-flush"
SYSTEMCTL_TIMEOUT_S = 30
KEPT_VARIABLES = ("XDG_STATE_HOME", "XDG_CONFIG_HOME")  # the user's manager need not know them
RESOLVERS = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf", "/run/NetworkManager/resolv.conf")


@verb("install-sync")
@click.option("--print", "only_print", is_flag=True, help="Only print the units.")
def command(call: Call, only_print: bool) -> int:
    """Write and start systemd user units that flush the spool: every minute, and when the network comes or changes.

    With --box NAME only for that box. They cost nothing while nothing waits. macOS: docs/laptop.md has a launch agent.
    """
    box = call.where.box
    units = sync_units(os.environ, _program(), Spool(spool_root(os.environ), box).box if box else None)
    folder = unit_folder(os.environ)
    if only_print:
        _tell(call, folder, units, [])
        return 0
    if sys.platform == "darwin" or shutil.which("systemctl") is None:
        raise AgentqError(
            "there is no systemd here; run `agentqctl flush` from cron, or as a launch agent (docs/laptop.md)",
            code="no_systemd",
        )
    os.makedirs(folder, exist_ok=True)
    for name, text in units.items():
        _replace(f"{folder}/{name}", text)
    started = [unit for unit in units if not unit.endswith(".service")]
    commands = [
        ["systemctl", "--user", "daemon-reload"],
        ["systemctl", "--user", "enable", "--now", *started],
    ]
    failed = next((why for words in commands if (why := _run(words)) is not None), None)
    _tell(call, folder, units, commands)
    if failed is not None:
        raise AgentqError(
            f"the units are written, but not started: {failed}; run: " + " && ".join(map(" ".join, commands)),
            code="systemctl_failed",
            folder=folder,
        )
    if "SSH_AUTH_SOCK" in os.environ:
        call.out.note(
            "your SSH agent: if your key is only there, the timer needs it too: systemctl --user import-environment SSH_AUTH_SOCK"
        )
    return 0


def unit_folder(env: Mapping[str, str]) -> str:
    xdg = env.get("XDG_CONFIG_HOME", "")
    base = xdg.rstrip("/") if xdg.startswith("/") else f"{(env.get('HOME') or '/').rstrip('/')}/.config"
    return f"{base}/systemd/user"


def sync_units(env: Mapping[str, str], program: list[str], box: str | None) -> dict[str, str]:
    """File name → text of the service, its timer, and the path unit that sees the network come."""
    name = f"{UNIT}-{box}" if box else UNIT
    which = f"for {box}" if box else "for every box"
    flush = [*program, "flush", *(["--box", box] if box else [])]
    waiting = f"{spool_root(env)}/{box or '*'}/*.json"
    kept = "".join(
        f"Environment={_quoted(f'{each}={env[each]}')}\n" for each in KEPT_VARIABLES if env.get(each)
    )
    return {
        f"{name}.service": (
            f"# Written by: agentqctl box install-sync\n[Unit]\nDescription=Send what waits in agentqctl's spool, {which}\n"
            f"ConditionPathExistsGlob={_escaped(waiting)}\n\n[Service]\nType=oneshot\nExecStart={' '.join(map(_quoted, flush))}\n"
            f"{kept}# 69: away; 75, 65, 66: the box said no, which `agentqctl spool` shows\n"
            "SuccessExitStatus=65 66 69 75\nTimeoutStartSec=10min\nNice=5\n"
        ),
        f"{name}.timer": (
            f"# Written by: agentqctl box install-sync\n[Unit]\nDescription=Look every minute whether something waits, {which}\n\n"
            "[Timer]\n# By the wall clock: fires at once after a sleep.\nOnCalendar=minutely\nAccuracySec=5s\nPersistent=yes\n\n"
            "[Install]\nWantedBy=timers.target\n"
        ),
        f"{name}.path": (
            f"# Written by: agentqctl box install-sync\n[Unit]\nDescription=The network has come or changed: flush, {which}\n\n"
            "[Path]\n"
            + "".join(f"PathChanged={path}\n" for path in RESOLVERS)
            + "\n[Install]\nWantedBy=paths.target\n"
        ),
    }


def _program() -> list[str]:
    """This agentqctl, as it can be run later from anywhere."""
    beside = os.path.join(os.path.dirname(sys.executable), "agentqctl")
    return [beside] if os.access(beside, os.X_OK) else [sys.executable, "-m", "agentqd.cli.main"]


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    """One word of a unit file."""
    if "\n" in text or "\r" in text:
        raise AgentqError(f"{text[:80]!r} has a line break, which a unit file cannot carry", code="bad_path")
    plain = _escaped(text).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{plain}"' if plain != text or any(char in plain for char in " '\t;") else text


def _replace(path: str, text: str) -> None:
    draft = f"{path}.{os.getpid()}"
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(draft, path)


def _run(words: list[str]) -> str | None:
    """Why it failed, or None."""
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, timeout=SYSTEMCTL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (
        None
        if done.returncode == 0
        else done.stderr.decode(errors="replace").strip() or f"exit {done.returncode}"
    )


def _tell(call: Call, folder: str, units: dict[str, str], commands: list[list[str]]) -> None:
    if call.as_json:
        call.out.json({"folder": folder, "units": units, "ran": commands})
        return
    for name, text in units.items():
        if commands:
            call.out.line(f"wrote {folder}/{name}")
        else:
            call.out.line(f"# {folder}/{name}")
            for line in text.splitlines():
                call.out.line(line)
            call.out.line()
    for words in commands:
        call.out.line(f"ran {' '.join(words)}")
