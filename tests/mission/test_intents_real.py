"""Two hundred tasks over twenty files, all policies, the daemon killed again and again: judged by what the workers saw.

Each worker appends a line to one file as it begins with a place and as it ends with it; the order of these lines is the order in
which it happened, whatever the daemon believes. AGENTQD_SEED sets the seed; it is printed.
"""

import json
import os
import random
import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import MakeBox
from realbox import RealBox, wait_for

pytestmark = [pytest.mark.real, pytest.mark.timeout(150)]

TASKS = 200
FOLDERS, FILES = 4, 5
KILLS_MIN = 5
WAIT_S = 90.0


class Wanted(NamedTuple):
    id: str
    policy: str
    covers: tuple[str, ...]  # the files among the twenty
    fields: dict[str, Any]


def tasks_of(draw: random.Random, root: Path) -> list[Wanted]:
    marks, found = root / "marks", []
    for n in range(TASKS):
        folder = draw.randrange(FOLDERS)
        files = [f"d{folder}/f{k}" for k in range(FILES)]
        kind = draw.choices(["file", "two", "folder", "glob", "alias"], [8, 3, 1, 1, 2])[0]
        one, other = draw.sample(files, 2)
        paths, covers = {
            "file": ([one], [one]),
            "two": ([one, other], [one, other]),
            "folder": ([f"d{folder}"], files),
            "glob": ([f"d{folder}/f[0-2]"], files[:3]),
            "alias": ([f"link{folder}/../{one}"], [one]),
        }[kind]
        policy = draw.choice(["queue", "queue", "refuse", "warn"])
        begin = "".join(f"B t{n} {name}\\n" for name in covers)
        end = begin.replace("B ", "E ")
        fails_first = draw.random() < 0.2
        script = f"[ $AGENTQ_ATTEMPT -gt 1 ] || printf '{begin}' >> {marks}; sleep {draw.uniform(0.01, 0.06):.3f}; "
        script += "[ $AGENTQ_ATTEMPT -gt 1 ] || exit 1; " if fails_first else ""
        script += f"printf '{end}' >> {marks}; echo done"
        fields = {"task": f"t{n}", "id": f"t{n}", "prompt": script, "workdir": str(root), "writes_to": paths,
                  "on_conflict": policy, "max_attempts": 2, "backoff": "30ms"}  # fmt: skip
        found.append(Wanted(f"t{n}", policy, tuple(covers), fields))
    return found


class Submitting(threading.Thread):
    """One after the other over the socket, each until it is acknowledged or refused."""

    def __init__(self, box: RealBox, tasks: list[Wanted]) -> None:
        super().__init__(daemon=True)
        self.box = box
        self.tasks = tasks
        self.refused: dict[str, Any] = {}
        self.odd: list[Any] = []

    def run(self) -> None:
        until_s = time.monotonic() + WAIT_S
        for task in self.tasks:
            while time.monotonic() < until_s:
                try:
                    status, answer = self.box.api("POST", "/v1/tasks", task.fields)
                except (OSError, IndexError, ValueError):  # no daemon, or one that died in its answer
                    time.sleep(0.02)
                    continue
                if status == 409:
                    self.refused[task.id] = answer
                elif status not in {200, 201}:
                    self.odd.append(answer)
                break


