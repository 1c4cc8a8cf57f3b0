"""The two state tables: every pair is covered, nothing leads astray, and the diagram in the docs is drawn from them."""

from __future__ import annotations

import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentqd.core import lifecycle, outbox
from agentqd.core.errors import IllegalTransition
from agentqd.core.lifecycle import Event, State, next_state
from agentqd.core.outbox import RowEvent, RowState, next_row_state

ROOT = Path(__file__).parents[2]
PAIRS = [(state, event) for state in State for event in Event]
ROW_PAIRS = [(state, event) for state in RowState for event in RowEvent]


def _reachable(table: dict[Any, dict[Any, Any]], start: StrEnum) -> set[Any]:
    seen, waiting = {start}, [start]
    while waiting:
        for state in table[waiting.pop()].values():
            if state not in seen:
                seen.add(state)
                waiting.append(state)
    return seen


def _copy(table: dict[Any, dict[Any, Any]]) -> dict[Any, dict[Any, Any]]:
    return {state: dict(moves) for state, moves in table.items()}


@given(st.sampled_from(PAIRS))
def test_every_pair_of_task_state_and_event_moves_as_the_table_says_or_raises_and_changes_nothing(
    pair: tuple[State, Event],
) -> None:
    state, event = pair
    before = _copy(lifecycle.TABLE)
    if event in lifecycle.TABLE[state]:
        assert next_state(state, event) is lifecycle.TABLE[state][event]
    else:
        with pytest.raises(IllegalTransition) as caught:
            next_state(state, event)
        assert caught.value.fields == {"state": state.value, "event": event.value}
        assert state.value in caught.value.message
        assert event.value in caught.value.message
    assert before == lifecycle.TABLE


@given(st.sampled_from(ROW_PAIRS))
def test_every_pair_of_row_state_and_event_moves_as_the_table_says_or_raises_and_changes_nothing(
    pair: tuple[RowState, RowEvent],
) -> None:
    state, event = pair
    before = _copy(outbox.TABLE)
    if event in outbox.TABLE[state]:
        assert next_row_state(state, event) is outbox.TABLE[state][event]
    else:
        with pytest.raises(IllegalTransition, match=f"{state.value}.*{event.value}"):
            next_row_state(state, event)
    assert before == outbox.TABLE


def test_each_state_has_its_line_in_the_table() -> None:
    assert set(lifecycle.TABLE) == set(State)
    assert set(outbox.TABLE) == set(RowState)


def test_every_event_is_used_somewhere() -> None:
    assert {event for moves in lifecycle.TABLE.values() for event in moves} == set(Event)
    assert {event for moves in outbox.TABLE.values() for event in moves} == set(RowEvent)


@pytest.mark.parametrize("state", State)
def test_from_every_state_a_task_can_finish(state: State) -> None:
    assert State.FINISHED in _reachable(lifecycle.TABLE, state)


@pytest.mark.parametrize("state", [state for state in State if state is not State.NEW])
def test_no_event_makes_a_task_new_again_and_every_state_is_reached(state: State) -> None:
    assert State.NEW not in _reachable(lifecycle.TABLE, state)
    assert state in _reachable(lifecycle.TABLE, State.NEW)


def test_only_a_persons_retry_leads_out_of_finished() -> None:
    assert lifecycle.TABLE[State.FINISHED] == {Event.RETRY_REQUESTED: State.QUEUED}


def test_only_a_claim_makes_a_task_run() -> None:
    into = [
        (state, event)
        for state, moves in lifecycle.TABLE.items()
        for event, to in moves.items()
        if to is State.RUNNING
    ]
    assert into == [(State.QUEUED, Event.CLAIMED)]


def test_a_running_task_is_never_cancelled_or_expired_behind_its_workers_back() -> None:
    for state in lifecycle.ACTIVE_STATES:
        assert not {Event.CANCELLED, Event.EXPIRED, Event.REFUSED} & set(lifecycle.TABLE[state])


def test_a_row_is_delivered_only_by_the_receivers_word_after_a_send() -> None:
    into = [
        (state, event)
        for state, moves in outbox.TABLE.items()
        for event, to in moves.items()
        if to is RowState.DELIVERED
    ]
    assert into == [(RowState.DELIVERING, RowEvent.ACKNOWLEDGED)]


@pytest.mark.parametrize("state", [RowState.DEAD, RowState.DROPPED, RowState.DELIVERED])
def test_only_a_person_brings_a_closed_row_back(state: RowState) -> None:
    back = {event for event, to in outbox.TABLE[state].items() if to in outbox.OPEN_STATES}
    assert back == {RowEvent.RETRY_REQUESTED}


@pytest.mark.parametrize("state", RowState)
def test_from_every_row_state_delivered_can_be_reached(state: RowState) -> None:
    assert RowState.DELIVERED in _reachable(outbox.TABLE, state)


def test_the_diagrams_in_the_docs_are_those_of_the_tables() -> None:
    """After a change of a table: script/draw-states"""
    drawn = subprocess.run(
        [sys.executable, ROOT / "script" / "draw-states", "-"], capture_output=True, text=True, check=True
    )
    assert (ROOT / "docs" / "states.md").read_text() == drawn.stdout
    for table in (lifecycle.TABLE, outbox.TABLE):
        for state, moves in table.items():
            for to in moves.values():
                assert f"    {state if state is not State.NEW else '[*]'} --> {to}: " in drawn.stdout
