"""The state of a task, as one table.

Invariants:
1. Everything that moves a task's state is an event in `TABLE`; a pair that is not there raises and changes nothing.
2. `state` says where the task stands; `result` says how it ended and exists exactly when the state is `finished`.
3. Delivery has a table of its own (`outbox`); the two are never merged.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from agentqd.core.errors import IllegalTransition


class State(StrEnum):
    NEW = "new"  # not a state that a person sees: before admission
    SCHEDULED = "scheduled"
    QUEUED = "queued"
    BLOCKED = "blocked"
    HELD = "held"
    RUNNING = "running"
    STOPPING = "stopping"
    RETRYABLE = "retryable"
    FINISHED = "finished"


class Result(StrEnum):
    SUCCESS = "success"
    FAILED = "failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    LOST = "lost"
    EXPIRED = "expired"
    REFUSED = "refused"
    SPAWN_FAILED = "spawn_failed"
    NO_WORK = "no_work"


class Event(StrEnum):
    """What happened, in the past tense."""

    ACCEPTED = "accepted"  # may start at once
    ACCEPTED_FOR_LATER = "accepted_for_later"  # not_before lies ahead
    ACCEPTED_BLOCKED = "accepted_blocked"  # waits for a prompt, a task or a write claim
    REFUSED = "refused"
    START_TIME_REACHED = "start_time_reached"
    UNBLOCKED = "unblocked"
    UNBLOCKED_FOR_LATER = "unblocked_for_later"  # its start time still lies ahead
    BLOCKED = "became_blocked"
    BACKOFF_ENDED = "backoff_ended"
    HOLD_REQUESTED = "hold_requested"
    RELEASED = "released"
    RELEASED_FOR_LATER = "released_for_later"  # its start time still lies ahead
    CLAIMED = "claimed"
    CLAIM_WITHDRAWN = "claim_withdrawn"  # the worker provably never started
    STOP_BEGUN = "stop_begun"  # a cancel or a deadline: the tree is being ended
    ATTEMPT_ENDED = "attempt_ended"  # another attempt follows after a backoff
    ATTEMPT_HELD = "attempt_held"  # on_lost: hold
    CANCELLED = "cancelled"  # while no worker ran
    EXPIRED = "expired"
    FINISHED = "finished"
    RETRY_REQUESTED = "retry_requested"  # a person's word: a new run


_WAITING: Final = {
    Event.HOLD_REQUESTED: State.HELD,
    Event.CANCELLED: State.FINISHED,
    Event.EXPIRED: State.FINISHED,
    Event.REFUSED: State.FINISHED,
    Event.FINISHED: State.FINISHED,  # total_timeout, dependency_failed
}

TABLE: Final[dict[State, dict[Event, State]]] = {
    State.NEW: {
        Event.ACCEPTED: State.QUEUED,
        Event.ACCEPTED_FOR_LATER: State.SCHEDULED,
        Event.ACCEPTED_BLOCKED: State.BLOCKED,
        Event.REFUSED: State.FINISHED,
    },
    State.SCHEDULED: {**_WAITING, Event.START_TIME_REACHED: State.QUEUED, Event.BLOCKED: State.BLOCKED},
    State.QUEUED: {**_WAITING, Event.CLAIMED: State.RUNNING, Event.BLOCKED: State.BLOCKED},
    State.BLOCKED: {**_WAITING, Event.UNBLOCKED: State.QUEUED, Event.UNBLOCKED_FOR_LATER: State.SCHEDULED},
    State.HELD: {
        Event.RELEASED: State.QUEUED,
        Event.RELEASED_FOR_LATER: State.SCHEDULED,
        Event.CANCELLED: State.FINISHED,
        Event.EXPIRED: State.FINISHED,
        Event.REFUSED: State.FINISHED,
        Event.FINISHED: State.FINISHED,
    },
    State.RUNNING: {
        Event.STOP_BEGUN: State.STOPPING,
        Event.CLAIM_WITHDRAWN: State.QUEUED,
        Event.ATTEMPT_ENDED: State.RETRYABLE,
        Event.ATTEMPT_HELD: State.HELD,
        Event.FINISHED: State.FINISHED,
    },
    State.STOPPING: {
        Event.CLAIM_WITHDRAWN: State.QUEUED,
        Event.ATTEMPT_ENDED: State.RETRYABLE,
        Event.ATTEMPT_HELD: State.HELD,
        Event.FINISHED: State.FINISHED,
    },
    State.RETRYABLE: {**_WAITING, Event.BACKOFF_ENDED: State.QUEUED, Event.BLOCKED: State.BLOCKED},
    State.FINISHED: {Event.RETRY_REQUESTED: State.QUEUED},
}

WAITING_STATES: Final = frozenset({State.SCHEDULED, State.QUEUED, State.BLOCKED, State.HELD, State.RETRYABLE})
ACTIVE_STATES: Final = frozenset({State.RUNNING, State.STOPPING})


def next_state(state: State, event: Event) -> State:
    """The state after `event`. Raises IllegalTransition, naming both, if the table has no such move."""
    moves = TABLE[state]
    if event not in moves:
        raise IllegalTransition(
            f"a task that is {state.value} cannot take the event {event.value}; "
            f"it can take: {', '.join(sorted(moves)) or 'none'}",
            state=state.value,
            event=event.value,
        )
    return moves[event]
