"""Pulling the completion queue: rows are acknowledged only after the caller has put them away."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from agentqd.client.box import Box
from agentqd.client.connection import Query, take
from agentqd.client.errors import AnswerLost
from agentqd.client.patience import Patience, may_come_back
from agentqd.core.errors import Unreachable
from agentqd.core.limits import COMPLETIONS_BATCH_MAX

FOLLOW_WAIT_S = 25
POLL_MIN_S = 0.05


def pull(
    box: Box,
    consumer: str,
    *,
    limit: int | None,
    follow: bool,
    acknowledge: bool,
    put_away: Callable[[list[dict[str, Any]]], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Hands each batch to `put_away`, which returns once the rows are safe; only then they are acknowledged. Returns
    how many. What was put away and not acknowledged (a crash, a lost daemon) comes again: at least once."""
    count = 0
    after: int | None = None  # moves only when nothing is acknowledged
    patience = Patience(box.reconnect_s if follow else 0.0)
    while limit is None or count < limit:
        most = COMPLETIONS_BATCH_MAX if limit is None else min(COMPLETIONS_BATCH_MAX, limit - count)
        wait_s = FOLLOW_WAIT_S if follow else 0
        asked = clock()
        query: Query = {"consumer": consumer, "limit": most, "wait_s": wait_s, "after": after}
        try:
            answer = box.connection.get("completions", query=query, extra_s=wait_s)
        except Unreachable as error:
            if not may_come_back(error):
                raise
            patience.bear(error)
            continue
        patience.succeeded()
        rows: list[dict[str, Any]] = take(answer, "rows", list)
        if rows:
            put_away(rows)
            count += len(rows)
            if acknowledge:
                _acknowledge(box, consumer, take(rows[-1], "seq", int))
            else:
                after = take(rows[-1], "seq", int)
        if not follow and not (answer.get("more") and rows):
            break
        if not rows and clock() - asked < POLL_MIN_S:
            sleep(POLL_MIN_S)
    return count


def _acknowledge(box: Box, consumer: str, seq: int) -> None:
    """Sent again when the answer is lost: it never moves back, so once more changes nothing."""
    try:
        box.connection.post("consumers", consumer, "ack", body={"seq": seq})
    except AnswerLost:
        box.connection.post("consumers", consumer, "ack", body={"seq": seq})