@pytest.mark.row(65, 66, 72, 76)
def test_no_two_workers_ever_held_one_file_unasked_whatever_was_killed(
    make_box: MakeBox, tmp_path: Path
) -> None:
    seed = int(os.environ.get("AGENTQD_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
    print(f"\nAGENTQD_SEED={seed}")
    draw = random.Random(seed)
    root = tmp_path / "root"
    for n in range(FOLDERS):
        (root / f"d{n}").mkdir(parents=True)
        (root / f"link{n}").symlink_to(f"d{n}")
    tasks = tasks_of(draw, root)
    box = make_box("max_workers: 16\nqueues: {default: {concurrency: 16}}\n")
    by_file, by_socket = tasks[::2], tasks[1::2]
    submitting = Submitting(box, by_socket)
    submitting.start()
    kills = 0
    until_s = time.monotonic() + WAIT_S
    while not over(box, tasks, submitting) or kills < KILLS_MIN:
        assert time.monotonic() < until_s, unfinished(box, tasks, submitting)
        for task in by_file[kills * 12 : (kills + 1) * 12]:
            box.append(task.fields)
        time.sleep(draw.uniform(0.05, 0.7))
        box.kill()
        kills += 1
        box.start(wait=draw.random() < 0.8)
    submitting.join(5)
    assert submitting.odd == []
    check(box, tasks, submitting, root)
    print(f"{kills} kills; {Counter(line['status'] for line in box.results().values())}; {len(submitting.refused)} refused by socket")  # fmt: skip


def over(box: RealBox, tasks: list[Wanted], submitting: Submitting) -> bool:
    return not submitting.is_alive() and len(box.results().keys() | submitting.refused) == len(tasks)


def unfinished(box: RealBox, tasks: list[Wanted], submitting: Submitting) -> str:
    missing = [task.id for task in tasks if task.id not in box.results().keys() | submitting.refused]
    return f"these never came to an end: {missing[:20]}\n{box.log_text()[-3000:]}"


def check(box: RealBox, tasks: list[Wanted], submitting: Submitting, root: Path) -> None:
    """None lost, none overlapping unasked, every refusal names somebody, nothing is held at the end."""
    results = Counter(line["name"] for line in box.completions() if "status" in line)
    assert set(results.values()) == {1}, "two results of one task"
    ran = {name for name, line in box.results().items() if line["status"] == "success"}
    refused = {name: line for name, line in box.results().items() if line["status"] == "refused"}
    assert len(ran) + len(refused) + len(submitting.refused) == TASKS, Counter(line["status"] for line in box.results().values())  # fmt: skip
    policies = {task.id: task.policy for task in tasks}
    assert {policies[name] for name in (*refused, *submitting.refused)} <= {"refuse"}
    assert all(line["conflicts"] for line in (*refused.values(), *submitting.refused.values()))
    with closing(sqlite3.connect(f"file:{box.state}/journal.db?mode=ro", uri=True)) as journal:
        seqs = dict(journal.execute("SELECT id, seq FROM tasks").fetchall())
    pairs = overlaps((root / "marks").read_text().splitlines(), {task.id: task.covers for task in tasks if task.id in ran})  # fmt: skip
    unasked = [pair for pair in pairs if policies[max(pair, key=seqs.__getitem__)] != "warn"]
    assert unasked == [], "two held one file, and the later one had not said that it may"
    assert pairs, "no warn task met anybody: nothing was tried"
    wait_for("the end of every claim", lambda: box.ctl_json("writes") == [])


def overlaps(marks: list[str], ran: dict[str, tuple[str, ...]]) -> set[tuple[str, str]]:
    """Pairs of tasks that were in one file at the same time, by the order of the marks."""
    inside: dict[str, list[str]] = {}
    seen: Counter[tuple[str, str, str]] = Counter()
    pairs = set()
    for mark in marks:
        what, task, name = mark.split()
        seen[what, task, name] += 1
        there = inside.setdefault(name, [])
        if what == "B":
            pairs |= {(other, task) for other in there}
            there.append(task)
        else:
            there.remove(task)
    expected = Counter((what, task, name) for task, names in ran.items() for name in names for what in "BE")
    assert seen == expected, "some worker ran twice, or not at all"
    assert not any(inside.values())
    return pairs


def test_the_checker_sees_an_overlap() -> None:
    lines = json.loads('["B t1 f", "B t2 f", "E t1 f", "E t2 f"]')
    assert overlaps(lines, {"t1": ("f",), "t2": ("f",)}) == {("t1", "t2")}
    assert overlaps([lines[n] for n in (0, 2, 1, 3)], {"t1": ("f",), "t2": ("f",)}) == set()
    with pytest.raises(AssertionError, match="not at all"):
        overlaps(lines[:2], {"t1": ("f",), "t2": ("f",)})
