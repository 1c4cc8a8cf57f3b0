"""The completion queue and those who read it: late, often, or never."""

import json
import subprocess
import sys
import threading

import pytest
from conftest import MakeBox
from realbox import RealBox, wait_for

pytestmark = pytest.mark.real


def pulled(box: RealBox, *words: str) -> list[dict[str, object]]:
    done = box.ctl("pull", *words)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.row(2)
def test_pulling_while_tasks_finish_loses_and_repeats_nothing(box: RealBox) -> None:
    got: list[dict[str, object]] = []
    done = threading.Event()

    def pull() -> None:
        while not done.is_set():
            got.extend(pulled(box))

    reader = threading.Thread(target=pull)
    reader.start()
    box.append(*({"task": f"t{n}", "prompt": "echo x"} for n in range(60)))
    wait_for("60 results", lambda: len(box.results()) == 60)
    done.set()
    reader.join()
    box.until_pullable(60)
    got += pulled(box)
    assert [row["seq"] for row in got] == list(range(1, 61))
    assert all(
        '"pulled":false' in line for line in (box.state / "completions.jsonl").read_text().splitlines()
    )


@pytest.mark.row(2)
def test_pulled_is_worked_out_for_each_consumer_and_the_line_never_changes(box: RealBox) -> None:
    box.append({"task": "one", "prompt": "echo x"})
    box.result("one")
    box.until_pullable(1)
    before = (box.state / "completions.jsonl").read_bytes()
    assert [row["pulled"] for row in pulled(box)] == [False]
    rows = box.api("GET", "/v1/completions?after=0")[1]["rows"]
    assert [row["pulled"] for row in rows] == [True]
    rows = box.api("GET", "/v1/completions?after=0&consumer=other")[1]["rows"]
    assert [row["pulled"] for row in rows] == [False]
    assert (box.state / "completions.jsonl").read_bytes() == before


@pytest.mark.row(3, 24)
def test_nobody_pulls_and_all_tasks_run(box: RealBox) -> None:
    box.append(*({"task": f"t{n}", "prompt": "echo x"} for n in range(40)))
    wait_for("40 results", lambda: len(box.results()) == 40)
    assert box.api("GET", "/v1/consumers")[1]["consumers"] == []


@pytest.mark.row(4, 24, 17)
def test_fifty_results_wait_for_hours_and_are_drained_in_order(box: RealBox) -> None:
    box.append(*({"task": f"t{n}", "prompt": f"echo {n}"} for n in range(50)))
    wait_for("50 results", lambda: len(box.results()) == 50)
    box.kill()
    box.start()
    box.until_pullable(50)
    first = pulled(box, "--limit", "20")
    rest = pulled(box)
    assert [row["seq"] for row in first + rest] == list(range(1, 51))
    assert sorted(str(row["name"]) for row in first + rest) == sorted(f"t{n}" for n in range(50))
    assert pulled(box) == []


@pytest.mark.row(13, 28)
def test_a_consumer_that_dies_before_it_has_put_rows_away_gets_them_again(box: RealBox) -> None:
    box.append(*({"task": f"t{n}", "prompt": "echo x"} for n in range(5)))
    box.until_pullable(5)
    command = [
        sys.executable,
        "-m",
        "agentqd.cli.main",
        "--state-dir",
        str(box.state),
        "--runtime-dir",
        str(box.runtime),
        "pull",
    ]
    with open("/dev/full", "wb") as full:
        assert subprocess.run(command, stdout=full, stderr=subprocess.DEVNULL, check=False).returncode != 0
    assert len(pulled(box)) == 5


@pytest.mark.row(13)
def test_an_offset_moves_forward_only_and_never_past_the_end(box: RealBox) -> None:
    box.append({"task": "one", "prompt": "echo x"}, {"task": "two", "prompt": "echo x"})
    box.until_pullable(2)
    assert box.api("POST", "/v1/consumers/laptop/ack", {"seq": 99})[1]["acknowledged"] == 2
    assert box.api("POST", "/v1/consumers/laptop/ack", {"seq": 1})[1]["acknowledged"] == 2
    box.kill()
    box.start()
    (consumer,) = box.api("GET", "/v1/consumers")[1]["consumers"]
    assert (consumer["name"], consumer["acknowledged"], consumer["behind"]) == ("laptop", 2, 0)


@pytest.mark.row(17, 16)
def test_enqueue_and_submit_work_while_the_daemon_is_off_and_pull_while_the_writer_is(
    make_box: MakeBox,
) -> None:
    box = make_box()
    box.stop()
    done = box.ctl("enqueue", stdin=b'{"task": "by enqueue", "prompt": "echo x"}')
    assert done.returncode == 0
    answer = box.ctl_json("submit", "--task", "by submit", "echo x")
    assert (answer["where"], answer["duplicate"], answer["state"]) == ("queue_file", None, None)
    assert box.ctl("status").returncode == 69
    box.start()
    box.result("by enqueue")
    box.result("by submit")
    box.until_pullable(2)
    assert {row["name"] for row in pulled(box)} == {"by enqueue", "by submit"}


@pytest.mark.row(9)
def test_a_torn_tail_of_the_completion_file_is_cut_and_its_line_sent_again(box: RealBox) -> None:
    box.append({"task": "one", "prompt": "echo x"})
    whole = box.result("one")
    box.kill()
    path = box.state / "completions.jsonl"
    path.write_bytes(path.read_bytes() + json.dumps(whole).encode()[:50])  # a write that was cut short
    box.start()
    box.append({"task": "two", "prompt": "echo x"})
    box.result("two")
    assert [line["seq"] for line in box.completions()] == [1, 2]
    wait_for("the alert", lambda: box.alerts("sink_file"))


@pytest.mark.row(9, 13)
def test_a_completion_file_replaced_while_in_use_is_told_and_loses_no_row(box: RealBox) -> None:
    box.append({"task": "one", "prompt": "echo x"})
    box.result("one")
    wait_for("its mark", lambda: box.status()["sinks"]["completions"]["delivered"] == 1)
    path = box.state / "completions.jsonl"
    path.rename(path.with_name("taken-away"))
    box.append({"task": "two", "prompt": "echo x"})
    box.result("two")
    wait_for("the alert", lambda: box.alerts("sink_file"))
    assert [row["name"] for row in pulled(box)] == ["one", "two"]


@pytest.mark.row(9, 25)
def test_the_completion_file_rotates_and_no_seq_is_used_twice(make_box: MakeBox) -> None:
    box = make_box("limits: {completions_bytes_max: 1KiB}\n")
    for n in range(6):
        box.append({"task": f"t{n}", "prompt": "echo x"})
        box.result(f"t{n}")
    assert len(list(box.state.glob("completions-*.jsonl"))) >= 2
    assert [line["seq"] for line in box.completions()] == list(range(1, 7))
    box.kill()
    box.start()
    box.append({"task": "t6", "prompt": "echo x"})
    box.result("t6")
    box.until_pullable(7)
    assert [row["seq"] for row in pulled(box)] == list(range(1, 8))
