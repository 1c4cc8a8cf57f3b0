"""Pulling the completion queue: rows are acknowledged only after the caller has put them away.

Promises:
1. `put_away` has returned before a row is acknowledged, and rows go to it in the order of their `seq`.
2. While this runs, no row goes to it twice: an acknowledgement whose answer is lost is sent again (it never moves back)
   before anything else is asked.
3. With `follow` it outlasts an absent box for `box.reconnect_s`, without `follow` only what breaks after the first answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from agentqd.client.box import Box
from agentqd.client.connection import Query, take
from agentqd.client.patience import Patience, may_come_back
from agentqd.core.errors import AgentqError
from agentqd.core.limits import COMPLETIONS_BATCH_MAX

FOLLOW_WAIT_S = 25
POLL_MIN_S = 0.05
CUT_PATIENCE_S = 60.0  # of a pull without --follow: a cut is worth waiting for, a box that is away is not

Rows = list[dict[str, Any]]


def cut_patience(box: Box, *, follow: bool) -> Patience:
    """How long something that has begun is tried again."""
    return Patience(box.reconnect_s if follow else min(box.reconnect_s, CUT_PATIENCE_S))


def pull(
    box: Box,
    consumer: str,
    *,
    limit: int | None,
    follow: bool,
    acknowledge: bool,
    put_away: Callable[[Rows], None],
    acknowledged: Callable[[Rows], None] = lambda _: None,
    came: Callable[[Rows], None] = lambda _: None,
    one_by_one: bool = False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Hands each batch to `put_away`, which returns once the rows are safe; only then they are acknowledged. Returns
    how many. What was put away and not acknowledged (a crash, a lost daemon) comes again: at least once.

    `one_by_one`: batches of one row, each acknowledged by itself. `came` is told of all rows of an answer first,
    `acknowledged` of those that will not come again."""
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
        except AgentqError as error:
            if not may_come_back(error):
                raise
            patience.bear(error)
            continue
        patience.succeeded()
        if not follow:
            patience = cut_patience(box, follow=False)
        rows: Rows = take(answer, "rows", list)
        came(rows)
        for part in [[row] for row in rows] if one_by_one else [rows] if rows else []:
            put_away(part)
            count += len(part)
            seq = take(part[-1], "seq", int)
            if acknowledge:
                _acknowledge(box, consumer, seq, cut_patience(box, follow=follow))
            else:
                after = seq
            acknowledged(part)
        if not follow and not (answer.get("more") and rows):
            break
        if not rows and clock() - asked < POLL_MIN_S:
            sleep(POLL_MIN_S)
    return count


def _acknowledge(box: Box, consumer: str, seq: int, patience: Patience) -> None:
    """Sent again until an answer comes: it never moves back, so once more changes nothing."""
    while True:
        try:
            box.connection.post("consumers", consumer, "ack", body={"seq": seq})
        except AgentqError as error:
            if not may_come_back(error):
                raise
            patience.bear(error)
        else:
            return
