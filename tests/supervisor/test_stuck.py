"""A tree that will not die, played with a manual clock: no real process can be made unkillable on demand."""

from __future__ import annotations

import selectors
from typing import cast

from agentqd.supervisor.context import Context
from agentqd.supervisor.deadlines import Deadlines
from agentqd.supervisor.ending import TreeEnd
from agentqd.supervisor.procfs import Process
from agentqd.supervisor.tree import Owner, Trees
from agentqd.system.clock import ManualClock


class Unkillable:
    """Stands for Trees: one process that ignores everything until it is let go."""

    def __init__(self) -> None:
        self.alive = [Process(7, 1, 1, 7, 7, "D", "stuck")]
        self.signals: list[int] = []

    def members(self, _owner: Owner) -> list[Process]:
        return self.alive

    def signal(self, _owner: Owner, number: int, _members: object) -> None:
        self.signals.append(number)

    def kill(self, _owner: Owner, _rounds_max: int) -> list[Process]:
        self.signals.append(9)
        return self.alive


def test_a_tree_that_will_not_die_is_reported_after_5_s_then_every_60_s_and_stays_known() -> None:
    clock, deadlines, trees = ManualClock(), Deadlines(), Unkillable()
    context = Context(
        clock=clock,
        deadlines=deadlines,
        selector=selectors.DefaultSelector(),
        trees=cast("Trees", trees),
        log=lambda *_, **__: None,
        instance="i",
        boot_id="b",
        state_id="s",
        state_folder="/",
        tasks_fd=-1,
        tell=lambda _: None,
    )
    begun_s = clock.monotonic_s()
    stuck: list[tuple[float, list[int]]] = []
    gone: list[bool] = []
    owner = Owner(("t", "1"), 7, 1)
    end = TreeEnd(
        context,
        owner,
        lambda: 10.0,
        lambda: gone.append(True),
        lambda pids: stuck.append((round(clock.monotonic_s() - begun_s), pids)),
    )

    def pass_time(seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            clock.advance(0.1)
            deadlines.run_due(clock.monotonic_s())

    end.begin()
    end.main_ended()
    assert trees.signals == [15, 18]
    pass_time(1.5)
    assert 9 not in trees.signals
    pass_time(150)
    assert stuck == [(7, [7]), (67, [7]), (127, [7])]  # the main had ended: 2 s of grace, not 10, then 5
    assert not gone
    trees.alive = []
    pass_time(1)
    assert gone == [True]
    context.selector.close()
