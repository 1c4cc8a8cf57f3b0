"""A worker's output over the socket: growing, punched, hostile."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from agentqd.control.logs import read_piece
from agentqd.system.fsops import punch_hole

from .harness import Daemon

BLOCK = 4096


async def logs(daemon: Daemon, task_id: str, **query: Any) -> tuple[bytes, dict[str, str]]:
    params = {name: str(value) for name, value in query.items()}
    async with daemon.session.get(f"http://box/v1/tasks/{task_id}/logs", params=params) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "application/octet-stream"
        headers = {name: value for name, value in response.headers.items() if name.startswith("Agentq-")}
        return await response.read(), headers


async def running(daemon: Daemon) -> tuple[str, str]:
    """A running task and the path of its stdout."""
    daemon.connect_supervisor()
    task_id = await daemon.submit()
    await daemon.start_task(task_id)
    return task_id, str(daemon.attempt_folder(task_id) / "stdout")


def write(path: str, content: bytes) -> None:
    with open(path, "ab") as file:
        file.write(content)


async def test_a_running_tasks_output_is_read_in_pieces_and_has_no_end_yet(daemon: Daemon) -> None:
    task_id, path = await running(daemon)
    assert await logs(daemon, task_id) == (
        b"",
        {"Agentq-Offset": "0", "Agentq-Next-Offset": "0", "Agentq-Attempt": "1"},
    )
    write(path, b"hello world")
    data, headers = await logs(daemon, task_id, offset=2, limit=4)
    assert (data, headers["Agentq-Offset"], headers["Agentq-Next-Offset"]) == (b"llo ", "2", "6")
    assert (await logs(daemon, task_id, offset=99))[0] == b""
    assert "Agentq-End" not in (await logs(daemon, task_id, offset=11))[1]


async def test_the_end_is_said_only_once_all_is_read_and_the_attempt_is_over(daemon: Daemon) -> None:
    task_id, path = await running(daemon)
    write(path, b"0123456789")
    await daemon.end_task(task_id)
    assert "Agentq-End" not in (await logs(daemon, task_id, limit=9))[1]
    assert (await logs(daemon, task_id, offset=9))[1]["Agentq-End"] == "true"
    assert (await logs(daemon, task_id, stream="stderr"))[1]["Agentq-End"] == "true"  # it never wrote any


async def test_waiting_for_output_answers_with_the_first_bytes(daemon: Daemon) -> None:
    task_id, path = await running(daemon)
    waiting = asyncio.ensure_future(logs(daemon, task_id, wait_s=20))
    await daemon.until(lambda: daemon.server._room.watch._waiters)
    write(path, b"at last")
    assert (await waiting)[0] == b"at last"


async def test_waiting_for_output_answers_when_the_attempt_ends(daemon: Daemon) -> None:
    task_id, _ = await running(daemon)
    waiting = asyncio.ensure_future(logs(daemon, task_id, wait_s=20))
    await daemon.until(lambda: daemon.server._room.watch._waiters)
    await daemon.end_task(task_id)
    data, headers = await asyncio.wait_for(waiting, 5)
    assert (data, headers["Agentq-End"]) == (b"", "true")


async def test_the_punched_out_middle_is_skipped_never_given_as_zeros(daemon: Daemon) -> None:
    task_id, path = await running(daemon)
    write(path, b"h" * BLOCK + b"m" * 4 * BLOCK + b"t" * 100)
    with open(path, "r+b") as file:
        assert punch_hole(file.fileno(), BLOCK, 4 * BLOCK)
    head, first = await logs(daemon, task_id)
    assert (head, first["Agentq-Next-Offset"]) == (b"h" * BLOCK, str(BLOCK))
    tail, second = await logs(daemon, task_id, offset=BLOCK)
    assert (tail, second["Agentq-Offset"], second["Agentq-Truncated"]) == (b"t" * 100, str(5 * BLOCK), "true")
    await daemon.end_task(task_id, stdout_truncated=True)
    assert (await logs(daemon, task_id, offset=BLOCK))[0] == b"t" * 100
    assert (await logs(daemon, task_id, offset=BLOCK))[1]["Agentq-End"] == "true"


async def test_holes_that_the_worker_itself_made_are_its_zeros(daemon: Daemon) -> None:
    task_id, path = await running(daemon)
    with open(path, "wb") as file:
        file.seek(3 * BLOCK)
        file.write(b"x")
    await daemon.end_task(task_id)
    assert (await logs(daemon, task_id))[0] == bytes(3 * BLOCK) + b"x"


async def test_a_hole_that_appears_while_reading_makes_the_piece_be_read_again(
    daemon: Daemon, monkeypatch: Any
) -> None:
    _, path = await running(daemon)
    write(path, b"h" * BLOCK + b"m" * 2 * BLOCK + b"t" * 100)
    real, calls = os.pread, []

    def pread(fd: int, length: int, offset: int) -> bytes:
        if not calls:
            with open(path, "r+b") as file:
                punch_hole(file.fileno(), BLOCK, 2 * BLOCK)
        calls.append(offset)
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    folder = path.rpartition("/")[0]
    assert read_piece(folder, "stdout", 0, 1 << 20, None).data == b"h" * BLOCK
    assert len(calls) == 2


async def test_nothing_but_a_regular_file_in_true_folders_is_read(daemon: Daemon) -> None:
    task_id, path = await running(daemon)
    daemon.root.joinpath("secret").write_text("secret")
    where = f"/v1/tasks/{task_id}/logs"
    os.symlink(daemon.root / "secret", path)
    await daemon.fails("GET", where, 409, "log_unreadable")
    os.unlink(path)
    os.mkfifo(path)
    await daemon.fails("GET", where, 409, "log_unreadable")
    folder = daemon.attempt_folder(task_id)
    folder.rename(daemon.root / "elsewhere")
    (daemon.root / "elsewhere/stdout").unlink()
    (daemon.root / "elsewhere/stdout").write_text("secret")
    os.symlink(daemon.root / "elsewhere", folder)
    await daemon.fails("GET", where, 409, "log_unreadable")


async def test_an_attempt_that_never_was_is_404(daemon: Daemon) -> None:
    task_id = await daemon.submit()
    await daemon.fails("GET", f"/v1/tasks/{task_id}/logs", 404, "no_such_attempt")
    daemon.connect_supervisor()
    daemon.supervision.scheduler.wake()
    await daemon.until(lambda: task_id in daemon.supervision.live)
    await daemon.fails("GET", f"/v1/tasks/{task_id}/logs?attempt=2", 404, "no_such_attempt")
    await daemon.fails("GET", f"/v1/tasks/{task_id}/logs?stream=stdin", 400, "invalid_request")
