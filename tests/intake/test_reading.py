"""The queue folder is read: lines once, in order, from the committed position; whatever happens to the files."""

import os
import shutil
import socket
import stat
import time

import pytest

from agentqd.storage import queuefile

from .reader import task


def test_lines_are_handed_out_again_until_they_are_committed(reader):
    reader.append(task(1), task(2))
    first, again = reader.queue.read(), reader.queue.read()
    assert [line.raw for line in first.lines] == [task(1), task(2)]
    assert again.lines == first.lines
    assert again.position == first.position
    reader.queue.forget()
    assert reader.queue.read().lines == first.lines
    reader.commit(first)
    assert reader.drain() == []


def test_a_restart_goes_on_at_the_committed_position(reader):
    reader.append(task(1))
    reader.drain()
    reader.append(task(2))
    reader.queue.read()
    reader.restart()
    assert reader.drain() == [task(2)]
    assert reader.codes() == []


def test_a_failed_commit_whose_outcome_was_a_success_is_read_from_the_journal(reader):
    reader.append(task(1), task(2))
    chunk = reader.queue.read(max_lines=1)
    reader.queue.forget(chunk.positions)
    reader.journal = {position.source: position for position in chunk.positions}
    assert reader.drain() == [task(2)]


def test_an_old_chunk_committed_late_does_not_move_a_file_that_was_cut_since(reader):
    reader.append(task(1), task(2))
    chunk = reader.queue.read()
    os.truncate(reader.live, 0)
    reader.append(task(3))
    reader.commit(chunk)
    assert reader.drain() == [task(3)]
    reader.restart()
    assert reader.drain() == []


def test_an_incomplete_line_waits_for_its_newline_and_costs_no_rereading(reader, monkeypatch):
    with reader.live.open("ab", buffering=0) as writer:
        writer.write(task(1, 40_000)[:30_000])
        assert reader.drain() == []
        read_bytes = []
        pread = os.pread
        monkeypatch.setattr(
            queuefile.os,
            "pread",
            lambda fd, size, at: read_bytes.append(size) or pread(fd, size, at),
            raising=True,
        )
        for _ in range(50):
            assert reader.step() is None
        monkeypatch.undo()
        assert sum(read_bytes) == 0, "nothing is before offset 0, and what was looked at is not read again"
        writer.write(task(1, 40_000)[30_000:] + b"\n")
    assert reader.drain() == [task(1, 40_000)]


def test_an_endless_line_is_scanned_once_never_kept_and_set_aside_when_its_newline_comes(make_reader):
    reader = make_reader(line_bytes_max=1000)
    with reader.live.open("ab", buffering=0) as writer:
        for _ in range(40):
            writer.write(b"x" * 5000)
            assert reader.drain(max_bytes=2048) == []
        writer.write(b"\n" + task(1) + b"\n")
    chunk = reader.step(max_bytes=2048)
    assert [(line.offset, line.length, line.too_long) for line in chunk.lines] == [(0, 200_001, True)]
    assert reader.rejected == [b"x" * 1000]
    assert reader.drain(max_bytes=2048) == [task(1)]
    reader.restart()
    assert reader.drain() == []
    assert reader.codes() == []


def test_a_scan_of_a_huge_line_comes_back_to_its_caller_in_between(make_reader, monkeypatch):
    monkeypatch.setattr(queuefile, "SCAN_BYTES_MAX", 10_000)
    reader = make_reader(line_bytes_max=100)
    reader.append(b"y" * 50_000)
    chunks = []
    while (chunk := reader.step(max_bytes=1000)) is not None:
        chunks.append(chunk)
    assert sum(chunk.is_empty for chunk in chunks) == 3
    assert reader.rejected == [b"y" * 100]


def test_a_line_of_exactly_the_limit_is_whole_also_when_it_is_longer_than_a_chunk(make_reader):
    reader = make_reader(line_bytes_max=5000)
    reader.append(b"a" * 5000, b"b" * 5001, b"c")
    assert reader.drain(max_bytes=1024) == [b"a" * 5000, b"c"]
    assert reader.rejected == [b"b" * 5000]


def test_a_writer_that_takes_back_its_own_half_line_costs_nothing(reader):
    reader.append(task(1))
    reader.drain()
    size = reader.live.stat().st_size
    with reader.live.open("ab") as writer:
        writer.write(b'{"half')
    reader.drain()
    os.truncate(reader.live, size)
    reader.append(task(2))
    assert reader.drain() == [task(2)]
    assert reader.codes() == []


@pytest.mark.parametrize("while_away", [False, True])
def test_a_truncated_file_is_an_alert_and_is_read_from_its_start(reader, while_away):
    reader.append(task(1), task(2), task(3))
    reader.drain()
    reader.live.write_bytes(task(1) + b"\n")
    if while_away:
        reader.restart()
    assert reader.drain() == [task(1)]
    assert reader.codes() == ["truncated"]
    reader.append(task(4))
    assert reader.drain() == [task(4)]
    assert reader.codes() == ["truncated"], "told once"


