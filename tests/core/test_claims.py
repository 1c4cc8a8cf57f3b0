"""The order of claims, on the model: nobody overlaps unasked, nobody waits in a circle, nobody is overtaken for ever."""

from __future__ import annotations

from typing import Any

import pytest
from budget import tries
from hypothesis import given, settings
from hypothesis import strategies as st

from agentqd.core.claims import Decision, decide, waits_behind
from agentqd.core.intents import overlap
from agentqd.core.settings import Conflict

from .claims_model import Registry, Task

PATHS = ("/a", "/a/b", "/a/c", "/d", "/", "/a/*", "/d/**/x")
SUBMIT = st.tuples(
    st.just("submit"),
    st.lists(st.sampled_from(PATHS), max_size=2).map(tuple),
    st.sampled_from(["refuse", "queue", "queue", "warn"]),
    st.lists(st.integers(0, 9), max_size=2),
    st.sampled_from(["success", "any", "failure"]),
    st.booleans(),
)
OTHER = st.tuples(
    st.sampled_from(["end", "fail", "cancel", "hold", "lose", "release", "retry", "retry", "resubmit"]),
    st.integers(0, 99),
    SUBMIT,
)
WORDS: tuple[Conflict | None, ...] = (None, None, "refuse", "queue", "queue", "warn")
HISTORY = st.lists(SUBMIT | OTHER, min_size=4, max_size=25)


