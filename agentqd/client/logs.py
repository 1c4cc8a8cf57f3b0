"""A worker's output, byte for byte, followed over attempts and over restarts of the daemon."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from agentqd.client.box import Box
from agentqd.client.connection import Query, take
from agentqd.client.errors import BadAnswer
from agentqd.client.patience import Patience, may_come_back
from agentqd.core.errors import AgentqError, Unreachable

READ_BYTES = 1024 * 1024
FOLLOW_WAIT_S = 20
NEXT_ATTEMPT_POLL_S = 1
POLL_MIN_S = 0.05


class Piece(NamedTuple):
    """`data` begins at `offset`; `skipped` bytes before it are gone (punched out by the output limit)."""

    data: bytes
    offset: int
    skipped: int
    next_offset: int
    end: bool


class LogReader:
    """Reads one stream of one task. `write` gets the bytes, `note` what a person should know."""

    def __init__(
        self,
        box: Box,
        task_id: str,
        stream: str,
        *,
        write: Callable[[bytes], None],
        note: Callable[[str], None],
    ) -> None:
        self._box = box
        self._id = task_id
        self._stream = stream
        self._write = write
        self._note = note

    def read_once(self, attempt: int | None) -> None:
        """What there is now of one attempt (None: the last)."""
        offset = 0
        while True:
            piece = self._piece(attempt, offset, wait_s=0)
            self._emit(piece)
            if piece.end or not piece.data:
                return
            offset = piece.next_offset

    def follow(self, attempt: int | None) -> None:
        """All attempts from the first (or only the one given) until the task is finished and everything was read."""
        current, offset = attempt, 0
        patience = Patience(self._box.reconnect_s)
        while True:
            asked = time.monotonic()
            try:
                if current is None and (current := self._attempt_after(0)) is None:
                    return
                piece = self._piece(current, offset, wait_s=FOLLOW_WAIT_S)
                patience.succeeded()
            except AgentqError as error:
                if may_come_back(error):
                    patience.bear(error)
                elif error.code == "no_such_attempt" and not self._finished():
                    self._pause()
                else:
                    raise
                continue
            self._emit(piece)
            offset = piece.next_offset
            if piece.end:
                following = None if attempt is not None else self._patient_attempt_after(current, patience)
                if following is None:
                    return
                current, offset = following, 0
            elif not piece.data and time.monotonic() - asked < POLL_MIN_S:
                time.sleep(POLL_MIN_S)  # a daemon that is stopping does not sit on the question

    def _patient_attempt_after(self, number: int, patience: Patience) -> int | None:
        while True:
            try:
                return self._attempt_after(number)
            except AgentqError as error:
                if not may_come_back(error):
                    raise
                patience.bear(error)

    def _attempt_after(self, number: int) -> int | None:
        """The next attempt, waited for; None once the task is finished without one."""
        while True:
            shown = self._box.connection.get("tasks", self._id)
            numbers = [take(item, "attempt", int) for item in take(shown, "attempts", list)]
            later = [found for found in numbers if found > number]
            if later:
                return min(later)
            if shown.get("state") == "finished":
                return None
            self._pause()

    def _pause(self) -> None:
        """A moment, or less if the task ends; an absent daemon is the next call's concern."""
        query: Query = {"timeout_s": NEXT_ATTEMPT_POLL_S}
        with suppress(Unreachable):
            self._box.connection.get("tasks", self._id, "wait", query=query, extra_s=NEXT_ATTEMPT_POLL_S)

    def _finished(self) -> bool:
        with suppress(Unreachable):
            return bool(self._box.connection.get("tasks", self._id).get("state") == "finished")
        return False

    def _piece(self, attempt: int | None, offset: int, wait_s: int) -> Piece:
        query = {
            "stream": self._stream,
            "attempt": attempt,
            "offset": offset,
            "limit": READ_BYTES,
            "wait_s": wait_s,
        }
        data, headers = self._box.connection.get_bytes("tasks", self._id, "logs", query=query, extra_s=wait_s)
        try:
            begins = int(headers.get("agentq-offset", offset))
            following = int(headers.get("agentq-next-offset", begins + len(data)))
        except ValueError:
            raise BadAnswer("the daemon's log answer has no readable offsets") from None
        return Piece(data, begins, begins - offset, following, headers.get("agentq-end") == "true")

    def _emit(self, piece: Piece) -> None:
        if piece.skipped > 0:
            self._note(f"{piece.skipped} bytes were left out here: the output passed limits.stdout_bytes_max")
        if piece.data:
            self._write(piece.data)
