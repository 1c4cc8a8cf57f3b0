"""`agentqctl doctor`: what is wrong with this box, and the command that mends it. Works with the daemon down too."""

from __future__ import annotations

import os
from typing import Any

from agentqd.cli.checks import Finding, finding, local_checks
from agentqd.cli.configfile import default_config, running_config
from agentqd.cli.verb import Call, verb
from agentqd.client.channel import UnixTransport
from agentqd.core.errors import EXIT_OTHER, AgentqError
from agentqd.core.folders import Folders

MARKS = {"ok": ("ok", "good"), "warning": ("warning", "warn"), "error": ("ERROR", "bad")}


@verb("doctor")
def command(call: Call) -> int:
    """What is wrong with this box, and the command that mends it. Exits 1 if there is an error."""
    merged: list[Finding] = []
    more = _remote_checks(call) if call.where.box else _local_checks(call)
    for item in (*_daemon_checks(call), *more):
        if all(item["name"] != other["name"] for other in merged):
            merged.append(item)
    failed = any(item["level"] == "error" for item in merged)
    if call.as_json:
        call.out.json({"ok": not failed, "checks": merged})
    else:
        _say(call, merged)
    return EXIT_OTHER if failed else 0


def _daemon_checks(call: Call) -> list[Finding]:
    """What the daemon finds itself: it knows best, so its findings win over ours of the same name."""
    try:
        answer = call.box.connection.get("doctor")
    except AgentqError as error:
        if call.where.box or error.code == "unreachable":
            return []  # the checks below say it
        return [finding("daemon", "error", error.message)]
    checks = answer.get("checks")
    if not isinstance(checks, list):
        return [finding("daemon", "error", "its answer to GET /v1/doctor has no checks")]
    return [
        finding(str(item.get("name")), _level(item), str(item.get("message") or ""), item.get("fix"))
        for item in checks
        if isinstance(item, dict)
    ]


def _level(item: dict[str, Any]) -> str:
    level = item.get("level")
    if level in MARKS:
        return str(level)
    return "ok" if item.get("ok") else "error"


def _remote_checks(call: Call) -> list[Finding]:
    """Over SSH the daemon speaks for its box; without one, only the way there can be looked at from here."""
    name = str(call.where.box)
    try:
        call.box.connection.get("status")
    except AgentqError as error:
        return [finding("daemon", "error", error.message, f"agentqctl box test {name}")]
    return [finding("connection", "ok", f"box {name} answers over SSH")]


def _local_checks(call: Call) -> list[Finding]:
    try:
        status = call.box.connection.get("status")
    except AgentqError:
        status = {}
    config = running_config(status) or default_config(os.environ, os.geteuid())
    transport = call.box.connection.transport
    assert isinstance(transport, UnixTransport), "doctor runs on the box"
    try:
        folders = call.box.folders()
    except AgentqError:
        folders = _folders_beside(transport.name)
    state_dir = (status.get("daemon") or {}).get("state_dir")
    if isinstance(state_dir, str):
        folders = Folders(state_dir, os.path.dirname(transport.name))
    return local_checks(folders, transport.name, config)


def _folders_beside(socket_path: str) -> Folders:
    """Only the socket is known: its folder is the runtime folder, and no state folder can be looked at."""
    return Folders("/nonexistent", os.path.dirname(socket_path))


def _say(call: Call, findings: list[Finding]) -> None:
    """What is wrong first; the command that mends it on a line of its own, ready to be copied."""
    order = ("error", "warning", "ok")
    for item in sorted(findings, key=lambda item: order.index(item["level"])):
        mark, style = MARKS[item["level"]]
        call.out.lines(f"{mark}: {item['name']}: {item['message']}", style, hang="    ")
        if item["fix"]:
            call.out.lines(str(item["fix"]), "strong", indent="    fix: ", hang=" " * 9)
    wrong = sum(item["level"] != "ok" for item in findings)
    call.out.line(
        f"{wrong} of {len(findings)} checks need you" if wrong else f"all {len(findings)} checks are fine",
        "strong",
    )
