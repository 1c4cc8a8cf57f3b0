"""Scheduling against a plain reference: random histories, each step compared; AGENTQD_HISTORIES says how many (make histories)."""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from budget import tries

from agentqd.core.errors import IllegalTransition
from agentqd.core.lifecycle import ACTIVE_STATES, WAITING_STATES, Event, Result
from agentqd.core.settings import Queue, Runner, Settings
from agentqd.core.units import format_time
from agentqd.loops import operations
from agentqd.loops.finishing import finish_waiting
from agentqd.loops.scheduling import waiting_reason
from agentqd.storage import runner_limits

from .ledger import US, Ledger

HISTORIES = int(os.environ.get("AGENTQD_HISTORIES", tries(1000)))
QUEUES, RUNNERS = ("a", "b", "c"), ("claude", "codex")
BACKOFF_S = 2
WAITING = frozenset(state.value for state in WAITING_STATES)
ACTIVE = frozenset(state.value for state in ACTIVE_STATES)
LIKELY = {  # where a word of a person means something; now and then it comes where it does not
    "cancel": {"queued", "running", "blocked"},
    "hold": {"queued", "blocked", "scheduled", "retryable"},
    "release": {"held", "retryable"},
    "retry": {"finished", "retryable"},
}
Step = tuple[Any, ...]


@dataclass
class Task:
    seq: int
    queue: str
    runner: str
    priority: int
    after: list[str]
    policy: str
    not_before: float | None
    expires: float | None
    max_attempts: int
    on_lost: str
    state: str = "queued"
    success: bool = False
    attempts: int = 0
    losses: int = 0
    retry_at: float = 0.0
    limited: bool = False  # backs off from its runner's limit
    stopping: bool = False
    first_run: bool = True
    begun: bool = False  # its run has
    let_go: bool = False  # a person has released it after it had expired: it has its attempt
    heard: set[str] = field(default_factory=set)  # run again after it had begun: it asks for them no more


