from __future__ import annotations

import json
import os
import subprocess
from typing import Any
from unittest import mock

import pytest

from agentqd.cli.verbs.enqueue import read_lines
from agentqd.client.queuefile import QueueFile
from agentqd.core.errors import InvalidTask, RefusedForNow
from agentqd.core.folders import Folders

from .conftest import Ctl
from .standin import StandIn


def lines_of(path: str) -> list[bytes]:
    with open(path, "rb") as file:
        content = file.read()
    assert content.endswith(b"\n")
    return content[:-1].split(b"\n")


def unnamed(ctl: Ctl) -> None:
    """No state folder is named; only the socket will be."""
    ctl.env |= {"AGENTQD_STATE_DIR": "", "AGENTQD_RUNTIME_DIR": ""}


def test_of_a_running_daemon_only_the_socket_needs_to_be_named(ctl: Ctl, daemon: StandIn) -> None:
    unnamed(ctl)
    daemon.status["daemon"]["state_dir"] = ctl.state
    done = ctl("--socket", ctl.socket, "enqueue", stdin=b'{"task":"a","id":"x"}')
    assert (done.code, done.out, done.err) == (0, "x\n", "")
    assert lines_of(ctl.queue_file) == [b'{"task":"a","id":"x"}']


def test_a_socket_that_leads_to_another_machine_is_no_way_to_its_queue_file(
    ctl: Ctl, daemon: StandIn
) -> None:
    unnamed(ctl)
    daemon.status["daemon"]["state_dir"] = f"{ctl.root}/elsewhere"
    done = ctl("--socket", ctl.socket, "enqueue", "--json", stdin=b'{"task":"a"}')
    assert done.code != 0
    assert "no queue folder on this machine" in done.json["message"]
    assert not os.path.exists(f"{ctl.root}/elsewhere")


def test_of_a_daemon_that_is_off_the_socket_alone_does_not_say_where_the_queue_file_is(ctl: Ctl) -> None:
    unnamed(ctl)
    done = ctl("--socket", ctl.socket, "enqueue", "--json", stdin=b'{"task":"a"}')
    assert (done.code, done.json["error"]) == (69, "unreachable")
    assert "give --state-dir too" in done.json["message"]


def test_lines_with_an_id_are_appended_as_they_were_written(ctl: Ctl) -> None:
    written = b'{"task":"a",  "id":"x-1", "n": 1.50}\n{"id":"x-2","task":"\xc3\xbc"}\n'
    done = ctl("enqueue", stdin=written)
    assert (done.code, done.out) == (0, "x-1\nx-2\n")
    with open(ctl.queue_file, "rb") as file:
        assert file.read() == written


def test_a_line_without_an_id_gets_one_and_it_is_printed(ctl: Ctl) -> None:
    done = ctl("enqueue", "--json", stdin=b'{"task":"a","prompt":"p"}\n\n{}')
    first, second = (json.loads(line) for line in lines_of(ctl.queue_file))
    assert done.json == {
        "ids": [first["id"], second["id"]],
        "where": "queue_file",
        "queue_file": ctl.queue_file,
    }
    assert len(first["id"]) == 20
    assert first["task"] == "a"


def test_an_object_on_several_lines_becomes_one_line(ctl: Ctl) -> None:
    with open(f"{ctl.root}/task.json", "w") as file:
        json.dump({"task": "a", "prompt": "p\nq", "id": "m"}, file, indent=2)
    assert ctl("enqueue", "task.json").out == "m\n"
    assert [json.loads(line) for line in lines_of(ctl.queue_file)] == [
        {"task": "a", "prompt": "p\nq", "id": "m"}
    ]


@pytest.mark.parametrize(
    "wrong", [b'{"a":1}\n[1]', b'{"a":1}\n{"b":', b'{"a":1}\n\xff', b'{"a":1}\nNaN', b'{"a":1}\n{"b":NaN}', b'{"a":1}\n{"b":"\x01"}', b'{\n"a" 1}']
)  # fmt: skip
def test_one_bad_line_and_nothing_is_enqueued(ctl: Ctl, wrong: bytes) -> None:
    done = ctl("enqueue", "--json", stdin=wrong)
    assert done.code == 65
    assert "line 2" in done.json["message"]
    assert not os.path.exists(ctl.queue_file)


@pytest.mark.parametrize(
    "line", [b'{"id":"d1","id":"d2","task":"t"}', b'{"task":"t",\n "env":{"A":"1","A":"2"}}']
)
def test_a_key_that_stands_twice_is_never_settled_in_silence(ctl: Ctl, line: bytes) -> None:
    done = ctl("enqueue", "--json", stdin=b'{"a":1}\n' + line)
    assert (done.code, done.json["error"]) == (65, "duplicate_field")
    assert "line 2: the key '" in done.json["message"]
    assert not os.path.exists(ctl.queue_file)


