"""A running daemon, the reference receiver of the docs as a process, and between them a proxy that loses answers."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from realbox import RealBox, wait_for
from standardwebhooks import Webhook

from .losingproxy import LosingProxy
from .webadapter import SECRET_LINE, keep_secret

RECEIVER = Path(__file__).parent.parent.parent / "docs" / "receiver.py"
NEW_LINE = "whsec_" + base64.b64encode(b"exchanged" * 3).decode()


class Reference:
    """docs/receiver.py, running."""

    def __init__(self, folder: Path) -> None:
        self.database, self.secrets = folder / "receiver.db", folder / "receiver-secrets"
        keep_secret(self.secrets)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(RECEIVER), str(self.port), str(self.database), str(self.secrets)]
        )
        wait_for("the receiver", self.listens)

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def effects(self) -> list[tuple[str, str, dict[str, Any]]]:
        with closing(sqlite3.connect(self.database)) as db:
            return [(a, b, json.loads(c)) for a, b, c in db.execute("SELECT id, type, data FROM effects")]

    def post(self, body: bytes, **headers: str) -> int:
        head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        with socket.create_connection(("127.0.0.1", self.port), 10) as wire:
            wire.sendall(
                f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body
            )
            return int(wire.recv(65536).split(b" ")[1])


@pytest.fixture
def reference(tmp_path: Path) -> Iterator[Reference]:
    made = Reference(tmp_path)
    yield made
    made.process.kill()
    made.process.wait(10)


def test_the_reference_receiver_takes_what_is_signed_now_and_each_id_once(reference: Reference) -> None:
    body = b'{"id": "d1", "type": "t", "data": {"x": 1}}'

    def sent(at: float, line: str = SECRET_LINE, changed: bytes = body, entry_id: str = "d1") -> int:
        from datetime import UTC, datetime

        signed = Webhook(line).sign("d1", datetime.fromtimestamp(int(at), UTC), body.decode())
        return reference.post(changed, webhook_id=entry_id, webhook_timestamp=str(int(at)), webhook_signature=f"v1,AAAA {signed}")  # fmt: skip

    now = time.time()
    assert sent(now, line=NEW_LINE) == 401
    assert sent(now, changed=body + b" ") == 401
    assert sent(now, entry_id="d2") == 401
    assert sent(now - 400) == 401
    assert sent(now + 400) == 401
    assert reference.post(body) == 401
    assert reference.post(body, webhook_id="d1", webhook_timestamp="nan", webhook_signature="v1,x") == 401
    assert reference.effects() == []
    assert sent(now) == 200
    assert sent(now + 1) == 200
    assert reference.effects() == [("d1", "t", {"x": 1})]
    keep_secret(reference.secrets, NEW_LINE, SECRET_LINE)
    assert sent(now) == 200
    assert sent(now, line=NEW_LINE) == 200
    assert len(reference.effects()) == 1


@pytest.mark.real
def test_lost_answers_a_kill_and_an_exchanged_secret_leave_one_effect_for_each_entry(
    make_box: Callable[..., RealBox], reference: Reference, tmp_path: Path
) -> None:
    ours = tmp_path / "ours"
    keep_secret(ours)
    with LosingProxy(reference.port) as proxy:
        box = make_box(
            "routes: [{match: {type: 'agentq.task.*'}, deliver_to: [hook]}]\n"
            f"sinks: {{hook: {{type: webhook, url: 'http://127.0.0.1:{proxy.port}/in', secret_file: {ours},"
            " headers: {X-Box: mine}, backoff: 300ms, backoff_max: 300ms}}\n",
            start=False,
        )

        def delivered(*ids: str) -> bool:
            shown = [row for id_ in ids for row in box.show(id_).get("outbox", [{"state": ""}])]
            return len(shown) >= 2 * len(ids) and all(row["state"] == "delivered" for row in shown)

        box.env = {"AGENTQD_FAILPOINT": "webhook_delivered:kill"}
        box.start(wait=False)
        wait_for("the socket", (box.runtime / "agentqd.sock").exists)
        box.append({"task": "work", "id": "t0", "prompt": "echo x"})
        assert box.daemon is not None
        box.daemon.wait(30)  # between the receiver's word and the mark
        box.kill()
        assert len(reference.effects()) == 1
        box.env = {}
        box.start()
        wait_for("the delivery", lambda: delivered("t0"))
        proxy.lose = ["after", "before", "after"]
        keep_secret(ours, NEW_LINE, SECRET_LINE)  # both sign while the receiver knows one
        make = (
            'import os; open(os.environ["AGENTQ_OUTBOX"] + "/big.bin", "wb").write(bytes(range(256)) * 4000)'
        )
        box.append(
            {"task": "large", "id": "t1", "prompt": f"{sys.executable} -c '{make}'; echo x"},
            *({"task": "work", "id": f"t{n}", "prompt": "echo x"} for n in range(2, 6)),
        )
        wait_for("all deliveries", lambda: delivered(*(f"t{n}" for n in range(6))))
        keep_secret(reference.secrets, NEW_LINE)
        keep_secret(ours, NEW_LINE)
        box.append({"task": "work", "id": "t6", "prompt": "echo x"})
        wait_for("the last delivery", lambda: delivered("t6"))
        assert proxy.lost == {"after": 2, "before": 1}
        assert sum(proxy.requests.values()) == len(proxy.requests) + 4, "three lost answers and a kill"
    effects = reference.effects()
    assert sorted(id_ for id_, _, _ in effects) == sorted(proxy.requests), "each entry once"
    assert sorted(data["task_id"] for _, type_, data in effects if type_ == "agentq.task.success") == [f"t{n}" for n in range(7)]  # fmt: skip
    (large,) = [data for _, type_, data in effects if type_ == "agentq.task.entry"]
    content = base64.b64decode(large["content_base64"])
    assert content == bytes(range(256)) * 4000
    assert large["sha256"] == hashlib.sha256(content).hexdigest()
    assert "path" not in large
    log = box.log.read_text()
    assert SECRET_LINE not in log
    assert NEW_LINE not in log
    assert "X-Box" not in log
