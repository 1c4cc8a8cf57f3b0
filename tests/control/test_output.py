"""The files of an attempt over the socket: listed, read in ranges, hostile, changed after their end."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from agentqd.control import output, outputfiles
from agentqd.core.task import read_task
from agentqd.loops import evidence
from agentqd.loops.finishing import AttemptEnd, finish_attempt
from agentqd.storage import tasks as store
from agentqd.supervisor import wire
from agentqd.system.fsops import open_beneath, punch_hole

from .harness import Daemon

BLOCK = 4096


async def ended(daemon: Daemon, files: dict[bytes, bytes], *, truncated: bool = False, **fields: Any) -> str:
    """A finished task that left these files in its attempt's folder (bytes names), recorded as the finisher does."""
    daemon.connect_supervisor()
    task_id = await daemon.submit(**fields)
    await daemon.start_task(task_id)
    folder = daemon.attempt_folder(task_id)
    for name, content in files.items():
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    now = daemon.clock.now_us()
    size = len(files.get(b"stdout", b""))
    exited = wire.Exited(
        task_id, 1, "inst", "boot", pid=4242, started_at=now - 1_000_000, ended_at=now, exit_code=0, stdout_bytes=size,
        stdout_truncated=truncated,
    )  # fmt: skip

    def unit(tx: Any) -> None:
        task = store.find(tx, task_id)
        assert task is not None
        request = read_task(store.spec_of(tx, task.seq)[0])
        asked = evidence.Asked(str(folder), request.workdir, request.expect, size, 0)
        finish_attempt(tx, daemon.box, AttemptEnd(task_id, 1, request, exited, seen=evidence.collect(asked)))

    await daemon.journal.commit(unit)
    daemon.supervision.live.pop(task_id, None)
    return task_id


def where(task_id: str, file: str | None = None) -> str:
    return f"/v1/tasks/{task_id}/attempts/1/files" + (f"/{file}" if file else "")


async def listed(daemon: Daemon, task_id: str) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in (await daemon.get(where(task_id)))["files"]}


