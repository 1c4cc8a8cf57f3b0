"""What running workers hand over is taken at once: inotify hints on their drop folders, and a slow rescan behind them."""

from __future__ import annotations

import asyncio
from typing import Final

from agentqd.core.lifecycle import State
from agentqd.core.resolve import resolve
from agentqd.core.verdict import RESULT_GRACE
from agentqd.loops import dropfolder
from agentqd.loops.dropfolder import RESULT_KEY, Scan
from agentqd.loops.live import Live, Workers
from agentqd.storage import tasks as store
from agentqd.storage.transaction import Transaction
from agentqd.supervisor.procfs import read_process
from agentqd.system.failpoints import failpoint
from agentqd.system.inotify import InotifyUnavailable, Overflow

_SETTLE_S: Final = 0.005
_WATCH_MASK: Final = 0x00000008 | 0x00000080 | 0x01000000  # IN_CLOSE_WRITE, IN_MOVED_TO, IN_ONLYDIR


class Handover:
    """`watcher` and `handover` are its loops; `watch` begins with a worker, `look` asks for one scan."""

    def __init__(self, workers: Workers) -> None:
        self.box = workers.box
        self.live = workers.live
        self._workers = workers
        self._handovers: asyncio.Queue[Live] = asyncio.Queue()

    def watch(self, live: Live) -> None:
        """Hear of this worker's drop folder from now on, and look at what is there already."""
        folder = self.box.folders.attempt(live.task.id, live.task.attempt)
        try:
            self._workers.inotify.add(f"{folder}/outbox", _WATCH_MASK, live.task.id)
        except (OSError, InotifyUnavailable) as error:
            self.box.log.warning("watch_failed", task=live.task.id, error=str(error))
        self.look(live)

    def look(self, live: Live) -> None:
        self._handovers.put_nowait(live)

    async def watcher(self) -> None:
        """inotify hints on the drop folders of running workers, and the slow rescan behind them."""
        while True:
            self.box.beat("handover")
            hints = await self._workers.inotify.wait(self.box.rescan_s)
            if isinstance(hints, Overflow) or not hints:
                chosen = [live for live in self.live.values() if live.running is not None]
            else:
                labels = {hint.label for hint in hints}
                chosen = [self.live[label] for label in labels if label in self.live]
            for live in chosen:
                self.look(live)

    async def handover(self) -> None:
        """Take what running workers hand over, one drop folder after another."""
        while True:
            live = await self._handovers.get()
            if not live.ended:
                await self._take_handed(live)

    async def _still_alive(self, live: Live) -> bool:
        """Asked after the scan. A file that its writer's death has closed is not handed over: the last scan judges it.

        The kernel closes a dying process's files an instant before it makes it a zombie, and a SIGKILL meets children first; so
        where the attempt is being ended, that instant is waited out.
        """
        if live.ending:
            await asyncio.sleep(_SETTLE_S)
        running = live.running
        if live.ended or running is None:
            return False
        process = read_process(running.pid)
        return process is not None and process.start == running.pid_start and process.state not in {"Z", "X"}

    async def _take_handed(self, live: Live) -> None:
        loop = asyncio.get_running_loop()
        folder = f"{self.box.folders.attempt(live.task.id, live.task.attempt)}/outbox"
        most = int(self.box.settings.limits.entry_bytes_max)
        try:
            scan: Scan = await loop.run_in_executor(
                self._workers.threads,
                dropfolder.scan,
                folder,
                self._workers.blobs,
                dict(live.taken),
                "alive",
                most,
            )
        except OSError as error:
            self.box.log.error("handover_failed", task=live.task.id, error=str(error))
            return
        if not scan.handed:
            return
        if live.ended or not await self._still_alive(live):
            self._workers.let_go([path for item in scan.handed for path in item.copies])
            return

        def unit(tx: Transaction) -> set[str]:
            task = store.get(tx, live.task.seq)
            keys: set[str] = set()
            if task.state in {State.RUNNING, State.STOPPING} and task.attempt == live.task.attempt:
                keys = dropfolder.record(tx, self.box, task, live.request, live.task.attempt, scan.handed)
            if spare := dropfolder.unnamed(tx, task.seq, scan.handed):
                tx.later(lambda: self._workers.let_go(spare))
            return keys

        failpoint("handover_read")
        keys = await self.box.journal.commit(unit)
        live.keys |= keys
        for item in scan.handed:
            live.taken[item.key] = item.identity
        if RESULT_KEY in keys:
            resolved = resolve(live.request, live.task.queue, live.task.runner, self.box.settings)
            self._workers.send_end(live.task.id, live.task.attempt, RESULT_GRACE, resolved.result_grace_s)
        self.box.task_changed(live.task.id)
