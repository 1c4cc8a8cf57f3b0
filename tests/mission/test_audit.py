"""The record of what happened: append-only, chained, read back."""

import json
import sqlite3

import pytest
from conftest import MakeBox
from realbox import RealBox

pytestmark = pytest.mark.real


@pytest.fixture
def written(box: RealBox) -> RealBox:
    box.append({"task": "one", "id": "one", "prompt": "echo x"})
    box.result("one")
    return box


@pytest.mark.row(46)
def test_the_chain_is_whole_with_and_without_a_daemon(written: RealBox) -> None:
    found = written.ctl_json("audit", "verify")
    assert found["ok"] is True
    assert found["events"] == found["last_seq"] >= 4
    events = written.ctl_json("audit", "show")
    assert [event["seq"] for event in events][:4] == [1, 2, 3, 4]
    assert "one" in {event["task_id"] for event in events}
    assert written.ctl("audit", "verify", "--offline").returncode == 1  # the daemon holds the state folder
    written.stop()
    done = written.ctl("audit", "verify", "--offline", "--json")
    assert (done.returncode, json.loads(done.stdout)["ok"]) == (0, True)


@pytest.mark.row(46)
@pytest.mark.parametrize(
    "tamper",
    [
        "UPDATE events SET data = replace(data, 'success', 'failed_') WHERE seq = (SELECT max(seq) FROM events WHERE data LIKE '%success%')",
        "UPDATE events SET at = at + 1 WHERE seq = 3",
        "UPDATE events SET task = 'two' WHERE seq = 3",
        "DELETE FROM events WHERE seq = 3",
        "UPDATE events SET seq = 1000003 WHERE seq = 3",
    ],
)
def test_a_changed_event_is_found_and_verify_says_where(written: RealBox, tamper: str) -> None:
    written.stop()
    journal = sqlite3.connect(written.state / "journal.db")
    with journal:
        before = {row[0]: row for row in journal.execute("SELECT * FROM events")}
        assert journal.execute(tamper).rowcount == 1
        after = {row[0]: row for row in journal.execute("SELECT * FROM events")}
    journal.close()
    changed = min(seq for seq in before if after.get(seq) != before[seq])
    written.start()
    done = written.ctl("audit", "verify", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"], found["broken_at"]) == (1, False, changed)
    assert str(changed) in written.ctl("audit", "verify").stdout.decode()


@pytest.mark.row(46, 47)
def test_each_attempt_and_each_word_of_a_person_is_an_event(make_box: MakeBox) -> None:
    box = make_box("queues: {default: {paused: true}}\n")
    box.append({"task": "held", "id": "held", "prompt": "exit 1", "max_attempts": 2, "backoff": ["10ms"]})
    box.wait_state("held", "queued")
    box.ctl("hold", "held")
    box.ctl("release", "held")
    box.config.write_text("{}\n")
    box.result("held")
    events = [event["event"] for event in box.show("held")["events"]]
    wanted = [
        "accepted",
        "hold_requested",
        "released",
        "claimed",
        "attempt_ended",
        "backoff_ended",
        "claimed",
        "finished",
    ]
    places = iter(events)
    assert all(step in places for step in wanted), events
    assert "config_applied" in {event["event"] for event in box.ctl_json("audit", "show")}
