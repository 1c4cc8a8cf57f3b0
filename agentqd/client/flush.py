"""Sending what was spooled, in order: whole flushes, and the one that every contact with a box makes by itself.

Promises:
1. An entry leaves the spool only after the box's answer: taken (by its daemon or its queue file), or refused for good.
2. Order is kept. What is refused for now, or cannot be sent, stops the flush. Two things let others pass: an entry that is
   damaged, and a cancellation that waits for a daemon (but nothing of the same task passes it).
3. The box is told that nobody waits for the answer (`spooled=KEY`), so that it records a refusal as it does for a line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import NamedTuple

from agentqd.client.box import Box, is_absent
from agentqd.client.connection import Object
from agentqd.client.errors import AnswerLost
from agentqd.client.spool import Damaged, Entry, Head, Kept, Spool
from agentqd.client.tasks import put_line
from agentqd.core.errors import (
    EXIT_OTHER,
    EXIT_REFUSED_FOR_NOW,
    AgentqError,
    InvalidTask,
    NotPermitted,
    RefusedForNow,
    Unreachable,
)

RESEND_WAIT_S = 0.2
UNREAD_WAIT_S = 1.0  # a line that the daemon has not read yet is no task yet
_FINAL_STATUSES = (409, 413, 422)


class Sent(NamedTuple):
    head: Head
    answer: Object


class Refused(NamedTuple):
    head: Head
    error: AgentqError


class SetAside(NamedTuple):
    name: str
    why: str
    kept: str


class Report:
    """What one flush did."""

    def __init__(self, *, stopped: AgentqError | None = None, busy: bool = False) -> None:
        self.sent: list[Sent] = []
        self.refused: list[Refused] = []
        self.damaged: list[SetAside] = []
        self.stopped = stopped
        self.attended = False  # stopped at an entry whose maker is sending it
        self.busy = busy  # another agentqctl is flushing
        self.own: Object | None = None

    @property
    def exit_code(self) -> int:
        """A lost submission first, then what was refused, then why it did not go on."""
        if self.damaged:
            return EXIT_OTHER
        errors = [item.error for item in self.refused] + ([self.stopped] if self.stopped else [])
        return errors[0].exit_code if errors else 0


def is_final(error: AgentqError) -> bool:
    """The box, or the rules, will never take it as it is. (Not what is wrong with this machine's own config.)"""
    return isinstance(error, InvalidTask) or (_is_answer(error) and error.http_status in _FINAL_STATUSES)


def may_pass(error: AgentqError) -> bool:
    """Whether the same may succeed later without a person."""
    return isinstance(error, Unreachable | RefusedForNow) or (_is_answer(error) and error.http_status >= 500)


def _is_answer(error: AgentqError) -> bool:
    """The box's own word (client/errors.py), not an error of ours."""
    return type(error) is AgentqError


class Flush:
    """One flush of one spool to its box (whose connection must not flush by itself). `sending` is held by the caller."""

    def __init__(self, box: Box, spool: Spool, sleep: Callable[[float], None] = time.sleep) -> None:
        self._box = box
        self._spool = spool
        self._sleep = sleep
        self._report = Report()
        self._passed: set[str] = set()  # ids of cancellations that wait for a daemon
        self._unread_left_s = UNREAD_WAIT_S

    def run(self, own: Kept | None = None) -> Report:
        """Everything that waits; with `own`, only up to that entry, which is sent as what somebody waits for: its
        refusal is raised (the caller removes it), its answer is `Report.own`."""
        self._set_strangers_aside()
        if own is None:
            self._spool.clear_drafts()
        seen: set[Entry] = set()
        while more := [entry for entry in self._spool.entries() if entry not in seen]:
            seen |= set(more)
            for entry in more:
                if own is not None and entry >= own.entry:
                    if own.entry.id in self._passed:
                        return self._report
                    self._report.own = self._send_own(own)
                    return self._report
                if not self._pass_on(entry):
                    return self._report
        return self._report

    def _send_own(self, own: Kept) -> Object:
        _, body = self._spool.read(own.entry)
        answer = submit_once(self._box, own.head.id, body, sleep=self._sleep)
        self._spool.remove(own.entry)
        return answer

    def _pass_on(self, entry: Entry) -> bool:
        """False: nothing behind it may be sent."""
        try:
            kept = self._spool.adopt(entry)
            if kept is None:
                self._report.attended = entry in self._spool.entries()
                return not self._report.attended
            try:
                head, body = self._spool.read(entry)
                return self._send(entry, head, body)
            finally:
                kept.release()
        except FileNotFoundError:
            return True
        except Damaged as damage:
            self._set_aside(entry.file, str(damage))
            return True
        except AgentqError as error:
            self._report.stopped = error
            return False

    def _send(self, entry: Entry, head: Head, body: bytes) -> bool:
        """Raises AgentqError: it stays, and so does what is behind it."""
        if head.id in self._passed:
            return True
        try:
            if head.kind == "cancel":
                answer = self._cancel(head)
                if answer is None:
                    self._passed.add(head.id)
                    return True
            else:
                answer = submit_once(self._box, head.id, body, spooled=head.key, sleep=self._sleep)
        except AgentqError as error:
            if not is_final(error) and not (head.kind == "cancel" and error.code == "no_such_task"):
                raise
            self._refuse(entry, head, body, error)
            return True
        if answer.get("result") == "refused" and head.kind == "submit":
            code = str(answer.get("reason") or "refused")
            met = {"conflicts": answer["conflicts"]} if answer.get("conflicts") else {}
            refusal = AgentqError(str(answer.get("message") or code), code=code, **met)
            refusal.exit_code = EXIT_REFUSED_FOR_NOW
            self._refuse(entry, head, body, refusal)
            return True
        self._spool.remove(entry)
        self._report.sent.append(Sent(head, answer))
        return True

    def _refuse(self, entry: Entry, head: Head, body: bytes, error: AgentqError) -> None:
        self._spool.refuse(entry, head, body, error)
        self._report.refused.append(Refused(head, error))

    def _cancel(self, head: Head) -> Object | None:
        """None: only a daemon can do it, and there is none."""
        try:
            return again_if_lost(lambda: self._post_cancel(head), self._sleep)
        except Unreachable as error:
            if is_absent(error):
                return None
            raise

    def _post_cancel(self, head: Head) -> Object:
        while True:
            try:
                return self._box.connection.post("tasks", head.id, "cancel")
            except AgentqError as error:
                if (
                    error.code == "illegal_transition"
                ):  # it has ended by itself: nothing is left to be cancelled
                    return {"id": head.id, **{name: error.fields.get(name) for name in ("state", "result")}}
                if error.code != "no_such_task":
                    raise
                if self._unread_left_s <= 0:
                    if head.unsent:
                        return {"id": head.id, "state": None, "result": "cancelled"}
                    raise
            self._unread_left_s -= (
                RESEND_WAIT_S  # a daemon that has just started may not have read its queue file
            )
            self._sleep(RESEND_WAIT_S)

    def _set_strangers_aside(self) -> None:
        for name in self._spool.strangers():
            self._set_aside(name, "not a spooled entry")

    def _set_aside(self, name: str, why: str) -> None:
        try:
            kept = self._spool.set_aside(name)
        except AgentqError as error:
            kept = f"{self._spool.folder}/{name} ({error.message})"
        self._report.damaged.append(SetAside(name, why, kept))


def again_if_lost(call: Callable[[], Object], sleep: Callable[[float], None] = time.sleep) -> Object:
    """For calls that do no more when they are made twice. Raises AnswerLost while the outcome of the first is unknown."""
    try:
        return call()
    except AnswerLost as error:
        lost = error
    sleep(RESEND_WAIT_S)
    try:
        return call()
    except (Unreachable, NotPermitted):
        raise lost from None


def submit_once(
    box: Box,
    task_id: str,
    body: bytes,
    *,
    spooled: str | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Object:
    """The box's answer, or the task in its queue file when its daemon is down. Raises AgentqError; AnswerLost: unknown.

    `spooled`: the key of the entry; nobody waits for the answer. Otherwise what is invalid is told here and now, also
    when there is no daemon to say so.
    """
    try:
        return again_if_lost(
            lambda: box.connection.post_raw("tasks", body=body, query={"spooled": spooled}), sleep
        )
    except Unreachable as error:
        if not is_absent(error):
            raise
        absent = error
    if spooled is None:
        from agentqd.core.task import read_task

        read_task(body)
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidTask(f"{task_id}: not JSON", code="invalid_json") from None
    queue = box.queue()
    if len(body) > queue.line_bytes_max and not isinstance(fields.get("prompt"), str):
        raise absent  # no prompt to put beside it: only a daemon can take it
    try:
        return put_line(queue, fields, body)
    except InvalidTask as error:
        raise (absent if error.code == "line_too_long" else error) from None


def flush_spool(box: Box, spool: Spool, wait_s: float = 0.0) -> Report:
    """Everything that waits, unless another agentqctl is at it already. Raises AgentqError where the spool itself fails."""
    if spool.is_empty():
        return Report()
    with spool.sending(wait_s) as ours:
        return Flush(box, spool).run() if ours else Report(busy=True)
