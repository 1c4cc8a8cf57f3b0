"""What a worker hands over: real files, real leases, hostile names."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentqd.core import limits
from agentqd.core.settings import Alerts, Queue, Settings, Sink
from agentqd.core.task import read_task
from agentqd.loops.dropfolder import Handed, How, Scan, record, scan
from agentqd.storage import tasks as store
from agentqd.storage.blobs import digest_of
from agentqd.storage.transaction import Transaction

from .harness import Bench

LARGE = limits.ENTRY_INLINE_BYTES_MAX + 1


@pytest.fixture
async def drop(bench: Bench) -> Path:
    """The drop folder of the running task `a`, which has two attempts."""
    bench.box.apply(Settings(sinks={"s": Sink(type="file", path="/x")}))
    await bench.connect()
    await bench.add(id="a", max_attempts=3)
    folder = Path(bench.folders.attempt("a", 1), "outbox")
    folder.mkdir(parents=True)
    (folder.parent / "work").mkdir()
    return folder


def _scan(drop: Path, how: How = "alive", taken: dict[str, Any] | None = None, most: int = 10**9) -> Scan:
    return scan(str(drop), str(drop.parents[3] / "blobs"), taken or {}, how, most)


async def _record(bench: Bench, found: list[Handed], attempt: int = 1) -> set[str]:
    def unit(tx: Transaction) -> set[str]:
        task = store.get(tx, 1)
        return record(tx, bench.box, task, read_task(store.spec_of(tx, 1)[0]), attempt, found)

    return await bench.do(unit)


async def _rows(bench: Bench) -> list[tuple[Any, ...]]:
    return await bench.rows("SELECT e.key, o.sink, o.state, o.last_error FROM outbox o JOIN entries e ON e.seq = o.entry_seq WHERE e.kind IN ('entry', 'broken') ORDER BY 1, 2")  # fmt: skip


def _keys(found: Scan) -> list[str]:
    return [item.key for item in found.handed]


class _Writer:
    """A process that keeps a file open for writing until told."""

    def __init__(self, path: Path) -> None:
        program = "import sys; f = open(sys.argv[1], 'a'); f.write('half'); f.flush(); print(1, flush=True); sys.stdin.read()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def close(self) -> None:
        self._process.communicate()


async def test_a_file_becomes_an_entry_with_its_content(bench: Bench, drop: Path) -> None:
    (drop / "note.txt").write_text("hällo")
    (drop / "data.json").write_text('{ "x": [1,\n 2] }')
    (drop / "blob.bin").write_bytes(b"\xff\x00")
    assert await _record(bench, _scan(drop).handed) == {"note.txt", "data.json", "blob.bin"}
    by_key = {data["key"]: data for data in await bench.entries("entry")}
    assert by_key["note.txt"]["content"] == "hällo"
    assert by_key["data.json"]["content"] == {"x": [1, 2]}
    assert by_key["blob.bin"]["content_base64"] == "/wA="
    assert {data["attempt"] for data in by_key.values()} == {1}
    assert {row[1:3] for row in await _rows(bench)} == {("completions", "pending")}


async def test_a_file_still_open_for_writing_is_not_taken_while_the_worker_lives(drop: Path) -> None:
    writer = _Writer(drop / "half.txt")
    try:
        assert (_keys(_scan(drop)), _scan(drop).waiting) == ([], 1)
        assert _keys(_scan(drop, "exited")) == ["half.txt"]  # somebody else has it open: the attempt is over
    finally:
        writer.close()
    assert _keys(_scan(drop)) == ["half.txt"]


async def test_a_mere_reader_does_not_keep_a_file_from_being_taken(drop: Path) -> None:
    (drop / "x.txt").write_text("x")
    with (drop / "x.txt").open():
        assert _keys(_scan(drop)) == ["x.txt"]


async def test_only_regular_files_without_a_leading_dot_are_taken(drop: Path) -> None:
    (drop / ".hidden").write_text("x")
    (drop / "folder").mkdir()
    os.mkfifo(drop / "fifo")
    (drop / "link").symlink_to("/etc/passwd")
    (drop / "dangling").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listener:
        folder = os.open(
            drop, os.O_RDONLY
        )  # entered by descriptor: a long path does not hit the kernel's 107 bytes
        listener.bind(f"/proc/self/fd/{folder}/sock")
        os.close(folder)
        found = _scan(drop)
    assert found.handed == []
    for name in ("folder", "fifo", "link", "dangling", "sock"):
        assert any(repr(name) in problem for problem in found.problems), name


async def test_a_name_that_is_not_utf8_can_be_recorded(bench: Bench, drop: Path) -> None:
    with open(os.fsencode(drop) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"x")
    found = _scan(drop)
    assert await _record(bench, found.handed) == set(_keys(found))
    assert _scan(drop, taken={item.key: item.identity for item in found.handed}).handed == []


async def test_a_file_that_was_taken_is_not_read_again_until_it_changes(drop: Path) -> None:
    (drop / "x.txt").write_text("x")
    taken = {item.key: item.identity for item in _scan(drop).handed}
    assert _scan(drop, taken=taken).handed == []
    (drop / "new").write_text("longer")
    (drop / "new").rename(drop / "x.txt")
    assert _keys(_scan(drop, taken=taken)) == ["x.txt"]


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b'"\\ud800"', b"[" * 100_000, b"{} x"])
async def test_json_that_does_not_parse_is_set_aside_and_told(
    bench: Bench, drop: Path, content: bytes
) -> None:
    (drop / "x.json").write_bytes(content)
    assert await _record(bench, _scan(drop, "exited").handed) == set()
    ((key, sink, state, error),) = await _rows(bench)
    assert (key, sink, state) == ("x.json", "completions", "dead")
    assert error.startswith("malformed")
    assert len(await bench.alerts("entry_malformed")) == 1


@pytest.mark.parametrize(("name", "content", "counts"), [("a.json", b"{}", True), ("a.json", b"{", False), ("a.txt", b"whole", False)])  # fmt: skip
async def test_after_a_kill_only_json_that_parses_counts_and_the_key_of_others_is_free(
    bench: Bench, drop: Path, name: str, content: bytes, counts: bool
) -> None:
    (drop / name).write_bytes(content)
    assert await _record(bench, _scan(drop, "killed").handed) == ({name} if counts else set())
    if counts:
        return
    assert [row[2:] for row in await _rows(bench)] == [("dead", "incomplete")]
    assert len(await bench.alerts("entry_incomplete")) == 1
    second = Path(bench.folders.attempt("a", 2), "outbox")
    second.mkdir(parents=True)
    (second / name).write_bytes(b"{}")
    assert await _record(bench, _scan(second, "exited").handed, attempt=2) == {name}
    assert sorted(row[2] for row in await _rows(bench)) == ["dead", "pending"]


async def test_after_a_kill_a_large_json_that_parses_counts(drop: Path) -> None:
    (drop / "large.json").write_bytes(b'"%s"' % (b"x" * LARGE))
    assert _scan(drop, "killed").handed[0].broken is None


async def test_the_same_content_again_is_a_repeat_and_other_content_is_told(bench: Bench, drop: Path) -> None:
    (drop / "x.txt").write_text("first")
    first = _scan(drop).handed
    await _record(bench, first)
    assert await _record(bench, first) == {"x.txt"}
    assert await bench.alerts("entry_conflict") == []
    (drop / "x.txt").write_text("second")
    for _ in range(2):
        assert await _record(bench, _scan(drop).handed, attempt=2) == {"x.txt"}
    assert [data["content"] for data in await bench.entries("entry")] == ["first"]
    assert len(await bench.alerts("entry_conflict")) == 1


async def test_a_large_file_is_copied_durably_and_named_by_its_path(bench: Bench, drop: Path) -> None:
    (drop / "large.bin").write_bytes(os.urandom(LARGE))
    (item,) = _scan(drop).handed
    assert item.blob is not None
    assert Path(item.blob).read_bytes() == (drop / "large.bin").read_bytes()
    (drop / "large.bin").write_bytes(b"the worker goes on")
    await _record(bench, [item])
    (data,) = await bench.entries("entry")
    assert (data["path"], data["bytes"]) == (item.blob, LARGE)
    assert Path(item.blob).stat().st_size == LARGE
    assert [name for name in os.listdir(Path(item.blob).parent) if name.startswith(".tmp-")] == []


async def test_a_file_over_the_limit_is_set_aside_unread(bench: Bench, drop: Path) -> None:
    (drop / "x.bin").write_bytes(b"x" * 100)
    assert await _record(bench, _scan(drop, most=99).handed) == set()
    assert (await _rows(bench))[0][3].startswith("too_large: 100 bytes")


async def test_a_folder_with_too_many_files_says_so(drop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ENTRIES_PER_TASK_MAX", 3)
    for n in range(5):
        (drop / f"f{n}").write_text("x")
    found = _scan(drop)
    assert _keys(found) == ["f0", "f1", "f2"]
    assert "5 files" in found.problems[0]


async def test_a_drop_folder_that_the_worker_removed_is_a_problem_only_while_it_lives(drop: Path) -> None:
    drop.rmdir()
    assert _scan(drop, "exited") == Scan([], 0, [])
    assert _scan(drop).problems


@pytest.mark.parametrize(
    ("fields", "sinks"),
    [
        ({"deliver_to": ["s"], "body": "x"}, ["completions", "s"]),
        ({"deliver_to": "s"}, ["completions", "s"]),
        ({"deliver_to": []}, ["completions"]),
        ({"body": "x"}, ["completions"]),
        ({"deliver_to": ["s"], "attachments": ["../work/plot.png", "x.json"]}, ["completions", "s"]),
    ],
)
async def test_a_json_entry_may_address_itself(bench: Bench, drop: Path, fields: dict[str, Any], sinks: list[str]) -> None:  # fmt: skip
    (drop.parent / "work" / "plot.png").write_bytes(b"png")
    (drop / "x.json").write_text(json.dumps(fields))
    await _record(bench, _scan(drop).handed)
    assert [(row[1], row[2]) for row in await _rows(bench)] == [(sink, "pending") for sink in sinks]


@pytest.mark.parametrize("name", ["deliver-to", "Deliver_To", "deliverTo", "deliver to"])
async def test_a_mistyped_deliver_to_is_set_aside_and_not_sent_elsewhere(
    bench: Bench, drop: Path, name: str
) -> None:
    (drop / "x.json").write_text(json.dumps({name: ["s"], "body": "x"}))
    assert await _record(bench, _scan(drop).handed) == set()
    assert {(row[2], row[3]) for row in await _rows(bench)} == {
        ("dead", f"malformed: {name!r} is no field of an entry; did you mean deliver_to?")
    }


async def test_other_fields_that_look_a_little_like_deliver_to_are_data(bench: Bench, drop: Path) -> None:
    (drop / "x.json").write_text('{"delivered_to": "me", "delivery": 1, "To": "you"}')
    assert await _record(bench, _scan(drop).handed) == {"x.json"}


async def test_a_sink_that_is_not_there_or_not_allowed_costs_only_its_own_row(
    bench: Bench, drop: Path
) -> None:
    sinks = {name: Sink(type="file", path="/x") for name in ("s", "pager", "other")}
    bench.box.apply(Settings(sinks=sinks, queues={"default": Queue(allow_deliver_to=["s"])}, alerts=Alerts(deliver_to=["other", "pager"])))  # fmt: skip
    (drop / "x.json").write_text('{"deliver_to": ["s", "pager", "nope"], "body": "x"}')
    (drop / "y.json").write_text('{"deliver_to": ["pager"]}')
    assert await _record(bench, _scan(drop).handed) == {"x.json", "y.json"}
    rows = {(key, sink): (state, why) for key, sink, state, why in await _rows(bench)}
    no, missing = rows.pop(("x.json", "pager")), rows.pop(("x.json", "nope"))
    assert rows.pop(("y.json", "pager")) == no
    assert no == ("dead", "not_allowed: the queue default does not allow 'pager'; it allows completions, s")
    assert missing == ("dead", "no_such_sink: the config has none of this name")
    assert set(rows) == {("x.json", "completions"), ("x.json", "s"), ("y.json", "completions")}
    assert {state for state, _ in rows.values()} == {"pending"}
    alerts = await bench.alerts("sink_refused")  # one for a task and sink, however many entries name it
    assert sorted((each["sink"], each["entry_key"]) for each in alerts) == [
        ("nope", "x.json"),
        ("pager", "x.json"),
    ]
    told = await bench.rows("SELECT o.sink FROM outbox o JOIN entries e ON e.seq = o.entry_seq WHERE e.type = 'agentq.alert.sink_refused' ORDER BY 1")  # fmt: skip
    assert told == [("other",), ("other",), ("pager",)]  # never over the sink that it is about
    await bench.counts_are_true()
    assert await _record(bench, _scan(drop).handed) == {"x.json", "y.json"}
    assert len(await bench.alerts("sink_refused")) == 2
    assert [kind for kind in await bench.events("a") if kind == "delivery_dead"] == ["delivery_dead"] * 3


async def test_a_worker_that_thinks_up_sinks_makes_only_so_many(bench: Bench, drop: Path) -> None:
    for n in range(limits.UNKNOWN_SINKS_MAX + 20):
        (drop / f"{n:03}.json").write_text(json.dumps({"deliver_to": [f"made-up-{n}", "s"]}))
    assert len(await _record(bench, _scan(drop).handed)) == limits.UNKNOWN_SINKS_MAX + 20
    sinks = {row[1] for row in await _rows(bench)}
    assert len(sinks - {"completions", "s"}) == limits.UNKNOWN_SINKS_MAX
    assert sum(row[1:3] == ("s", "pending") for row in await _rows(bench)) == limits.UNKNOWN_SINKS_MAX + 20
    assert len(await bench.alerts("sink_refused")) == limits.ALERTS_A_GROUP_MAX + 1
    bench.clock.advance(3601)
    await bench.do(lambda tx: (tx.execute("DELETE FROM outbox WHERE sink = 'made-up-0'"), tx.count_outbox("made-up-0", "dead", -1)))  # fmt: skip
    for name in ("late", "later"):
        (drop / f"{name}.json").write_text(json.dumps({"deliver_to": [name]}))
    await _record(bench, _scan(drop).handed)
    assert {row[1] for row in await _rows(bench) if row[1].startswith("late")} == {"late"}


async def test_a_storm_of_broken_files_is_told_up_to_a_bound_and_then_once_more(
    bench: Bench, drop: Path
) -> None:
    for n in range(limits.ALERTS_A_GROUP_MAX + 30):
        (drop / f"{n:03}.json").write_text("{")
    await _record(bench, _scan(drop).handed)
    alerts = await bench.alerts("entry_malformed")
    assert len(alerts) == limits.ALERTS_A_GROUP_MAX + 1
    assert [each["message"].startswith("more than 50 of these in an hour") for each in alerts] == [
        False
    ] * 50 + [True]
    assert (await bench.events("a")).count("entry_set_aside") == limits.ALERTS_A_GROUP_MAX + 30
    bench.clock.advance(3600)
    (drop / "later.json").write_text("{")
    await _record(bench, _scan(drop).handed)
    assert len(await bench.alerts("entry_malformed")) == limits.ALERTS_A_GROUP_MAX + 2


@pytest.mark.parametrize(
    "fields",
    [
        {"deliver_to": ["no pe"]},
        {"deliver_to": ["s", "../s"]},
        {"deliver_to": ["s", "rejected"]},
        {"deliver_to": ["n" * 65]},
        {"deliver_to": [f"n{n}" for n in range(33)]},
        {"deliver_to": 7},
        {"deliver_to": [7]},
        {"deliver_to": {"s": 1}},
        {"deliver_to": ["s"], "attachments": ["/etc/passwd"]},
        {"deliver_to": ["s"], "attachments": ["../../attempt-2/outbox/x"]},
        {"deliver_to": ["s"], "attachments": ["sneaky"]},
        {"deliver_to": ["s"], "attachments": ["a\x00b"]},
        {"deliver_to": ["s"], "attachments": "x"},
        {"deliver_to": ["s"], "attachments": [None]},
    ],
)
async def test_an_address_that_leads_nowhere_or_outside_is_malformed(bench: Bench, drop: Path, fields: dict[str, Any]) -> None:  # fmt: skip
    (drop / "x.json").write_text(json.dumps(fields))
    (drop / "sneaky").symlink_to("/etc/passwd")
    (item,) = _scan(drop).handed
    assert await _record(bench, [item]) == set()
    assert {row[2] for row in await _rows(bench)} == {"dead"}


async def test_attachments_are_found_in_a_state_folder_behind_a_symlink(
    bench: Bench, drop: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").symlink_to(bench.folders.state)
    bench.box.folders = type(bench.folders)(str(tmp_path / "elsewhere"), bench.folders.runtime)
    behind = Path(bench.folders.attempt("a", 1), "outbox")
    (behind.parent / "work" / "plot.png").write_bytes(b"png")
    for path in (
        "../work/plot.png",
        str(behind.parent / "work" / "plot.png"),
        str(drop.parent / "work" / "plot.png"),
    ):
        (drop / "y.json").write_text(json.dumps({"deliver_to": ["s"], "attachments": [path]}))
        (item,) = _scan(behind).handed
        assert (item.broken, len(item.attachments)) == (None, 1), path
    (drop / "y.json").unlink()
    (drop / "x.json").write_text('{"deliver_to": ["s"], "attachments": ["../work/plot.png"]}')
    assert await _record(bench, _scan(drop).handed) == {"x.json"}


async def test_entries_handed_over_at_the_end_are_evidence_and_come_with_the_finishing_commit(bench: Bench, drop: Path) -> None:  # fmt: skip
    (drop / "x.txt").write_text("x")
    commits = bench.journal.commits
    await bench.end("a", stdout_bytes=0, handed=_scan(drop, "exited").handed)
    assert bench.journal.commits == commits + 1
    assert (await bench.task("a")).result == "success"
    assert [data["key"] for data in await bench.entries("entry")] == ["x.txt"]


async def test_what_was_handed_over_survives_the_failure_of_its_worker(bench: Bench, drop: Path) -> None:
    (drop / "x.txt").write_text("x")
    await _record(bench, _scan(drop).handed)
    await bench.end("a", None, signal=int(signal.SIGKILL))
    assert (await bench.task("a")).state.value == "retryable"
    assert len(await bench.entries("entry")) == 1


# Attachments.


def _mail(drop: Path, *attachments: str, name: str = "m.json", **fields: Any) -> None:
    (drop / name).write_text(
        json.dumps({"to": "a@b.c", "body": "x", "attachments": list(attachments), **fields})
    )


async def test_attachments_are_our_own_durable_copies(bench: Bench, drop: Path) -> None:
    work = drop.parent / "work"
    (work / "deep").mkdir()
    (work / "deep" / "a.pdf").write_bytes(b"first")
    (drop / ".b.txt").write_bytes(b"second")
    _mail(drop, "../work/deep/a.pdf", ".b.txt", str(work / "deep" / "a.pdf"))
    await _record(bench, _scan(drop).handed)
    (work / "deep" / "a.pdf").write_bytes(b"the worker goes on")
    (drop / ".b.txt").unlink()
    (data,) = await bench.entries("entry")
    assert [(each["name"], each["bytes"]) for each in data["attachments"]] == [
        ("a.pdf", 5),
        (".b.txt", 6),
        ("a.pdf", 5),
    ]
    assert [Path(each["path"]).read_bytes() for each in data["attachments"]] == [
        b"first",
        b"second",
        b"first",
    ]
    assert all(digest_of(each["path"]) == each["sha256"] for each in data["attachments"])
    kept = {path for (path,) in await bench.rows("SELECT blob FROM attachments")}
    assert kept == {each["path"] for each in data["attachments"]}


@pytest.mark.parametrize("path", ["missing", "link", "linked/a", "fifo", "folder", "sock", "../work", "../outbox", "..", "../stdout", "", ".", "/", "a/../../stdout", "../../attempt-1/stdout", "x" * 300, "file/x"])  # fmt: skip
async def test_an_attachment_that_is_no_plain_file_below_the_folders_sets_its_mail_aside(
    bench: Bench, drop: Path, path: str
) -> None:
    (drop.parent / "stdout").write_text("secret")
    (drop / "file").write_text("x")
    (drop / "link").symlink_to("../stdout")
    (drop / "linked").symlink_to("/etc")
    (drop / "folder").mkdir()
    os.mkfifo(drop / "fifo")
    _mail(drop, path)
    found = [item for item in _scan(drop).handed if item.key == "m.json"]
    assert await _record(bench, found) == set()
    assert {(row[2], row[3].split(":")[0]) for row in await _rows(bench)} == {("dead", "malformed")}
    assert len(await bench.alerts("entry_malformed")) == 1


async def test_a_folder_that_becomes_a_link_is_not_followed(bench: Bench, drop: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("secret")
    (drop.parent / "work").rmdir()
    (drop.parent / "work").symlink_to(tmp_path / "elsewhere")
    _mail(drop, "../work/a")
    (item,) = _scan(drop).handed
    assert item.broken is not None
    assert item.broken.startswith("malformed")


async def test_attachments_count_in_the_limit_of_an_entry(
    drop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (drop / f".{name}").write_bytes(b"x" * 600)
    _mail(drop, ".a", ".b")
    (item,) = _scan(drop, most=1200).handed
    assert (item.broken or "").startswith("too_large: its attachments have 1200 bytes")
    assert not (drop.parents[3] / "blobs").exists(), "nothing is copied of what is not taken"
    assert _scan(drop, most=1400).handed[0].broken is None
    monkeypatch.setattr("agentqd.loops.attachments.ATTACHMENTS_MAX", 1)
    assert "more than 1" in (_scan(drop).handed[0].broken or "")


async def test_a_mail_waits_for_an_attachment_that_is_still_being_written(drop: Path) -> None:
    writer = _Writer(drop.parent / "work" / "slow.pdf")
    try:
        _mail(drop, "../work/slow.pdf")
        assert (_keys(_scan(drop)), _scan(drop).waiting) == ([], 1)
        assert _keys(_scan(drop, "exited")) == ["m.json"]
    finally:
        writer.close()
    assert _scan(drop).handed[0].attachments[0].bytes == len("half")


async def test_a_mail_that_was_taken_stays_taken_when_its_attachments_are_gone(
    bench: Bench, drop: Path
) -> None:
    """After a restart of the daemon the folder is read again."""
    (drop.parent / "work" / "a").write_text("x")
    _mail(drop, "../work/a")
    assert await _record(bench, _scan(drop).handed) == {"m.json"}
    (drop.parent / "work" / "a").unlink()
    assert await _record(bench, _scan(drop).handed) == {"m.json"}
    assert await bench.rows("SELECT kind FROM entries WHERE kind IN ('entry', 'broken', 'alert')") == [
        ("entry",)
    ]


async def test_data_that_is_called_attachments_is_no_matter(drop: Path) -> None:
    (drop / "d.json").write_text('{"attachments": {"count": 7}, "x": 1}')
    assert _scan(drop).handed[0].broken is None


# Large JSON.


async def test_a_large_json_is_looked_into_for_its_address(bench: Bench, drop: Path) -> None:
    (drop.parent / "work" / "a").write_text("x")
    _mail(drop, "../work/a", deliver_to=["s"], body="x" * LARGE)
    await _record(bench, _scan(drop).handed)
    assert [(row[1], row[2]) for row in await _rows(bench)] == [("completions", "pending"), ("s", "pending")]
    (data,) = await bench.entries("entry")
    assert (len(data["attachments"]), "path" in data) == (1, True)


@pytest.mark.parametrize("content", [b'{"x": "%s"' % (b"x" * LARGE), b"[" * LARGE, b"x" * LARGE])
async def test_a_large_json_that_does_not_parse_is_set_aside(drop: Path, content: bytes) -> None:
    (drop / "x.json").write_bytes(content)
    assert (_scan(drop).handed[0].broken or "").startswith("malformed")
    assert _scan(drop, "killed").handed[0].broken == "incomplete"


async def test_a_large_json_of_another_kind_is_data(drop: Path) -> None:
    (drop / "x.json").write_bytes(b'["%s"]' % (b"x" * LARGE))
    assert _scan(drop).handed[0].broken is None


async def test_a_json_too_large_to_be_looked_into_is_not_sent_anywhere(
    bench: Bench, drop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "JSON_CHECK_BYTES_MAX", LARGE)
    (drop / "x.json").write_bytes(b'{"deliver_to": ["s"], "x": "%s"}' % (b"x" * LARGE))
    assert await _record(bench, _scan(drop).handed) == set()
    ((_, sink, state, error),) = await _rows(bench)
    assert (sink, state) == ("completions", "dead")
    assert error.startswith("too_large")
