"""Random histories of a queue folder against a plain reference: every whole line comes, in order, once."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections import Counter

from budget import tries
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from .reader import Reader


class QueueFolderHistory(RuleBasedStateMachine):
    """Writers, rotations, replacements, crashes. A line is (file, number in it); `file` counts live files."""

    def __init__(self) -> None:
        super().__init__()
        self.home = pathlib.Path(tempfile.mkdtemp(prefix="agentqd-model-"))
        self.reader = Reader(self.home / "queue", line_bytes_max=200)
        self.reader.drain()
        self.expected: list[bytes] = []
        self.file = 0
        self.number = 0
        self.names = 0
        self.half: tuple[int, bytes, bytes] | None = None  # descriptor, rest, the whole line
        self.half_is_live = False
        self.late: list[tuple[int, int]] = []  # descriptors of renamed files, and their file number
        self.may_repeat = False
        self.replaced_unseen = False  # twice between two looks: it might be a deletion and a new file

    def teardown(self) -> None:
        try:
            self.reader.drain()
            self.check_all()
        finally:
            for fd, _ in self.late:
                os.close(fd)
            if self.half is not None:
                os.close(self.half[0])
            self.reader.queue.close()
            shutil.rmtree(self.home)

    def check_all(self) -> None:
        counts = Counter(self.reader.lines)
        missing = [line for line in self.expected if not counts[line]]
        assert not missing, f"never handed out: {missing}"
        unexpected = counts.keys() - set(self.expected)
        assert not unexpected, f"never written: {unexpected}"
        if not self.may_repeat:
            assert max(counts.values(), default=1) == 1, "handed out twice"
            files: dict[bytes, list[bytes]] = {}
            for line in self.reader.lines:
                files.setdefault(line[:12], []).append(line)
            for lines in files.values():
                assert lines == sorted(lines), "out of order"
        assert not self.reader.rejected

    @invariant()
    def never_more_than_was_written(self) -> None:
        if not self.may_repeat:
            assert len(self.reader.lines) <= len(self.expected)

    def line(self, file: int, size: int = 0) -> bytes:
        self.number += 1
        return b'{"f":"%06d" "n":"%06d%s"}' % (file, self.number, b"x" * size)

    def fresh_name(self) -> str:
        self.names += 1
        return f"tasks.jsonl.{self.names}"

    def commit_some(self, chunk: object, wanted: bool) -> None:
        if chunk is not None and wanted:
            self.reader.commit(chunk)

    @initialize()
    def begin(self) -> None:
        """Nothing yet."""

    # -- writers

    @precondition(lambda self: not self.half_is_live)
    @rule(sizes=st.lists(st.integers(0, 150), min_size=1, max_size=6))
    def append(self, sizes: list[int]) -> None:
        lines = [self.line(self.file, size) for size in sizes]
        self.reader.append(*lines)
        self.expected += lines

    @precondition(lambda self: self.half is None)
    @rule(cut=st.integers(1, 20), size=st.integers(0, 100))
    def begin_a_line(self, cut: int, size: int) -> None:
        whole = self.line(self.file, size)
        fd = os.open(self.reader.live, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, whole[:cut])
        self.half, self.half_is_live = (fd, whole[cut:] + b"\n", whole), True

    @precondition(lambda self: self.half is not None)
    @rule()
    def end_the_line(self) -> None:
        assert self.half is not None
        fd, rest, whole = self.half
        os.write(fd, rest)
        os.close(fd)
        self.expected.append(whole)
        self.half, self.half_is_live = None, False

    @precondition(lambda self: self.late)
    @rule(pick=st.integers(0, 9), close=st.booleans())
    def write_late(self, pick: int, close: bool) -> None:
        at = pick % len(self.late)
        fd, file = self.late[at]
        line = self.line(file)
        os.write(fd, line + b"\n")
        self.expected.append(line)
        if close:
            os.close(fd)
            del self.late[at]

    # -- other people

    @rule(keep_open=st.booleans())
    def rename_away(self, keep_open: bool) -> None:
        if keep_open and not self.half_is_live:
            self.late.append((os.open(self.reader.live, os.O_WRONLY | os.O_APPEND), self.file))
        self.reader.live.rename(self.reader.folder / self.fresh_name())
        self.begin_next_file()

    def begin_next_file(self) -> None:
        """Nobody appends to a renamed file but who holds it."""
        self.file += 1
        self.half_is_live = False
        self.reader.live.touch(mode=0o600)
        self.replaced_unseen = False

    @precondition(lambda self: not self.half_is_live)
    @rule(more=st.integers(0, 3))
    def replace_by_a_longer_copy(self, more: int) -> None:
        self.may_repeat |= self.replaced_unseen
        self.replaced_unseen = True
        copy = self.reader.folder / "tasks.new"
        shutil.copy(self.reader.live, copy)
        lines = [self.line(self.file) for _ in range(more)]
        with copy.open("ab") as file:
            file.write(b"".join(line + b"\n" for line in lines))
        copy.rename(self.reader.live)
        self.expected += lines

    @precondition(lambda self: not self.half_is_live)
    @rule()
    def make_a_backup(self) -> None:
        self.replaced_unseen = False
        self.reader.drain()
        shutil.copy(self.reader.live, self.reader.folder / f"{self.fresh_name()}.bak")

    @precondition(lambda self: not self.half_is_live)
    @rule()
    def delete(self) -> None:
        self.replaced_unseen = False
        self.reader.drain()
        self.append([0, 0])
        self.reader.live.unlink()
        self.file += 1
        self.reader.drain()

    @precondition(lambda self: not self.half_is_live)
    @rule()
    def cut_to_nothing(self) -> None:
        self.replaced_unseen = False
        self.reader.drain()
        os.truncate(self.reader.live, 0)
        self.may_repeat = True

    @precondition(lambda self: not self.half_is_live)
    @rule()
    def rewrite_the_last_line_in_place(self) -> None:
        self.replaced_unseen = False
        self.append([0])
        self.reader.drain()
        changed = self.line(self.file)
        with self.reader.live.open("r+b") as file:
            file.seek(-len(changed) - 1, os.SEEK_END)
            file.write(changed + b"\n")
        self.expected.append(changed)
        self.may_repeat = True

    # -- the daemon

    @rule(
        max_bytes=st.integers(1, 600),
        max_lines=st.integers(1, 5),
        commit=st.sampled_from([True, True, True, False]),
    )
    def read(self, max_bytes: int, max_lines: int, commit: bool) -> None:
        self.replaced_unseen = False
        self.commit_some(self.reader.queue.read(max_bytes, max_lines), commit)

    @rule()
    def read_and_forget(self) -> None:
        self.replaced_unseen = False
        first = self.reader.queue.read()
        self.reader.queue.forget()
        second = self.reader.queue.read()
        assert (first and first.lines) == (second and second.lines)

    @rule(hours=st.sampled_from([0, 0, 2, 30]), rotate=st.booleans(), commit=st.booleans())
    def maintain(self, hours: int, rotate: bool, commit: bool) -> None:
        self.replaced_unseen = False
        self.reader.clock.advance(hours * 3600)
        inode = self.reader.live.stat().st_ino
        self.commit_some(
            self.reader.queue.maintain(self.reader.clock.now_us(), 0 if rotate else 10**9), commit
        )
        with contextlib.suppress(FileNotFoundError):
            if self.reader.live.stat().st_ino != inode:
                self.file += 1
                self.half_is_live = False

    @rule()
    def die_and_start_again(self) -> None:
        self.replaced_unseen = False
        self.reader.restart()

    @rule()
    def read_all(self) -> None:
        self.replaced_unseen = False
        self.reader.drain()
        self.check_all()


TestQueueFolderHistory = QueueFolderHistory.TestCase
TestQueueFolderHistory.settings = settings(
    max_examples=tries(100), stateful_step_count=30, suppress_health_check=list(HealthCheck)
)
