"""The adapter of the `email` sink: a real SMTP server with STARTTLS and AUTH."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

from smtpserver import SmtpServer

from agentqd.core.envelope import data_of, seal
from agentqd.core.settings import Sink as SinkSettings
from agentqd.core.units import Duration
from agentqd.sinks.base import Delivery

from .conformance import NOW_US, Adapter, Condition

USER, PASSWORD = "agent@example.org", "pass word é!"
PLANS: dict[Condition, dict[str, Any]] = {
    Condition.GOOD: {},
    Condition.DEFERRING: {"at": "RCPT", "do": "451 4.7.1 greylisted, come back later"},
    Condition.REJECTING: {"at": "RCPT", "do": "550 5.1.1 nobody here of that name"},
    Condition.HANGING: {"at": "dot", "do": "hang"},
    Condition.CRASHING: {"at": "MAIL", "do": "drop"},
    Condition.AMBIGUOUS: {"at": "dot", "do": "drop", "take": True},
    Condition.HUGE_ANSWER: {"at": "RCPT", "do": "long"},
}


class EmailAdapter(Adapter):
    type = "email"
    needs = "smtpd"
    server: ClassVar[SmtpServer]

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.server.use(base)
        self._before = os.environ.get("SSL_CERT_FILE")
        os.environ["SSL_CERT_FILE"] = str(self.server.ca_file)
        (base / "password").write_text(PASSWORD + "\n")
        (base / "password").chmod(0o600)
        self.more: dict[str, Any] = {}
        self.plan()

    def settings(self) -> SinkSettings:
        fields: dict[str, Any] = {
            "host": "localhost", "port": self.server.port, "username": USER, "password_file": str(self.base / "password"),
            "from_": "The Box <agent@example.org>", "to": "me@example.org", "timeout": Duration(20),
        } | self.more  # fmt: skip
        return SinkSettings(type="email", **fields)

    def plan(self, **plan: Any) -> None:
        self.server.plan(**{"auth": f"{USER}:{PASSWORD}"} | plan)

    def become(self, condition: Condition) -> None:
        self.plan(**PLANS[condition])

    def release(self) -> None:
        if self._before is None:
            os.environ.pop("SSL_CERT_FILE", None)
        else:
            os.environ["SSL_CERT_FILE"] = self._before

    def received(self) -> list[str]:
        return self.server.received()

    def holds(self, delivery: Delivery) -> bool:
        """The text, to the letter; of a result what a person reads of it."""
        mail = next(m for m in self.server.mails() if m["X-AgentQ-Delivery-ID"] == delivery.delivery_id)
        data = json.loads(data_of(delivery.payload))
        body = mail.get_content().replace("\r\n", "\n")
        if delivery.kind == "result":
            return all(str(data[name]) in body for name in ("task_id", "status"))
        return body == data["content"] + "\n"

    def malformed(self) -> Delivery:
        return a_mail({"to": "two@x@example.org", "body": "x"}, name="bad")


def a_mail(content: object, *, name: str = "m", key: str = "mail.json", **fields: Any) -> Delivery:
    """An entry as a worker hands it over."""
    data: dict[str, Any] = {
        "task_id": "t1",
        "name": "the task",
        "attempt": 1,
        "key": key,
        "bytes": 1,
        "sha256": "x",
    }
    data |= {"content": content} | fields.pop("data", {})
    payload = seal(f"d{name}", "agentq.task.entry", "box", "t1", NOW_US, data)
    return Delivery(
        f"d{name}", 1, "agentq.task.entry", "entry", key, "t1", payload, NOW_US, **{"attempts": 0} | fields
    )
