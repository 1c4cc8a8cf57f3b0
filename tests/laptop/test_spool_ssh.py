"""The spool through the real way: OpenSSH, a keeper, a link that is cut. Nothing lost, nothing doubled."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from realbox import wait_for

from .cuttcp import CutTcp
from .onelaptop import OneLaptop, one_laptop

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


@pytest.fixture
def one() -> Iterator[OneLaptop]:
    with one_laptop() as made:
        yield made


def submit(one: OneLaptop, name: str, *more: str) -> Any:
    done = one.ctl(
        "submit", "--json", "--task", name, *more, f"echo {name} >> {one.box.folder}/ran; echo done"
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    assert done.returncode == 0, (done.stdout, done.stderr)
    return json.loads(done.stdout)


def waiting(one: OneLaptop) -> list[str]:
    folder = one.laptop.home / ".local/state/agentqctl/spool" / one.name
    return sorted(path.name for path in folder.glob("*.json"))


def flushed(one: OneLaptop) -> Any:
    done = one.run("flush", "--json")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert waiting(one) == []
    return json.loads(done.stdout)


def check_once(one: OneLaptop, names: list[str]) -> None:
    wait_for("the results", lambda: set(names) <= set(one.box.results()))
    ran = Counter((one.box.folder / "ran").read_text().split())
    told = Counter(line["name"] for line in one.box.completions() if "status" in line)
    assert {name: (ran[name], told[name]) for name in names} == dict.fromkeys(names, (1, 1))


def test_without_an_sshd_the_task_is_spooled_and_the_next_verb_sends_it(one: OneLaptop) -> None:
    one.sshd.kill()
    one.end_keepers()
    answer = submit(one, "a")
    assert (answer["where"], answer["box"]) == ("spool", "box")
    assert one.ctl("submit", "--require-box", "x").returncode == 69
    assert len(waiting(one)) == 1
    assert json.loads(one.ctl("show", answer["task_id"], "--json").stdout)["where"] == "spool"
    one.sshd.start()
    one.ok("status")
    assert waiting(one) == []
    check_once(one, ["a"])


def test_a_cancellation_goes_over_ssh_too(one: OneLaptop) -> None:
    one.ok("submit", "--id", "one", "sleep 60")
    one.sshd.kill()
    assert json.loads(one.ctl("cancel", "one", "--json").stdout)["where"] == "spool"
    one.sshd.start()
    flushed(one)
    assert one.box.wait_state("one", "finished")["result"] == "cancelled"


def test_with_the_daemon_down_the_line_and_a_long_prompt_go_to_the_box(
    one: OneLaptop, tmp_path: Path
) -> None:
    one.box.stop()
    prompt = tmp_path / "prompt"
    prompt.write_text(f"echo long >> {one.box.folder}/ran; echo done\n: {'x' * 50_000}\n")
    assert submit(one, "short")["where"] == "queue_file"
    done = one.ctl("submit", "--json", "--task", "long", "--prompt-file", str(prompt))
    assert json.loads(done.stdout)["where"] == "queue_file"
    assert waiting(one) == []
    one.box.start()
    check_once(one, ["short", "long"])


def test_what_only_a_daemon_can_take_waits_for_it(one: OneLaptop) -> None:
    one.box.stop()
    answer = submit(one, "wide", *(word for n in range(20) for word in ("--env", f"V{n}={'x' * 1000}")))
    assert answer["where"] == "spool"
    one.box.start()
    flushed(one)
    check_once(one, ["wide"])


def test_a_host_key_that_has_changed_keeps_nothing_here_and_sends_nothing(one: OneLaptop) -> None:
    one.sshd.kill()
    one.end_keepers()
    first = submit(one, "before")
    one.sshd.new_host_key()
    one.sshd.start()
    done = one.ctl("submit", "--json", "x")
    assert done.returncode == 77, done.stdout
    assert len(waiting(one)) == 1  # what was kept before stays
    assert one.run("flush").returncode == 77
    one.laptop.known_hosts.write_text(one.sshd.known_hosts_line())
    one.end_keepers()
    assert flushed(one)[0]["sent"][0]["id"] == first["task_id"]
    check_once(one, ["before"])


def test_a_box_of_no_config_is_told_and_nothing_is_kept(one: OneLaptop) -> None:
    done = one.run("--box", "nobody", "submit", "x")
    assert done.returncode == 2
    assert b"nobody" in done.stderr
    assert json.loads(one.run("spool", "list", "--json").stdout) == []


@pytest.mark.parametrize("daemon", ["up", "down"])
def test_an_ssh_connection_cut_at_forty_bytes_of_submit_loses_and_doubles_nothing(
    one: OneLaptop, daemon: str
) -> None:
    link = CutTcp(one.sshd.port)
    try:
        known = one.sshd.known_hosts_line()
        one.laptop.known_hosts.write_text(known.replace(f"]:{one.sshd.port} ", f"]:{link.port} "))
        one.add(url=one.sshd.url.replace(f":{one.sshd.port}", f":{link.port}"))
        if daemon == "down":
            one.box.stop()
        submit(one, "measured")
        sent, received = link.sent, link.received
        names, where = ["measured"], Counter[str]()
        cuts = [("sent", sent * n // 20) for n in range(21)] + [
            ("received", received * n // 20) for n in range(21)
        ]
        for direction, at in cuts:
            one.end_keepers()
            link.clear()
            setattr(link, f"cut_{direction}", at)
            names.append(f"{direction}-{at}")
            where[submit(one, names[-1])["where"]] += 1
            link.clear()
            one.end_keepers()
            flushed(one)
        if daemon == "down":
            one.box.start()
        assert len(cuts) >= 40
        assert where["spool"] >= 34, where  # most cuts are noticed
        check_once(one, names)
    finally:
        one.end_keepers()
        link.close()


def test_sshd_and_keeper_killed_at_any_moment_of_submits_lose_and_double_nothing(one: OneLaptop) -> None:
    names: list[str] = []
    done = threading.Event()

    def kill() -> None:
        number = 0
        while not done.wait(0.05 + number % 7 * 0.06):
            number += 1
            for pid in one.sshd.sessions() if number % 3 else one.keepers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        began = time.monotonic()
        while len(names) < 30 and time.monotonic() - began < 90:
            names.append(f"n{len(names)}")
            submit(one, names[-1])
    finally:
        done.set()
        killer.join()
    assert len(names) >= 10
    flushed(one)
    check_once(one, names)
