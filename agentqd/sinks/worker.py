"""One thread for a sink's blocking file work, in order: a slow disk never holds up the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

T = TypeVar("T")
_Job = tuple[Callable[[], Any], asyncio.Future[Any] | None]
_STOP: Final = None


class Worker:
    """Invariants: jobs run one at a time in the order given; one cancelled before its turn never runs; one under way
    cannot be cancelled (a system call on a slow disk) and ends by itself."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None:
            # A daemon thread: a disk that hangs must not keep the process from leaving.
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    async def run(self, job: Callable[[], T]) -> T:
        """The job's result, or what it raised."""
        assert self._thread is not None, "start() comes first"
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.put((job, answer))
        return await answer

    def post(self, job: Callable[[], object]) -> None:
        """Run after what was given before; nobody waits for it."""
        self._jobs.put((job, None))

    async def stop(self) -> None:
        """After what was given before. May be called twice."""
        if self._thread is None:
            return
        try:
            await self.run(lambda: None)
        finally:  # cancelled while a disk hangs: the thread leaves when it can
            self._jobs.put(_STOP)
            thread, self._thread = self._thread, None
        thread.join()

    def _run(self) -> None:
        while (taken := self._jobs.get()) is not _STOP:
            job, answer = taken
            if answer is None:
                job()
            elif not answer.cancelled():
                self._answer(job, answer)

    @staticmethod
    def _answer(job: Callable[[], Any], answer: asyncio.Future[Any]) -> None:
        result, problem = None, None
        try:
            result = job()
        except BaseException as error:  # noqa: BLE001  (handed to the one who waits, not swallowed)
            problem = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            answer.get_loop().call_soon_threadsafe(_settle, answer, result, problem)


def _settle(answer: asyncio.Future[Any], result: object, problem: BaseException | None) -> None:
    if answer.done():
        return
    if problem is not None:
        answer.set_exception(problem)
    else:
        answer.set_result(result)