async def read(
    daemon: Daemon, task_id: str, file: str, status: int = 200, **headers: str
) -> tuple[bytes, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with daemon.session.get(f"http://box{where(task_id, file)}", headers=named) as response:
        assert response.status == status, await response.text()
        return await response.read(), response.headers


async def test_the_files_of_an_ended_attempt_are_listed_and_read_byte_for_byte(daemon: Daemon) -> None:
    big = os.urandom(3 * 1024 * 1024 + 17)
    task_id = await ended(daemon, {b"stdout": b"hello", b"work/a/big.bin": big, b"work/empty": b""})
    files = await listed(daemon, task_id)
    assert [(name, item["kind"], item["bytes"]) for name, item in files.items()] == [
        ("stdout", "stream", 5), ("stderr", "stream", 0), ("empty", "artifact", 0), ("a/big.bin", "artifact", len(big)),
    ]  # fmt: skip
    item = files["a/big.bin"]
    assert item["sha256"] == hashlib.sha256(big).hexdigest()
    assert (await read(daemon, task_id, item["file"]))[0] == big
    assert (await read(daemon, task_id, "stdout"))[0] == b"hello"
    assert (await read(daemon, task_id, "stderr"))[0] == b""
    assert (await read(daemon, task_id, files["empty"]["file"]))[0] == b""


async def test_a_range_goes_on_where_a_cut_has_stopped_it(daemon: Daemon) -> None:
    big = os.urandom(2 * 1024 * 1024)
    task_id = await ended(daemon, {b"stdout": b"x", b"work/big": big})
    data, headers = await read(daemon, task_id, "a0", 206, Range="bytes=1500000-")
    assert (data, headers["Content-Range"]) == (big[1500000:], f"bytes 1500000-{len(big) - 1}/{len(big)}")
    assert (await read(daemon, task_id, "a0", 206, Range="bytes=10-19"))[0] == big[10:20]
    await read(daemon, task_id, "a0", 416, Range=f"bytes={len(big)}-")
    for text in ("bytes=-5", "bytes=5-4", "bytes=1-2,4-5", "lines=1-2", "bytes=a-"):
        await daemon.fails("GET", where(task_id, "a0"), 416, "bad_range", headers={"Range": text})


async def test_a_digest_is_worked_out_of_the_whole_file_when_it_is_asked_for(daemon: Daemon) -> None:
    task_id = await ended(daemon, {b"stdout": b"hello" * 1000})
    _, headers = await read(daemon, task_id, "stdout", 206, Range="bytes=0-0", Want_Repr_Digest="sha-256=1")
    wanted = base64.b64encode(hashlib.sha256(b"hello" * 1000).digest()).decode()
    assert headers["Repr-Digest"] == f"sha-256=:{wanted}:"
    assert "Repr-Digest" not in (await read(daemon, task_id, "stdout"))[1]


async def test_any_byte_may_stand_in_a_name_and_no_request_holds_a_path(daemon: Daemon) -> None:
    names = [b"a\nb", b"\x1b[2J", b"\xff\xfe/\xe9", b"..hidden", b"%2e%2e", b"?q=1#x", "ü".encode(), b"\\xff"]
    task_id = await ended(daemon, {b"stdout": b"x", **{b"work/" + name: b"<" + name for name in names}})
    files = [item for item in (await daemon.get(where(task_id)))["files"] if item["kind"] == "artifact"]
    assert [item for item in files if "problem" in item] == []
    got = {(await read(daemon, task_id, item["file"]))[0] for item in files}
    assert got == {b"<" + name for name in names}
    for file in (
        "..",
        "%2e%2e%2fprompt",
        "a99",
        "prompt",
        "exit.json",
        "%00",
        "%ff",
        "a-1",
        "a0%0a",
        "e",
        "ex",
    ):
        status, value = await daemon.ask("GET", where(task_id, file))
        assert status in (404, 405), (file, status, value)
    await daemon.fails("GET", "/v1/tasks/nope/attempts/1/files", 404, "no_such_task")
    await daemon.fails("GET", f"/v1/tasks/{task_id}/attempts/2/files", 404, "no_such_attempt")
    await daemon.fails("GET", f"/v1/tasks/{task_id}/attempts/0x1/files", 400, "invalid_request")


def secret_in_the_place_of(path: Path) -> None:
    """What a worker may do after its end."""
    outside = path.parent.parent.parent / "secret"
    outside.mkdir(exist_ok=True)
    (outside / "f").write_bytes(b"12345")
    if path.is_dir():
        path.rename(path.with_name("moved"))
        path.symlink_to(outside)
    else:
        path.unlink()
        path.symlink_to(outside / "f")


@pytest.mark.parametrize("replaced", ["work/d/f", "work/d", "work", "stdout"])
async def test_a_link_put_there_after_the_end_is_not_followed(daemon: Daemon, replaced: str) -> None:
    task_id = await ended(daemon, {b"stdout": b"12345", b"work/d/f": b"12345"})
    secret_in_the_place_of(daemon.attempt_folder(task_id) / replaced)
    name, file = ("stdout", "stdout") if replaced == "stdout" else ("d/f", "a0")
    assert (await listed(daemon, task_id))[name]["problem"] == "file_unreadable"
    await daemon.fails("GET", where(task_id, file), 409, "file_unreadable")


async def test_a_fifo_or_a_folder_in_the_place_of_a_file_is_neither_waited_for_nor_read(
    daemon: Daemon,
) -> None:
    task_id = await ended(daemon, {b"stdout": b"x", b"work/f": b"12345"})
    path = daemon.attempt_folder(task_id) / "work" / "f"
    path.unlink()
    os.mkfifo(path)
    await daemon.fails("GET", where(task_id, "a0"), 409, "file_unreadable")
    path.unlink()
    path.mkdir()
    await daemon.fails("GET", where(task_id, "a0"), 409, "file_unreadable")
    path.rmdir()
    await daemon.fails("GET", where(task_id, "a0"), 404, "file_gone")


async def test_a_file_that_has_another_size_than_was_recorded_is_told_and_not_sent(daemon: Daemon) -> None:
    task_id = await ended(daemon, {b"stdout": b"x", b"work/f": b"12345"})
    path = daemon.attempt_folder(task_id) / "work" / "f"
    path.write_bytes(b"123456")
    assert (await listed(daemon, task_id))["f"]["problem"] == "file_changed"
    error = await daemon.fails("GET", where(task_id, "a0"), 409, "file_changed")
    assert (error["bytes"], error["recorded_bytes"]) == (6, 5)


async def test_expected_files_of_a_workdir_are_read_below_it_and_nowhere_else(daemon: Daemon) -> None:
    workdir = daemon.root / "repo"
    (workdir / "out").mkdir(parents=True)
    (workdir / "out" / "report").write_bytes(b"good")
    (daemon.root / "outside").write_bytes(b"beside")
    expect = {"files": ["out/report", "../outside", f"{daemon.root}/outside"]}
    task_id = await ended(daemon, {b"stdout": b"x"}, workdir=str(workdir), expect=expect)
    files = await listed(daemon, task_id)
    assert (await read(daemon, task_id, files["out/report"]["file"]))[0] == b"good"
    for name in ("../outside", f"{daemon.root}/outside"):
        assert files[name]["problem"] == "file_unreadable"
        await daemon.fails("GET", where(task_id, files[name]["file"]), 409, "file_unreadable")


async def test_a_stream_that_was_written_and_is_gone_is_told(daemon: Daemon) -> None:
    task_id = await ended(daemon, {b"stdout": b"x"})
    (daemon.attempt_folder(task_id) / "stdout").unlink()
    files = await listed(daemon, task_id)
    assert (files["stdout"]["problem"], files["stderr"]["bytes"]) == ("file_gone", 0)
    await daemon.fails("GET", where(task_id, "stdout"), 404, "file_gone")
    assert (await read(daemon, task_id, "stderr"))[0] == b""


async def test_the_middle_that_was_punched_out_is_left_out_and_said(daemon: Daemon) -> None:
    head, middle, tail = b"h" * 4 * BLOCK, b"m" * 8 * BLOCK, b"t" * 3 * BLOCK
    task_id = await ended(daemon, {b"stdout": head + middle + tail}, truncated=True)
    with open(daemon.attempt_folder(task_id) / "stdout", "r+b") as file:
        if not punch_hole(file.fileno(), len(head), len(middle)):
            pytest.skip("this file system has no holes")
    item = (await listed(daemon, task_id))["stdout"]
    assert (item["bytes"], item["left_out_at"], item["left_out_bytes"]) == (
        len(head + tail), len(head), len(middle),
    )  # fmt: skip
    assert (await read(daemon, task_id, "stdout"))[0] == head + tail
    first = len(head) - 2
    assert (await read(daemon, task_id, "stdout", 206, Range=f"bytes={first}-"))[0] == b"hh" + tail


async def test_a_running_attempts_streams_are_listed_and_not_read(daemon: Daemon) -> None:
    daemon.connect_supervisor()
    task_id = await daemon.submit()
    await daemon.start_task(task_id)
    (daemon.attempt_folder(task_id) / "stdout").write_bytes(b"so far")
    shown = await daemon.get(where(task_id))
    assert (shown["ended"], shown["files"][0]["bytes"]) == (False, 6)
    await daemon.fails("GET", where(task_id, "stdout"), 409, "attempt_running")


async def test_a_file_opened_for_one_who_has_gone_is_closed(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = await ended(daemon, {b"stdout": b"x"})
    begun, go, closed = threading.Event(), threading.Event(), threading.Event()

    def slow(item: outputfiles.Recorded) -> outputfiles.OpenFile:
        begun.set()
        go.wait(10)
        opened = outputfiles.open_recorded(item)
        close = opened.close
        opened.close = lambda: (close(), closed.set())  # type: ignore[method-assign,return-value]
        return opened

    monkeypatch.setattr(output, "open_recorded", slow)
    asking = asyncio.ensure_future(daemon.get(where(task_id, "stdout")))
    await daemon.until(begun.is_set)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.sleep(0.1)  # the server hears of it
    go.set()
    await daemon.until(closed.is_set)


def test_open_beneath_takes_names_only(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"x")
    folder = os.open(tmp_path / "d", os.O_RDONLY)
    try:
        os.close(open_beneath(folder, ["f"]))
        for parts in (
            [],
            [""],
            ["."],
            [".."],
            ["..", "d", "f"],
            ["f/"],
            ["../d/f"],
            ["/etc/passwd"],
            ["f\0"],
        ):
            with pytest.raises(OSError, match="not a path below"):
                open_beneath(folder, parts)
    finally:
        os.close(folder)
