"""SIGKILL of a real daemon between a receiver's yes and its mark: the same id again, one effect at a receiver that dedupes.

`completions` is shown in tests/crash/test_edges.py, `ssh` in test_ssh_daemon.py. One receiver a class: what to add for a new plug.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeBox
from realbox import RealBox, wait_for

from .notifyadapter import TOKEN, NotifyAdapter

pytestmark = pytest.mark.real
KILLS = 1


class Receiver:
    """Not ready until `mend`."""

    doubles = True  # the receiver is told twice, under one id
    secret: str | None = None  # that nothing may ever show

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def config(self) -> dict[str, Any]:
        raise NotImplementedError

    def mend(self) -> None:
        """From now on it takes what comes."""
        raise NotImplementedError

    def ids(self) -> list[str]:
        raise NotImplementedError

    def end(self) -> None:
        """After the test."""


class Command(Receiver):
    def config(self) -> dict[str, Any]:
        script = f'[ -e {self.folder}/ready ] || exit 75; cat > /dev/null; echo "$AGENTQ_DELIVERY_ID" >> {self.folder}/heard'
        return {"type": "command", "command": ["/bin/sh", "-c", script]}

    def mend(self) -> None:
        (self.folder / "ready").touch()

    def ids(self) -> list[str]:
        heard = self.folder / "heard"
        return heard.read_text().split() if heard.exists() else []


class File(Receiver):
    doubles = False  # it finds its own line again

    def config(self) -> dict[str, Any]:
        return {"type": "file", "path": str(self.folder / "later" / "entries.jsonl")}

    def mend(self) -> None:
        (self.folder / "later").mkdir(exist_ok=True)

    def ids(self) -> list[str]:
        path = self.folder / "later" / "entries.jsonl"
        return [json.loads(line)["id"] for line in path.read_text().splitlines()] if path.exists() else []


class Notify(Receiver):
    secret = TOKEN

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.service = NotifyAdapter(folder)
        self.service.say("deferring")

    def config(self) -> dict[str, Any]:
        return {"type": "notify", "urls_file": str(self.service.urls_file)}

    def mend(self) -> None:
        self.service.say("good")

    def ids(self) -> list[str]:
        return self.service.received()

    def end(self) -> None:
        self.service.release()


@pytest.fixture(params=[Command, File, Notify])
def receiver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Receiver]:
    (tmp_path / "receiver").mkdir()
    made = request.param(tmp_path / "receiver")
    yield made
    made.end()


def row_of(box: RealBox) -> dict[str, Any]:
    found = [row for row in box.show("t").get("outbox", ()) if row["sink"] == "s"]
    return dict(found[0]) if found else {}


def test_a_daemon_killed_between_send_and_mark_sends_the_same_id_again(make_box: MakeBox, receiver: Receiver) -> None:  # fmt: skip
    box = make_box(json.dumps({"sinks": {"s": {**receiver.config(), "backoff": ["100ms"]}}}))
    box.append({"task": "work", "id": "t", "prompt": "echo x", "deliver_to": ["s"]})
    wait_for("a try in vain", lambda: row_of(box).get("attempts"))
    wait_for("its end in completions", lambda: box.results().get("t") or box.results().get("work"))
    box.kill()
    receiver.mend()
    kills = KILLS if receiver.doubles else 1
    for _ in range(kills):
        box.env = {"AGENTQD_FAILPOINT": "receiver_answered:kill"}
        box.start(wait=False)
        assert box.daemon is not None
        box.daemon.wait(30)
        box.kill()
    assert len(receiver.ids()) == kills, "it had taken it"
    box.env = {}
    box.start()
    wait_for("the mark", lambda: row_of(box).get("state") == "delivered")
    assert set(receiver.ids()) == {row_of(box)["delivery_id"]}
    assert len(receiver.ids()) == (kills + 1 if receiver.doubles else 1)
    if receiver.secret is not None:
        told = [
            box.status(),
            box.show("t"),
            box.completions(),
            box.api("GET", "/v1/doctor"),
            box.api("GET", "/v1/config"),
        ]
        assert receiver.secret not in json.dumps(told) + box.log_text()
