"""agentqd under a real systemd and journald, installed by the commands in docs/install.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from systemd.nspawn import Box, install_commands, wait_for

pytestmark = [
    pytest.mark.xdist_group("systemd"),
    pytest.mark.systemd,
    pytest.mark.root,
    pytest.mark.real,
    pytest.mark.timeout(300),
]

UNITS = ("agentqd", "agentqd-supervisor")
WAITS_FOR = "until [ -e /tmp/go-{name} ]; do sleep 0.1; done; echo pid $$ has finished"


def start_waiting(box: Box, name: str) -> int:
    """A task whose worker goes on until `let_go`; returns its pid."""
    box.append({"task": name, "prompt": WAITS_FOR.format(name=name)})
    return box.worker_pid(name)


def let_go(box: Box, name: str) -> None:
    box.run("touch", f"/tmp/go-{name}")


def finished_by(box: Box, name: str, pid: int) -> None:
    """Its worker goes on as the same process, and its true end arrives, once."""
    assert box.alive(pid)
    assert box.worker_pid(name) == pid
    let_go(box, name)
    result = box.result(name)
    assert (result["status"], result["attempt"], result["exit_code"]) == ("success", 1, 0)
    assert result["stdout_tail"] == f"pid {pid} has finished\n"
    assert len([line for line in box.completions() if line.get("name") == name]) == 1


def active(box: Box) -> list[str]:
    return [box.show(unit, "ActiveState")["ActiveState"] for unit in UNITS]


def idle(box: Box) -> bool:
    status = json.loads(box.run("agentqctl", "status", "--json"))
    waiting = sum(count for state, count in status["tasks"].items() if state != "finished")
    return waiting == 0 and status["intake"]["bytes_waiting"] == 0 and status["outbox"]["pending"] == 0


def test_a_bare_append_becomes_a_delivered_result(machine: Box) -> None:
    assert active(machine) == ["active", "active"]
    machine.append({"task": "first", "prompt": "id -un; echo in $PWD"})
    result = machine.result("first")
    assert result["status"] == "success"
    assert result["stdout_tail"].startswith("agentqd\nin /var/lib/agentqd/tasks/")


def test_state_is_closed_to_others_and_the_supervisor_is_systemds(machine: Box) -> None:
    listing = machine.run(
        "stat", "-c", "%a %U %n", "/var/lib/agentqd", "/run/agentqd", "/run/agentqd/agentqd.sock"
    )
    assert listing.splitlines() == [
        "700 agentqd /var/lib/agentqd",
        "700 agentqd /run/agentqd",
        "600 agentqd /run/agentqd/agentqd.sock",
    ]
    supervisors = machine.run("pgrep", "-u", "agentqd", "-f", "agentqd-supervisor").split()
    assert supervisors == [str(machine.main_pid("agentqd-supervisor"))]


def test_worker_lives_in_the_supervisors_cgroup(machine: Box) -> None:
    pid = start_waiting(machine, "cgroup")
    assert machine.run("cat", f"/proc/{pid}/cgroup").strip().endswith("/agentqd-supervisor.service")
    finished_by(machine, "cgroup", pid)


def test_restart_of_the_daemon_in_mid_task_leaves_the_worker_its_pid(machine: Box) -> None:
    pid = start_waiting(machine, "restart")
    before = machine.main_pid("agentqd")
    machine.run("systemctl", "restart", "agentqd")
    assert machine.main_pid("agentqd") != before
    finished_by(machine, "restart", pid)


def test_sigkill_of_the_daemon_in_mid_task_leaves_the_worker_its_pid(machine: Box) -> None:
    pid = start_waiting(machine, "sigkill")
    before = machine.main_pid("agentqd")
    machine.run("kill", "-9", str(before))
    wait_for("a new daemon", lambda: machine.main_pid("agentqd") not in {0, before})
    wait_for("both units", lambda: active(machine) == ["active", "active"])
    finished_by(machine, "sigkill", pid)


def test_result_of_a_worker_that_ends_while_the_daemon_is_stopped_arrives(machine: Box) -> None:
    pid = start_waiting(machine, "away")
    machine.run("systemctl", "stop", "agentqd")
    let_go(machine, "away")
    wait_for("the worker's end", lambda: not machine.alive(pid))
    machine.append({"task": "meanwhile", "prompt": "echo appended while the daemon was away"})
    machine.run("systemctl", "start", "agentqd")
    assert machine.result("away")["stdout_tail"] == f"pid {pid} has finished\n"
    assert machine.result("meanwhile")["status"] == "success"


def write_config(box: Box, text: str) -> None:
    box.sh(f"printf '%s' '{text}' > /etc/agentqd/agentqd.yaml")


def concurrency(box: Box) -> int:
    return int(json.loads(box.run("agentqctl", "status", "--json"))["queues"]["default"]["concurrency"])


def test_reload_applies_an_edited_config_and_keeps_the_process(machine: Box) -> None:
    before = machine.main_pid("agentqd")
    write_config(machine, "queues: {default: {concurrency: 7}}")
    try:
        machine.run("systemctl", "reload", "agentqd")
        wait_for("the reload", lambda: concurrency(machine) == 7)
        write_config(machine, "queues: {default: {concurrency: seven}}")
        with pytest.raises(AssertionError, match=r"Job for agentqd\.service failed"):
            machine.run("systemctl", "reload", "agentqd")
        assert concurrency(machine) == 7
        write_config(machine, "queues: {default: {concurrency: 8}}")
        machine.run("systemctl", "kill", "-s", "HUP", "agentqd")
        wait_for("the reload that SIGHUP asks for", lambda: concurrency(machine) == 8)
    finally:
        machine.run("rm", "/etc/agentqd/agentqd.yaml")
        machine.run("systemctl", "restart", "agentqd-supervisor", "agentqd")
    assert active(machine) == ["active", "active"]
    assert before in {entry["_PID"] and int(entry["_PID"]) for entry in machine.journal("agentqd")}


def test_journal_has_the_tasks_line_with_its_id(machine: Box) -> None:
    machine.append({"task": "journalled", "id": "journal-1", "prompt": "echo a secret $((40 + 2))"})
    machine.result("journalled")
    lines = [entry for entry in machine.journal("agentqd") if "journal-1" in entry["MESSAGE"]]
    events = [match[1] for entry in lines if (match := re.search(r'"event":"(\w+)"', entry["MESSAGE"]))]
    assert events.count("task_finished") == 1
    assert {entry["SYSLOG_IDENTIFIER"] for entry in lines} == {"agentqd"}
    assert not [entry for entry in lines if "a secret" in entry["MESSAGE"]]


@pytest.fixture
def short_watchdog(machine: Box) -> Iterator[None]:
    """Both units with a watchdog of 2 s, so that a test need not wait a minute."""
    folders = [f"/run/systemd/system/{unit}.service.d" for unit in UNITS]
    for folder in folders:
        machine.sh(f"mkdir -p {folder}; printf '[Service]\\nWatchdogSec=2s\\n' > {folder}/short.conf")
    machine.sh("systemctl daemon-reload; systemctl restart agentqd-supervisor agentqd")
    yield
    machine.sh(
        f"rm -r {' '.join(folders)}; systemctl daemon-reload; systemctl restart agentqd-supervisor agentqd"
    )


@pytest.mark.usefixtures("short_watchdog")
@pytest.mark.parametrize("unit", ["agentqd", "agentqd-supervisor"])
def test_watchdog_is_fed_and_replaces_a_frozen_process(machine: Box, unit: str) -> None:
    name = f"frozen-{unit}"
    pid = start_waiting(machine, name)
    before = machine.main_pid(unit)
    fed = machine.show(unit, "WatchdogTimestampMonotonic")

    wait_for("it to be fed", lambda: machine.show(unit, "WatchdogTimestampMonotonic") != fed)
    machine.run("sleep", "3")
    assert machine.main_pid(unit) == before, "it was fed, and still replaced"

    machine.run("kill", "-STOP", str(before))
    wait_for("a new process", lambda: machine.main_pid(unit) not in {0, before}, 60.0)
    wait_for("both units", lambda: active(machine) == ["active", "active"])
    if unit == "agentqd":
        finished_by(machine, name, pid)
    else:
        assert machine.result(name)["status"] == "lost"
        assert not machine.alive(pid)


def test_stop_of_the_supervisor_ends_the_workers_and_the_task_is_lost(machine: Box) -> None:
    pid = start_waiting(machine, "stopped")
    machine.run("systemctl", "stop", "agentqd-supervisor")
    try:
        assert not machine.alive(pid)
        assert machine.show("agentqd", "ActiveState")["ActiveState"] == "active"
        machine.append({"task": "waits", "prompt": "echo ran after all"})
    finally:
        machine.run("systemctl", "start", "agentqd-supervisor")
    assert machine.result("stopped")["status"] == "lost"
    assert machine.result("waits")["status"] == "success"


def test_sigkill_of_the_supervisor_ends_the_workers_and_the_task_is_lost(machine: Box) -> None:
    pid = start_waiting(machine, "orphaned")
    before = machine.main_pid("agentqd-supervisor")
    machine.run("kill", "-9", str(before))
    wait_for("a new supervisor", lambda: machine.main_pid("agentqd-supervisor") not in {0, before})
    assert not machine.alive(pid)
    assert machine.result("orphaned")["status"] == "lost"


def test_reboot_brings_both_back_and_what_waits_is_run(machine: Box) -> None:
    """As far as a container can show it: everything is stopped in systemd's own order, then started again."""
    start_waiting(machine, "before-the-boot")
    machine.run("systemctl", "isolate", "rescue.target", check=False)
    wait_for("the end of both", lambda: active(machine) == ["inactive", "inactive"])
    machine.append({"task": "appended-while-off", "prompt": "echo ran"})
    machine.run("systemctl", "isolate", "multi-user.target")
    wait_for("both units", lambda: active(machine) == ["active", "active"])
    assert machine.result("before-the-boot")["status"] == "lost"
    assert machine.result("appended-while-off")["status"] == "success"


