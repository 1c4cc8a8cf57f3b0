"""A laptop that says its word and goes away, over real SSH: cut, asleep, without a network, without a daemon."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from laptop.cuttcp import CutTcp
from laptop.onelaptop import OneLaptop, one_laptop
from realbox import wait_for

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]


@pytest.fixture
def one() -> Iterator[OneLaptop]:
    with one_laptop() as made:
        yield made


def submit(one: OneLaptop, name: str, *more: str) -> Any:
    done = one.ctl(
        "submit", "--json", "--task", name, *more, f"echo {name} >> {one.box.folder}/ran; echo done"
    )
    return json.loads(done.stdout)


def ran(one: OneLaptop) -> list[str]:
    path = one.box.folder / "ran"
    return path.read_text().split() if path.exists() else []


@pytest.mark.row(7)
@pytest.mark.parametrize("door", ["accepted", "queue_file"])
def test_the_laptop_may_vanish_right_after_its_submit(one: OneLaptop, door: str) -> None:
    if door == "queue_file":
        one.box.stop()
    assert submit(one, "a")["where"] == door
    one.sshd.kill()
    one.end_keepers()
    if door == "queue_file":
        one.box.start()
    assert one.box.result("a")["status"] == "success"
    assert ran(one) == ["a"]


@pytest.mark.row(8)
def test_half_a_submit_over_ssh_never_runs_and_the_whole_one_runs_once(one: OneLaptop) -> None:
    link = CutTcp(one.sshd.port)
    try:
        host = f"]:{one.sshd.port} "
        one.laptop.known_hosts.write_text(one.sshd.known_hosts_line().replace(host, f"]:{link.port} "))
        one.add(url=one.sshd.url.replace(str(one.sshd.port), str(link.port)))
        one.ok("status")
        before = link.sent
        submit(one, "whole")
        link.cut_sent = link.sent + (link.sent - before) // 2  # half as many bytes as the submit before took
        assert submit(one, "half")["where"] == "spool"
        one.box.append({"task": "later", "prompt": "echo x"})
        one.box.result("later")
        assert "half" not in ran(one)
        link.clear()
        one.ok("flush")
        one.box.result("half")
        assert ran(one) == ["whole", "half"]
    finally:
        one.end_keepers()
        link.close()


@pytest.mark.row(16)
def test_what_was_said_outlives_the_laptops_and_the_boxes_restart(one: OneLaptop) -> None:
    """Everything that runs on either side is stopped: what is left stands on a disk."""
    one.box.stop()
    submit(one, "in-the-file")
    one.sshd.kill()
    one.end_keepers()
    submit(one, "in-the-spool")
    one.box.kill_supervisor()
    one.box.start()
    one.sshd.start()
    one.ok("flush")
    one.box.result("in-the-spool")
    one.box.result("in-the-file")
    assert sorted(ran(one)) == ["in-the-file", "in-the-spool"]


@pytest.mark.row(17)
def test_each_side_works_while_the_other_is_off(one: OneLaptop) -> None:
    submit(one, "first")
    one.sshd.kill()  # the laptop sleeps: the box goes on and keeps the result
    one.box.result("first")
    one.box.until_pullable(1)
    one.end_keepers()
    spooled = submit(one, "second")  # the box is away: the laptop goes on and keeps the task
    assert spooled["where"] == "spool"
    one.sshd.start()
    pulled = [json.loads(line) for line in one.ok("pull").splitlines()]  # a contact: both go over
    assert [row["name"] for row in pulled][:1] == ["first"]
    one.box.result("second")
    assert ran(one) == ["first", "second"]


@pytest.mark.row(80)
def test_a_refusal_reaches_the_laptop_at_once_or_with_the_first_contact(one: OneLaptop) -> None:
    one.ok("submit", "--id", "one", "--writes", "/tmp/w1", "sleep 60")
    told = one.ctl("submit", "--writes", "/tmp/w1", "x")
    assert told.returncode == 75
    assert b"one (" in told.stderr
    one.sshd.kill()
    one.end_keepers()
    late = submit(one, "late", "--writes", "/tmp/w1")
    assert late["where"] == "spool"
    one.sshd.start()
    waited = one.ctl("wait", late["task_id"], "--json")
    assert waited.returncode == 125
    assert json.loads(waited.stdout)["reason"] == "write_conflict"
    assert json.loads(waited.stdout)["conflicts"] == [
        {"task_id": "one", "task": "sleep 60", "path": "/tmp/w1"}
    ]
    shown = json.loads(one.ctl("show", late["task_id"], "--json").stdout)
    assert shown["conflicts"] == json.loads(waited.stdout)["conflicts"]
    assert b"has refused" in waited.stderr
    wait_for("its result", lambda: one.box.results().get("late", {}).get("status") == "refused")