@pytest.mark.parametrize("while_away", [False, True])
def test_a_rewrite_in_place_of_the_same_size_is_noticed(reader, while_away):
    reader.append(task(1), task(2))
    reader.drain()
    with reader.live.open("r+b") as file:
        file.write(task(7))
    if while_away:
        reader.restart()
    assert reader.drain() == [task(7), task(2)]
    assert reader.codes() == ["changed_in_place"]


def test_a_notice_is_told_again_until_its_commit(reader):
    reader.append(task(1), task(2))
    reader.drain()
    os.truncate(reader.live, 3)
    first = reader.queue.read()
    assert [notice.code for notice in first.notices] == ["truncated"]
    reader.queue.forget()
    assert [notice.code for notice in reader.queue.read().notices] == ["truncated"]
    reader.restart()
    assert reader.drain() == []
    assert reader.codes() == ["truncated"]


def test_a_tail_of_nul_bytes_after_a_power_cut_is_a_changed_file_or_a_bad_line(reader):
    reader.append(task(1), task(2))
    size = reader.live.stat().st_size
    reader.drain()
    os.truncate(reader.live, size - 10)
    os.truncate(reader.live, size + 20)  # the size survived the cut, the data did not
    reader.append(task(3))
    assert reader.drain() == [task(1), task(2)[:-9] + b"\x00" * 30 + task(3)]
    assert reader.codes() == ["changed_in_place"]


@pytest.mark.parametrize("while_away", [False, True])
def test_a_replacement_by_a_copy_with_more_lines_goes_on_where_it_was(reader, while_away):
    reader.append(*(task(n) for n in range(100)))
    reader.drain()
    reader.append(task(100))  # not read before the copy
    copy = reader.folder / "tasks.jsonl.new"
    shutil.copy(reader.live, copy)
    with copy.open("ab") as file:
        file.write(task(101) + b"\n")
    copy.rename(reader.live)
    if while_away:
        reader.restart()
    assert reader.drain() == [task(100), task(101)]
    assert reader.codes() == []
    assert len(reader.journal) == 1
    reader.restart()
    assert reader.drain() == []


def test_a_line_that_a_replacement_does_not_have_is_still_read_from_the_old_file(reader):
    reader.append(task(1), task(2))
    reader.drain()
    copy = reader.folder / "copy"
    shutil.copy(reader.live, copy)
    reader.append(task(3), task(4))
    with copy.open("ab") as file:
        file.write(task(3) + b"\n" + task(5) + b"\n")
    copy.rename(reader.live)
    assert sorted(reader.drain()) == [task(3), task(4), task(5)]


def test_a_deleted_file_is_never_taken_for_the_one_that_has_its_name_now(reader):
    reader.drain()
    reader.append(task(1))
    for turn in range(2):
        shutil.copy(reader.live, reader.folder / "new")
        (reader.folder / "new").rename(reader.live)
        if turn == 0:
            reader.maintain(10**6)  # commits the positions, reads nothing
    reader.restart()
    assert reader.drain() == [task(1)]


def test_unread_lines_of_a_deleted_file_are_not_skipped_in_a_later_copy_of_it(reader):
    reader.drain()
    reader.append(task(1))
    for number in (2, 3):  # twice: not to be told from a deletion and a new file
        shutil.copy(reader.live, reader.folder / "new")
        (reader.folder / "new").rename(reader.live)
        reader.append(task(number))
        time.sleep(0.02)  # the clock of the file system must tick
    reader.live.rename(reader.folder / "tasks.jsonl.2")
    reader.append(task(4))
    reader.maintain(10**6)
    reader.restart()  # the descriptor of the first file is gone
    assert set(reader.drain()) == {task(1), task(2), task(3), task(4)}


@pytest.mark.parametrize("while_away", [False, True])
def test_a_replacement_by_other_content_is_an_alert_and_is_read_from_its_start(reader, while_away):
    reader.append(task(1))
    reader.drain()
    other = reader.folder / "other"
    other.write_bytes(task(8) + b"\n" + task(9) + b"\n")
    other.rename(reader.live)
    if while_away:
        reader.restart()
    assert reader.drain() == [task(8), task(9)]
    assert reader.codes() == ["vanished" if while_away else "replaced"]


def test_a_deleted_file_is_read_to_its_end_and_made_anew(reader):
    reader.append(task(1))
    reader.drain()
    reader.append(task(2))
    reader.live.unlink()
    assert reader.drain() == [task(2)]
    assert reader.codes() == ["vanished"]
    assert reader.live.exists()
    assert reader.drain() == []
    assert len(reader.journal) == 1
    reader.append(task(3))
    assert reader.drain() == [task(3)]


