"""Real writers in their own processes, while the folder is read, rotated and restarted under them."""

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from agentqd.core.errors import InvalidTask
from agentqd.core.lines import split_glued
from agentqd.core.task import read_task

from .reader import Reader, task

SHELL_WRITER = 'for n in $(seq "$2" "$3"); do printf \'{"task":"t%d","prompt":"p"}\\n\' "$n" >> "$1"; done'
PYTHON_WRITER = """
import json, sys
with open(sys.argv[1], "a") as file:
    for n in range(int(sys.argv[2]), int(sys.argv[3]) + 1):
        file.write(json.dumps({"task": f"t{n}", "prompt": "p"}) + "\\n")
        file.flush()
"""
TORN_WRITER = """
import json, os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
for n in range(int(sys.argv[2]), int(sys.argv[3]) + 1):
    line = (json.dumps({"task": f"t{n}", "prompt": "p" * 300_000}) + "\\n").encode()
    for at in range(0, len(line), 64 * 1024):
        os.write(fd, line[at:at + 64 * 1024])
"""


def start(kind: str, path: os.PathLike[str], first: int, last: int) -> subprocess.Popen[bytes]:
    ends = [str(path), str(first), str(last)]
    if kind == "sh":
        return subprocess.Popen(["/bin/sh", "-c", SHELL_WRITER, "sh", *ends])
    return subprocess.Popen(
        [sys.executable, "-I", "-c", PYTHON_WRITER if kind == "python" else TORN_WRITER, *ends]
    )


def read_while(
    reader: Reader, writers: list[subprocess.Popen[bytes]], meanwhile=lambda turn: None, limit_s: float = 60
) -> None:
    deadline = time.monotonic() + limit_s
    turn = 0
    while any(writer.poll() is None for writer in writers):
        assert time.monotonic() < deadline
        meanwhile(turn)
        if reader.step(max_bytes=20_000, max_lines=100) is None:
            time.sleep(0.001)
        turn += 1
    assert [writer.wait() for writer in writers] == [0] * len(writers)
    reader.drain()


def test_eight_writers_of_two_kinds_lose_and_double_nothing_while_the_daemon_rotates_and_dies(reader):
    def meanwhile(turn: int) -> None:
        if turn % 5 == 0:
            reader.maintain(rotate_bytes_max=2000)
        if turn % 11 == 0:
            reader.queue.read()
            reader.restart()

    writers = [start("python" if n % 2 else "sh", reader.live, n * 1000, n * 1000 + 499) for n in range(8)]
    read_while(reader, writers, meanwhile)
    reader.drain()
    assert Counter(read_task(raw).task for raw in reader.lines) == Counter(
        f"t{n * 1000 + k}" for n in range(8) for k in range(500)
    )
    assert reader.codes() == []
    assert len(reader.names()) > 2, "it did rotate"
    reader.clock.advance(7200)
    reader.maintain(10**9)
    assert reader.names() == ["tasks.jsonl"]


def test_ten_thousand_appends_while_others_rename_the_file_are_all_read(reader):
    stop = threading.Event()

    def rotate_for_ever() -> None:
        number = 0
        while not stop.wait(0.003):
            number += 1
            try:
                os.rename(reader.live, reader.folder / f"tasks.jsonl.{number:06d}")
            except FileNotFoundError:
                continue

    rotator = threading.Thread(target=rotate_for_ever)
    rotator.start()
    try:
        writers = [start("sh", reader.live, n * 10_000, n * 10_000 + 2499) for n in range(4)]
        read_while(reader, writers)
    finally:
        stop.set()
        rotator.join()
    reader.drain()
    counts = Counter(read_task(raw).task for raw in reader.lines)
    assert counts == Counter(f"t{n * 10_000 + k}" for n in range(4) for k in range(2500))


def test_long_lines_torn_between_writers_cost_only_themselves(make_reader):
    reader = make_reader(line_bytes_max=1 << 20)
    writers = [start("torn", reader.live, n * 100, n * 100 + 9) for n in range(3)]
    writers += [start("sh", reader.live, 1000, 1299)]
    read_while(reader, writers)
    content = b"".join((reader.folder / name).read_bytes() for name in reader.names())
    good, torn = [], []
    for raw in reader.lines + reader.rejected:
        try:
            good.append(read_task(raw).task)
        except InvalidTask:
            glued = split_glued(raw)
            torn.append(raw)
            if glued is not None:
                good.append(read_task(glued[1]).task)
    assert max(Counter(good).values()) == 1
    assert content.count(b"\n") == len(reader.lines) + len(reader.rejected), (
        "every line of the file came out, torn or not"
    )
    short = {name for name in good if int(name[1:]) >= 1000}
    assert len(short) == 300, "one write() never tears: each short line is whole, at worst behind a torn one"


def test_an_append_at_a_random_moment_of_the_start_is_never_missed(tmp_path):
    chance = random.Random(7)
    for number in range(200):
        folder = tmp_path / f"queue-{number % 5}"
        seen: list[Reader] = []

        def begin(folder=folder, seen=seen) -> None:
            seen.append(Reader(folder))

        starting = threading.Thread(target=begin)
        starting.start()
        for _ in range(chance.randrange(200)):
            pass
        while True:
            try:
                with (folder / "tasks.jsonl").open("ab") as file:
                    file.write(task(number) + b"\n")
                break
            except FileNotFoundError:
                continue
        starting.join()
        (reader,) = seen
        assert reader.drain()[-1:] == [task(number)]
        reader.queue.close()


@pytest.mark.parametrize("kind", ["sh", "python"])
def test_lines_come_in_the_order_in_which_one_writer_wrote_them(reader, kind):
    read_while(reader, [start(kind, reader.live, 0, 499)])
    assert [read_task(raw).task for raw in reader.lines] == [f"t{n}" for n in range(500)]
