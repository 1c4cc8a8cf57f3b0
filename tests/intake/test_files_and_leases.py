"""Durable files, birth times, and who has a file open."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from agentqd.storage import files
from agentqd.storage.files import append_durably, open_regular, rename_to_free_name, write_durably
from agentqd.system import leases, statx
from agentqd.system.leases import has_writer, is_open_elsewhere, sole_holder
from agentqd.system.statx import birth_time_ns


@pytest.fixture
def calls(monkeypatch):
    made: list[str] = []
    for name in ("fsync", "rename", "write"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, name=name: (made.append(name), real(*args))[1])
    return made


def test_a_file_is_written_synced_renamed_and_its_folder_synced_in_that_order(tmp_path, calls):
    target = tmp_path / "result"
    target.write_bytes(b"old")
    write_durably(str(target), b"new", 0o640)
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert calls == ["write", "fsync", "rename", "fsync"]
    assert os.listdir(tmp_path) == ["result"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    target = tmp_path / "result"
    target.write_bytes(b"old")

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_durably(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["result"]


def test_an_append_is_one_write_and_heals_a_torn_end(tmp_path, calls):
    target = tmp_path / "rejected.jsonl"
    append_durably(str(target), b"one\n")
    assert calls == ["write", "fsync", "fsync"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    with target.open("ab") as file:
        file.write(b"to")
    calls.clear()
    append_durably(str(target), b"two\n")
    assert target.read_bytes() == b"one\nto\ntwo\n"
    assert calls == ["write", "fsync"]


def test_links_fifos_and_folders_are_never_opened_as_files(tmp_path):
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for name in ("link", "fifo", "folder"):
        with pytest.raises(OSError, match=r"regular|symbolic"):
            open_regular(str(tmp_path / name))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("has_renameat2", [True, False])
def test_a_rename_never_overwrites(tmp_path, monkeypatch, has_renameat2):
    if not has_renameat2:
        monkeypatch.setattr(files, "_renameat2", None)
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError):
        rename_to_free_name(str(tmp_path / "a"), str(tmp_path / "b"))
    rename_to_free_name(str(tmp_path / "a"), str(tmp_path / "c"))
    assert sorted(os.listdir(tmp_path)) == ["b", "c"]
    with pytest.raises(FileNotFoundError):
        rename_to_free_name(str(tmp_path / "a"), str(tmp_path / "d"))


def test_a_birth_time_stays_when_the_file_changes_and_differs_for_the_next_one(tmp_path, monkeypatch):
    path = tmp_path / "a"
    before = time.time_ns()
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    born = birth_time_ns(fd)
    if born:
        assert abs(born - before) < 5 * 10**9
    os.write(fd, b"x")
    os.utime(path, (1, 1))
    assert birth_time_ns(fd) == born
    monkeypatch.setattr(statx, "_statx", None)
    assert birth_time_ns(fd) == 0
    os.close(fd)


def test_a_writer_is_seen_and_a_reader_is_not_one(tmp_path):
    path = tmp_path / "a"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    assert has_writer(fd) is False
    with path.open("rb"):
        assert has_writer(fd) is False
    with path.open("ab"):
        assert has_writer(fd) is True
        assert is_open_elsewhere(str(path)) is True
        with sole_holder(fd) as alone:
            assert alone is False
    assert has_writer(fd) is False
    os.close(fd)
    assert is_open_elsewhere(str(path)) is False


def test_where_leases_are_not_supported_nobody_knows(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    real = leases.fcntl.fcntl

    def refuse(fd, command, value=0):
        if command == leases.fcntl.F_SETLEASE:
            raise OSError(22, "Invalid argument")
        return real(fd, command, value)

    monkeypatch.setattr(leases.fcntl, "fcntl", refuse)
    assert has_writer(fd) is None
    assert is_open_elsewhere(str(path)) is None
    os.close(fd)


def test_a_writer_that_comes_while_a_lease_is_held_waits_and_kills_nobody(tmp_path):
    path = tmp_path / "a"
    path.touch()
    holder = (
        "import os, sys, time\n"
        "from agentqd.system.leases import sole_holder\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "with sole_holder(fd) as alone:\n"
        "    assert alone\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.readline()\n"
        "print('alive', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError):
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # breaks the lease: the holder gets its signal here
    writer = subprocess.Popen(["/bin/sh", "-c", 'echo x >> "$1"', "sh", str(path)])
    out, _ = process.communicate(b"\n", timeout=20)
    assert out == b"alive\n"
    assert process.returncode == 0, signal.Signals(-process.returncode).name
    assert writer.wait(20) == 0
    assert path.read_bytes() == b"x\n"
