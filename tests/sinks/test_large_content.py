"""100 MB of a worker through a running daemon: to a program, a file and another machine, and never as a whole in memory."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from conftest import MakeBox
from realbox import RealBox, wait_for
from realsshd import RealSshd, real_sshd

pytestmark = [pytest.mark.real, pytest.mark.sshd, pytest.mark.xdist_group("sshd")]
SIZE = 100_000_000
GROWS_MAX = 40_000_000
PROGRAM = """import hashlib, json, os, sys
data = json.load(sys.stdin)["data"]
assert sys.stdin.read() == ""
if data.get("path"):
    with open(data["path"], "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    print(found, data["sha256"], data["bytes"], file=open(sys.argv[1], "a"))
"""


def config(folder: Path, sshd: RealSshd) -> str:
    (folder / "inbox").mkdir()
    (folder / "take.py").write_text(PROGRAM)
    (folder / "known_hosts").write_text(sshd.known_hosts_line())
    sinks = {
        "program": {"type": "command", "command": ["python3", str(folder / "take.py"), str(folder / "taken")]},
        "file": {"type": "file", "path": str(folder / "entries.jsonl")},
        "laptop": {
            "type": "ssh", "host": "127.0.0.1", "port": sshd.port, "user": sshd.account.name, "path": str(folder / "inbox"),
            "identity_file": str(sshd.client_key), "known_hosts": str(folder / "known_hosts"),
        },
    }  # fmt: skip
    return json.dumps({"sinks": sinks, "defaults": {"deliver_to": list(sinks)}})


def memory_peak(box: RealBox) -> int:
    lines = Path(f"/proc/{box.daemon_pid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def all_delivered(box: RealBox, count: int) -> bool:
    rows = box.show("large").get("outbox", [])
    return len(rows) == count and all(row["state"] == "delivered" for row in rows)


def test_a_hundred_megabytes_reach_every_sink_whole_and_are_never_loaded(make_box: MakeBox, tmp_path: Path) -> None:  # fmt: skip
    with real_sshd() as sshd:
        box = make_box(config(tmp_path, sshd))
        box.append({"task": "small", "id": "small", "prompt": "echo x"})  # every sink has been used once
        wait_for("a small one", lambda: [row for row in box.show("small").get("outbox", []) if row["state"] == "delivered"][3:])  # fmt: skip
        before = memory_peak(box)
        box.append({"task": "large", "id": "large", "prompt": f"head -c {SIZE} /dev/urandom > $AGENTQ_OUTBOX/big.bin"})  # fmt: skip
        wait_for("all of it", lambda: all_delivered(box, 8), 60)
        grown = memory_peak(box) - before
        (blob,) = (box.state / "blobs").glob("[!.]*")
        digest = hashlib.sha256(blob.read_bytes()).hexdigest()
        assert (tmp_path / "taken").read_text() == f"{digest} {digest} {SIZE}\n"
        (entry,) = [
            each
            for each in map(json.loads, (tmp_path / "entries.jsonl").read_text().splitlines())
            if each["type"] == "agentq.task.entry"
        ]
        assert (entry["data"]["path"], entry["data"]["sha256"]) == (str(blob), digest)
        (there,) = (tmp_path / "inbox").glob("*.content")
        assert hashlib.sha256(there.read_bytes()).hexdigest() == digest
        assert grown < GROWS_MAX, f"the daemon has grown by {grown / 1e6:.0f} MB"
