"""Submitting and cancelling from a laptop: what is said is on its disk before it is sent (docs/laptop.md, L0 to L4)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from agentqd.client.box import Box
from agentqd.client.connection import Object, encode_json
from agentqd.client.errors import AnswerLost, BadAnswer
from agentqd.client.flush import Flush, Report, again_if_lost, is_final, may_pass, submit_once
from agentqd.client.spool import Damaged, Entry, Head, Kept, Spool
from agentqd.core.errors import (
    AgentqError,
    IdConflict,
    InvalidTask,
    RefusedForNow,
    StateFolderError,
    Unreachable,
)

SEND_WAIT_S = 10.0  # for another agentqctl that sends what is older
POLL_S = 0.02

Tell = Callable[[Report], None]


def submit_spooled(box: Box, spool: Spool, fields: dict[str, Any], tell: Tell) -> Object:
    """The task in the box's hands, or in our spool. Raises AgentqError: then it is in neither.

    `box` must not flush by itself: what is older goes first here, and this one right after it. `tell` hears of that.
    """
    assert fields.get("id"), "an id comes before the first send"
    body = encode_json(fields)
    try:
        kept = _keep(spool, fields, body)
    except (RefusedForNow, StateFolderError) as error:  # this machine's disk; perhaps the box has one
        return _submit_without_spool(box, fields["id"], body, error)
    try:
        answer, why = _send(box, spool, kept, tell)
        if answer is not None:
            return answer
        _check_spooled(spool, kept, fields, body, why)
    finally:
        kept.release()
    return {
        "task_id": fields["id"],
        "state": None,
        "result": None,
        "duplicate": True if kept.adopted else None,
        "where": "spool",
        "box": spool.box,
        "reason": why.code,
        "message": why.message,
    }


def submit_required(box: Box, fields: dict[str, Any]) -> Object:
    """The task in the box's hands and nothing on this machine. Raises Unreachable; an unknown outcome names the id."""
    try:
        return submit_once(box, fields["id"], encode_json(fields))
    except AnswerLost as error:
        text = f"{error.message}; whether the box has the task is unknown: the same --id {fields['id']} asks again safely"
        raise AnswerLost(text, **{**error.fields, "task_id": fields["id"]}) from None


def _submit_without_spool(box: Box, task_id: str, body: bytes, spool_error: AgentqError) -> Object:
    try:
        return submit_once(box, task_id, body)
    except Unreachable as error:
        if isinstance(error, AnswerLost):
            text = f"whether the box has the task is unknown ({error.message}): the same --id {task_id} asks again safely"
        else:
            text = f"the box cannot be reached either: {error.message}"
        spool_error.message = f"{spool_error.message}; {text}"
        spool_error.fields["task_id"] = task_id
        raise spool_error from None


def _keep(spool: Spool, fields: dict[str, Any], body: bytes) -> Kept:
    """Our entry; or the one that is there already, when the same is said again."""
    if not _may_be_id(fields["id"]):
        from agentqd.core.task import read_task

        read_task(body)
        raise InvalidTask(f"id: {str(fields['id'])[:80]!r} cannot be an id", field="id")
    found = spool.find(fields["id"])
    if found is not None and _says_the_same(spool, found[0], fields):
        kept = spool.adopt(found[0])
        if kept is not None:
            return kept
    return spool.put("submit", fields["id"], str(fields.get("task") or ""), body)


def _send(box: Box, spool: Spool, kept: Kept, tell: Tell) -> tuple[Object | None, AgentqError]:
    """The box's answer, or why there is none yet. Raises AgentqError for its refusal; then the entry is gone."""
    give_up = time.monotonic() + SEND_WAIT_S
    while True:
        with spool.sending() as ours:
            if ours:
                try:
                    report = Flush(box, spool).run(kept)
                except (FileNotFoundError, Damaged) as error:
                    raise StateFolderError(
                        f"{spool.folder}/{kept.entry.file}: {error or 'it is gone'}"
                    ) from None
                except AgentqError as error:
                    if may_pass(error) and not _is_refusal_for_now(error):
                        return None, error
                    if is_final(error) or not kept.adopted:
                        spool.remove(kept.entry)
                    raise
                tell(report)
                if report.own is not None:
                    return report.own, RefusedForNow("")
                if report.stopped is not None and not may_pass(report.stopped):
                    if not kept.adopted:
                        spool.remove(
                            kept.entry
                        )  # a key, a config: a person's to mend, who is told here and now
                    raise report.stopped
                if not report.attended:
                    return None, report.stopped or RefusedForNow(
                        "an older cancellation of the same id waits for the daemon"
                    )
        if time.monotonic() >= give_up:
            return None, RefusedForNow("another agentqctl is sending what is older")
        time.sleep(POLL_S)


