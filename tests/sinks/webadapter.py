"""The adapter of the `webhook` sink: a real HTTP receiver, a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

from agentqd.core.settings import Sink as SinkSettings
from agentqd.sinks.base import Delivery

from .conformance import Adapter, Condition, with_payload

SECRET_LINE = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
_PROGRAM = Path(__file__).with_name("httpreceiver.py")


@contextmanager
def receiver_process() -> Iterator[int]:
    """Its port. It ends with its stdin."""
    process = subprocess.Popen(
        [sys.executable, "-I", str(_PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(10)
        finally:
            process.kill()


def keep_secret(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines or (SECRET_LINE,)) + "\n")
    path.chmod(0o600)
    return str(path)


class WebhookAdapter(Adapter):
    type = "webhook"
    needs = "web_receiver"
    port: ClassVar[int]
    cannot: ClassVar[dict[Condition, str]] = {
        Condition.REJECTING: "what a web receiver says no to may be mended there; a payload that is no envelope has a test of its own",
    }

    def settings(self) -> SinkSettings:
        return SinkSettings(
            type="webhook",
            url=f"http://127.0.0.1:{self.port}{quote(str(self.base))}",
            secret_file=keep_secret(self.base / "secret"),
        )

    def become(self, condition: Condition) -> None:
        (self.base / "mode.new").write_text(condition.value)
        (self.base / "mode.new").rename(self.base / "mode")

    def received(self) -> list[str]:
        received = self.base / "received"
        return received.read_text().split() if received.exists() else []

    def holds(self, delivery: Delivery) -> bool:
        return (self.base / f"taken-{delivery.delivery_id}").read_bytes() == delivery.payload

    def malformed(self) -> Delivery:
        return with_payload(b'["no envelope"]')