def test_a_group_may_submit_and_nothing_else(machine: Box) -> None:
    """The drop-ins of docs/install.md: state and sockets stay open to the group across starts of either unit."""
    machine.sh("useradd -m -s /bin/sh alice; useradd -m -s /bin/sh mallory")
    try:
        machine.sh(install_commands("Letting a group submit"))
        for unit in ("agentqd", "agentqd-supervisor", "agentqd"):
            machine.run("systemctl", "restart", unit)
            wait_for("both units", lambda: active(machine) == ["active", "active"])
            line = '{"task":"by-alice","prompt":"id -un"}'
            machine.sh(f"echo '{line}' >> /var/lib/agentqd/queue/tasks.jsonl", user="alice")
            wait_for("that all is done", lambda: idle(machine))
        assert [line["stdout_tail"] for line in machine.completions() if line["name"] == "by-alice"] == [
            "agentqd\n"
        ] * 3
        machine.run("agentqctl", "submit", "--task", "by-socket", "echo hello", user="alice")
        assert machine.result("by-socket")["status"] == "success"
        with pytest.raises(AssertionError, match="Permission denied"):
            machine.run("cat", "/var/lib/agentqd/completions.jsonl", user="alice")
        with pytest.raises(AssertionError, match="Permission denied"):
            machine.sh("echo >> /var/lib/agentqd/queue/tasks.jsonl", user="mallory")
        with pytest.raises(AssertionError, match="exit 77"):
            machine.run("agentqctl", "status", user="mallory")
    finally:
        machine.sh("rm -r /etc/systemd/system/agentqd*.d /etc/agentqd/agentqd.yaml; systemctl daemon-reload")
        machine.sh("systemctl restart agentqd-supervisor agentqd")


def test_user_units_run_without_root(machine: Box) -> None:
    machine.sh("useradd -m -s /bin/sh carol; loginctl enable-linger carol")
    uid = machine.sh("id -u carol").strip()
    wait_for(
        "carol's systemd", lambda: machine.sh(f"test -S /run/user/{uid}/systemd/private && echo yes || true")
    )
    machine.install("As services of one user", user="carol")
    session = f"export HOME=/home/carol XDG_RUNTIME_DIR=/run/user/{uid};"
    append = 'echo \'{"task":"own","prompt":"id -un"}\' >> ~/.local/state/agentqd/queue/tasks.jsonl'
    machine.sh(f"{session} {append}", user="carol")
    done = f"{session} cat ~/.local/state/agentqd/completions.jsonl"
    wait_for(
        "carol's result", lambda: '"stdout_tail":"carol\\n"' in machine.sh(done, user="carol", check=False)
    )
    status = machine.sh(f"{session} ~/.local/bin/agentqctl status --json", user="carol")
    assert '"connected": true' in status
