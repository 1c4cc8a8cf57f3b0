"""The adapter of the `notify` sink: apprise's json:// and a service of our own, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

from agentqd.core.settings import Sink as SinkSettings
from agentqd.core.units import Duration
from agentqd.sinks.base import Delivery

from .conformance import Adapter, Condition, with_payload

SERVICE = Path(__file__).with_name("notify_service.py")
TOKEN = "tk-5up3r-s3cret"


class NotifyAdapter(Adapter):
    type = "notify"
    cannot: ClassVar[dict[Condition, str]] = {
        Condition.REJECTING: "apprise only says yes or no, and not why; a payload that is no envelope has a test of its own",
    }
    paths: tuple[str, ...] = ("one",)
    try_s = 20.0

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.say("good")
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.port = listening.getsockname()[1]
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SERVICE), str(base), str(listening.fileno())],
                pass_fds=[listening.fileno()],
            )
        self.urls_file = base / "urls"
        self.write_urls(*self.paths)

    def write_urls(self, *paths: str, scheme: str = "json") -> None:
        urls = [f"{scheme}://user:{TOKEN}@127.0.0.1:{self.port}/{path}" for path in paths]
        self.urls_file.write_text("# people\n" + "\n".join(urls) + "\n")
        os.chmod(self.urls_file, 0o600)

    def settings(self) -> SinkSettings:
        return SinkSettings(type="notify", urls_file=str(self.urls_file), timeout=Duration(self.try_s))

    def say(self, mode: str, path: str | None = None) -> None:
        name = "mode" if path is None else f"mode-{path}"
        (self.base / "mode.new").write_text(mode)
        (self.base / "mode.new").rename(self.base / name)

    def become(self, condition: Condition) -> None:
        self.say(condition.value)

    def messages(self) -> list[dict[str, Any]]:
        path = self.base / "messages"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def taken(self) -> list[tuple[str, str]]:
        """(path, delivery id) of each message that was taken, in order."""
        return [(each["path"].strip("/"), each["message"].split()[-1]) for each in self.messages()]

    def received(self) -> list[str]:
        return [delivery_id for _, delivery_id in self.taken()]

    def holds(self, delivery: Delivery) -> bool:
        """A message is no copy: it has the delivery's id, its key and the beginning of its content."""
        found = next(each for each in self.messages() if each["message"].endswith(delivery.delivery_id))
        data = json.loads(delivery.payload)["data"]
        seen = f"{found['title']}\n{found['message']}"
        if "status" in data:
            return data["status"] in seen and data["task_id"] in seen
        return data["key"] in seen and data["content"][:20] in seen

    def malformed(self) -> Delivery:
        return with_payload(b'{"specversion":"1.0"}')

    def release(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
