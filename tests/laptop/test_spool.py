"""submit with --box: where a task can stand, and the spool that holds it until the box is reached."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from realbox import wait_for

from agentqd.client import spool as spool_module
from agentqd.client.spool import Damaged, Spool
from agentqd.core.errors import RefusedForNow, StateFolderError

from .spoolworld import World, world

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]


@pytest.fixture
def make() -> Iterator[Callable[..., World]]:
    with ExitStack() as stack:
        yield lambda *args, **settings: stack.enter_context(world(*args, **settings))


@pytest.fixture
def here(make: Callable[..., World]) -> World:
    return make()


def ids_in(names: list[str]) -> list[str]:
    return [name.partition("-")[2].removesuffix(".json") for name in names]


def test_a_box_that_answers_takes_the_task_and_nothing_stays_here(here: World) -> None:
    done = here.submit("a")
    assert done.code == 0
    assert done.json["where"] == "accepted"
    assert here.waiting() == []
    here.check_once("a")


def test_with_no_network_the_task_is_kept_here_and_sent_by_a_flush_with_its_id(here: World) -> None:
    here.link.down()
    done = here.submit("a")
    assert done.code == 0
    assert (done.json["where"], done.json["state"], done.json["box"]) == ("spool", None, "box1")
    assert ids_in(here.waiting()) == [done.json["task_id"]]
    words = here.ctl("submit", here.script("b"))
    assert words.code == 0
    assert "spooled here, " in words.err
    assert "the box is not reachable" in words.err
    assert here.flush().code == 69

    here.link.up()
    flushed = here.flush()
    assert flushed.code == 0
    assert [item["id"] for item in flushed.json[0]["sent"]] == [done.json["task_id"], words.out.strip()]
    assert here.waiting() == []
    here.check_once("a")


def test_require_box_keeps_nothing_and_says_69(here: World) -> None:
    here.link.down()
    assert here.submit("a", "--require-box").code == 69
    assert here.waiting() == []
    here.link.up()
    assert here.submit("a", "--require-box").json["where"] == "accepted"
    here.check_once("a")


def test_a_box_without_a_daemon_takes_the_task_into_its_queue_file(here: World) -> None:
    here.box.stop()
    done = here.submit("a")
    assert (done.code, done.json["where"]) == (0, "queue_file")
    long = here.ctl("submit", "--json", "--task", "long", "--prompt-file", str(_long_prompt(here)))
    assert long.json["where"] == "queue_file"
    assert max(len(line) for line in here.box.queue_file.read_bytes().splitlines()) <= 16 * 1024
    words = here.ctl("submit", "--task", "b", here.script("b"))
    assert "queued on disk, the daemon is down (box1: " in words.err
    assert here.waiting() == []
    here.box.start()
    here.check_once("a", "b", "long")


def _long_prompt(here: World) -> Path:
    path = here.home / "prompt"
    path.write_text(f"{here.script('long')}\n: {'x' * 40_000}\n")
    return path


def test_what_is_older_goes_first(here: World) -> None:
    here.link.down()
    spooled = [here.submit(f"s{number}").json["task_id"] for number in range(3)]
    here.link.up()
    last = here.submit("last", "--after", spooled[2])
    assert last.json["where"] == "accepted"
    listed = here.ctl("list", "--json").json
    assert [task["id"] for task in reversed(listed)] == [*spooled, last.json["task_id"]]
    here.check_once("s0", "s1", "s2", "last")


@pytest.mark.parametrize("verb", [["status"], ["pull"], ["list"], ["show", "x"]])
def test_the_next_contact_of_any_verb_sends_what_waits(here: World, verb: list[str]) -> None:
    here.link.down()
    here.submit("a")
    here.link.up()
    here.ctl(*verb)
    assert here.waiting() == []
    here.check_once("a")


def test_a_daemon_of_this_machine_is_never_spooled_for(here: World) -> None:
    done = here.box.ctl("submit", "--json", here.script("a"), env={"XDG_STATE_HOME": str(here.state)})
    assert json.loads(done.stdout)["where"] == "accepted"
    assert not here.folder.parent.exists()


def test_a_refusal_that_is_waited_for_is_an_error_and_leaves_nothing_here(here: World) -> None:
    first = here.ctl("submit", "--json", "--writes", "/tmp/w1", "--id", "one", "sleep 60").json
    conflict = here.submit("b", "--writes", "/tmp/w1")
    assert (conflict.code, conflict.json["error"]) == (75, "write_conflict")
    assert conflict.json["conflicts"][0]["task_id"] == first["task_id"]
    taken = here.submit("c", "--id", "one")
    assert (taken.code, taken.json["error"]) == (65, "id_conflict")
    unknown = here.submit("d", "--deliver-to", "nowhere")
    assert (unknown.code, unknown.json["error"]) == (65, "unknown_sink")
    assert here.waiting() == []
    here.link.down()
    invalid = here.submit("e", "--timeout", "never")
    assert invalid.code == 65
    assert here.submit("f", "--id", "no/id").code == 65
    assert here.waiting() == []
    here.link.up()
    here.ctl("cancel", "one")
    here.at_rest()
    assert here.ran() == []


ONE_WRITES_W1 = {"task_id": "one", "task": "sleep 60", "path": "/tmp/w1"}


def test_all_that_stood_in_the_way_of_a_spooled_task_is_named(here: World) -> None:
    for name in ("one", "two"):
        here.ctl("submit", "--id", name, "--task", name, "--writes", f"/tmp/w/{name}", "sleep 60")
    here.link.down()
    task_id = here.submit("late", "--writes", "/tmp/w").json["task_id"]
    here.link.up()
    flushed = here.ctl("flush")
    lines = ["one (one) writes /tmp/w/one", "two (two) writes /tmp/w/two"]
    assert [line.strip() for line in flushed.err.splitlines()][-2:] == lines
    assert [line.strip() for line in here.ctl("wait", task_id).out.splitlines()][-2:] == lines
    for line in lines:
        assert line in here.ctl("show", task_id).out
    here.link.down()
    assert [line.strip() for line in here.ctl("show", task_id).out.splitlines()][-2:] == lines


def test_a_conflict_found_by_a_flush_is_a_refused_task_that_the_laptop_shows(here: World) -> None:
    here.ctl("submit", "--id", "one", "--writes", "/tmp/w1", "sleep 60")
    here.link.down()
    task_id = here.submit("late", "--writes", "/tmp/w1").json["task_id"]
    after = here.submit("next").json["task_id"]
    here.link.up()
    flushed = here.flush()
    assert flushed.code == 75
    assert flushed.json[0]["refused"][0]["error"] == "write_conflict"
    assert [item["id"] for item in flushed.json[0]["sent"]] == [after]

    shown = here.ctl("show", task_id, "--json").json
    assert (shown["state"], shown["result"], shown["reason"]) == ("finished", "refused", "write_conflict")
    assert here.ctl("wait", task_id).code == 125
    told = [line for line in here.box.completions() if line.get("task_id") == task_id]
    assert [line["status"] for line in told] == ["refused"]
    assert told[0]["conflicts"] == [ONE_WRITES_W1]
    assert flushed.json[0]["refused"][0]["conflicts"] == [ONE_WRITES_W1]
    assert shown["conflicts"] == [ONE_WRITES_W1]
    assert here.ctl("wait", task_id, "--json").json["conflicts"] == [ONE_WRITES_W1]
    here.link.down()  # what the box has said is known here too
    assert here.ctl("show", task_id, "--json").json["conflicts"] == [ONE_WRITES_W1]
    here.link.up()
    here.box.until_pullable(len(here.box.completions()))
    pulled = [json.loads(line) for line in here.ctl("pull").out.splitlines()]
    assert task_id in {row.get("task_id") for row in pulled}
    assert [item["state"] for item in here.ctl("spool", "list", "--json").json] == ["refused"]

    here.ctl("cancel", "one")
    again = here.submit("late", "--writes", "/tmp/w1", "--id", task_id)
    assert again.json["where"] == "accepted"  # a refused id is free again
    assert here.ctl("wait", task_id).code == 0
    assert here.ctl("spool", "drop", "--refused").code == 0
    assert here.ctl("spool", "list", "--json").json == []


def test_what_a_flush_finds_invalid_is_rejected_like_a_line_and_shown_here(here: World) -> None:
    here.link.down()
    task_id = here.submit("bad", "--deliver-to", "nowhere").json["task_id"]
    here.link.up()
    flushed = here.flush()
    assert flushed.code == 65
    assert flushed.json[0]["refused"][0]["error"] == "unknown_sink"
    told = wait_for(
        "the rejection",
        lambda: [line for line in here.box.completions() if line.get("submitted_id") == task_id],
    )
    assert [(line["status"], line["reason"], line["task_id"]) for line in told] == [
        ("refused", "unknown_sink", None)
    ]
    assert [line["reason"] for line in wait_for("rejected.jsonl", here.box.rejected)] == ["unknown_sink"]
    shown = here.ctl("show", task_id, "--json").json
    assert (shown["result"], shown["reason"], shown["where"]) == ("refused", "unknown_sink", "spool")
    waited = here.ctl("wait", task_id, "--json")
    assert (waited.code, waited.json["result"], waited.json["reason"]) == (125, "refused", "unknown_sink")
    assert here.ctl("logs", task_id).code == 69


@pytest.mark.parametrize("kind", ["conflict", "invalid"])
def test_a_refusal_whose_answer_is_lost_is_recorded_once(here: World, kind: str) -> None:
    here.ctl("submit", "--id", "one", "--writes", "/tmp/w1", "sleep 60")
    here.link.down()
    more = ["--writes", "/tmp/w1"] if kind == "conflict" else ["--deliver-to", "nowhere"]
    task_id = here.submit("late", *more).json["task_id"]
    here.link.up()
    here.link.cut_received = 0
    assert here.flush().code == 69
    here.link.clear()
    here.ctl("--box", "", "cancel", "one", box=False)
    assert here.flush().code == (75 if kind == "conflict" else 65)

    def told() -> list[dict[str, object]]:
        lines = here.box.completions()
        return [line for line in lines if task_id in (line.get("task_id"), line.get("submitted_id"))]

    wait_for("the refusal", told)
    here.ctl("cancel", "one")
    here.at_rest()
    assert [line["status"] for line in told()] == ["refused"]
    assert here.ran() == []


def test_what_is_refused_for_now_stays_and_holds_back_what_is_behind_it(here: World) -> None:
    here.link.down()
    ids = [here.submit(name).json["task_id"] for name in ("a", "b")]
    here.link.up()
    here.box.api("POST", "/v1/drain", {"on": True})  # not by a verb: that would be a contact
    flushed = here.flush()
    assert (flushed.code, flushed.json[0]["left"], flushed.json[0]["stopped"]["reason"]) == (
        75,
        2,
        "draining",
    )
    waits = here.submit("c")
    assert (waits.code, waits.json["where"]) == (0, "spool")
    assert here.ctl("show", ids[0], "--json").json["where"] == "spool"
    here.box.api("POST", "/v1/drain", {"on": False})
    assert here.flush().code == 0
    here.check_once("a", "b", "c")


def test_a_refusal_for_now_of_what_is_waited_for_is_told_at_once(here: World) -> None:
    here.ctl("drain")
    done = here.submit("a")
    assert (done.code, done.json["reason"]) == (75, "draining")
    assert here.waiting() == []


def test_cancel_is_spooled_too_and_sent_in_order(here: World) -> None:
    here.ctl("submit", "--id", "one", "sleep 60")
    here.link.down()
    done = here.ctl("cancel", "one", "--json")
    assert (done.code, done.json["where"], done.json["state"]) == (0, "spool", None)
    assert here.ctl("cancel", "one").code == 0
    assert len(here.waiting()) == 1
    here.link.up()
    assert here.flush().code == 0
    assert here.box.wait_state("one", "finished")["result"] == "cancelled"


def test_a_cancelled_submission_that_is_still_here_never_runs(here: World) -> None:
    here.link.down()
    task_id = here.submit("a").json["task_id"]
    done = here.ctl("cancel", task_id)
    assert done.code == 0
    assert "was still spooled here" in done.err
    here.submit("b")
    here.link.up()
    assert here.flush().code == 0
    here.check_once("b")
    assert here.ran() == ["b"]
    assert here.ctl("show", task_id).code == 66


def test_a_cancelled_submission_that_had_reached_the_box_is_cancelled_there(here: World) -> None:
    here.link.cut_received = 0
    done = here.ctl("submit", "--json", "sleep 60")
    assert done.json["where"] == "spool"  # nobody knows here that the box has it
    here.link.clear()
    task_id = done.json["task_id"]
    here.link.down()
    assert here.ctl("cancel", task_id).code == 0
    here.link.up()
    assert here.flush().code == 0
    assert here.box.wait_state(task_id, "finished")["result"] == "cancelled"


def test_the_cancellation_of_a_task_that_no_box_knows_is_told(here: World) -> None:
    here.link.down()
    here.ctl("cancel", "nobody")
    here.link.up()
    flushed = here.flush()
    assert flushed.code == 66
    assert "nobody" in here.ctl("spool").out


def test_a_cancellation_waits_for_the_daemon_and_lets_submissions_pass(here: World) -> None:
    here.ctl("submit", "--id", "one", "sleep 60")
    here.box.stop()
    assert here.ctl("cancel", "one", "--json").json["where"] == "spool"
    assert here.submit("a").json["where"] == "queue_file"
    assert len(here.waiting()) == 1
    here.box.start()
    assert here.flush().code == 0
    assert here.box.wait_state("one", "finished")["result"] == "cancelled"
    here.check_once("a")


def test_show_wait_and_logs_know_a_task_that_is_still_here(here: World) -> None:
    here.link.down()
    task_id = here.submit("a").json["task_id"]
    shown = here.ctl("show", task_id)
    assert shown.code == 0
    assert "not yet sent to box1" in shown.out
    assert here.ctl("show", task_id, "--json").json["where"] == "spool"
    logs = here.ctl("logs", task_id)
    assert (logs.code, "still spooled here" in logs.err) == (69, True)
    timed = here.ctl("wait", task_id, "--timeout", "300ms", "--json")
    assert (timed.code, timed.json["finished"]) == (124, False)
    with (
        here.popen("--box", "box1", "wait", task_id) as waiting,
        here.popen("--box", "box1", "logs", "-f", task_id) as reader,
    ):
        assert waiting.stderr is not None
        assert b"not yet sent" in waiting.stderr.readline()
        here.link.up()
        assert waiting.wait(30) == 0
        assert reader.communicate(timeout=30)[0] == b"done\n"
    here.check_once("a")


def test_submit_with_wait_outlasts_a_box_that_is_away(here: World) -> None:
    here.link.down()
    with here.popen("--box", "box1", "submit", "--wait", "--task", "a", here.script("a")) as process:
        wait_for("the spooled task", here.waiting)
        here.link.up()
        assert process.wait(30) == 0
    here.check_once("a")


def test_the_same_id_again_is_one_task_and_other_content_under_it_is_refused(here: World) -> None:
    here.link.down()
    here.submit("a", "--id", "one")
    again = here.submit("a", "--id", "one")
    assert (again.code, again.json["duplicate"], again.json["where"]) == (0, True, "spool")
    other = here.submit("b", "--id", "one")
    assert (other.code, other.json["error"]) == (65, "id_conflict")
    assert len(here.waiting()) == 1
    here.link.up()
    assert here.flush().code == 0
    here.check_once("a")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 9),
    "empty": lambda path: os.truncate(path, 0),
    "zeroes": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a changed byte": lambda path: path.write_bytes(path.read_bytes().replace(b"done", b"dome")),
    "another name": lambda path: path.rename(path.with_name("000000000001-other.json")),
    "deep JSON": lambda path: path.write_bytes(b"[" * 60_000 + b"\n{}\n"),
    "a link": lambda path: (path.rename(path.parent.parent / "elsewhere"), path.symlink_to("../elsewhere")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "x").touch()),
    "gone": lambda path: (path.unlink(), path.with_name("x\x1b[31m\n\udcff.json").touch()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_set_aside_told_and_blocks_nothing(here: World, damage: str) -> None:
    here.link.down()
    here.submit("a")
    here.submit("b")
    path = here.folder / here.waiting()[0]
    DAMAGES[damage](path)
    here.link.up()
    flushed = here.ctl("flush")
    assert flushed.code == 1
    assert "moved to" in flushed.err
    assert "\x1b" not in flushed.err
    here.check_once("b")
    assert here.ran() == ["b"]
    assert len(os.listdir(here.folder / "damaged")) == 1
    assert [item["state"] for item in here.ctl("spool", "list", "--json").json] == ["damaged"]
    assert here.flush().code == 0


def test_two_flushes_and_submits_at_once_double_nothing_and_keep_the_order(here: World) -> None:
    here.link.down()
    names = [f"n{number}" for number in range(12)]
    ids = [here.submit(name).json["task_id"] for name in names]
    here.link.up()
    runs = [here.popen("--box", "box1", "flush") for _ in range(3)]
    runs += [here.popen("--box", "box1", "submit", "--task", f"m{n}", here.script(f"m{n}")) for n in range(3)]
    for run in runs:
        with run:
            _, err = run.communicate(timeout=60)
            assert run.returncode == 0, err.decode()
    assert here.flush().code == 0
    assert here.waiting() == []
    listed = [task["id"] for task in reversed(here.ctl("list", "--json").json)]
    assert listed[: len(ids)] == ids
    here.check_once(*names, "m0", "m1", "m2")


def test_what_another_process_attends_to_is_left_to_it(here: World) -> None:
    here.link.down()
    here.submit("a")
    here.link.up()
    kept = here.spool.adopt(here.spool.entries()[0])
    assert kept is not None
    flushed = here.flush()
    assert (flushed.code, flushed.json[0]["busy"], flushed.json[0]["left"]) == (0, True, 1)
    kept.release()
    assert here.flush().json[0]["left"] == 0
    here.check_once("a")


def test_the_spool_is_private_also_where_it_was_opened_to_others(here: World) -> None:
    here.link.down()
    here.submit("a")
    modes = {path.stat().st_mode & 0o777 for path in [here.folder, here.folder / here.waiting()[0]]}
    assert modes == {0o700, 0o600}
    here.folder.chmod(0o777)
    here.submit("b")
    assert here.folder.stat().st_mode & 0o777 == 0o700


def test_a_box_that_is_not_known_any_more_keeps_the_others_from_nothing(here: World) -> None:
    here.link.down()
    here.submit("a")
    Spool(f"{here.state}/agentqctl/spool", "away").put("submit", "x1", "x", b"{}").release()
    here.link.up()
    flushed = here.ctl("flush", "--json", box=False)
    assert flushed.code == 2
    assert {item["box"]: item["left"] for item in flushed.json} == {"away": 1, "box1": 0}
    here.check_once("a")


def test_a_box_that_nobody_knows_is_an_error_and_nothing_is_kept(here: World) -> None:
    done = here.ctl("--box", "nobody", "submit", "x", box=False)
    assert done.code == 2
    assert here.ctl("spool", "list", "--json", box=False).json == []


def test_a_box_name_is_never_a_path(here: World) -> None:
    for name in ("../x", "/tmp", ".", "a/b"):
        assert here.ctl("--box", name, "submit", "x", box=False).code == 2


# The files alone.


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(str(tmp_path / "spool"), "box1")


def test_entries_come_back_as_they_were_put_and_in_order(spool: Spool) -> None:
    for number in range(12):
        spool.put("submit", f"t{number}", "n\u0301\n", b'{"a": %d}' % number).release()
    assert [entry.id for entry in spool.entries()] == [f"t{number}" for number in range(12)]
    assert [spool.read(entry)[1] for entry in spool.entries()] == [
        b'{"a": %d}' % number for number in range(12)
    ]


def test_looking_at_an_empty_spool_makes_nothing_and_costs_one_listdir(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: (calls.append(path), real(path))[1])
    assert spool.is_empty()
    assert calls == [spool.folder]
    assert not os.path.exists(os.path.dirname(spool.folder))


def test_a_full_spool_refuses_for_now_and_leaves_no_draft(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "SPOOL_ENTRIES_MAX", 2)
    for number in range(2):
        spool.put("submit", f"t{number}", "n", b"{}").release()
    with pytest.raises(RefusedForNow, match="is full"):
        spool.put("submit", "t3", "n", b"{}")
    assert len(spool.entries()) == 2
    assert [name for name in os.listdir(spool.folder) if name.endswith(".draft")] == []
    monkeypatch.setattr(spool_module, "SPOOL_BYTES_MAX", 500)
    monkeypatch.setattr(spool_module, "SPOOL_ENTRIES_MAX", 9)
    with pytest.raises(RefusedForNow, match="is full"):
        spool.put("submit", "t3", "n", b"x" * 500)


def test_a_spool_folder_of_somebody_else_or_a_link_is_refused(spool: Spool, tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", spool.folder)
    with pytest.raises(StateFolderError, match="not a folder of ours"):
        spool.put("submit", "t", "n", b"{}")
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_head_that_names_another_task_is_damage(spool: Spool) -> None:
    spool.put("submit", "t", "n", b"{}").release()
    (entry,) = spool.entries()
    os.rename(f"{spool.folder}/{entry.file}", f"{spool.folder}/000000000001-u.json")
    with pytest.raises(Damaged):
        spool.read(spool.entries()[0])


@pytest.mark.root
def test_a_full_disk_here_keeps_no_half_entry_and_the_box_is_asked_at_once(here: World) -> None:
    here.state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(here.state)], check=True)
    try:
        here.link.down()
        assert here.submit("small").json["where"] == "spool"
        before = here.waiting()
        big = ["submit", "--json", "--task", "big", "--prompt-file", str(_big_prompt(here))]
        full = here.ctl(*big)
        assert full.code == 75
        assert full.json["reason"] == "disk_full"
        assert "cannot be reached either" in full.json["message"]
        assert here.waiting() == before
        here.link.up()
        assert here.ctl(*big).json["where"] == "accepted"
        assert here.flush().code == 0
        here.check_once("small", "big")
    finally:
        subprocess.run(["umount", str(here.state)], check=True)


def _big_prompt(here: World) -> Path:
    path = here.home / "big"
    path.write_text(f"{here.script('big')}\n: {'x' * 100_000}\n")
    return path
