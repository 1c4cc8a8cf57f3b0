"""Rotation, by others and by the daemon: a late writer loses nothing, and no file is removed too early."""

import os
import shutil
import stat

import pytest

from agentqd.storage import queuefolder, queuesources
from agentqd.storage.queuefolder import SOURCES_MAX

from .reader import task

HOUR_S = 3601


@pytest.mark.parametrize("while_away", [False, True])
def test_a_renamed_file_is_read_to_its_end_before_the_new_one(reader, while_away):
    reader.append(task(1))
    reader.drain()
    reader.append(task(2))
    reader.live.rename(reader.folder / "old")
    reader.append(task(3))
    if while_away:
        reader.restart()
    assert reader.drain() == [task(2), task(3)]
    assert reader.codes() == []


def test_a_writer_that_still_holds_the_renamed_file_loses_no_line(reader):
    with reader.live.open("ab", buffering=0) as late:
        reader.live.rename(reader.folder / "tasks.jsonl.1")
        reader.append(task(1))
        assert reader.drain() == [task(1)]
        late.write(task(2) + b"\n" + task(3)[:7])
        assert reader.drain() == [task(2)]
        reader.restart()
        late.write(task(3)[7:] + b"\n")
        assert reader.drain() == [task(3)]


@pytest.mark.parametrize("while_away", [False, True])
def test_files_that_were_live_for_a_moment_between_two_looks_are_read_too(reader, while_away):
    reader.append(task(1))
    reader.drain()
    for number in (2, 3, 4):
        reader.live.rename(reader.folder / f"tasks.jsonl.{number}")
        reader.append(task(number))
    if while_away:
        reader.restart()
    assert reader.drain() == [task(2), task(3), task(4)]
    reader.restart()
    assert reader.drain() == []


def test_a_backup_copy_is_not_taken_for_a_rotated_file(reader):
    reader.append(task(1), task(2))
    reader.drain()
    shutil.copy(reader.live, reader.folder / "tasks.jsonl.bak")
    reader.live.rename(reader.folder / "tasks.jsonl.1")
    reader.append(task(3))
    assert reader.drain() == [task(3)]
    reader.restart()
    assert reader.drain() == []


def test_a_half_line_of_a_file_that_was_live_for_a_moment_is_read_when_it_is_ended(reader):
    reader.append(task(1))
    reader.drain()
    reader.live.rename(reader.folder / "tasks.jsonl.1")
    with reader.live.open("ab", buffering=0) as late:
        late.write(task(2)[:3])  # begins like the line before
        reader.live.rename(reader.folder / "tasks.jsonl.2")
        reader.append(task(3))
        assert reader.drain() == [task(3)]
        late.write(task(2)[3:] + b"\n")
    assert reader.drain() == [task(2)]


def test_only_what_a_copy_has_more_than_the_renamed_file_is_read(reader):
    reader.append(task(1), task(2))
    reader.drain()
    shutil.copy(reader.live, reader.folder / "new")
    reader.live.rename(reader.folder / "tasks.jsonl.1")
    with (reader.folder / "new").open("ab") as file:
        file.write(task(3) + b"\n")
    (reader.folder / "new").rename(reader.folder / "tasks.jsonl.2")
    reader.append(task(4))
    assert reader.drain() == [task(3), task(4)]


def test_a_backup_copy_is_not_read_when_the_live_file_is_replaced(reader):
    reader.append(task(1), task(2))
    reader.drain()
    shutil.copy(reader.live, reader.folder / "tasks.jsonl.bak")
    shutil.copy(reader.live, reader.folder / "new")
    (reader.folder / "new").rename(reader.live)
    reader.append(task(3))
    assert reader.drain() == [task(3)]


def test_a_replaced_file_that_was_renamed_at_once_is_read_from_where_the_first_one_was(reader):
    reader.append(task(1))
    reader.drain()
    copy = reader.folder / "new"
    shutil.copy(reader.live, copy)
    with copy.open("ab") as file:
        file.write(task(2) + b"\n")
    copy.rename(reader.live)
    reader.live.rename(reader.folder / "tasks.old")
    reader.append(task(3))
    assert reader.drain() == [task(2), task(3)]


def test_the_daemon_rotates_a_consumed_large_file_with_its_mode_and_group(reader):
    os.chmod(reader.live, 0o640)
    reader.append(task(1))
    reader.maintain(10)
    assert len(reader.names()) == 1, "not consumed yet"
    reader.drain()
    assert reader.maintain(10_000) is None, "not large"
    assert reader.maintain(10) is not None
    assert len(reader.names()) == 2
    assert stat.S_IMODE(reader.live.stat().st_mode) == 0o640
    assert reader.live.stat().st_size == 0
    reader.append(task(2))
    assert reader.drain() == [task(2)]
    assert reader.codes() == []


def test_two_rotations_in_one_second_overwrite_nothing(reader):
    for number in range(3):
        reader.append(task(number))
        reader.drain()
        reader.maintain(10)
    assert len(reader.names()) == 4


@pytest.mark.parametrize("made_new_file", [False, True])
def test_a_crash_between_the_rotation_and_its_commit_repeats_nothing(reader, made_new_file):
    reader.append(task(1))
    reader.drain()
    with reader.live.open("ab", buffering=0) as late:
        reader.queue.maintain(reader.clock.now_us(), 10)  # never committed
        if not made_new_file:
            reader.live.unlink()
        late.write(task(2) + b"\n")
        reader.restart()
        reader.append(task(3))
        assert reader.drain() == [task(2), task(3)]
        assert reader.codes() == []


