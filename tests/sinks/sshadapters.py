"""The adapters of the `ssh` sink: a real OpenSSH, and between its sshd and its sftp-server a program that misbehaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import ClassVar

from realsshd import RealSshd

from agentqd.core.settings import Sink as SinkSettings
from agentqd.core.units import Duration
from agentqd.sinks.base import Delivery

from .conformance import Adapter, Condition, with_payload

BETWEEN = Path(__file__).with_name("sftp_between.py")


def sshd_with_between(sshd: RealSshd) -> None:
    sshd.lines.append(f"ForceCommand exec {sys.executable} -I {BETWEEN} {sshd.folder}")


class SshAdapter(Adapter):
    """One entry a file."""

    type = "ssh"
    needs = "between"
    mode: ClassVar[str] = "file"
    server: ClassVar[RealSshd]
    cannot: ClassVar[dict[Condition, str]] = {
        Condition.REJECTING: "an SFTP server never says no for good; a payload that is no envelope has a test of its own",
    }

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.inbox = base / "inbox"
        self.inbox.mkdir()
        self._aside = base / "aside"
        self.known_hosts = base / "known_hosts"
        self.known_hosts.write_text(self.server.known_hosts_line())
        (self.server.folder / "between").write_text(str(base))
        (base / "mode").write_text("good")
        self.step_s = 20.0

    @property
    def path(self) -> Path:
        return self.inbox

    def settings(self) -> SinkSettings:
        return SinkSettings(
            type="ssh",
            host="127.0.0.1",
            port=self.server.port,
            user=self.server.account.name,
            identity_file=str(self.server.client_key),
            known_hosts=str(self.known_hosts),
            path=str(self.path),
            mode=self.mode,  # type: ignore[arg-type]
            timeout=Duration(self.step_s),
        )

    def become(self, condition: Condition) -> None:
        self.release()
        if condition is Condition.DEFERRING:
            self.inbox.rename(self._aside)
        self.say(condition.value)

    def say(self, mode: str) -> None:
        (self.base / "mode.new").write_text(mode)
        (self.base / "mode.new").rename(self.base / "mode")

    def release(self) -> None:
        if self._aside.exists():
            self._aside.rename(self.inbox)
        self.say("good")

    def received(self) -> list[str]:
        received = self.base / "received"
        return received.read_text().split() if received.exists() else []

    def parts(self) -> list[Path]:
        """What must not stay."""
        return [path for path in self.inbox.iterdir() if path.name.endswith(".part")]

    def holds(self, delivery: Delivery) -> bool:
        return (self.inbox / f"{delivery.delivery_id}.json").read_bytes() == delivery.payload

    def malformed(self) -> Delivery:
        return with_payload(b'{"specversion":"1.0"}\n')


class SshAppendAdapter(SshAdapter):
    """One entry a line; what is too long for a line in a file beside it."""

    mode = "append"

    @property
    def path(self) -> Path:
        return self.inbox / "queue.jsonl"

    def become(self, condition: Condition) -> None:
        super().become(condition)
        if condition is Condition.AMBIGUOUS:
            self.say("ambiguous append")

    def lines(self) -> list[bytes]:
        text = self.path.read_bytes() if self.path.exists() else b""
        assert text == b"" or text.endswith(b"\n"), f"a torn tail: {text[-80:]!r}"
        return text.splitlines(keepends=True)

    def received(self) -> list[str]:
        return [json.loads(line)["id"] for line in self.lines()]

    def holds(self, delivery: Delivery) -> bool:
        if delivery.payload + b"\n" in self.lines():
            return True
        named = [json.loads(line) for line in self.lines()]
        (name,) = {line["dataref"] for line in named if line["id"] == delivery.delivery_id}
        return (self.inbox / name).read_bytes() == delivery.payload
