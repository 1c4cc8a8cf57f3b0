"""The adapters of today's plugs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from agentqd.core.envelope import data_of
from agentqd.core.settings import Sink as SinkSettings
from agentqd.sinks import appendlog
from agentqd.sinks.appendsink import AppendSink
from agentqd.sinks.base import Delivered, Delivery, Exec, ExecResult

from .conformance import Adapter, Condition, with_payload
from .smtpadapter import EmailAdapter


class FaultyDisk:
    """Stands in for `os` in appendlog: real system calls, but for the faults asked for."""

    def __init__(self) -> None:
        self.faults: dict[str, Callable[[], None]] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> object:
        real = getattr(os, name)
        if name not in ("write", "fdatasync", "fsync", "ftruncate", "rename", "pwrite"):
            return real

        def call(*args: object) -> object:
            self.calls.append(name)
            if name in self.faults:
                self.faults[name]()
            return real(*args)

        return call


def failing(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


class AppendAdapter(Adapter):
    file_name: ClassVar[str]
    cannot: ClassVar[dict[Condition, str]] = {
        Condition.REJECTING: "a file never says no for good; a payload that can be no line has a test of its own",
        Condition.HUGE_ANSWER: "a file answers with an errno",
    }
    doubles_after_ambiguity = False

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.disk = FaultyDisk()
        self._hanging = threading.Event()
        self._aside = base.with_name(base.name + "-aside")

    @property
    def path(self) -> Path:
        return self.base / self.file_name

    def become(self, condition: Condition) -> None:
        self.release()
        match condition:
            case Condition.DEFERRING:
                self.base.rename(self._aside)  # the folder is missing
            case Condition.HANGING:
                self._hanging = threading.Event()
                self.disk.faults["fdatasync"] = self._hanging.wait  # type: ignore[assignment]
            case Condition.CRASHING:
                self.disk.faults["write"] = failing(errno.EIO)
            case Condition.AMBIGUOUS:
                self.disk.faults["fdatasync"] = failing(errno.EIO)
            case _:
                pass
        setattr(appendlog, "os", self.disk)  # noqa: B010

    def release(self) -> None:
        self._hanging.set()
        self.disk.faults.clear()
        setattr(appendlog, "os", os)  # noqa: B010
        if self._aside.exists():
            self._aside.rename(self.base)

    def lines(self) -> list[bytes]:
        text = self.path.read_bytes() if self.path.exists() else b""
        assert text == b"" or text.endswith(b"\n"), f"a torn tail: {text[-80:]!r}"
        return text.splitlines(keepends=True)

    def received(self) -> list[str]:
        return [json.loads(line)["delivery_id"] for line in self.lines()]

    def holds(self, delivery: Delivery) -> bool:
        """The data object's bytes, spliced and not encoded anew."""
        return any(line.startswith(data_of(delivery.payload)[:-1] + b",") for line in self.lines())

    def malformed(self) -> Delivery:
        return with_payload(b'{"specversion":"1.0"}\n')


class CompletionsAdapter(AppendAdapter):
    type = "completions"
    file_name = "completions.jsonl"


class RejectedAdapter(AppendAdapter):
    type = "rejected"
    file_name = "queue/rejected.jsonl"


class FileAdapter(AppendAdapter):
    type = "file"
    file_name = "out/entries.jsonl"

    def settings(self) -> SinkSettings:
        return SinkSettings(type="file", path=str(self.path))

    def received(self) -> list[str]:
        return [json.loads(line)["id"] for line in self.lines()]

    def holds(self, delivery: Delivery) -> bool:
        return delivery.payload + b"\n" in self.lines()


# The receiver: takes the entry, then does what the file `mode` says.
RECEIVER = r"""
cd "$1" || exit 111
cat > "body.$$"
printf '%s\n' "$AGENTQ_DELIVERY_ID" >> asked
take() { cp "body.$$" "taken-$AGENTQ_DELIVERY_ID"; printf '%s\n' "$AGENTQ_DELIVERY_ID" >> received; }
read -r mode < mode
case "$mode" in
good) take; echo thanks;;
deferring) echo "not now, please"; exit 75;;
rejecting) echo "never"; exit 100;;
hanging) while :; do sleep 1000; done;;
crashing) kill -SEGV $$;;
ambiguous) take; kill -KILL $$;;
huge*) head -c 20000000 /dev/zero | tr '\0' '\007x'; exit 1;;
esac
"""


async def run_command(
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    timeout_s: float,
    stdin: str | None = None,
    stdin_path: str | None = None,
) -> ExecResult:
    """A small real Exec: own session, whole group ended at the time limit and on cancellation."""
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *argv,
            env=dict(env),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    )
    try:
        process = await asyncio.shield(starting)
    except OSError as problem:
        return ExecResult(exit_code=None, error=str(problem))
    except asyncio.CancelledError:
        await _end(await starting)
        raise
    timed_out, output = False, b""
    try:
        async with asyncio.timeout(timeout_s):
            output, _ = await process.communicate((stdin or "").encode())
    except TimeoutError:
        timed_out = True
    finally:
        await _end(process)
    code = process.returncode
    assert code is not None
    return ExecResult(
        exit_code=code if code >= 0 else None,
        signal=-code if code < 0 else None,
        timed_out=timed_out,
        output=output.decode("utf-8", "replace"),
    )


async def _end(process: asyncio.subprocess.Process) -> None:
    """The whole group is gone and nothing of it is open."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert process.stdin is not None
    process.stdin.close()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        await process.communicate()
    process._transport.close()  # type: ignore[attr-defined]


class CommandAdapter(Adapter):
    type = "command"
    exec: Exec = staticmethod(run_command)
    timeout_s: float = 30.0

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        (base / "receiver.sh").write_text(RECEIVER)

    def settings(self) -> SinkSettings:
        return SinkSettings(
            type="command", command=["/bin/sh", str(self.base / "receiver.sh"), str(self.base)]
        )

    def become(self, condition: Condition) -> None:
        (self.base / "mode").write_text(condition.value + "\n")

    def received(self) -> list[str]:
        received = self.base / "received"
        return received.read_text().split() if received.exists() else []

    def holds(self, delivery: Delivery) -> bool:
        return (self.base / f"taken-{delivery.delivery_id}").read_bytes() == delivery.payload

    def malformed(self) -> Delivery:
        return with_payload(b'{"specversion":"1.0","data":"\xff"}')


ADAPTERS: tuple[type[Adapter], ...] = (
    CompletionsAdapter,
    RejectedAdapter,
    FileAdapter,
    CommandAdapter,
    EmailAdapter,
)
APPENDING: tuple[type[AppendAdapter], ...] = (CompletionsAdapter, RejectedAdapter, FileAdapter)


def appending(adapter: AppendAdapter) -> AppendSink:
    sink = adapter.make()
    assert isinstance(sink, AppendSink)
    return sink


def positions(outcomes: object) -> list[int | None]:
    assert isinstance(outcomes, list)
    assert all(isinstance(outcome, Delivered) for outcome in outcomes), outcomes
    return [outcome.position for outcome in outcomes]
