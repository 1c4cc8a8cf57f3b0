"""A running daemon that pushes to a real sshd: killed between send and mark, a peer that comes back, a host key that changes."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from realbox import RealBox, wait_for
from realsshd import RealSshd, real_sshd

MakeBox = Callable[..., RealBox]
pytestmark = [pytest.mark.real, pytest.mark.sshd]


class Peer:
    """A machine with an sshd and a folder for what comes, and the box's config that leads there."""

    def __init__(self, sshd: RealSshd, folder: Path) -> None:
        self.sshd = sshd
        self.inbox = folder / "inbox"
        self.inbox.mkdir()
        self.known_hosts = folder / "known_hosts"
        self.known_hosts.write_text(sshd.known_hosts_line())

    def config(self, more: str = "") -> str:
        return (
            "alerts: {deliver_to: [completions]}\nroutes: [{match: {type: 'agentq.task.*'}, deliver_to: [laptop]}]\n"
            f"sinks: {{laptop: {{type: ssh, host: 127.0.0.1, port: {self.sshd.port}, user: {self.sshd.account.name},"
            f" identity_file: {self.sshd.client_key}, known_hosts: {self.known_hosts}, path: {self.inbox}, peer: my-laptop{more}}}}}\n"
        )

    def ids(self) -> list[str]:
        """The delivery ids that a reader there can see; a temporary file is not among them."""
        return sorted(path.stem for path in self.inbox.iterdir() if not path.name.startswith("."))

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads((self.inbox / f"{name}.json").read_text()) for name in self.ids()]


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    with real_sshd() as sshd:
        yield Peer(sshd, tmp_path)


def laptop(box: RealBox) -> dict[str, Any]:
    found: dict[str, Any] = box.status()["sinks"]["laptop"]
    return found


def row_of(box: RealBox, task_id: str) -> dict[str, Any]:
    (row,) = [row for row in box.show(task_id)["outbox"] if row["sink"] == "laptop"]
    return dict(row)


def delivered(box: RealBox, task_id: str) -> bool:
    return box.show(task_id).get("state") == "finished" and row_of(box, task_id)["state"] == "delivered"


def tries(box: RealBox, tasks: int) -> int:
    return sum(row_of(box, f"t{n}")["attempts"] for n in range(tasks))


def contact(box: RealBox, who: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(box.runtime / "agentqd.sock"))
        head = f"GET /v1/status HTTP/1.1\r\nHost: box\r\nConnection: close\r\nAgentQ-Client: {who}\r\n\r\n"
        connection.sendall(head.encode())
        assert b"200 OK" in connection.recv(65536)


def test_a_daemon_killed_between_send_and_mark_sends_the_same_id_again_and_there_is_one_file(make_box: MakeBox, peer: Peer) -> None:  # fmt: skip
    box = make_box(peer.config(), start=False)
    for n in range(3):
        box.env = {"AGENTQD_FAILPOINT": "ssh_delivered:kill"}
        box.start(wait=False)
        wait_for("the socket", (box.runtime / "agentqd.sock").exists)
        box.append({"task": "work", "id": f"t{n}", "prompt": "echo x"})
        daemon = box.daemon
        assert daemon is not None
        daemon.wait(30)
        box.kill()
        assert len(peer.ids()) >= 1
        box.env = {}
        box.start()
        wait_for("the delivery", lambda n=n: delivered(box, f"t{n}"))
        box.stop()
    assert sorted(entry["data"]["task_id"] for entry in peer.entries()) == ["t0", "t1", "t2"]
    box.start()
    assert [row_of(box, f"t{n}")["delivery_id"] for n in range(3)] == [
        next(entry["id"] for entry in peer.entries() if entry["data"]["task_id"] == f"t{n}") for n in range(3)
    ]


def test_a_peer_that_was_asleep_is_tried_at_once_when_it_contacts_the_box(
    make_box: MakeBox, peer: Peer
) -> None:
    peer.sshd.stop()
    box = make_box(peer.config(", backoff: 10m, backoff_max: 10m"))
    box.append(*({"task": "work", "id": f"t{n}", "prompt": "echo x"} for n in range(8)))
    wait_for("the breaker", lambda: laptop(box)["breaker"] == "open")
    shown = laptop(box)
    assert shown["next_probe_at"] is not None
    assert "cannot be reached" in shown["last_error"]
    wait_for("their marks", lambda: tries(box, 8) == 5)  # they ride on the next commit
    peer.sshd.start()
    contact(box, "another-laptop elsewhere")
    time.sleep(0.3)
    assert peer.ids() == []
    contact(box, "my-laptop some-host.example")
    began = time.monotonic()
    wait_for("all of them", lambda: len(peer.ids()) == 8)
    assert time.monotonic() - began < 25
    wait_for("their marks", lambda: all(delivered(box, f"t{n}") for n in range(8)))
    assert laptop(box)["breaker"] == "closed"