@dataclass
class Model:
    """The rules of docs/scheduling.md, as plainly as they can be written down."""

    workers: int = 2
    slots: dict[str, int] = field(default_factory=lambda: dict.fromkeys(QUEUES, 2))
    removed: set[str] = field(default_factory=set)
    paused: set[str] = field(default_factory=set)
    limits: dict[str, float] = field(default_factory=dict)
    draining: bool = False
    connected: bool = True
    now: float = 0.0
    tasks: dict[str, Task] = field(default_factory=dict)

    def submit(self, name: str, task: Task) -> None:
        self.tasks[name] = task
        if task.after:
            task.state = "blocked"
            self.settle()
        else:
            self.free(task)

    def free(self, task: Task) -> None:
        """Nothing but, perhaps, its start time is in its way."""
        task.state = "scheduled" if task.not_before is not None and task.not_before > self.now else "queued"

    def finish(self, task: Task, *, success: bool = False) -> None:
        task.state, task.success, task.stopping = "finished", success, False

    def obstacle(self, task: Task) -> str | None:
        others = [self.tasks[name] for name in task.after if name not in task.heard]
        ended = [other for other in others if other.state == "finished"]
        failed = any(not other.success for other in ended)
        if task.policy == "success" and failed:
            return "never"
        if len(ended) < len(others):
            return "wait"
        return "never" if task.policy == "failure" and others and not failed else None

    def settle(self) -> None:
        moved = True
        while moved:
            moved = False
            for task in self.tasks.values():
                if task.state != "blocked" or (what := self.obstacle(task)) == "wait":
                    continue
                moved = True
                overdue = task.first_run and task.expires is not None and task.expires <= self.now
                if what == "never" or overdue:
                    self.finish(task)
                else:
                    self.free(task)

    def end(self, task: Task, how: str, limit_s: float) -> None:
        if task.stopping:
            self.finish(task)
        elif how == "success":
            self.finish(task, success=True)
        elif how == "limit":
            self.limits[task.runner] = self.now + limit_s
            task.attempts -= 1
            self.again(task, limit_s, limited=True)
        elif how == "lost":
            task.losses += 1
            if task.on_lost == "hold":
                task.state = "held"
            elif task.on_lost == "requeue" and task.losses < 10:
                self.again(task, BACKOFF_S)
            else:
                self.finish(task)
        elif task.attempts < task.max_attempts:
            self.again(task, BACKOFF_S)
        else:
            self.finish(task)

    def again(self, task: Task, wait_s: float, *, limited: bool = False) -> None:
        """Another attempt, if its time is not over by then."""
        at = self.now + wait_s
        if task.first_run and task.expires is not None and at >= task.expires:
            self.finish(task)
        else:
            task.state, task.limited, task.retry_at = "retryable", limited, at

    def lift(self, runner: str) -> bool:
        was = self.closed(runner)
        self.limits.pop(runner, None)
        for task in self.tasks.values():
            if task.state == "retryable" and task.limited and task.runner == runner:
                task.retry_at = min(task.retry_at, self.now)
        return was

    def closed(self, runner: str) -> bool:
        return self.limits.get(runner, 0.0) > self.now

    def at_once(self, task: Task) -> bool:
        """A person ends a wait that only time would end; False: there is none."""
        if task.state == "retryable":
            if task.limited:
                self.lift(task.runner)
            task.state = "queued"
            return True
        return task.state == "queued" and self.closed(task.runner) and self.lift(task.runner)

    def hold(self, task: Task) -> bool:
        legal = task.state in WAITING - {"held"}
        if legal:
            task.state = "held"
        return legal

    def release(self, task: Task) -> bool:
        if task.state != "held":
            return self.at_once(task)
        task.state = "blocked"
        task.let_go = task.expires is not None and task.expires <= self.now
        what = self.obstacle(task)
        if what == "never":
            self.finish(task)
        elif what is None:
            self.free(task)
        return True

    def retry(self, task: Task) -> bool:
        if task.state != "finished":
            return self.at_once(task)
        task.after = [name for name in task.after if self.tasks[name].state != "finished"]
        task.attempts, task.losses, task.first_run, task.success = 0, 0, False, False
        task.begun, task.heard = False, set()
        mine = next(name for name, other in self.tasks.items() if other is task)
        for other in self.tasks.values():
            if other.state != "finished" and other.begun and mine in other.after:
                other.heard.add(mine)
        task.state = "blocked" if task.after else "queued"
        return True

    def cancel(self, task: Task) -> bool:
        if task.state == "running" and not task.stopping:
            task.stopping, task.state = True, "stopping"
            return True
        legal = task.state in WAITING
        if legal:
            self.finish(task)
        return legal

    def tick(self, seconds: float) -> None:
        self.now += seconds
        for task in self.tasks.values():
            if task.state not in WAITING:
                continue
            if task.first_run and task.expires is not None and task.expires <= self.now and not task.let_go:
                self.finish(task)
            elif (task.state == "scheduled" and (task.not_before or 0) <= self.now) or (
                task.state == "retryable" and task.retry_at <= self.now
            ):
                task.state = "queued"

    def choose(self) -> list[str]:
        """One after another: of the queues that may start one more, the one with the smallest share of its slots in use, then
        the higher priority, then the older task."""
        claimed: list[str] = []
        while self.connected and not self.draining:
            used = Counter(task.queue for task in self.tasks.values() if task.state in ACTIVE)
            heads: dict[str, tuple[int, int, str]] = {}
            for name, task in self.tasks.items():
                if task.state == "queued" and not self.closed(task.runner):
                    mine = (-task.priority, task.seq, name)
                    heads[task.queue] = min(mine, heads.get(task.queue, mine))
            open_ = [
                (used[queue] / self.slots[queue], *head)
                for queue, head in heads.items()
                if queue not in self.paused | self.removed and used[queue] < self.slots[queue]
            ]
            if not open_ or sum(used.values()) >= self.workers:
                break
            task = self.tasks[min(open_)[3]]
            task.state = "running"
            task.attempts += 1
            task.begun = True
            claimed.append(min(open_)[3])
        return claimed


