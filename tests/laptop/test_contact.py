"""A box that pushes to a laptop tries at once when that laptop is heard of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from realbox import wait_for
from realsshd import real_sshd

from .onelaptop import one_laptop

pytestmark = [pytest.mark.real, pytest.mark.sshd]


def test_any_verb_of_a_laptop_has_the_box_deliver_what_waits_for_that_laptop(tmp_path: Path) -> None:
    inbox, known_hosts = tmp_path / "inbox", tmp_path / "known_hosts"
    inbox.mkdir()
    with real_sshd() as peer:
        known_hosts.write_text(peer.known_hosts_line())
        sink = {
            "type": "ssh", "host": "127.0.0.1", "port": peer.port, "user": peer.account.name, "peer": "my-laptop", "backoff": "1h",
            "identity_file": str(peer.client_key), "known_hosts": str(known_hosts), "path": str(inbox),
        }  # fmt: skip
        peer.stop()
        with one_laptop(config=json.dumps({"sinks": {"laptop": sink}})) as one:
            name = one.laptop.home / ".local" / "state" / "agentqctl" / "client-id"
            name.parent.mkdir(parents=True)
            name.write_text("my-laptop\n")
            one.box.append({"task": "t", "id": "t", "prompt": "echo x", "deliver_to": ["laptop"]})
            rows = lambda: {row["sink"]: row for row in one.box.show("t").get("outbox", [])}  # noqa: E731
            wait_for("the first try", lambda: rows().get("laptop", {}).get("state") == "retryable")
            peer.start()
            assert list(inbox.iterdir()) == []
            one.ok("status")
            wait_for("the delivery", lambda: rows()["laptop"]["state"] == "delivered")
            assert [json.loads(path.read_text())["data"]["task_id"] for path in inbox.iterdir()] == ["t"]
