"""What goes over the wire, as the box's own sftp server logs it: one packet a line, fsynced before it is reported."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.laptop.onelaptop import one_laptop

pytestmark = [pytest.mark.real, pytest.mark.sshd]

CALLS = re.compile(r"request \d+: (open|write|fsync|close|rename|posix-rename|setstat|read|remove)\b[^\n]*")
SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/lib/ssh/sftp-server")


class Wire:
    """What an sftp server that logs its requests has seen."""

    def __init__(self, log: Path) -> None:
        self.log = log
        server = next(path for path in SERVERS if os.path.exists(path))
        self.lines = [f"Subsystem sftp exec {server} -e -l DEBUG3 2>>{log}"]

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def calls(self) -> list[str]:
        """The names of the requests, in order."""
        return [found[1] for found in CALLS.finditer(self.text())]


@pytest.fixture
def wire(tmp_path: Path) -> Wire:
    return Wire(tmp_path / "sftp.log")


def test_a_line_is_one_write_and_its_fsync_comes_before_the_answer(wire: Wire) -> None:
    with one_laptop(lines=wire.lines, start=False) as one:
        (one.box.state / "queue").mkdir(parents=True)
        one.box.runtime.mkdir()
        one.ok("submit", "echo " + "x" * 16000, "--id", "t")
        seen = wire.calls()
        assert seen.count("write") == 1, wire.text()
        assert seen[seen.index("write") + 1] == "fsync"
        # A new file's name is durable too: its folder is opened, fsynced and closed.
        assert seen[seen.index("fsync") + 1 :][:3] == ["open", "fsync", "close"]
        assert re.search(r'open "[^"]+tasks.jsonl" flags READ,WRITE,APPEND,CREATE mode 0600', wire.text())


def test_the_longest_line_behind_a_torn_one_is_one_write_too(wire: Wire) -> None:
    with one_laptop(lines=wire.lines, start=False) as one:
        (one.box.state / "queue").mkdir(parents=True)
        one.box.queue_file.write_bytes(b'{"torn')
        line = json.dumps({"task": "t", "id": "t", "prompt": ""}).encode()
        line = line.replace(b'""', b'"' + b"x" * (16383 - len(line)) + b'"')
        one.ok("enqueue", stdin=line)
        assert wire.calls().count("write") == 1
        assert " len 16385\n" in wire.text()
        assert one.box.queue_file.read_bytes() == b'{"torn\n' + line + b"\n"


def test_a_payload_is_fsynced_then_renamed_then_its_folder_fsynced_then_the_line_written(wire: Wire) -> None:
    with one_laptop(lines=wire.lines, start=False) as one:
        for folder in ("queue", "prompts"):
            (one.box.state / folder).mkdir(parents=True)
        one.ok("submit", "--prompt-file", "-", "--id", "t", stdin=b"y" * 50_000)
        seen = [call for call in wire.calls() if call not in ("setstat", "close")]
        rename = next(at for at, call in enumerate(seen) if "rename" in call)
        assert seen[rename - 1] == "fsync"
        assert seen[rename + 1 : rename + 3] == ["open", "fsync"]
        assert "write" in seen[rename + 3 :], "the line comes after its payload"