# Histories: plain data, made from a seed; a step that makes no sense where it comes is left out.


def history(seed: int) -> list[Step]:
    draw = random.Random(seed)
    return [_step(draw) for _ in range(draw.randint(3, 22))]


def _step(draw: random.Random) -> Step:
    what = draw.choices(
        ("submit", "end", "tick", "cancel", "hold", "release", "retry", "pause", "slots", "workers", "remove", "drain", "link", "restart"),
        (30, 28, 10, 5, 6, 7, 8, 5, 4, 3, 2, 2, 2, 2),
    )[0]  # fmt: skip
    if what == "submit":
        return (what, [_written(draw) for _ in range(draw.randint(1, 4))])
    if what == "end":
        how = draw.choices(("success", "failed", "lost", "limit"), (4, 3, 1, 2))[0]
        return (what, draw.randrange(100), how, draw.randint(1, 6))
    if what == "tick":
        return (what, draw.randint(0, 4))
    if what in {"pause", "remove"}:
        return (what, draw.choice(QUEUES))
    if what == "slots":
        return (what, draw.choice(QUEUES), draw.randint(1, 3))
    if what == "workers":
        return (what, draw.randint(1, 4))
    return (what, draw.randrange(100))


def _written(draw: random.Random) -> dict[str, Any]:
    return {
        "queue": draw.choice(QUEUES),
        "runner": draw.choice(RUNNERS),
        "priority": draw.randint(-1, 1),
        "after": [draw.randrange(100) for _ in range(draw.choice((0, 0, 0, 1, 2)))],
        "policy": draw.choice(("success", "success", "any", "failure")),
        "not_before": draw.choice((None, None, None, 2)),
        "expires": draw.choice((None, None, None, None, 4)),
        "max_attempts": draw.randint(1, 2),
        "on_lost": draw.choice(("fail", "requeue", "hold")),
    }