def test_the_same_line_in_a_new_file_after_a_deletion_is_a_new_line(reader):
    reader.append(task(1))
    reader.drain()
    reader.live.unlink()
    assert reader.drain() == []
    reader.append(task(1), task(1))
    assert reader.drain() == [task(1), task(1)]


def test_a_writer_that_holds_a_deleted_file_is_waited_for(reader):
    with reader.live.open("ab", buffering=0) as writer:
        reader.live.unlink()
        assert reader.drain() == []
        writer.write(task(1) + b"\n" + task(2)[:5])
        assert reader.drain() == [task(1)]
        writer.write(task(2)[5:] + b"\n" + b'{"torn')
        assert reader.drain() == [task(2)]
        assert len(reader.queue.positions()) == 2
    reader.drain()
    assert reader.rejected == [b'{"torn'], "nobody can end it any more"
    assert len(reader.queue.positions()) == 1


def test_a_deleted_folder_is_made_anew_and_loses_no_unread_line(reader):
    reader.append(task(1))
    shutil.rmtree(reader.folder)
    assert reader.drain() == [task(1)]
    assert sorted(reader.codes()) == ["folder_vanished", "vanished"]
    reader.append(task(2))
    assert reader.drain() == [task(2)]
    assert stat.S_IMODE(reader.folder.stat().st_mode) == 0o700


def make_fifo(path):
    os.mkfifo(path)


def make_link(path):
    (path.parent / "elsewhere").write_bytes(b'{"task":"evil","prompt":"x"}\n')
    path.symlink_to("elsewhere")


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        here = os.open(path.parent, os.O_RDONLY)
        made.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (os.mkdir, "not_a_file"),
        (make_fifo, "not_a_file"),
        (make_socket, "not_a_file"),
        (make_link, "symlink"),
    ],
)
def test_what_is_no_regular_file_is_told_once_and_never_read(reader, make, code):
    reader.append(task(1))
    reader.live.unlink()
    make(reader.live)
    assert reader.drain() == [task(1)]
    assert reader.codes() == ["vanished", code] or reader.codes() == [code, "vanished"]
    reader.drain()
    assert len(reader.codes()) == 2
    reader.restart()
    assert reader.drain() == []
    os.rename(reader.live, reader.folder / "away")
    assert reader.drain() == []
    reader.append(task(2))
    assert reader.drain() == [task(2)]


def test_a_file_that_cannot_be_opened_is_told_once_and_tried_again(reader, monkeypatch):
    other = reader.folder / "other"
    other.write_bytes(task(1) + b"\n")
    other.rename(reader.live)
    real = os.open

    def refuse(path, *rest, **more):
        if str(path).endswith("tasks.jsonl"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        assert reader.drain() == []
        assert reader.drain() == []
        assert reader.codes().count("unreadable") == 1
    assert reader.drain() == [task(1)]


def test_an_input_error_is_told_once_and_the_line_comes_when_it_is_over(reader, monkeypatch):
    reader.append(task(1))
    with monkeypatch.context() as patched:
        patched.setattr(
            queuefile.os, "pread", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error"))
        )
        reader.drain()
        reader.drain()
    assert reader.codes() == ["unreadable"]
    assert reader.drain() == [task(1)]


def test_a_restored_backup_goes_on_where_it_was(reader):
    reader.append(task(1))
    reader.drain()
    reader.append(task(2))
    reader.queue.close()
    shutil.copytree(reader.folder, reader.folder.parent / "backup")
    shutil.rmtree(reader.folder)
    (reader.folder.parent / "backup").rename(reader.folder)
    reader.restart()
    assert reader.drain() == [task(2)]
    assert reader.codes() == []


def test_an_inode_number_used_again_is_another_file(reader):
    reader.append(task(1))
    reader.drain()
    ((number, position),) = reader.journal.items()
    reader.journal[number] = queuefile.msgspec.structs.replace(
        position, btime_ns=position.btime_ns - 1, digest="0" * 64
    )
    reader.restart()
    assert reader.drain() == [task(1)]
    assert reader.codes() == ["vanished"]


def test_folder_and_file_are_private_or_open_for_the_group_alone(make_reader):
    reader = make_reader()
    assert stat.S_IMODE(reader.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(reader.live.stat().st_mode) == 0o600
    shutil.rmtree(reader.folder)
    group = os.getgroups()[-1] if os.getgroups() else os.getgid()
    wide = make_reader(group=group)
    assert stat.S_IMODE(wide.folder.stat().st_mode) == 0o770
    assert stat.S_IMODE(wide.live.stat().st_mode) == 0o660
    wide.live.unlink()
    wide.live.touch(mode=0o640)
    wide.drain()
    assert stat.S_IMODE(wide.live.stat().st_mode) == 0o660


def test_bytes_waiting_counts_what_is_behind_the_committed_positions(reader):
    reader.append(task(1))
    reader.queue.read()
    assert reader.queue.bytes_waiting() == len(task(1)) + 1
    reader.drain()
    assert reader.queue.bytes_waiting() == 0
