"""Makes journal.db and expected.json as agentqd 0.1.0 wrote them: `python tests/storage/released/0.1.0/make.py` from the repository.

Run once, at that release. Never run it again with a later version: the point is what the old one wrote.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2]))

from loops.harness import Bench  # noqa: E402 - found through the line above

from agentqd.core.outbox import RowEvent, RowState  # noqa: E402
from agentqd.loops.operations import hold  # noqa: E402
from agentqd.storage import outbox, sources  # noqa: E402
from agentqd.storage.outbox import Mark  # noqa: E402
from agentqd.storage.queuefile import Position  # noqa: E402


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with Bench(Path(folder)) as bench:
            await bench.connect()
            await bench.add(id="done", submitted_at="2026-04-07T18:30:00Z", deliver_to=["completions"])
            await bench.end("done")
            await bench.do(lambda tx: outbox.mark(tx, [Mark(1, "completions", RowState.PENDING, RowEvent.ACKNOWLEDGED, 1, None, 1)]))  # fmt: skip
            await bench.add(id="running", writes_to=["/w"], labels=["x"])
            await bench.add(id="dependent", after="running")
            await bench.add(id="retryable", max_attempts=3, backoff=["1m", "5m"])
            await bench.end("retryable", exit_code=1)
            await bench.add(id="empty")
            await bench.end("empty", stdout_bytes=0)
            await bench.admit({"id": "refused", "writes_to": ["/w/x"]})
            bench.scheduler.target = None
            await bench.add(id="scheduled", not_before="2030-01-01T00:00:00Z")
            await bench.add(id="held", command=["true"], prompt=None)
            await bench.do(lambda tx: hold(tx, "held"))
            await bench.add(id="missing", prompt=None, prompt_ref="x.txt")
            await bench.do(lambda tx: sources.save(tx, [Position(1, "tasks.jsonl", 1, 2, 3, 4, "d", "current", 5)], []))  # fmt: skip
            await bench.do(lambda tx: tx.execute("INSERT INTO consumers VALUES ('default', 1, 0)"))
            due = await bench.journal.read(lambda c: outbox.due(c, "completions", 2**60, 100))
            expected = {
                "epoch": bench.journal.epoch,
                "tasks": {
                    row[0]: row[1:] for row in await bench.rows("SELECT id, state, result, run FROM tasks")
                },
                "due": [(row.delivery_id, row.task_id) for row in due],
                "sources": 1,
                "events": (await bench.rows("SELECT count(*) FROM events"))[0][0],
            }
            path = bench.folders.journal
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode=DELETE")
            connection.execute("VACUUM")
        (HERE / "journal.db").write_bytes(Path(path).read_bytes())
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


asyncio.run(main())
