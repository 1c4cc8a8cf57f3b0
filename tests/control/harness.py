"""A daemon's shared state with a real journal and a real control socket, and no process: claims are made, workers are not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import msgspec

from agentqd.control.server import ControlServer, Parts
from agentqd.core.errors import ConfigError
from agentqd.core.folders import Folders
from agentqd.core.outbox import RowEvent, RowState
from agentqd.core.settings import Settings
from agentqd.core.task import read_task
from agentqd.loops.admission import admit
from agentqd.loops.box import Box
from agentqd.loops.delivery import DeliveryLoop
from agentqd.loops.finishing import AttemptEnd, finish_attempt
from agentqd.loops.intake import Intake
from agentqd.loops.outside import OutsideClaims
from agentqd.loops.preparing import prepare
from agentqd.loops.scheduling import Target
from agentqd.loops.supervision import Supervision
from agentqd.storage import tasks as store
from agentqd.storage.journal import Journal
from agentqd.storage.outbox import Mark, mark
from agentqd.supervisor import wire
from agentqd.system.clock import SystemClock
from agentqd.system.inotify import NoInotify

VERSION = "9.9"


class Logged:
    """A log that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def _say(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    debug = info = warning = error = _say

    def events(self) -> list[str]:
        return [event for event, _ in self.lines]


class FakeReload:
    """What Reload shows and does, without a file."""

    def __init__(self) -> None:
        self.path = "/etc/agentqd/agentqd.yaml"
        self.sha256 = "ab" * 32
        self.applied_at = 1_700_000_000_000_000
        self.last_error: ConfigError | None = None
        self.changed = True

    async def now(self) -> bool:
        if self.last_error is not None:
            raise self.last_error
        return self.changed


class Daemon:
    """`get`, `post` and `ask` go through the real socket."""

    def __init__(self, root: Path, settings: Settings) -> None:
        self.root = root
        for name in ("state", "run", "state/tasks", "state/prompts"):
            (root / name).mkdir(mode=0o700)
        self.folders = Folders(str(root / "state"), str(root / "run"))
        self.clock = SystemClock()
        self.log = Logged()
        self.settings = settings
        self.reload = FakeReload()

    async def open(self) -> None:
        self.journal = Journal(self.folders.journal, self.clock.now_us)
        await self.journal.open()
        self.box = Box(self.folders, self.journal, self.settings, "s" * 32, "testbox", self.clock, self.log)
        self.supervision = Supervision(self.box, NoInotify(), may_start_supervisor=False)
        self.delivery = DeliveryLoop(self.box, self.supervision.execs)
        self.outside = OutsideClaims(self.box)
        intake = Intake(self.box, NoInotify(), [], None)

        def before_commit(tx: Any) -> None:
            self.supervision.scheduler.claim(tx)
            self.delivery.before_commit(tx)

        self.journal.before_commit = before_commit
        self.parts = Parts(
            supervision=self.supervision,
            delivery=self.delivery,
            intake=intake,
            reload=self.reload,  # type: ignore[arg-type]
            started_monotonic_s=self.clock.monotonic_s(),
            version=VERSION,
            outside=self.outside,
        )
        self.server = ControlServer(self.box, self.parts)
        await self.server.start()
        self.session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(self.folders.control_socket))

    def set_draining(self, on: bool) -> None:
        self.box.drain(self.clock.now_us() if on else None)

    async def close(self) -> None:
        await self.session.close()
        await self.server.close()
        self.supervision.close()
        await self.journal.close()

    # The client's side.

    async def ask(self, method: str, path: str, **more: Any) -> tuple[int, Any]:
        async with self.session.request(method, f"http://box{path}", **more) as response:
            assert response.content_type == "application/json", await response.text()
            return response.status, await response.json()

    async def get(self, path: str, **query: Any) -> Any:
        status, value = await self.ask("GET", path, params=query)
        assert status == 200, value
        return value

    async def post(self, path: str, body: Any = None) -> Any:
        status, value = await self.ask("POST", path, data=json.dumps({} if body is None else body))
        assert status in (200, 201), value
        return value

    async def fails(self, method: str, path: str, status: int, code: str, **more: Any) -> Any:
        got, value = await self.ask(method, path, **more)
        assert (got, value["error"]) == (status, code), value
        assert value["message"]
        return value

    async def submit(self, **fields: Any) -> str:
        answer = await self.post("/v1/tasks", {"task": "demo", "prompt": "true", **fields})
        return str(answer["task_id"])

    # The box's side.

    def connect_supervisor(self, version: str = VERSION) -> None:
        """As after a Welcome: claims are made (nobody gets them)."""
        self.supervision.link.welcome = wire.Welcome(1, version, "inst", "boot", 77, [], [], [])
        self.supervision.scheduler.target = Target("inst", "boot")

    def disconnect_supervisor(self) -> None:
        self.supervision.link.welcome = None
        self.supervision.scheduler.target = None

    async def start_task(self, task_id: str, pid: int = 4242) -> None:
        """The worker of a claimed task runs, as far as anybody can tell."""
        live = self.supervision.live[task_id]
        live.running = wire.Running(task_id, live.task.attempt, pid, 1, self.clock.now_us())
        self.attempt_folder(task_id, live.task.attempt)

    def attempt_folder(self, task_id: str, attempt: int = 1) -> Path:
        folder = Path(self.folders.attempt(task_id, attempt))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    async def end_task(self, task_id: str, exit_code: int = 0, **more: Any) -> None:
        """The worker's end, recorded as the finisher records it."""
        attempt = self.supervision.live[task_id].task.attempt if task_id in self.supervision.live else 1
        now = self.clock.now_us()
        exited = wire.Exited(
            task_id, attempt, "inst", "boot", pid=4242, started_at=now - 1_000_000, ended_at=now, exit_code=exit_code,
            **{"stdout_bytes": 5, **more},
        )  # fmt: skip

        def unit(tx: Any) -> None:
            task = store.find(tx, task_id)
            assert task is not None
            finish_attempt(
                tx, self.box, AttemptEnd(task_id, attempt, read_task(store.spec_of(tx, task.seq)[0]), exited)
            )

        await self.journal.commit(unit)
        self.supervision.live.pop(task_id, None)

    async def run_to_end(self, **fields: Any) -> str:
        """Submit, claim, end: one finished task with its result in the outbox."""
        self.connect_supervisor()
        task_id = await self.submit(**fields)
        await self.start_task(task_id)
        await self.end_task(task_id)
        return task_id

    async def deliver(
        self, sink: str = "completions", event: RowEvent = RowEvent.ACKNOWLEDGED, error: str | None = None
    ) -> int:
        """What the sink's runner records for all its pending rows. Returns how many."""

        def unit(tx: Any) -> int:
            sql = "SELECT entry_seq FROM outbox WHERE sink=? AND state IN ('pending','retryable') ORDER BY entry_seq"
            rows = tx.execute(sql, (sink,)).fetchall()
            last = tx.one(
                "SELECT coalesce(max(position), 0) FROM outbox WHERE sink=? AND position IS NOT NULL", (sink,)
            )[0]
            is_known = event is RowEvent.ACKNOWLEDGED
            for n, (seq,) in enumerate(rows, 1):
                was = RowState(
                    tx.one("SELECT state FROM outbox WHERE entry_seq=? AND sink=?", (seq, sink))[0]
                )
                mark(tx, [Mark(seq, sink, was, event, 1, None, last + n if is_known else None, error)])
            return len(rows)

        return int(await self.journal.commit(unit))

    async def admit_many(self, count: int, **fields: Any) -> None:
        """Tasks by the other door, many a commit."""

        def raw(n: int) -> bytes:
            return msgspec.json.encode({"task": f"many-{n}", "prompt": "true", **fields})

        source = {"kind": "file", "file": "tasks.jsonl", "offset": 0, "length": 1}
        for start in range(0, count, 5000):
            ready = [
                prepare(raw(n), source, b"%d" % n, self.box) for n in range(start, min(count, start + 5000))
            ]
            await self.journal.commit(lambda tx, ready=ready: admit(tx, self.box, ready))

    async def until(self, condition: Any, within_s: float = 10.0) -> None:
        async with asyncio.timeout(within_s):
            while not condition():
                await asyncio.sleep(0.005)


def fake_runner(*in_flight: int, last_error: str | None = None) -> Any:
    return SimpleNamespace(
        in_flight=set(in_flight),
        last_error=last_error,
        delivered_us=None,
        disabled_by_receiver=False,
        rates=lambda: {"delivered_last": None, "failed_last": None, "counted_since": None},
        health=lambda: {"breaker": "closed"},
        forget=lambda: None,
        lift=lambda: None,
    )