def test_a_breaker_that_is_open_outlives_the_daemon(make_box: MakeBox, peer: Peer) -> None:
    peer.sshd.stop()
    box = make_box(peer.config(", backoff: 100ms"))
    box.append(*({"task": "work", "id": f"t{n}", "prompt": "echo x"} for n in range(4)))
    wait_for("the breaker", lambda: laptop(box)["breaker"] == "open")
    tried = wait_for("their marks, and its memory with them", lambda: tries(box, 4) == 5 and 5)
    box.kill()
    box.start()
    assert wait_for("the sink", lambda: laptop(box)["breaker"]) == "open"
    time.sleep(0.5)
    assert tries(box, 4) == tried
    assert row_of(box, "t0")["state"] in {"pending", "retryable"}


def test_a_changed_host_key_is_refused_told_and_mended_by_a_person(make_box: MakeBox, peer: Peer) -> None:
    box = make_box(peer.config(", backoff: 200ms"))
    box.append({"task": "work", "id": "t0", "prompt": "echo x"})
    wait_for("the first", lambda: delivered(box, "t0"))
    peer.sshd.kill()
    peer.sshd.new_host_key()
    peer.sshd.start()
    box.append({"task": "work", "id": "t1", "prompt": "echo secret-output"})
    alert = wait_for("the alert", lambda: box.alerts("host_key"))[0]
    assert "CHANGED" in alert["message"]
    assert "ssh-keygen -R" in alert["message"]
    wait_for(
        "its line",
        lambda: [line for line in box.completions() if line.get("type") == "agentq.alert.host_key"],
    )
    time.sleep(1.0)
    assert len(box.alerts("host_key")) == 1, "told once, not with each try"
    assert len(peer.ids()) == 1
    peer.known_hosts.write_text(peer.sshd.known_hosts_line())
    contact(box, "my-laptop x")
    wait_for("the second", lambda: delivered(box, "t1"))
    assert "secret-output" not in box.log_text()
    assert peer.sshd.client_key.read_text()[40:80] not in box.log_text()


def test_a_large_file_of_a_worker_reaches_the_laptop_whole(make_box: MakeBox, peer: Peer) -> None:
    box = make_box(peer.config())
    box.append(
        {
            "task": "work",
            "id": "t0",
            "prompt": "head -c 3000000 /dev/urandom | tee copy > $AGENTQ_OUTBOX/big.bin",
        }
    )
    wait_for(
        "result and entry",
        lambda: len([path for path in peer.inbox.iterdir() if path.suffix == ".json"]) == 2,
    )
    (content,) = [path for path in peer.inbox.iterdir() if path.suffix == ".content"]
    assert content.read_bytes() == (box.attempt_folder("t0") / "work" / "copy").read_bytes()
    assert f"{content.stem}.json" in {path.name for path in peer.inbox.iterdir()}


def test_rows_of_a_sink_that_was_taken_from_the_config_are_shown_and_sent_when_it_returns(make_box: MakeBox, peer: Peer) -> None:  # fmt: skip
    peer.sshd.stop()
    box = make_box(peer.config())
    box.append({"task": "work", "id": "t0", "prompt": "echo x"})
    wait_for("a try", lambda: box.show("t0").get("state") == "finished" and row_of(box, "t0")["attempts"])
    box.config.write_text("alerts: {deliver_to: [completions]}\n")
    gone = wait_for("the edit", lambda: laptop(box)["type"] is None and laptop(box))
    assert gone["pending"] == 1
    assert gone["last_error"] == "not in the config"
    peer.sshd.start()
    box.kill()
    box.start()
    assert laptop(box)["pending"] == 1
    assert peer.ids() == []
    box.config.write_text(peer.config())
    wait_for("its delivery", lambda: delivered(box, "t0"))
    assert len(peer.ids()) == 1