class Run:
    """One history on both sides."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.model = Model()
        ledger.begin(self._settings())
        ledger.connect(on=True)
        self.started_us = ledger.clock.now_us()

    def _settings(self) -> Settings:
        model = self.model
        queues = {name: Queue(concurrency=n) for name, n in model.slots.items() if name not in model.removed}
        return Settings(
            max_workers=model.workers, queues=queues, runners={name: Runner(preset=name) for name in RUNNERS}
        )

    def play(self, steps: list[Step]) -> None:
        for step in steps:
            self.ledger.claims.clear()
            if getattr(self, f"_{step[0]}")(*step[1:]) is False:
                continue
            self._compare(step)
        self._to_the_end()

    def _compare(self, step: Step) -> None:
        self.model.settle()
        expected = self.model.choose()
        assert [claim.task.id for claim in self.ledger.claims] == expected, step
        states = {name: task.state for name, task in self.model.tasks.items()}
        assert self.ledger.states() == states, step
        self._limits_and_reasons(expected)

    def _limits_and_reasons(self, claimed: list[str]) -> None:
        ledger, model = self.ledger, self.model
        active = dict(ledger.connection.execute("SELECT queue, count(*) FROM tasks WHERE state IN ('running','stopping') GROUP BY 1"))  # fmt: skip
        if claimed:
            assert sum(active.values()) <= model.workers
            assert all(
                active[model.tasks[name].queue] <= model.slots[model.tasks[name].queue] for name in claimed
            )
        assert ledger.numbers.active == {**dict.fromkeys(ledger.numbers.active, 0), **active}
        closed = runner_limits.closed(ledger.connection, ledger.clock.now_us())
        for task in ledger.tasks().values():
            reason = waiting_reason(
                task, ledger.box, paused=ledger.scheduler.is_paused(task.queue), connected=model.connected,
                busy=sum(active.values()) >= model.workers or active.get(task.queue, 0) >= ledger.box.concurrency(task.queue),
                limited=task.runner in closed,
            )  # fmt: skip
            assert (reason is not None) == (task.state.value in WAITING)
            assert reason != "starting", "whatever can start has been started"
            assert reason != "blocked", "a blocked task says by what"

    def _to_the_end(self) -> None:
        """Every obstacle is taken away: every task ends. Nobody starves, nothing is forgotten."""
        model = self.model
        model.removed, model.paused, model.draining, model.connected = set(), set(), False, True
        self.ledger.connect(on=False)
        self.ledger.box.apply(self._settings())
        for queue in QUEUES:
            self.ledger.pause(queue, on=False)
        self.ledger.drain(on=False)
        self.ledger.connect(on=True)
        self.ledger.claims.clear()
        self.ledger.turn()
        self._compare(("to the end",))
        for _ in range(200):
            held = [name for name, task in model.tasks.items() if task.state == "held"]
            running = [name for name, task in model.tasks.items() if task.state in ACTIVE]
            if all(task.state == "finished" for task in model.tasks.values()):
                return
            step: Step
            if held:
                step = ("release", list(model.tasks).index(held[0]))
            elif running:
                step = ("end", 0, "success", 1)
            else:
                step = ("tick", 6)
            self.ledger.claims.clear()
            getattr(self, f"_{step[0]}")(*step[1:])
            self._compare(step)
        raise AssertionError(f"these never end: {self.ledger.states()}")

    # The steps, on both sides. False: it makes no sense here.

    def _submit(self, written: list[dict[str, Any]]) -> bool:
        model, fields = self.model, []
        for each in written:
            queue = each["queue"]
            if queue in model.removed:
                continue
            names = list(model.tasks)
            after = list(dict.fromkeys(names[n % len(names)] for n in each["after"] if names))
            name = f"t{len(names)}"
            start = None if each["not_before"] is None else model.now + each["not_before"]
            expires = None if each["expires"] is None else model.now + each["expires"]
            task = Task(len(names), queue, each["runner"], each["priority"], after, each["policy"], start, expires,
                        each["max_attempts"], each["on_lost"])  # fmt: skip
            line = {"id": name, "queue": queue, "runner": task.runner, "priority": task.priority, "backoff": [BACKOFF_S],
                    "max_attempts": task.max_attempts, "on_lost": task.on_lost}  # fmt: skip
            if after:
                line |= {"after": after, "after_policy": task.policy}
            for key, at in (("not_before", start), ("expires_at", expires)):
                if at is not None:
                    line[key] = format_time(self.started_us + int(at * US))
            fields.append(line)
            model.submit(name, task)
        if fields:
            self.ledger.admit(fields)
        return bool(fields)

    def _end(self, n: int, how: str, limit_s: int) -> bool:
        running = [name for name, task in self.model.tasks.items() if task.state in ACTIVE]
        if not running:
            return False
        name = running[n % len(running)]
        if self.model.tasks[name].stopping and how == "lost":
            how = "failed"
        self.model.end(self.model.tasks[name], how, limit_s)
        self.ledger.end(name, how, self.ledger.clock.now_us() + limit_s * US)
        return True

    def _tick(self, seconds: int) -> None:
        self.ledger.clock.advance(seconds)
        self.model.tick(seconds)
        self.ledger.wake()

    def _on_one(self, n: int, verb: str) -> bool:
        tasks = self.model.tasks
        likely = [name for name, task in tasks.items() if task.state in LIKELY[verb]]
        names = likely if likely and n % 4 else list(tasks)
        if not names:
            return False
        name = names[n % len(names)]
        legal = getattr(self.model, verb)(self.model.tasks[name])
        self.ledger.clock.advance(
            1e-6
        )  # a person's run is known by when it was asked for: never at the first one's time
        try:
            if verb == "hold":
                self.ledger.commit(lambda tx: operations.hold(tx, name))
            elif verb == "cancel":
                self._cancel_now(name)
            else:
                self.ledger.commit(lambda tx: getattr(operations, verb)(tx, self.ledger.box, name))
        except IllegalTransition:
            assert not legal, f"{verb} {name} was refused"
        else:
            assert legal, f"{verb} {name} was not refused"
        return True

    def _cancel_now(self, name: str) -> None:
        task = self.ledger.tasks()[name]
        if task.state.value in ACTIVE:
            self.ledger.stop(name)
        else:
            self.ledger.commit(lambda tx: finish_waiting(tx, self.ledger.box, operations.must_find(tx, name), Event.CANCELLED, Result.CANCELLED, "cancelled"))  # fmt: skip

    def _cancel(self, n: int) -> bool:
        return self._on_one(n, "cancel")

    def _hold(self, n: int) -> bool:
        return self._on_one(n, "hold")

    def _release(self, n: int) -> bool:
        return self._on_one(n, "release")

    def _retry(self, n: int) -> bool:
        return self._on_one(n, "retry")

    def _pause(self, queue: str) -> None:
        self.model.paused ^= {queue}
        self.ledger.pause(queue, on=queue in self.model.paused)

    def _edit(self) -> None:
        self.ledger.box.apply(self._settings())
        self.ledger.turn()

    def _slots(self, queue: str, n: int) -> None:
        self.model.slots[queue] = n
        self._edit()

    def _workers(self, n: int) -> None:
        self.model.workers = n
        self._edit()

    def _remove(self, queue: str) -> None:
        self.model.removed ^= {queue}
        self._edit()

    def _drain(self, _: int) -> None:
        self.model.draining = not self.model.draining
        self.ledger.drain(on=self.model.draining)

    def _link(self, _: int) -> None:
        self.model.connected = not self.model.connected
        self.ledger.connect(on=self.model.connected)
        self.ledger.turn()

    def _restart(self, _: int) -> None:
        self.ledger.restart()
        self.ledger.connect(on=self.model.connected)
        self.ledger.turn()


def failure(ledger: Ledger, steps: list[Step]) -> AssertionError | None:
    try:
        Run(ledger).play(steps)
    except Exception as error:
        if ledger.connection.in_transaction:
            ledger.connection.execute("ROLLBACK")
        return error if isinstance(error, AssertionError) else AssertionError(repr(error))
    return None


def shrunk(ledger: Ledger, steps: list[Step]) -> list[Step]:
    """Steps are left out as long as it still fails."""
    at = 0
    while at < len(steps):
        fewer = steps[:at] + steps[at + 1 :]
        if failure(ledger, fewer) is not None:
            steps, at = fewer, 0
        else:
            at += 1
    return steps


@pytest.mark.parametrize("part", range(4))
def test_random_histories_are_scheduled_as_the_plain_rules_say(part: int) -> None:
    base = int(os.environ.get("AGENTQD_HISTORIES_SEED", "0"))
    with Ledger() as ledger:
        for seed in range(base + part, base + HISTORIES, 4):
            if failure(ledger, history(seed)) is not None:
                least = shrunk(ledger, history(seed))
                text = "\n".join(map(repr, least))
                pytest.fail(f"history {seed}, as short as it gets:\n{text}\n{failure(ledger, least)}")


@pytest.mark.slow
def test_the_histories_do_meet_what_they_are_made_for() -> None:
    """Claims, limits, dependencies, backoffs, holds: a model test in which nothing happens proves nothing."""
    seen: Counter[str] = Counter()
    with Ledger() as ledger:
        for seed in range(150):
            assert failure(ledger, history(seed)) is None
            seen.update(row[0] for row in ledger.connection.execute("SELECT event FROM events"))
            seen.update(row[0] for row in ledger.connection.execute("SELECT 'ended: ' || coalesce(reason, 'success') FROM tasks"))  # fmt: skip
    for what in ("claimed", "attempt_ended", "attempt_held", "unblocked", "backoff_ended", "start_time_reached", "released", "retry_requested",
                 "runner_limited", "runner_limit_over", "runner_limit_lifted", "ended: dependency_failed", "ended: expires_at"):  # fmt: skip
        assert seen[what] >= 3, (what, seen)
