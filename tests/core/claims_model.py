"""The whole registry in plain Python: no index, no notes, every claim looked at every time, by the rules of core/claims.py.

The journal is compared with it (tests/loops/test_claims.py); its own promises are tested in test_claims.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from agentqd.core.claims import Decision, decide, waits_behind
from agentqd.core.intents import overlap
from agentqd.core.settings import Conflict


@dataclass
class Task:
    id: str
    paths: tuple[str, ...]
    policy: Conflict
    after: tuple[str, ...] = ()
    after_policy: str = "success"
    state: str = "new"  # blocked, active, held, finished
    result: str = ""
    place: int = 0  # in the line; 0: holds no claim
    warned: set[str] = field(default_factory=set)
    declared: Conflict | None = None  # its own policy, where a retry has said another
    starts: bool = False  # it runs as soon as it is active
    begun: bool = False  # it has, in this run
    heard: set[str] = field(default_factory=set)  # of `after`: its run had begun when they were run again

    @property
    def live(self) -> bool:
        return self.state in {"blocked", "active", "held"}


class Registry:
    def __init__(self) -> None:
        self.tasks: dict[str, Task] = {}
        self.line = 0

    # What happens.

    def submit(self, task: Task) -> str:
        """blocked, active or refused; `circle` if it is the id of a refused task that others wait for."""
        old = self.tasks.get(task.id)
        if old is not None and (
            old.id in self.ancestors(task)
            or self._leads_back({*task.after, *self._ahead(task, old)}, task.id)
        ):
            return "circle"
        strangers = self.strangers(task)
        decision = decide(task.policy, strangers=bool(strangers))
        self.tasks[task.id] = task
        if decision is Decision.REFUSE:
            task.state, task.result = "finished", "refused"
            return "refused"
        self._claim(task)
        task.warned = {other.id for other in strangers}
        task.state = "blocked"
        self.settle()
        return task.result or task.state

    def retry(self, name: str, word: Conflict | None = None) -> str:
        """blocked, active, refused or circle: the last two change nothing. `word`: the policy of this run."""
        task = self.tasks[name]
        open_ = tuple(each for each in task.after if self.tasks[each].live)
        again = replace(task, after=open_, policy=word or task.declared or task.policy, heard=set())
        if decide(again.policy, strangers=bool(self.strangers(again))) is Decision.REFUSE:
            return "refused"
        begun = [each for each in self.tasks.values() if each.live and each.begun]
        hears = [each for each in begun if name in each.after and name not in each.heard]
        for each in hears:
            each.heard.add(name)
        if self._followed(task) and self._leads_back({*open_, *self._ahead(again, task)}, name):
            for each in hears:
                each.heard.discard(name)
            return "circle"
        task.after, strangers = open_, self.strangers(again)
        task.declared, task.policy, task.heard = task.declared or task.policy, again.policy, set()
        task.begun = False
        self._claim(task)
        task.warned = {other.id for other in strangers}
        task.state, task.result = "blocked", ""
        self.settle()
        return task.state

    def end(self, name: str, result: str = "success") -> None:
        task = self.tasks[name]
        task.state, task.result, task.place = "finished", result, 0
        self.settle()

    def hold(self, name: str) -> None:
        self.tasks[name].state = "held"

    def release(self, name: str) -> None:
        self.tasks[name].state = "blocked"
        self.settle()

    def settle(self) -> None:
        """All that is blocked, until nothing moves any more."""
        moved = True
        while moved:
            moved = False
            for task in self.tasks.values():
                if task.state != "blocked" or (why := self.why(task)) in {"dependency", "write_conflict"}:
                    continue
                moved = True
                if why is None:
                    task.state, task.begun = "active", task.starts
                else:
                    task.state, task.result, task.place = "finished", "refused", 0

    # What holds.

    def why(self, task: Task) -> str | None:
        """Why it waits."""
        before = [self.tasks[name] for name in task.after if name not in task.heard]
        failed = [each for each in before if each.state == "finished" and each.result != "success"]
        if task.after_policy == "success" and failed:
            return "dependency_failed"
        if any(each.live for each in before):
            return "dependency"
        if task.after_policy == "failure" and before and not failed:
            return "dependency_failed"
        return "write_conflict" if self.in_its_way(task) else None

    def in_its_way(self, task: Task) -> set[str]:
        """Whose claims it waits for."""
        related = self.ancestors(task)
        return {
            other.id
            for other in self.overlapping(task)
            if other.place < task.place and waits_behind(task.policy, related=other.id in related)
        }

    def overlapping(self, task: Task) -> list[Task]:
        """Live claims of others."""
        return [
            other
            for other in self.tasks.values()
            if other.place
            and other.id != task.id
            and any(overlap(a, b) for a in task.paths for b in other.paths)
        ]

    def strangers(self, task: Task) -> list[Task]:
        related = self.ancestors(task)
        return [other for other in self.overlapping(task) if other.id not in related]

    def ancestors(self, task: Task) -> set[str]:
        found: set[str] = set()
        ways = list(task.after)
        while ways:
            name = ways.pop()
            if name not in found:
                found.add(name)
                ways += self.tasks[name].after
        return found

    def _claim(self, task: Task) -> None:
        if task.paths:
            self.line += 1
            task.place = self.line

    def _ahead(self, task: Task, old: Task) -> set[str]:
        """Whom it would wait for, where a circle is possible: somebody comes after it."""
        if not self._followed(old):
            return set()
        related = self.ancestors(task)
        return {
            each.id
            for each in self.overlapping(task)
            if waits_behind(task.policy, related=each.id in related)
        }

    def _followed(self, task: Task) -> bool:
        return any(
            each.live and task.id in each.after and task.id not in each.heard for each in self.tasks.values()
        )

    def _leads_back(self, start: set[str], to: str) -> bool:
        ways, seen = list(start), set(start)
        while ways:
            name = ways.pop()
            if name == to:
                return True
            task = self.tasks[name]
            new = {
                each
                for each in task.after
                if (each == to or self.tasks[each].live) and each not in task.heard
            }
            new |= {each.id for each in self.overlapping(task) if task.place and each.place < task.place}
            ways += new - seen
            seen |= new
        return False