class Player:
    """Plays a history and holds the promises to every step of it."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.waits: dict[
            tuple[str, int], set[tuple[str, int]]
        ] = {}  # (task, place) → whose claims it waited for

    def pick(self, n: int, *states: str) -> Task | None:
        found = [task for task in self.registry.tasks.values() if task.state in states]
        return found[n % len(found)] if found else None

    def play(self, history: list[Any]) -> None:
        for step in history:
            if step[0] == "submit":
                self.submit(f"t{len(self.registry.tasks)}", step)
            else:
                self.other(*step)
            self.check()

    def submit(self, name: str, step: Any) -> None:
        _, paths, policy, after, after_policy, starts = step
        names = [each for each in self.registry.tasks if each != name]
        wanted = dict.fromkeys(names[n % len(names)] for n in after) if names else {}
        self.registry.submit(Task(name, paths, policy, tuple(wanted), after_policy, starts=starts))

    def other(self, what: str, n: int, again: Any) -> None:
        registry = self.registry
        if what in {"end", "fail"} and (task := self.pick(n, "active")):
            registry.end(task.id, "success" if what == "end" else "failed")
        elif what == "cancel" and (task := self.pick(n, "blocked", "held")):
            registry.end(task.id, "cancelled")
        elif what == "hold" and (task := self.pick(n, "blocked")):
            registry.hold(task.id)
        elif what == "lose" and (task := self.pick(n, "active")) and task.begun:
            registry.hold(task.id)  # on_lost: hold
        elif what == "release" and (task := self.pick(n, "held")):
            registry.release(task.id)
        elif what == "retry" and (task := self.pick(n, "finished")):
            registry.retry(task.id, WORDS[n % len(WORDS)])
        elif what == "resubmit" and (task := self.pick(n, "finished")) and task.result == "refused":
            self.submit(task.id, again)

    def check(self) -> None:
        tasks = list(self.registry.tasks.values())
        active = [task for task in tasks if task.state == "active" and task.place]
        for first in active:
            for second in active:
                if first.place < second.place and any(
                    overlap(a, b) for a in first.paths for b in second.paths
                ):
                    assert second.policy == "warn", "two overlap, and nobody said that they may"
                    assert first.id in second.warned, "two overlap untold"
        for task in tasks:
            if task.state != "blocked":
                continue
            assert self.registry.why(task) in {"dependency", "write_conflict"}, "it waits for nothing"
            if task.place:
                now = {(each, self.registry.tasks[each].place) for each in self.registry.in_its_way(task)}
                before = self.waits.setdefault((task.id, task.place), now)
                assert now <= before, "somebody came in before it"
                self.waits[task.id, task.place] = now

    def run_out(self) -> None:
        """Everything that is active ends, again and again: all must come to their end."""
        for task in list(self.registry.tasks.values()):
            if task.state == "held":
                self.registry.release(task.id)
        while any(task.live for task in self.registry.tasks.values()):
            active = self.pick(0, "active")
            assert active is not None, "a deadlock"
            self.registry.end(active.id)
            self.check()


@settings(max_examples=tries(800))
@given(HISTORY)
def test_claims_never_overlap_unasked_never_lock_up_and_are_never_overtaken(history: list[Any]) -> None:
    player = Player()
    player.play(history)
    player.run_out()


def test_a_wide_claim_behind_a_stream_of_narrow_ones_gets_its_turn() -> None:
    registry = Registry()
    registry.submit(Task("n0", ("/a/0",), "queue"))
    assert registry.submit(Task("wide", ("/a",), "queue")) == "blocked"
    for n in range(1, 50):
        assert registry.submit(Task(f"n{n}", (f"/a/{n}",), "queue")) == "blocked"
        assert registry.submit(Task(f"r{n}", (f"/a/r{n}",), "refuse")) == "refused"
        assert registry.submit(Task(f"w{n}", (f"/a/w{n}",), "warn")) == "active"
    registry.end("n0")
    assert registry.tasks["wide"].state == "active"
    assert {registry.tasks[f"n{n}"].state for n in range(1, 50)} == {"blocked"}
    registry.end("wide")
    assert {registry.tasks[f"n{n}"].state for n in range(1, 50)} == {"active"}


def test_a_task_run_again_stands_at_the_end_of_the_line() -> None:
    registry = Registry()
    registry.submit(Task("first", ("/a",), "queue"))
    registry.submit(Task("second", ("/a",), "queue"))
    registry.submit(Task("third", ("/a",), "queue"))
    registry.end("first", "failed")
    assert registry.retry("first") == "blocked"
    registry.end("second")
    assert [registry.tasks[name].state for name in ("first", "third")] == ["blocked", "active"]


def test_a_task_run_again_never_waits_for_one_that_waits_for_it() -> None:
    registry = Registry()
    registry.submit(Task("first", ("/a",), "queue"))
    registry.submit(Task("holder", ("/b",), "queue"))
    registry.submit(Task("next", ("/b",), "queue", ("first",), "any"))
    registry.submit(Task("stranger", ("/a", "/b"), "queue"))
    registry.end("first", "failed")
    assert registry.tasks["next"].state == "blocked"  # for holder
    assert (
        registry.retry("first") == "circle"
    )  # it would wait for stranger, which waits for next, which comes after first


@pytest.mark.parametrize("early", ["cancelled", "success"])
def test_whoever_comes_after_through_others_waits_even_if_those_end_early(early: str) -> None:
    for policy in ("refuse", "queue", "warn"):
        registry = Registry()
        registry.submit(Task("first", ("/a",), "refuse"))
        registry.submit(Task("between", (), "refuse", ("first",)))
        assert registry.submit(Task("last", ("/a",), policy, ("between",), "any")) == "blocked"
        registry.end("between", early)
        assert registry.tasks["last"].state == "blocked"
        registry.end("first")
        assert registry.tasks["last"].state == "active"


def test_the_rules_as_a_table() -> None:
    assert [decide(policy, strangers=True) for policy in ("refuse", "queue", "warn")] == [Decision.REFUSE, Decision.WAIT, Decision.WARN]  # fmt: skip
    assert {decide(policy, strangers=False) for policy in ("refuse", "queue", "warn")} == {Decision.TAKE}
    assert [waits_behind(policy, related=False) for policy in ("refuse", "queue", "warn")] == [
        True,
        True,
        False,
    ]
    assert all(waits_behind(policy, related=True) for policy in ("refuse", "queue", "warn"))