def _is_refusal_for_now(error: AgentqError) -> bool:
    """The box was reached, and says so: told at once, and nothing is kept here."""
    return isinstance(error, RefusedForNow) or error.code == RefusedForNow.code


def _check_spooled(spool: Spool, kept: Kept, fields: dict[str, Any], body: bytes, why: AgentqError) -> None:
    """What stays here was seen by nobody else: what can be refused is refused now. Raises InvalidTask; it is gone then."""
    if isinstance(why, AnswerLost):
        return  # it may have been taken
    from agentqd.core.task import read_task

    try:
        read_task(body)
        for entry in spool.entries():
            if entry.id == kept.entry.id and entry < kept.entry and not _says_the_same(spool, entry, fields):
                raise IdConflict(
                    f"id: {entry.id} is taken by another task that is spooled here; use another id, or none",
                    field="id",
                    id=entry.id,
                )
        spool.check_known()
    except AgentqError:
        if not kept.adopted:
            spool.remove(kept.entry)
        raise


def _says_the_same(spool: Spool, entry: Entry, fields: dict[str, Any]) -> bool:
    """Whether this entry is a submission of the same task. (A cancellation contradicts nothing.)"""
    try:
        head, body = spool.read(entry)
        if head.kind != "submit":
            return False
        old = json.loads(body)
    except (FileNotFoundError, Damaged, ValueError):
        return False
    return isinstance(old, dict) and {**old, "submitted_at": None} == {**fields, "submitted_at": None}


def _may_be_id(task_id: str) -> bool:
    return (
        0 < len(task_id) <= 64 and task_id.isascii() and task_id.replace("-", "a").replace("_", "a").isalnum()
    )


def cancel_spooled(bare: Box, box: Box, spool: Spool, task_id: str) -> Object:
    """The task cancelled on the box, taken out of our spool, or its cancellation spooled. Raises AgentqError.

    `bare` is `box` without its flush: a submission that is about to be withdrawn must not be sent first.
    """
    if _may_be_id(task_id) and spool.find(task_id) is not None:
        with spool.sending(SEND_WAIT_S) as ours:
            found = spool.find(task_id) if ours else None
            kept = spool.adopt(found[0]) if found is not None else None
            if kept is not None:
                try:
                    return _withdraw(bare, spool, kept)
                finally:
                    kept.release()
    try:
        return again_if_lost(lambda: box.connection.post("tasks", task_id, "cancel"))
    except Unreachable as error:
        if isinstance(error, BadAnswer) or not _may_be_id(task_id):
            raise
        spool.check_known()
        if spool.find(task_id, "cancel") is None:
            spool.put("cancel", task_id, "", b"{}").release()
        told = {"id": task_id, "state": None, "result": None}
        return {**told, "where": "spool", "box": spool.box, "message": error.message}


def _withdraw(bare: Box, spool: Spool, kept: Kept) -> Object:
    """A submission that stands in the spool may have reached the box all the same: its cancellation is sent too."""
    head = kept.head
    answer: Object = {"id": head.id, "state": None, "result": "cancelled", "where": "spool", "box": spool.box}
    try:
        answer = again_if_lost(lambda: bare.connection.post("tasks", head.id, "cancel"))
    except Unreachable as error:
        spool.put("cancel", head.id, head.name, b"{}", unsent=True).release()
        answer["message"] = error.message
    except AgentqError as error:
        if error.code == "no_such_task":
            spool.remove(kept.entry)
            return answer
        if error.code == "illegal_transition":
            spool.remove(kept.entry)
        raise
    spool.remove(kept.entry)
    return answer


def spooled_view(spool: Spool, task_id: str) -> Object | None:
    """What is known here of a task that waits in the spool, or that the box would not take from it."""
    found = spool.find(task_id)
    if found is not None:
        return {**_view(spool, found[1]), "state": None, "result": None, "reason": None}
    refused = spool.find_refused(task_id)
    if refused is None:
        return None
    error = refused[1].error or {}
    said = {
        "result": "refused",
        "reason": error.get("error"),
        "detail": error.get("message"),
        "conflicts": error.get("conflicts") or [],
        "finished_at": error.get("at"),
    }
    return {**_view(spool, refused[1]), "state": "finished", **said}


def _view(spool: Spool, head: Head) -> Object:
    return {"id": head.id, "task": head.name, "where": "spool", "box": spool.box, "spooled_at": head.at}
