"""Webhook deliveries a second, 20 at once: a real daemon with a full outbox, beside a bare aiohttp client, against one server.

Ours: each delivery is read from the journal, checked, signed, sent, and its mark and event made durable. The rate is taken from
the journal (read-only), from the first tenth delivered to the last: no start-up in it. The floor: 20 coroutines of one
`aiohttp.ClientSession` that post the same bytes and read the answer; nothing is signed, nothing is kept. A second floor does
what any outbox has to, and no more: it reads pages of rows from a copy of the same journal, signs and posts them with 20
coroutines, and marks each page there in one transaction, with executemany.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Final

import aiohttp

from agentqd.core.envelope import delivery_id, seal
from agentqd.storage.journal import Journal
from agentqd.storage.outbox import NewEntry, add_entry
from agentqd.storage.transaction import Transaction
from benchmarks.box import Box
from benchmarks.measure import Row

AT_ONCE: Final = 20
ROUNDS: Final = 5
LIMIT: Final = 0.70
WAIT_S: Final = 300.0
_TYPE: Final = "agentq.task.success"
_DELIVERED: Final = (
    "SELECT coalesce(sum(n), 0) FROM outbox_counts WHERE sink = 'hook' AND state = 'delivered'"
)
_PUT_AT_ONCE: Final = 500
_PAGE: Final = "SELECT e.seq, e.delivery_id, e.payload FROM outbox o JOIN entries e ON e.seq = o.entry_seq WHERE o.sink = 'hook' AND o.state = 'pending' ORDER BY o.due_at, o.entry_seq LIMIT 256"
_MARK: Final = "UPDATE outbox SET state = 'delivered', attempts = 1, due_at = NULL, delivered_at = ? WHERE entry_seq = ? AND sink = 'hook'"


def _payload(number: int) -> tuple[str, bytes]:
    """As large as a usual result."""
    entry_id = delivery_id("bench", f"t{number}", 1, "result", os.urandom(8).hex())
    data = {
        "task_id": f"t{number}",
        "name": "a task",
        "status": "success",
        "stdout_tail": "a line of output\n" * 60,
    }
    return entry_id, seal(entry_id, _TYPE, "bench", f"t{number}", time.time_ns() // 1000, data)


async def _bare(port: int, count: int) -> float:
    _, payload = _payload(0)
    left = count
    headers = {"content-type": "application/cloudevents+json"}
    url = f"http://127.0.0.1:{port}/hook"

    async def post(session: aiohttp.ClientSession) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            async with session.post(url, data=payload, headers=headers) as answer:
                await answer.read()
                assert answer.status == 200

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=AT_ONCE)) as session:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(post(session))
        return count / (time.perf_counter() - began)


async def _marked(port: int, path: str, secret: bytes, count: int) -> float:
    left = asyncio.Queue[tuple[int, str, bytes]]()
    url = f"http://127.0.0.1:{port}/hook"

    async def post(session: aiohttp.ClientSession) -> None:
        while not left.empty():
            _, name, payload = left.get_nowait()
            at = str(int(time.time()))
            digest = hmac.digest(secret, f"{name}.{at}.".encode() + payload, "sha256")
            headers = {
                "content-type": "application/cloudevents+json",
                "webhook-id": name,
                "webhook-timestamp": at,
                "webhook-signature": "v1," + base64.b64encode(digest).decode(),
            }
            async with session.post(url, data=payload, headers=headers) as answer:
                await answer.read()
                assert answer.status == 200

    def mark(rows: list[tuple[int, str, bytes]]) -> None:
        journal.execute("BEGIN IMMEDIATE")
        journal.executemany(_MARK, [(0, seq) for seq, _, _ in rows])
        journal.execute("COMMIT")

    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as journal:
        journal.executescript("PRAGMA synchronous = FULL; PRAGMA temp_store = MEMORY")
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=AT_ONCE)) as session:
            began = time.perf_counter()
            done = 0
            while rows := await asyncio.to_thread(lambda: journal.execute(_PAGE).fetchall()):
                for row in rows:
                    left.put_nowait(row)
                async with asyncio.TaskGroup() as group:
                    for _ in range(AT_ONCE):
                        group.create_task(post(session))
                await asyncio.to_thread(mark, rows)
                done += len(rows)
            assert done == count
            return count / (time.perf_counter() - began)


async def _fill(path: str, count: int) -> None:
    """Into the outbox of a daemon that is not running."""
    journal = Journal(path, lambda: time.time_ns() // 1000)
    await journal.open()

    def unit(tx: Transaction, start: int) -> None:
        for number in range(start, min(start + _PUT_AT_ONCE, count)):
            entry_id, payload = _payload(number)
            add_entry(tx, NewEntry(entry_id, None, 0, 0, "result", f"k{number}", _TYPE, payload, ["hook"]))

    for start in range(0, count, _PUT_AT_ONCE):
        await journal.commit(lambda tx, start=start: unit(tx, start))
    await journal.close()


def _filled(box: Box, count: int) -> str:
    """The journal of a box that is stopped now, with so many more rows to send."""
    path = str(box.state / "journal.db")
    box.stop()
    asyncio.run(_fill(path, count))
    return path


def _ours(box: Box, path: str, count: int) -> float:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as journal:

        def delivered() -> int:
            return int(journal.execute(_DELIVERED).fetchone()[0])

        before = delivered()
        box.start()
        begun = _wait_for(delivered, before + count // 10)
        began = time.perf_counter()
        _wait_for(delivered, before + count)
        return (before + count - begun) / (time.perf_counter() - began)


def _wait_for(delivered: object, count: int) -> int:
    assert callable(delivered)
    deadline = time.monotonic() + WAIT_S
    while (have := int(delivered())) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{have} of {count} deliveries after {WAIT_S:g} s")
        time.sleep(0.02)  # a look takes a moment of the cores that are measured
    return have


@contextmanager
def web_server() -> Iterator[int]:
    command = [sys.executable, str(Path(__file__).with_name("webserver.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(10)


def measure(folder: Path, deliveries: int, rounds: int = ROUNDS) -> list[Row]:
    """In turns, `rounds` times; the median of each."""
    place = folder / "webhook"
    (place / "box").mkdir(parents=True)
    key = os.urandom(32)
    secret = place / "secret"
    secret.write_text("whsec_" + base64.b64encode(key).decode() + "\n")
    secret.chmod(0o600)
    bare: list[float] = []
    marked: list[float] = []
    ours: list[float] = []
    with web_server() as port:
        hook = {"type": "webhook", "url": f"http://127.0.0.1:{port}/hook", "secret_file": str(secret)}
        with Box(place / "box", {"sinks": {"hook": hook}}) as box:
            box.start()
            asyncio.run(_bare(port, 200))  # warm
            for _ in range(rounds):
                bare.append(asyncio.run(_bare(port, deliveries)))
                journal = _filled(box, deliveries)
                shutil.copy(journal, place / "copy.db")  # closed, so that all of it is in the one file
                marked.append(asyncio.run(_marked(port, str(place / "copy.db"), key, deliveries)))
                ours.append(_ours(box, journal, deliveries))
    rates = {
        name: [round(rate) for rate in rates]
        for name, rates in (("bare", bare), ("marked", marked), ("agentqd", ours))
    }
    return [
        Row(
            "webhook deliveries a second, 20 at once",
            median(bare),
            median(ours),
            "/s",
            LIMIT,
            "higher",
            note="floor: bare aiohttp client; ours signed and durable",
            detail={"deliveries": deliveries, "rates": rates},
        ),
        Row(
            "the same beside a loop that reads, signs and marks",
            median(marked),
            median(ours),
            "/s",
            LIMIT,
            "higher",
            note="with the same client; no events, no retries",
        ),
    ]
