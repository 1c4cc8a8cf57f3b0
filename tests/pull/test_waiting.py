"""`wait` and `logs -f` through a network that is cut, and tasks that will never end."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MakeBox
from realbox import RealBox, wait_for

from agentqd.client.box import Box
from agentqd.client.channel import UnixTransport
from agentqd.client.completions import pull
from agentqd.client.connection import Connection
from agentqd.client.logs import LogReader
from agentqd.client.patience import Patience
from agentqd.client.tasks import exit_code_of, unread_patience
from agentqd.client.tasks import wait_for as wait_for_end
from agentqd.client.transfer import fetch, list_files
from agentqd.core.errors import AgentqError
from agentqd.core.folders import Folders

from .cutproxy import Cut, CutProxy, points

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]
FOREVER = float("inf")  # what a laptop's box has


@pytest.fixture
def proxied(make_box: MakeBox) -> Iterator[tuple[RealBox, CutProxy]]:
    box = make_box()
    with CutProxy(str(box.folder / "p.sock"), str(box.runtime / "agentqd.sock")) as proxy:
        yield box, proxy


def client(proxy: CutProxy, reconnect_s: float = FOREVER) -> Box:
    def nowhere() -> Folders:
        raise AssertionError("nothing here uses the box's folders")

    return Box(Connection(UnixTransport([proxy.path])), nowhere, nowhere, reconnect_s)  # type: ignore[arg-type]


def followed(box: Box, task_id: str) -> bytes:
    got = bytearray()
    LogReader(box, task_id, "stdout", write=got.extend, note=lambda text: None).follow(None)
    return bytes(got)


def test_wait_cut_at_any_place_goes_on_to_the_end(proxied: tuple[RealBox, CutProxy]) -> None:
    box, proxy = proxied
    box.append({"task": "three", "id": "three", "prompt": "exit 3"})
    box.result("three")
    proxy.begin(lambda _: None)
    wait_for_end(client(proxy), "three")
    wait_for("the connection's end", lambda: proxy.seen)
    places = points(list(proxy.seen))
    assert len(places) >= 8
    for cut in places:
        proxy.begin(lambda number, cut=cut: cut._replace(number=number) if number < 3 else None)  # type: ignore[misc]
        end = wait_for_end(client(proxy), "three", timeout_s=30)
        assert (end["finished"], exit_code_of(end), proxy.cut_count) == (True, 3, 3), cut


def test_wait_outlasts_cuts_and_a_restart_while_its_task_runs(proxied: tuple[RealBox, CutProxy]) -> None:
    box, proxy = proxied
    box.append({"task": "long", "id": "long", "prompt": "while [ ! -e go ]; do sleep 0.02; done; echo x"})
    box.wait_state("long", "running")
    ends: list[int] = []
    proxy.begin(lambda number: Cut(number, "up", 40) if number % 2 == 0 else None)
    waiting = threading.Thread(
        target=lambda: ends.append(exit_code_of(wait_for_end(client(proxy), "long"))), daemon=True
    )
    waiting.start()
    wait_for("the wait to begin", lambda: proxy.cut_count)
    box.kill()
    wait_for("more tries", lambda: proxy._number > 3)
    box.start()
    assert ends == []
    (box.attempt_folder("long") / "work" / "go").touch()
    waiting.join(30)
    assert ends == [0]


def test_logs_f_cut_at_any_place_repeats_and_misses_no_byte(proxied: tuple[RealBox, CutProxy]) -> None:
    box, proxy = proxied
    lines = "i=0; while [ $i -lt 300 ]; do echo $AGENTQ_ATTEMPT line $i; i=$((i+1)); done"
    box.append({"task": "t", "id": "t", "prompt": f"{lines}; exit 1", "max_attempts": 2, "backoff": "0s"})
    box.result("t")
    whole = b"".join((box.attempt_folder("t", n) / "stdout").read_bytes() for n in (1, 2))
    proxy.begin(lambda _: None)
    assert followed(client(proxy), "t") == whole
    wait_for("the last connection's end", lambda: len(proxy.seen) == 5)
    for cut in points(list(proxy.seen)):
        proxy.begin(lambda number, cut=cut: cut if number == cut.number else None)  # type: ignore[misc]
        assert followed(client(proxy), "t") == whole, cut
        wait_for("the cut to be counted", lambda: proxy.cut_count == 1)


def test_logs_f_of_a_growing_output_through_cuts_and_a_restart_is_byte_for_byte(
    proxied: tuple[RealBox, CutProxy],
) -> None:
    box, proxy = proxied
    prompt = "i=0; while [ $i -lt 120 ]; do echo line $i of many; i=$((i+1)); sleep 0.015; done"
    box.append({"task": "t", "id": "t", "prompt": prompt})
    box.wait_state("t", "running")
    counts = itertools.cycle([60, 9000, 0, 230, 9000, 300])
    proxy.begin(lambda number: Cut(number, "down", next(counts)) if number % 5 else Cut(number, "up", 20))
    got: list[bytes] = []
    reading = threading.Thread(target=lambda: got.append(followed(client(proxy), "t")), daemon=True)
    reading.start()
    wait_for("some cuts", lambda: proxy.cut_count > 3)
    box.kill()
    box.start()
    reading.join(60)
    assert got == [b"".join(b"line %d of many\n" % n for n in range(120))]
    assert proxy.cut_count > 5


def test_a_connection_that_says_nothing_more_is_given_up_and_made_anew(
    proxied: tuple[RealBox, CutProxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentqd.client.tasks.LONG_POLL_S", 0.2)
    box, proxy = proxied
    box.append({"task": "t", "id": "t", "prompt": "head -c 300000 /dev/urandom | tee f"})
    box.result("t")
    laptop = client(proxy)
    laptop.connection.timeout_s = 0.3
    for count in (1, 100, 200):
        proxy.begin(lambda number, count=count: Cut(number, "hang", count) if number < 2 else None)  # type: ignore[misc]
        assert wait_for_end(laptop, "t")["finished"]
        assert proxy._number == 3
    proxy.begin(lambda number: Cut(number, "hang", 100_000) if number else None)
    stdout = list_files(laptop.connection, "t", 1, Patience(FOREVER)).files[0]
    fetch(laptop.connection, stdout, str(tmp_path / "got"), Patience(FOREVER), lambda count: None)
    assert (tmp_path / "got").read_bytes() == (box.attempt_folder("t") / "stdout").read_bytes()
    assert proxy._number == 1 + 4


def test_a_pull_cut_at_any_place_puts_each_row_away_once(proxied: tuple[RealBox, CutProxy]) -> None:
    box, proxy = proxied
    box.append(*({"task": f"t{n}", "id": f"t{n}", "prompt": "echo x"} for n in range(3)))
    box.until_pullable(3)

    def pulled(consumer: str) -> list[int]:
        got: list[int] = []
        away = lambda rows: got.extend(row["seq"] for row in rows)  # noqa: E731
        pull(client(proxy), consumer, limit=3, follow=True, acknowledge=True, put_away=away)
        return got

    proxy.begin(lambda _: None)
    assert pulled("plain") == [1, 2, 3]
    wait_for("both connections' end", lambda: len(proxy.seen) == 2)
    for n, cut in enumerate(points(list(proxy.seen))):
        for times in (1, 3):
            proxy.begin(
                lambda number, cut=cut, times=times: (  # type: ignore[misc]
                    cut._replace(number=number) if cut.number <= number < cut.number + times else None
                )
            )
            consumer = f"{n:03}-{times}"
            assert (pulled(consumer), proxy.cut_count) == ([1, 2, 3], times), cut
            found = [
                each for each in box.api("GET", "/v1/consumers")[1]["consumers"] if each["name"] == consumer
            ]
            assert found[0]["acknowledged"] == 3


@pytest.mark.parametrize("verb", [["wait"], ["logs", "-f"]], ids=["wait", "logs -f"])
def test_a_lost_task_ends_the_waiting(proxied: tuple[RealBox, CutProxy], verb: list[str]) -> None:
    box, proxy = proxied
    box.append({"task": "t", "id": "t", "prompt": "echo begun; sleep 1000"})
    wait_for("its first word", (box.attempt_folder("t") / "stdout").exists)
    command = [sys.executable, "-m", "agentqd.cli.main", "--socket", proxy.path, *verb, "t"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            wait_for("the question", lambda: proxy._number > 1 or (verb == ["wait"] and proxy._number))
            box.kill()
            box.kill_supervisor()
            box.start()
            out, err = process.communicate(timeout=40)
        finally:
            process.kill()
    assert (process.returncode, out) == (
        (125, b"t  lost (supervisor_lost)\n") if verb == ["wait"] else (0, b"begun\n")
    ), err


@pytest.mark.parametrize("verb", [["wait"], ["logs", "-f"]], ids=["wait", "logs -f"])
def test_a_task_that_vanishes_while_it_is_waited_for_ends_the_waiting(
    make_box: MakeBox, proxied: tuple[RealBox, CutProxy], verb: list[str]
) -> None:
    """The box comes back without it: another state folder, a restored backup."""
    box, proxy = proxied
    box.append({"task": "t", "id": "t", "prompt": "sleep 1000"})
    box.wait_state("t", "running")
    other = make_box(name="other")
    command = [sys.executable, "-m", "agentqd.cli.main", "--socket", proxy.path, *verb, "t"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            wait_for("the question", lambda: proxy._number)
            proxy._target = str(other.runtime / "agentqd.sock")
            box.kill()  # every connection to it ends
            out, err = process.communicate(timeout=40)
        finally:
            process.kill()
    assert (process.returncode, out) == (66, b""), err
    assert b"no task 't'" in err


def test_a_line_that_never_becomes_a_task_is_not_waited_for_for_ever(
    proxied: tuple[RealBox, CutProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentqd.client.tasks.UNREAD_S", 0.5)
    _, proxy = proxied
    assert unread_patience(client(proxy))._limit_s == 0.5
    with pytest.raises(AgentqError) as raised:
        wait_for_end(client(proxy), "refused", may_be_unread=True)
    assert raised.value.exit_code == 66


def test_an_interrupt_in_mid_reconnect_is_quiet(proxied: tuple[RealBox, CutProxy]) -> None:
    box, proxy = proxied
    box.kill()
    command = [sys.executable, "-m", "agentqd.cli.main", "--socket", proxy.path, "pull", "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            wait_for("some tries", lambda: proxy._number > 2)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=20) == (b"", b"")
        finally:
            process.kill()
    assert process.returncode == 130
