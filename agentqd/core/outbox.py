"""The state of one outbox row (an entry on its way to one sink), as one table. Never merged with the task's state.

Invariants:
1. A row reaches `delivered` only from `delivering`, and only on the receiver's word.
2. `dead` and `dropped` are left only by a person (`outbox retry`), who keeps the delivery id.
3. A daemon that died while `delivering` knows nothing: the row goes back to `pending` (at-least-once, same id).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from agentqd.core.errors import IllegalTransition


class RowState(StrEnum):
    PENDING = "pending"
    DELIVERING = "delivering"
    RETRYABLE = "retryable"
    HELD = "held"
    DELIVERED = "delivered"
    DEAD = "dead"
    DROPPED = "dropped"


class RowEvent(StrEnum):
    SEND_BEGUN = "send_begun"
    SEND_ABANDONED = "send_abandoned"  # stopped before an answer: same id again
    ACKNOWLEDGED = "acknowledged"
    DEFERRED = "deferred"
    REJECTED = "rejected"
    GAVE_UP = "gave_up"  # lifetime or attempts used up
    HELD = "held"
    RELEASED = "released"
    RETRY_REQUESTED = "retry_requested"
    DROPPED = "dropped"


TABLE: Final[dict[RowState, dict[RowEvent, RowState]]] = {
    RowState.PENDING: {
        RowEvent.SEND_BEGUN: RowState.DELIVERING,
        RowEvent.REJECTED: RowState.DEAD,  # not allowed, incomplete: set aside before any send
        RowEvent.GAVE_UP: RowState.DEAD,
        RowEvent.HELD: RowState.HELD,
        RowEvent.DROPPED: RowState.DROPPED,
    },
    RowState.DELIVERING: {
        RowEvent.ACKNOWLEDGED: RowState.DELIVERED,
        RowEvent.DEFERRED: RowState.RETRYABLE,
        RowEvent.REJECTED: RowState.DEAD,
        RowEvent.GAVE_UP: RowState.DEAD,
        RowEvent.HELD: RowState.HELD,
        RowEvent.SEND_ABANDONED: RowState.PENDING,
    },
    RowState.RETRYABLE: {
        RowEvent.SEND_BEGUN: RowState.DELIVERING,
        RowEvent.RETRY_REQUESTED: RowState.PENDING,
        RowEvent.REJECTED: RowState.DEAD,
        RowEvent.GAVE_UP: RowState.DEAD,
        RowEvent.HELD: RowState.HELD,
        RowEvent.DROPPED: RowState.DROPPED,
    },
    RowState.HELD: {
        RowEvent.RELEASED: RowState.PENDING,
        RowEvent.RETRY_REQUESTED: RowState.PENDING,
        RowEvent.DROPPED: RowState.DROPPED,
    },
    RowState.DELIVERED: {RowEvent.RETRY_REQUESTED: RowState.PENDING},
    RowState.DEAD: {RowEvent.RETRY_REQUESTED: RowState.PENDING, RowEvent.DROPPED: RowState.DROPPED},
    RowState.DROPPED: {RowEvent.RETRY_REQUESTED: RowState.PENDING},
}

OPEN_STATES: Final = frozenset({RowState.PENDING, RowState.DELIVERING, RowState.RETRYABLE, RowState.HELD})


def next_row_state(state: RowState, event: RowEvent) -> RowState:
    """The state after `event`. Raises IllegalTransition, naming both, if the table has no such move."""
    moves = TABLE[state]
    if event not in moves:
        raise IllegalTransition(
            f"an outbox row that is {state.value} cannot take the event {event.value}; "
            f"it can take: {', '.join(sorted(moves)) or 'none'}",
            state=state.value,
            event=event.value,
        )
    return moves[event]