def test_nothing_on_stdin_is_an_error_not_a_success(ctl: Ctl) -> None:
    assert ctl("enqueue", stdin=b" \n\n").code == 65


def test_a_deeply_nested_line_is_an_error_not_a_crash() -> None:
    with pytest.raises(InvalidTask):
        read_lines(b'{"a":' + b"[" * 200_000)


def test_what_a_torn_writer_left_costs_only_itself(ctl: Ctl) -> None:
    with open(ctl.queue_file, "wb") as file:
        file.write(b'{"task":"torn","pro')
    ctl("enqueue", stdin=b'{"task":"a","id":"whole"}')
    ctl("submit", "p", "--id", "whole-too")
    torn, first, second = lines_of(ctl.queue_file)
    assert torn == b'{"task":"torn","pro'
    assert (json.loads(first)["id"], json.loads(second)["id"]) == ("whole", "whole-too")


def test_large_lines_from_six_processes_at_once_never_tear(ctl: Ctl) -> None:
    def feed(name: int) -> bytes:
        return b"".join(
            json.dumps({"id": f"w{name}-{number}", "task": "t", "prompt": chr(97 + name) * 300 * 1024}).encode() + b"\n" for number in range(8)
        )  # fmt: skip

    writers = [ctl.popen("enqueue", stdin=subprocess.PIPE) for _ in range(6)]
    for process in writers:  # all of them are up and wait for their input before the first one writes
        assert process.stdin is not None
    feeds = [feed(name) for name in range(6)]
    for process, content in zip(writers, feeds, strict=True):
        assert process.stdin is not None
        process.stdin.write(content)
    for process in writers:
        assert process.communicate(timeout=20)[1] == b""
    found = [json.loads(line) for line in lines_of(ctl.queue_file)]
    assert sorted(item["id"] for item in found) == sorted(
        f"w{name}-{number}" for name in range(6) for number in range(8)
    )
    assert all(
        set(item["prompt"]) == {chr(97 + int(item["id"][1]))} and len(item["prompt"]) == 300 * 1024
        for item in found
    )


def short_then_whole(times: int) -> Any:
    """os.write that writes half of what it is given, so many times."""
    real, left = os.write, [times]

    def write(fd: int, data: bytes) -> int:
        if left[0] > 0 and len(data) > 1:
            left[0] -= 1
            return real(fd, data[: len(data) // 2])
        return real(fd, data)

    return write


@pytest.fixture
def queue(tmp_path: Any) -> QueueFile:
    return QueueFile(Folders(str(tmp_path / "state"), str(tmp_path / "run")))


def test_a_short_write_is_closed_with_a_newline_and_the_line_written_whole(queue: QueueFile) -> None:
    line = b'{"task":"a","prompt":"0123456789"}'
    with mock.patch("os.write", short_then_whole(2)):
        queue.append([line])
    *torn, whole = lines_of(queue.path)
    assert whole == line
    assert len(torn) == 2
    assert all(line.startswith(part) for part in torn)


def test_a_line_that_cannot_be_written_whole_is_an_error_and_stays_closed_off(queue: QueueFile) -> None:
    from agentqd.core.errors import StateFolderError

    with mock.patch("os.write", short_then_whole(1000)), pytest.raises(StateFolderError):
        queue.append([b'{"task":"a"}'])
    assert lines_of(queue.path)


def test_a_full_disk_is_told_with_what_to_do(queue: QueueFile) -> None:
    with (
        mock.patch("os.write", side_effect=OSError(28, "No space left on device")),
        pytest.raises(RefusedForNow, match="free some space"),
    ):
        queue.append([b'{"task":"a"}'])


def test_nothing_counts_as_enqueued_before_the_fsync(queue: QueueFile) -> None:
    order: list[str] = []
    write, fsync = os.write, os.fsync
    with (
        mock.patch("os.write", lambda fd, data: (order.append("write"), write(fd, data))[1]),
        mock.patch("os.fsync", lambda fd: (order.append("fsync"), fsync(fd))[1]),
    ):
        queue.append([b"{}", b"{}"])
    last_write = len(order) - 1 - order[::-1].index("write")
    assert "fsync" in order[last_write:]
    with (
        mock.patch("os.fsync", side_effect=OSError(5, "Input/output error")),
        pytest.raises(Exception, match="Input/output"),
    ):
        queue.append([b"{}"])


def test_a_symlink_in_place_of_the_queue_file_is_not_followed(ctl: Ctl) -> None:
    os.symlink(f"{ctl.root}/target", ctl.queue_file)
    assert ctl("enqueue", stdin=b"{}").code == 1
    assert not os.path.exists(f"{ctl.root}/target")
