"""What `pull --to` leaves in its folder, and what it does when this machine or the other side is not as it should be."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cli.standin import StandIn
from conftest import MakeBox
from realbox import RealBox, wait_for

pytestmark = pytest.mark.real

PROGRAM = [sys.executable, "-m", "agentqd.cli.main"]


def pull(box: RealBox, *words: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [*PROGRAM, "--socket", str(box.runtime / "agentqd.sock"), "pull", *words],
        capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False, **more,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


def rows(done: subprocess.CompletedProcess[bytes]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def acknowledged(box: RealBox) -> dict[str, int]:
    return {each["name"]: each["acknowledged"] for each in box.api("GET", "/v1/consumers")[1]["consumers"]}


def run(box: RealBox, task_id: str, prompt: str, **fields: Any) -> dict[str, Any]:
    box.append({"task": fields.pop("task", task_id), "id": task_id, "prompt": prompt, **fields})
    wait_for(
        task_id, lambda: any(row.get("task_id") == task_id and "status" in row for row in box.completions())
    )
    box.until_pullable(len(box.completions()))
    return next(row for row in box.completions() if row.get("task_id") == task_id and "status" in row)


def test_each_result_has_its_folder_and_the_row_says_where(box: RealBox, tmp_path: Path) -> None:
    run(box, "one", "echo out; echo err >&2; mkdir a; echo 1 > a/b", task="My job: über/../x")
    run(box, "two", "exit 7")
    run(box, "none", "x", writes_to=["/srv/a"], expires_at="2020-01-01T00:00:00Z")
    done = pull(box, "--to", str(tmp_path / "to"))
    assert done.returncode == 0, done.stderr
    folders = [row["dir"] for row in rows(done)]
    assert folders == [
        str(tmp_path / "to" / name) for name in ("My_job__über_.._x-one", "two-two", "none-none")
    ]
    files = {
        str(p.relative_to(folders[0])): p.read_text() for p in Path(folders[0]).rglob("*") if p.is_file()
    }
    row = json.loads(files.pop("result.json"))
    assert (row["task_id"], row["status"], "dir" in row) == ("one", "success", False)
    assert files == {"stdout": "out\n", "stderr": "err\n", "artifacts/a/b": "1\n"}
    assert sorted(os.listdir(folders[1])) == ["result.json", "stderr", "stdout"]
    assert os.listdir(folders[2]) == ["result.json"]


def test_an_acknowledged_row_is_not_fetched_again_and_another_consumer_gets_it_too(
    box: RealBox, tmp_path: Path
) -> None:
    run(box, "one", "echo out")
    to = str(tmp_path / "to")
    assert len(rows(pull(box, "--to", to))) == 1
    assert rows(pull(box, "--to", to)) == []
    again = pull(box, "--to", to, "--consumer", "other")  # the same folder: known by its result.json
    assert [row["dir"] for row in rows(again)] == [f"{to}/one-one"]
    assert len(rows(pull(box, "--to", str(tmp_path / "own"), "--consumer", "third"))) == 1
    assert sorted(os.listdir(to)) == [".agentqctl", "one-one"]
    assert acknowledged(box) == {"default": 1, "other": 1, "third": 1}


def test_no_ack_fetches_and_leaves_the_row_where_it_is(box: RealBox, tmp_path: Path) -> None:
    run(box, "one", "echo out")
    for _ in range(2):
        assert len(rows(pull(box, "--to", str(tmp_path / "to"), "--no-ack"))) == 1
    assert acknowledged(box) == {}
    assert os.listdir(tmp_path / "to" / ".agentqctl") == ["lock"]


def test_a_second_run_of_a_task_overwrites_nothing(box: RealBox, tmp_path: Path) -> None:
    run(box, "one", "echo out $AGENTQ_ATTEMPT")
    to = tmp_path / "to"
    pull(box, "--to", str(to))
    assert box.ctl("retry", "one").returncode == 0
    box.until_pullable(2)
    assert [row["dir"] for row in rows(pull(box, "--to", str(to)))] == [f"{to}/one-one.2"]
    assert [(to / name / "stdout").read_text() for name in ("one-one", "one-one.2")] == ["out 1\n", "out 2\n"]


def test_what_stands_in_the_way_is_not_touched(box: RealBox, tmp_path: Path) -> None:
    run(box, "one", "echo out")
    to, outside = tmp_path / "to", tmp_path / "outside"
    outside.mkdir()
    to.mkdir()
    (to / "one-one").symlink_to(outside)
    (to / "one-one.2").mkdir()
    (to / "one-one.2" / "stdout").write_text("a person's")
    assert [row["dir"] for row in rows(pull(box, "--to", str(to)))] == [f"{to}/one-one.3"]
    assert os.listdir(outside) == []
    assert (to / "one-one.2" / "stdout").read_text() == "a person's"


def test_entries_come_as_they_are_handed_over_and_their_result_joins_them(
    box: RealBox, tmp_path: Path
) -> None:
    prompt = """
        echo '{"a": 1}' > $AGENTQ_OUTBOX/small.json; head -c 700000 /dev/urandom > d; cp d .d; mv .d "$AGENTQ_OUTBOX/large bin"
        while [ ! -e go ]; do sleep 0.02; done; echo done"""
    box.append({"task": "t", "id": "t", "prompt": prompt})
    box.until_pullable(2)
    to = tmp_path / "to"
    done = pull(box, "--to", str(to))
    assert (done.returncode, len(rows(done))) == (0, 2), done.stderr
    assert json.loads((to / "t-t" / "entries" / "small.json").read_text()) == {"a": 1}
    large = (to / "t-t" / "entries" / "large bin").read_bytes()
    assert large == (box.attempt_folder("t") / "work" / "d").read_bytes()
    assert os.listdir(to / "t-t") == ["entries"]
    (box.attempt_folder("t") / "work" / "go").touch()
    box.until_pullable(3)
    assert [row["dir"] for row in rows(pull(box, "--to", str(to)))] == [f"{to}/t-t"]
    assert sorted(os.listdir(to / "t-t")) == ["artifacts", "entries", "result.json", "stderr", "stdout"]
    rows(pull(box, "--to", str(to), "--consumer", "again"))
    assert sorted(os.listdir(to / "t-t" / "entries")) == ["large bin", "small.json"]


def test_a_file_changed_after_its_end_is_told_once_and_the_pull_goes_on(box: RealBox, tmp_path: Path) -> None:
    run(
        box,
        "one",
        "echo out; echo 1 > kept; echo 12345 > same_size; echo 1 > gone; echo 1 > larger; echo 1 > link",
    )
    run(box, "two", "echo out")
    work = box.attempt_folder("one") / "work"
    (work / "same_size").write_text("54321\n")
    (work / "gone").unlink()
    (work / "larger").write_text("12")
    (work / "larger").write_text("1234567")
    (work / "link").unlink()
    (work / "link").symlink_to("/etc/passwd")
    began = time.monotonic()
    done = pull(box, "--to", str(tmp_path / "to"))
    assert time.monotonic() - began < 10
    first, second = rows(done)
    assert done.returncode == 1
    told = {problem["path"]: problem["reason"] for problem in first["problems"]}
    assert told == {
        "same_size": "file_changed", "gone": "file_gone", "larger": "file_changed", "link": "file_unreadable",
    }  # fmt: skip
    assert os.listdir(tmp_path / "to" / "one-one" / "artifacts") == ["kept"]
    assert json.loads((tmp_path / "to" / "one-one" / "problems.json").read_text()) == first["problems"]
    assert b"one (one): same_size: its content is no longer what was recorded" in done.stderr
    assert "problems" not in second
    assert acknowledged(box) == {"default": 2}


def test_a_hook_is_run_for_each_row_and_its_failure_is_told_and_stops_nothing(
    box: RealBox, tmp_path: Path
) -> None:
    run(box, "one", "echo out", task="it's; touch $HOME/evil")
    run(box, "two", "exit 3")
    hook = 'cat >> "$AGENTQ_DIR/row"; env | grep ^AGENTQ_ | sort > "$AGENTQ_DIR/env"; echo printed; exit 9'
    done = pull(box, "--to", str(tmp_path / "to"), "--exec", hook)
    first, second = rows(done)
    assert done.returncode == 0
    assert done.stderr.count(b"printed\n") == 2
    assert b"--exec: exit 9 for two (two)" in done.stderr
    folder = Path(first["dir"])
    assert json.loads((folder / "row").read_text())["task_id"] == "one"
    assert (folder / "env").read_text().splitlines() == [
        f"AGENTQ_DELIVERY_ID={first['delivery_id']}",
        f"AGENTQ_DIR={folder}",
        "AGENTQ_NAME=it's; touch $HOME/evil",
        "AGENTQ_STATUS=success",
        "AGENTQ_TASK_ID=one",
    ]
    assert "AGENTQ_STATUS=failed" in (Path(second["dir"]) / "env").read_text()
    assert acknowledged(box) == {"default": 2}
    without = pull(box, "--consumer", "c", "--exec", 'test -z "$AGENTQ_DIR" && cat > /dev/null')
    assert (without.returncode, without.stderr, len(rows(without))) == (0, b"", 2)


def test_a_disk_that_takes_no_more_is_told_and_nothing_is_acknowledged(box: RealBox, tmp_path: Path) -> None:
    run(box, "one", "echo out; head -c 300000 /dev/zero > big")
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = pull(box, "--to", str(tmp_path / "to"), preexec_fn=small)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"nothing of this row was acknowledged" in done.stderr
    assert acknowledged(box) == {}
    assert os.listdir(tmp_path / "to") == [".agentqctl"]
    assert len(rows(pull(box, "--to", str(tmp_path / "to")))) == 1


def test_what_an_earlier_pull_left_spoilt_is_fetched_anew(box: RealBox, tmp_path: Path) -> None:
    """As a power cut may leave it: the size is there, the bytes are not."""
    run(box, "one", "head -c 300000 /dev/urandom | tee big; echo end")
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    assert pull(box, "--to", str(tmp_path / "to"), preexec_fn=small).returncode == 1
    (part,) = [
        path for path in (tmp_path / "to").rglob("*") if path.is_file() and path.stat().st_size == 200_000
    ]
    part.write_bytes(bytes(200_000))
    (row,) = rows(pull(box, "--to", str(tmp_path / "to")))
    folder = Path(row["dir"])
    assert (folder / "stdout").read_bytes() == (box.attempt_folder("one") / "stdout").read_bytes()
    assert (folder / "artifacts" / "big").read_bytes() == (
        box.attempt_folder("one") / "work" / "big"
    ).read_bytes()
    assert "problems" not in row


def test_a_stream_whose_middle_was_punched_out_comes_without_it_and_says_so(
    make_box: MakeBox, tmp_path: Path
) -> None:
    box = make_box("limits: {stdout_bytes_max: 1MiB}\n")
    run(box, "one", "head -c 3000000 /dev/urandom | tr '\\0' x; sleep 1.5; echo end")
    (row,) = rows(pull(box, "--to", str(tmp_path / "to")))
    (problem,) = row["problems"]
    stdout = (Path(row["dir"]) / "stdout").read_bytes()
    assert (problem["path"], problem["reason"]) == ("stdout", "left_out")
    assert len(stdout) + problem["left_out_bytes"] == 3_000_004
    assert b"\0" not in stdout
    assert stdout.endswith(b"end\n")


def test_a_result_whose_folder_somebody_took_away_before_its_acknowledgement_is_fetched_again(
    box: RealBox, tmp_path: Path
) -> None:
    run(box, "one", "echo out")
    to = tmp_path / "to"
    hook = f'mv "$AGENTQ_DIR" {tmp_path}/moved; kill -9 $PPID'
    assert pull(box, "--to", str(to), "--exec", hook).returncode == -9
    (row,) = rows(pull(box, "--to", str(to)))
    assert (Path(row["dir"]) / "stdout").read_text() == "out\n"


@pytest.mark.root
def test_a_full_disk_is_told_and_the_pull_goes_on_where_it_stopped(box: RealBox, tmp_path: Path) -> None:
    run(box, "one", "echo out; head -c 3000000 /dev/urandom > big")
    to = tmp_path / "to"
    to.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(to)], check=False, capture_output=True
    )
    if mount.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        done = pull(box, "--to", str(to))
        assert (done.returncode, done.stdout) == (1, b"")
        assert b"No space left on device; nothing of this row was acknowledged: make room" in done.stderr
        assert acknowledged(box) == {}
        subprocess.run(["mount", "-o", "remount,size=8m", str(to)], check=True)
        (row,) = rows(pull(box, "--to", str(to)))
        big = (to / "one-one" / "artifacts" / "big").read_bytes()
        assert hashlib.sha256(big).hexdigest() == row["artifacts"][0]["sha256"]
    finally:
        subprocess.run(["umount", str(to)], check=True)


def test_a_folder_that_is_a_file_or_in_use_is_refused_at_once(box: RealBox, tmp_path: Path) -> None:
    run(box, "one", "echo out")
    (tmp_path / "file").write_text("")
    assert pull(box, "--to", str(tmp_path / "file")).returncode == 1
    command = [
        *PROGRAM,
        "--socket",
        str(box.runtime / "agentqd.sock"),
        "pull",
        "--follow",
        "--to",
        str(tmp_path / "to"),
    ]
    with subprocess.Popen([*command, "--consumer", "f"], stdout=subprocess.PIPE) as following:
        try:
            assert following.stdout is not None
            following.stdout.readline()
            done = pull(box, "--to", str(tmp_path / "to"))
        finally:
            following.kill()
    assert done.returncode == 75
    assert b"another pull writes there" in done.stderr
    assert "default" not in acknowledged(box)


@pytest.mark.root
def test_a_folder_that_may_not_be_written_is_told(box: RealBox, tmp_path: Path) -> None:
    run(box, "one", "echo out")
    target = tmp_path / "to"
    target.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(target)], check=False, capture_output=True
    )
    if mount.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        done = pull(box, "--to", str(target))
    finally:
        subprocess.run(["umount", str(target)], check=True)
    assert done.returncode == 1
    assert b"Read-only file system" in done.stderr
    assert acknowledged(box) == {}


# A box that lies.


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[StandIn]:
    path = f"/tmp/aqp-{os.getpid()}-{time.monotonic_ns()}"
    standin = StandIn(path).start()
    row = {
        "seq": 1,
        "task_id": "t",
        "name": "n",
        "status": "success",
        "attempt": 1,
        "delivery_id": "d1",
        "pulled": False,
    }
    standin.completions = [row]
    yield standin
    standin.stop()


def from_liar(liar: StandIn, to: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [*PROGRAM, "--socket", liar.path, "pull", "--to", str(to), *words],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


def offer(liar: StandIn, name: str, content: bytes = b"evil", **changes: Any) -> None:
    item = {"file": "a0", "kind": "artifact", "name": name, "bytes": len(content), "sha256": None, **changes}

    async def listing(_: web.Request) -> web.StreamResponse:
        return web.json_response({"files": [item]})

    async def bytes_of(request: web.Request) -> web.StreamResponse:
        first = int(request.headers["Range"].removeprefix("bytes=").split("-")[0])
        headers = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
        return web.Response(status=206, body=content[first:], headers=headers)

    liar.answers[("GET", "/v1/tasks/t/attempts/1/files")] = listing
    liar.answers[("GET", "/v1/tasks/t/attempts/1/files/a0")] = bytes_of


EVIL = hashlib.sha256(b"evil").hexdigest()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "..", "", "a//b", "a\0b", "./x"])
def test_a_name_that_leads_out_of_the_folder_is_an_error_and_nothing_is_acknowledged(
    liar: StandIn, tmp_path: Path, name: str
) -> None:
    offer(liar, name, sha256=EVIL)
    done = from_liar(liar, tmp_path / "to")
    assert (done.returncode, done.stdout, liar.acknowledged) == (69, b"", {})
    assert b"would lead out of its folder" in done.stderr
    assert not list(tmp_path.rglob("x"))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]


@pytest.mark.parametrize("field", ["name", "task_id", "delivery_id"])
@pytest.mark.parametrize(
    "text", ["../../x", "/x", "..", ".agentqctl", "\x1b[2J", "-rf", "a" * 5000, "", "\ud800"]
)
def test_no_field_of_a_row_leads_out_of_the_folder(
    liar: StandIn, tmp_path: Path, field: str, text: str
) -> None:
    liar.completions[0][field] = text
    offer(liar, "x", sha256=EVIL)
    to = tmp_path / "in" / "to"
    done = from_liar(liar, to)
    assert sorted(os.listdir(tmp_path)) == ["in"]
    assert os.listdir(tmp_path / "in") == ["to"]
    if liar.acknowledged:
        (folder,) = [path for path in to.iterdir() if path.name != ".agentqctl"]
        assert folder.is_dir()
        assert folder.name.isprintable()
        assert not folder.name.startswith((".", "-"))
        assert (folder / "result.json").exists()
    else:
        assert (field, done.returncode) == ("delivery_id", 69)


def test_bytes_that_are_not_those_of_the_sum_are_not_kept(liar: StandIn, tmp_path: Path) -> None:
    offer(liar, "x", sha256="0" * 64)
    done = from_liar(liar, tmp_path / "to")
    assert done.returncode == 1
    assert [problem["reason"] for problem in rows(done)[0]["problems"]] == ["file_changed"]
    assert sorted(os.listdir(tmp_path / "to" / "n-t")) == ["artifacts", "problems.json", "result.json"]
    assert os.listdir(tmp_path / "to" / "n-t" / "artifacts") == []
    assert len(liar.requests("GET", "/v1/tasks/t/attempts/1/files/a0")) == 2


def test_an_old_box_without_the_route_is_told_and_nothing_is_acknowledged(
    liar: StandIn, tmp_path: Path
) -> None:
    async def nothing_here(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": "not_found", "message": "there is nothing at GET ..."}, status=404)

    liar.answers[("GET", "/v1/tasks/t/attempts/1/files")] = nothing_here
    done = from_liar(liar, tmp_path / "to")
    assert (done.returncode != 0, done.stdout, liar.acknowledged) == (True, b"", {})


def test_folders_of_results_have_the_users_own_modes(liar: StandIn, tmp_path: Path) -> None:
    offer(liar, "x", sha256=EVIL)
    assert from_liar(liar, tmp_path / "to").returncode == 0
    assert stat.S_IMODE((tmp_path / "to" / ".agentqctl").stat().st_mode) == 0o700
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "to" / "n-t" / "artifacts" / "x").stat().st_mode) == 0o666 & ~mask