def rotated(reader):
    reader.append(task(1))
    reader.drain()
    reader.maintain(10)
    reader.drain()
    (name,) = set(reader.names()) - {"tasks.jsonl"}
    return reader.folder / name


def test_a_rotated_file_is_removed_after_an_hour(reader):
    old = rotated(reader)
    reader.clock.advance(3000)
    reader.maintain(10**6)
    assert old.exists()
    reader.clock.advance(HOUR_S)
    reader.maintain(10**6)
    assert not old.exists()
    assert len(reader.journal) == 1


def test_a_rotated_file_that_somebody_has_open_stays(reader):
    fd = os.open(reader.live, os.O_WRONLY | os.O_APPEND)
    old = rotated(reader)
    reader.clock.advance(5 * HOUR_S)
    reader.maintain(10**6)
    assert old.exists()
    os.write(fd, task(2) + b"\n")
    os.close(fd)
    reader.maintain(10**6)
    assert old.exists(), "it has a line that was not read"
    assert reader.drain() == [task(2)]
    reader.maintain(10**6)
    assert not old.exists()


def test_a_half_line_that_nobody_can_end_is_set_aside_before_its_file_goes(reader):
    fd = os.open(reader.live, os.O_WRONLY | os.O_APPEND)
    old = rotated(reader)
    os.write(fd, b'{"task":"half')
    reader.clock.advance(2 * HOUR_S)
    reader.maintain(10**6)
    reader.drain()
    assert reader.rejected == []
    os.close(fd)
    reader.maintain(10**6)
    reader.drain()
    assert reader.rejected == [b'{"task":"half']
    reader.maintain(10**6)
    assert not old.exists()


def test_without_leases_a_rotated_file_is_kept_for_a_day(reader, monkeypatch):
    monkeypatch.setattr("agentqd.system.leases._take", lambda fd, kind: None)
    old = rotated(reader)
    reader.clock.advance(23 * 3600)
    reader.maintain(10**6)
    assert old.exists()
    reader.clock.advance(2 * HOUR_S)
    reader.maintain(10**6)
    assert not old.exists()


def test_a_file_that_a_person_rotated_is_let_go_but_never_removed(reader):
    reader.append(task(1))
    reader.live.rename(reader.folder / "tasks.jsonl.1")
    reader.drain()
    reader.clock.advance(2 * HOUR_S)
    reader.maintain(10**6)
    assert "tasks.jsonl.1" in reader.names()
    assert len(reader.journal) == 1
    reader.restart()
    assert reader.drain() == []


def test_a_crash_between_the_removal_and_its_commit_is_no_alert(reader):
    old = rotated(reader)
    reader.clock.advance(2 * HOUR_S)
    reader.queue.maintain(reader.clock.now_us(), 10**6)
    assert not old.exists()
    reader.restart()
    assert reader.drain() == []
    assert reader.codes() == []
    assert len(reader.journal) == 1


def test_a_rotated_file_that_vanishes_while_agentqd_is_away_is_an_alert(reader):
    old = rotated(reader)
    old.unlink()
    reader.restart()
    reader.drain()
    assert reader.codes() == ["vanished"]


def test_a_rotated_file_deleted_with_unread_lines_is_read_through_its_descriptor(reader):
    reader.append(task(1))
    reader.live.rename(reader.folder / "tasks.jsonl.1")
    reader.step()
    with (reader.folder / "tasks.jsonl.1").open("ab") as file:
        file.write(task(2) + b"\n")
    (reader.folder / "tasks.jsonl.1").unlink()
    reader.drain()
    assert reader.lines == [task(1), task(2)]
    assert reader.codes() == ["vanished"]
    assert len(reader.journal) == 1


def test_a_busy_late_writer_does_not_starve_the_live_file(reader):
    with reader.live.open("ab", buffering=0) as late:
        reader.live.rename(reader.folder / "old")
        reader.drain()
        reader.append(task(100))
        seen = []
        for number in range(4):
            late.write(task(number) + b"\n")
            seen += [line.raw for line in reader.step().lines]
        assert task(100) in seen


def test_many_rotations_by_others_do_not_eat_all_descriptors(reader):
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3 * SOURCES_MAX):
        reader.append(task(number))
        reader.live.rename(reader.folder / f"tasks.jsonl.{number}")
        reader.drain()
        reader.maintain(10**6)
    assert len(os.listdir("/proc/self/fd")) - before <= SOURCES_MAX + 2
    assert reader.lines == [task(number) for number in range(3 * SOURCES_MAX)]


def test_a_file_renamed_back_goes_on_where_it_was(reader):
    reader.append(task(1))
    reader.drain()
    reader.live.rename(reader.folder / "aside")
    reader.append(task(2))
    assert reader.drain() == [task(2)]
    (reader.folder / "aside").rename(reader.live)
    reader.append(task(3))
    assert reader.drain() == [task(3)]
    reader.restart()
    assert reader.drain() == []


def test_the_new_live_file_of_a_faster_writer_is_taken(reader, monkeypatch):
    reader.append(task(1))
    reader.drain()
    real = queuefolder.rename_to_free_name

    def rename_and_be_overtaken(old, new):
        real(old, new)
        reader.append(task(2))

    monkeypatch.setattr(queuefolder, "rename_to_free_name", rename_and_be_overtaken)
    reader.maintain(10)
    assert reader.drain() == [task(2)]
    assert reader.codes() == []
    assert queuesources.LIVE_NAME in reader.names()
