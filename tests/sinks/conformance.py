"""What every sink must be able to show: the conditions of a receiver, and the adapter by which a plug shows itself.

A new plug adds one Adapter to `adapters.ADAPTERS` and runs through `test_conformance.py` unchanged. A condition that
its receiver cannot be in is named in `cannot`, with the reason; the suite prints it in the test's place.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from agentqd.core.envelope import delivery_id, seal
from agentqd.core.settings import Sink as SinkSettings
from agentqd.sinks.base import Context, Delivery, Exec, ExecResult, Sink
from agentqd.sinks.registry import make_sink

SECRET = "xyzzy-this-is-a-prompt"
NOW_US = 1_775_000_000_000_000


class Condition(StrEnum):
    GOOD = "good"
    DEFERRING = "deferring"  # it says: later
    REJECTING = "rejecting"  # it says: never
    HANGING = "hanging"  # it takes the delivery and says nothing
    CRASHING = "crashing"  # it dies before it has taken anything
    AMBIGUOUS = "ambiguous"  # it has taken the delivery, and then fails to say so
    HUGE_ANSWER = "huge answer"  # it says no with very many words


class Adapter:
    """One plug and its receiver. `base` is a folder of the test's own."""

    type: ClassVar[str]
    needs: ClassVar[str | None] = None  # the fixture that its receiver is
    cannot: ClassVar[dict[Condition, str]] = {}
    doubles_after_ambiguity: ClassVar[bool] = True  # what an append sink can see for itself, others cannot

    def __init__(self, base: Path) -> None:
        self.base = base

    def settings(self) -> SinkSettings:
        return SinkSettings(type=self.type)

    def make(self) -> Sink:
        """A sink as the daemon makes it. Called again, it is the sink after a restart."""
        return make_sink(
            Context(
                name=self.type,
                settings=self.settings(),
                state_dir=str(self.base),
                exec=self.exec,
                now_us=lambda: NOW_US,
            ),
            64 * 1024 * 1024,
        )

    exec: Exec = staticmethod(lambda *_, **__: _no_exec())

    def become(self, condition: Condition) -> None:
        raise NotImplementedError

    def received(self) -> list[str]:
        """The delivery ids that the receiver took for good, in order, repeats included."""
        raise NotImplementedError

    def holds(self, delivery: Delivery) -> bool:
        """Has the receiver the delivery's payload (or data) byte for byte?"""
        raise NotImplementedError

    def malformed(self) -> Delivery:
        """A delivery that this sink can never send."""
        raise NotImplementedError

    def release(self) -> None:
        """Let go of whatever hangs (after the test, too)."""


async def _no_exec() -> ExecResult:
    raise AssertionError("this sink runs no command")


def delivery(number: int, *, kind: str = "entry", padding: int = 0, attempts: int = 0) -> Delivery:
    """The number-th delivery: always the same id and bytes."""
    data = {
        "task_id": f"t{number}",
        "name": "a task with é and \u2028",
        "key": f"reply-{number}.txt",
        "content": SECRET + "x" * padding,
    }
    if kind == "result":
        data["status"] = "success"
    type_ = "agentq.task.success" if kind == "result" else "agentq.task.entry"
    entry_id = delivery_id("state", f"t{number}", 1, kind, f"reply-{number}.txt")  # type: ignore[arg-type]
    return Delivery(
        delivery_id=entry_id,
        entry_seq=number,
        type=type_,
        kind=kind,
        key=f"reply-{number}.txt",
        task_id=f"t{number}",
        payload=seal(entry_id, type_, "box", f"t{number}", NOW_US, data),
        created_at=NOW_US,
        attempts=attempts,
    )


def some(count: int, start: int = 1) -> list[Delivery]:
    return [delivery(number) for number in range(start, start + count)]


def with_payload(payload: bytes) -> Delivery:
    return Delivery("dbad", 999, "agentq.task.entry", "entry", "bad", "t999", payload, NOW_US, 0)


def ids(batch: Sequence[Delivery]) -> list[str]:
    return [one.delivery_id for one in batch]


def open_descriptors() -> set[str]:
    """What this process has open, by target: compared before and after, it shows a leak."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number}:{os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:
            continue
    return found
