"""The states L0 to L4 of docs/laptop.md: submit cut at every byte and killed at every call. Nothing lost, nothing doubled."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from crash.inject import MUTATING, call_name, needs_strace
from realbox import wait_for

from agentqd.client import flush
from agentqd.client.ids import new_task_id, now_text
from agentqd.client.spooling import submit_spooled

from .fakectl import far_box
from .spoolworld import World, world

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def here() -> Iterator[World]:
    with world("queues: {default: {concurrency: 8}}\n") as made:
        yield made


def at_peace(here: World) -> None:
    """The link is whole again, and everything has gone over it."""
    here.link.clear()
    with here.spool.sending(10):
        report = flush.Flush(far_box(here.link.path, str(here.box.state)), here.spool).run()
    assert (report.stopped, report.refused, report.damaged, report.attended) == (None, [], [], False)
    assert here.waiting() == []


def bytes_of_one_submit(here: World) -> tuple[int, int]:
    """How much goes over the link, and how much comes back."""
    here.link.clear()
    assert here.submit("measured").json["where"] == "accepted"
    return here.link.sent, here.link.received


def test_a_link_cut_at_forty_and_more_bytes_of_submit_loses_and_doubles_nothing(here: World) -> None:
    sent, received = bytes_of_one_submit(here)
    cuts = [("sent", sent * n // 24) for n in range(25)] + [
        ("received", received * n // 24) for n in range(25)
    ]
    assert len(set(cuts)) >= 40
    where: Counter[str] = Counter()
    names = []
    for direction, at in cuts:
        here.link.clear()
        setattr(here.link, f"cut_{direction}", at)
        names.append(f"cut-{direction}-{at}")
        done = here.submit(names[-1])
        assert done.code == 0, done.out
        where[done.json["where"]] += 1
        at_peace(here)
    assert where.total() == len(cuts)
    assert where["spool"] >= 40  # a cut that is not noticed would show nothing
    here.check_once(*names)


def test_a_link_cut_at_every_single_byte_loses_and_doubles_nothing(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flush, "RESEND_WAIT_S", 0.001)
    sent, received = bytes_of_one_submit(here)
    box = far_box(here.link.path, str(here.box.state))
    names = []
    for direction, count in (("sent", sent), ("received", received)):
        for at in range(count + 1):
            here.link.clear()
            setattr(here.link, f"cut_{direction}", at)
            name = f"byte-{direction}-{at}"
            fields = {
                "id": new_task_id(),
                "task": name,
                "submitted_at": now_text(),
                "prompt": here.script(name),
            }
            answer = submit_spooled(box, here.spool, fields, lambda _: None)
            assert answer["where"] in {"accepted", "spool"}
            names.append(name)
            at_peace(here)
    assert len(names) > 500
    here.check_once(*names)


class Kill(NamedTuple):
    call: str
    when: int  # the ordinal among the calls of its name
    kept: bool  # it comes after the rename of the first new entry


def kills_of(trace: Path) -> list[Kill]:
    """Every mutating call of a run from the first that touches the spool."""
    counted: Counter[str] = Counter()
    found: list[Kill] = []
    begun = kept = False
    for line in trace.read_text(errors="replace").splitlines():
        name = call_name(f"0 {line}")
        if name is None:
            continue
        counted[name] += 1
        begun = begun or "/agentqctl" in line
        if begun and name in MUTATING:
            found.append(Kill(name, counted[name], kept))
        kept = kept or (name.startswith("rename") and ".json" in line)
    return found


def traced(here: World, trace: Path, *words: str) -> list[Kill]:
    """The kill points of a run that is not killed."""
    prefix = ("strace", "-q", "-o", str(trace), "-e", f"trace={','.join(MUTATING)}")
    done = here.ctl(*words, prefix=prefix)
    assert done.code == 0, done.err
    return kills_of(trace)


def killed(here: World, kill: Kill, *words: str) -> bool:
    """Runs the verb and kills it there. False: it ended before."""
    inject = f"inject={kill.call}:signal=SIGKILL:when={kill.when}"
    prefix = ("strace", "-q", "-o", "/dev/null", "-e", f"trace={kill.call}", "-e", inject)
    with here.popen("--box", "box1", *words, prefix=prefix) as process:
        process.communicate(timeout=60)
        return process.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)


def submit_words(here: World, name: str) -> list[str]:
    return ["submit", "--json", "--task", name, here.script(name)]


@pytest.mark.root
@pytest.mark.parametrize("state", ["up", "down", "no_daemon"])
def test_submit_killed_at_every_mutating_call_is_nothing_or_one_task(state: str, tmp_path: Path) -> None:
    if why := needs_strace():
        pytest.skip(why)
    with world() as here:
        here.submit("first")  # the folders are there

        def broken() -> None:
            if state == "down":
                here.link.down()
            elif state == "no_daemon":
                here.box.stop()

        def mend() -> None:
            if state == "down":
                here.link.up()
            elif state == "no_daemon":
                here.box.start()

        broken()
        kills = traced(here, tmp_path / "trace", *submit_words(here, "traced"))
        assert len(kills) >= 12
        assert {kill.call for kill in kills} >= {"openat", "fsync", "rename"}
        expected: dict[str, bool] = {}
        for number, kill in enumerate(kills):
            name = f"k{number}-{kill.call}-{kill.when}"
            if killed(here, kill, *submit_words(here, name)):
                expected[name] = kill.kept
        mend()
        assert len(expected) >= len(kills) - 2
        at_peace(here)
        here.check_once("first", "traced", *(name for name, kept in expected.items() if kept))
        assert not set(here.ran()) & {name for name, kept in expected.items() if not kept}
        print(f"\n{state}: {len(expected)} kills of {len(kills)} calls")


@pytest.mark.root
@pytest.mark.parametrize("verb", ["flush", "cancel"])
def test_flush_and_cancel_killed_at_every_mutating_call_lose_and_double_nothing(
    verb: str, tmp_path: Path
) -> None:
    if why := needs_strace():
        pytest.skip(why)
    with world() as here:

        def spooled(name: str) -> list[str]:
            """Two submissions and a refusal wait; the words of the verb that is killed."""
            here.link.down()
            task_id = here.submit(name).json["task_id"]
            if verb == "cancel":
                return ["cancel", task_id]
            here.ctl("submit", "--json", "--task", f"{name}-bad", "--deliver-to", "nowhere", "x")
            here.submit(f"{name}-2")
            here.link.up()
            return ["flush"]

        words = spooled("traced")
        done = here.ctl(
            *words, prefix=("strace", "-q", "-o", str(tmp_path / "t"), "-e", f"trace={','.join(MUTATING)}")
        )
        assert done.code in (0, 65), done.err
        if verb == "cancel":
            here.link.up()
        kills = kills_of(tmp_path / "t")
        assert len(kills) >= 12
        names = []
        for number, kill in enumerate(kills):
            name = f"k{number}-{kill.call}-{kill.when}"
            words = spooled(name)
            if killed(here, kill, *words):
                names.append(name)
            if verb == "cancel":
                assert here.ctl(*words).code == 0  # said again, as a person would
                here.link.up()
            here.flush()
            assert here.waiting() == []
        assert len(names) >= len(kills) - 2
        if verb == "cancel":
            here.at_rest()
            assert here.ran() == []
            return
        here.check_once("traced", "traced-2", *names, *(f"{name}-2" for name in names))
        told = Counter(line["name"] for line in here.box.completions() if line.get("submitted_id"))
        wanted = {f"{name}-bad" for name in ["traced", *names]}
        assert {name: told[name] for name in wanted} == dict.fromkeys(wanted, 1)
        assert {item["state"] for item in here.ctl("spool", "list", "--json").json} == {"refused"}


def test_a_day_of_submits_offline_goes_over_in_order_in_one_flush() -> None:
    with world("queues: {default: {concurrency: 1}}\n") as here:
        here.link.down()
        names = [f"d{number:03}" for number in range(300)]
        box = far_box(here.link.path, str(here.box.state))
        for name in names:
            fields = {
                "id": new_task_id(),
                "task": name,
                "submitted_at": now_text(),
                "prompt": here.script(name),
            }
            assert submit_spooled(box, here.spool, fields, lambda _: None)["where"] == "spool"
        here.box.stop()  # the box is started again too, meanwhile
        here.box.start()
        here.link.up()
        flushed = here.flush()
        assert flushed.code == 0
        assert [item["id"] for item in flushed.json[0]["sent"]] == _ids_by_name(here, names)
        here.check_once(*names)
        assert here.ran() == names


def _ids_by_name(here: World, names: list[str]) -> list[str]:
    listed: list[dict[str, Any]] = here.ctl("list", "--json", "--all").json
    ids = {task["task"]: task["id"] for task in listed}
    return [ids[name] for name in names]


def test_a_flush_that_is_cut_anywhere_goes_on_where_it_stopped(here: World) -> None:
    here.link.clear()
    sent, received = bytes_of_one_submit(here)
    names = []
    for number in range(12):
        here.link.down()
        batch = [f"batch{number}-{n}" for n in range(4)]
        for name in batch:
            here.submit(name)
        names += batch
        here.link.up()
        here.link.clear()
        if number % 2:
            here.link.cut_sent = number * 4 * sent // 12
        else:
            here.link.cut_received = number * 4 * received // 12
        assert here.flush().code in (0, 69)
        at_peace(here)
    here.check_once(*names)
    order = [name for name in here.ran() if re.match(r"batch", name)]
    assert sorted(order) == sorted(names)


def test_the_answer_says_spool_only_while_the_entry_is_there(here: World) -> None:
    """An answer of `spool` for a task that nobody has would be a lost task."""
    here.link.clear()
    here.link.cut_received = 0
    done = here.submit("unsure")
    assert done.json["where"] == "spool"
    assert [
        json.loads((here.folder / name).read_bytes().splitlines()[0])["id"] for name in here.waiting()
    ] == [done.json["task_id"]]
    wait_for("the task", lambda: here.box.show(done.json["task_id"]).get("id"))  # the box has it too
    at_peace(here)
    here.check_once("unsure")
