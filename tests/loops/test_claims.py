"""Write claims in the journal: random histories beside the plain model, every end, and what a look costs."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any, Final

import pytest
from budget import tries
from core.claims_model import Registry, Task

from agentqd.core.errors import InvalidTask, WriteConflict
from agentqd.core.lifecycle import Event, Result, State
from agentqd.core.limits import CONFLICTS_TOLD_MAX
from agentqd.core.settings import Defaults, Queue, Settings, Writes
from agentqd.core.usage_limit import Limit
from agentqd.loops import operations
from agentqd.loops.admission import Accepted
from agentqd.loops.finishing import finish_waiting
from agentqd.loops.unblocking import candidates_after, request_of, what_blocks
from agentqd.loops.usage_limits import lift
from agentqd.loops.waking import Waker
from agentqd.storage import intents
from agentqd.storage.transaction import Transaction

from .harness import SOCKET, Bench

PATHS: Final = ("a", "a/b", "a/c", "d", "", "a/*", "d/**/x", "[ad]")
POLICIES: Final = ("refuse", "queue", "warn")
HISTORIES: Final = int(os.environ.get("AGENTQD_HISTORIES", tries(80)))


@pytest.fixture
def settings() -> Settings:
    return Settings(
        max_workers=1000, queues={"default": Queue(concurrency=1000), "parked": Queue(paused=True)}
    )


class History:
    """One random history, in the journal and in the model; its tasks and paths are its own."""

    def __init__(self, bench: Bench, n: int, draw: random.Random) -> None:
        self.bench = bench
        self.draw = draw
        self.n = n
        self.model = Registry()

    def path(self, name: str) -> str:
        return f"/h{self.n}/{name}".rstrip("/")

    async def step(self) -> None:
        what = self.draw.choice(["submit"] * 5 + ["end"] * 4 + ["cancel", "hold", "release", "retry", "retry", "resubmit"])  # fmt: skip
        self.bench.clock.advance(0.001)
        await getattr(self, what)()
        await self.compare(what)

    def pick(self, *states: str, result: str | None = None) -> Task | None:
        found = [
            task
            for task in self.model.tasks.values()
            if task.state in states and (result is None or task.result == result)
        ]
        return self.draw.choice(found) if found else None

    async def submit(self, name: str | None = None) -> None:
        draw = self.draw
        name = name or f"h{self.n}-{len(self.model.tasks)}"
        others = [each for each in self.model.tasks if each != name]
        paths = tuple({self.path(each) for each in draw.choices(PATHS, k=draw.choice([0, 1, 1, 1, 2]))})
        after = tuple(dict.fromkeys(draw.choices(others, k=draw.choice([0, 0, 1, 2])))) if others else ()
        task = Task(name, paths, draw.choice(["refuse", "queue", "queue", "warn"]), after, draw.choice(["success", "any", "failure"]))  # fmt: skip
        fields: dict[str, Any] = {
            "id": name,
            "on_conflict": task.policy,
            "queue": draw.choice(["default", "parked"]),
        }
        if paths:
            fields["writes_to"] = list(paths)
        if after:
            fields |= {"after": list(after), "after_policy": task.after_policy}
        task.starts = fields["queue"] == "default"
        expected = self.model.submit(task)
        (outcome,) = await self.bench.admit(fields)
        if expected == "circle":
            assert isinstance(outcome, InvalidTask), outcome
            assert outcome.code in {"waits_for_itself", "dependency_cycle"}
        else:
            assert isinstance(outcome, Accepted), outcome

    async def resubmit(self) -> None:
        if task := self.pick("finished", result="refused"):
            await self.submit(task.id)

    async def end(self) -> None:
        if task := self.pick("active"):
            good = self.draw.random() < 0.6
            running = (await self.bench.task(task.id)).state is State.RUNNING
            if running:
                await self.bench.end(task.id, 0 if good else 1)
            else:  # in a paused queue
                await self.end_waiting(task.id)
            self.model.end(task.id, "cancelled" if not running else "success" if good else "failed")

    async def cancel(self) -> None:
        if task := self.pick("blocked", "held"):
            await self.end_waiting(task.id)
            self.model.end(task.id, "cancelled")

    async def end_waiting(self, name: str) -> None:
        row = await self.bench.task(name)
        await self.bench.do(
            lambda tx: finish_waiting(tx, self.bench.box, row, Event.CANCELLED, Result.CANCELLED, "cancelled")
        )

    async def hold(self) -> None:
        if task := self.pick("blocked"):
            await self.bench.do(lambda tx: operations.hold(tx, task.id))
            self.model.hold(task.id)

    async def release(self) -> None:
        if task := self.pick("held"):
            await self.bench.do(lambda tx: operations.release(tx, self.bench.box, task.id))
            self.model.release(task.id)

    async def retry(self) -> None:
        if not (task := self.pick("finished")):
            return
        word = self.draw.choice([None, None, *POLICIES])
        expected = self.model.retry(task.id, word)
        refused = None
        try:
            await self.bench.do(lambda tx: operations.retry(tx, self.bench.box, task.id, word))
        except WriteConflict as error:
            refused = "circle" if "would have to wait" in error.message else "refused"
        assert refused == (expected if expected in {"refused", "circle"} else None)

    async def compare(self, what: str) -> None:
        rows = await self.bench.rows(
            "SELECT id, state, result, reason FROM tasks WHERE id GLOB ?", f"h{self.n}-*"
        )
        seen = {row[0]: (_like_the_model(row[1]), row[2] or "") for row in rows}
        expected = {task.id: (task.state, task.result) for task in self.model.tasks.values()}
        assert seen == expected, what
        assert all(row[3] in {"dependency", "write_conflict"} for row in rows if row[1] == "blocked")
        lines = await self.bench.rows("SELECT DISTINCT t.id, i.place FROM intents i JOIN tasks t ON t.seq = i.task_seq WHERE t.id GLOB ? ORDER BY 2", f"h{self.n}-*")  # fmt: skip
        model = sorted(
            (task for task in self.model.tasks.values() if task.place), key=lambda each: each.place
        )
        assert [row[0] for row in lines] == [task.id for task in model]

    async def run_out(self) -> None:
        """All must come to their end."""
        while task := self.pick("held"):
            await self.bench.do(lambda tx, name=task.id: operations.release(tx, self.bench.box, name))
            self.model.release(task.id)
        while any(task.live for task in self.model.tasks.values()):
            await self.end()
            await self.compare("the end")


def _like_the_model(state: str) -> str:
    return state if state in {"blocked", "held", "finished"} else "active"


async def test_random_histories_go_as_in_the_model(bench: Bench) -> None:
    seed = int(os.environ.get("AGENTQD_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
    print(f"\nAGENTQD_SEED={seed}")
    await bench.connect()
    for n in range(HISTORIES):
        history = History(bench, n, random.Random(f"{seed}-{n}"))
        for _ in range(20):
            await history.step()
        await history.run_out()
    assert await bench.rows("SELECT count(*) FROM intents") == [(0,)]
    assert await bench.rows("SELECT count(*) FROM claim_waits") == [(0,)]


ENDS: Final[dict[str, dict[str, Any]]] = {
    "success": {},
    "failed": {"exit_code": 1},
    "timeout": {"exit_code": None, "signal": 9, "intent": "run_timeout"},
    "cancelled": {"exit_code": None, "signal": 15, "intent": "cancelled"},
    "lost": {"lost": "supervisor_gone"},
    "spawn_failed": {"exit_code": None, "pid": None, "error": "no such file"},
    "no_work": {"stdout_bytes": 0},
}


@pytest.fixture
async def watched(bench: Bench) -> Bench:
    """No commit ever leaves a claim, or a wait, of a task that has finished."""

    def look(tx: Transaction) -> None:
        sql = "SELECT t.id FROM {} c JOIN tasks t ON t.seq = c.task_seq WHERE t.state = 'finished'"
        for table in ("intents", "claim_waits"):
            assert tx.execute(sql.format(table)).fetchall() == [], table

    bench.hooks.append(look)
    await bench.connect()
    return bench


@pytest.mark.parametrize("result", ENDS)
async def test_an_attempts_end_releases_in_its_own_transaction_and_frees_who_waits(
    watched: Bench, result: str
) -> None:
    first = await watched.add(writes_to=["/w"])
    second = await watched.add(writes_to=["/w/a"], on_conflict="queue")
    assert await watched.states(first, second) == ["running", "blocked"]
    finished = await watched.end(first, **ENDS[result])
    assert finished is not None
    assert finished.task.result == result
    assert await watched.states(first, second) == ["finished", "running"]


@pytest.mark.parametrize(
    ("event", "result"),
    [
        (Event.CANCELLED, Result.CANCELLED),
        (Event.EXPIRED, Result.EXPIRED),
        (Event.REFUSED, Result.REFUSED),
        (Event.FINISHED, Result.TIMEOUT),
    ],
)
@pytest.mark.parametrize("waits_how", ["blocked", "held", "scheduled", "queued", "retryable"])
async def test_an_end_while_waiting_releases_in_its_own_transaction(
    watched: Bench, event: Event, result: Result, waits_how: str
) -> None:
    more: dict[str, Any] = {}
    if waits_how == "blocked":
        await watched.add(id="before", writes_to=["/w/b"])
        more = {"on_conflict": "queue"}
    elif waits_how == "scheduled":
        more = {"not_before": "2099-01-01T00:00:00Z"}
    elif waits_how in {"queued", "held"}:
        more = {"queue": "parked"}
    elif waits_how == "retryable":
        more = {"max_attempts": 2, "backoff": "1h"}
    first = await watched.add(writes_to=["/w"], **more)
    if waits_how == "held":
        await watched.do(lambda tx: operations.hold(tx, first))
    if waits_how == "retryable":
        await watched.end(first, 1)
    second = await watched.add(writes_to=["/w/a"], on_conflict="queue")
    assert await watched.states(first, second) == [waits_how, "blocked"]
    row = await watched.task(first)
    await watched.do(lambda tx: finish_waiting(tx, watched.box, row, event, result, "because"))
    assert await watched.states(first, second) == ["finished", "running"]


async def test_a_dependency_that_fails_releases_what_came_after_it(watched: Bench) -> None:
    first = await watched.add()
    second = await watched.add(after=first, writes_to=["/w"])
    third = await watched.add(writes_to=["/w"], on_conflict="queue")
    await watched.end(first, 1)
    assert await watched.states(second, third) == ["finished", "running"]


async def test_a_lost_task_that_is_run_again_keeps_its_claim_meanwhile(watched: Bench) -> None:
    first = await watched.add(writes_to=["/w"], on_lost="requeue", backoff="1h")
    await watched.end(first, lost="supervisor_gone")
    assert await watched.states(first) == ["retryable"]
    (refused,) = await watched.admit({"writes_to": ["/w"]}, door=SOCKET)
    assert isinstance(refused, WriteConflict)


@pytest.mark.parametrize(
    ("task", "queue", "default", "deployment", "holds"),
    [
        ("warn", "queue", "queue", "queue", "warn"),
        (None, "warn", "queue", "queue", "warn"),
        (None, None, "warn", "queue", "warn"),
        (None, None, None, "warn", "warn"),
        (None, None, None, "queue", "queue"),
        (None, None, None, None, "refuse"),
        ("queue", "refuse", "refuse", "refuse", "queue"),
        ("refuse", "warn", "warn", "warn", "refuse"),
    ],
)
async def test_the_nearest_word_on_the_policy_holds(
    bench: Bench, task: Any, queue: Any, default: Any, deployment: Any, holds: str
) -> None:
    bench.box.apply(
        Settings(
            queues={"q": Queue(on_conflict=queue)},
            defaults=Defaults(on_conflict=default),
            writes=Writes() if deployment is None else Writes(on_conflict=deployment),
        )
    )
    await bench.add(id="holder", writes_to=["/w"], on_conflict="refuse")
    fields = {"id": "new", "queue": "q", "writes_to": ["/w"]}
    await bench.admit(fields if task is None else {**fields, "on_conflict": task})
    assert await bench.states("new") == [{"warn": "queued", "queue": "blocked", "refuse": "finished"}[holds]]


async def test_an_edit_of_the_policy_meets_newcomers_and_reruns_not_those_who_wait(bench: Bench) -> None:
    await bench.connect()
    bench.box.apply(Settings(writes=Writes(on_conflict="queue")))
    await bench.add(id="holder", writes_to=["/w"])
    await bench.add(id="waits", writes_to=["/w"])
    bench.box.apply(Settings(writes=Writes(on_conflict="refuse")))
    await bench.add(id="new", writes_to=["/w"])
    assert await bench.states("waits", "new") == ["blocked", "finished"]
    await bench.end("holder")
    assert await bench.states("waits") == ["running"]
    with pytest.raises(WriteConflict, match="waits"):
        await bench.do(lambda tx: operations.retry(tx, bench.box, "holder"))
    assert await bench.states("holder") == ["finished"]


async def test_a_retry_meets_its_policy_like_a_newcomer(bench: Bench) -> None:
    await bench.connect()
    for policy in ("refuse", "queue", "warn"):
        await bench.add(id=policy, writes_to=["/w"], on_conflict=policy)
        await bench.end(policy, 1)
    await bench.add(id="other", writes_to=["/w/x"])
    bench.clock.advance(1)
    with pytest.raises(WriteConflict) as refused:
        await bench.do(lambda tx: operations.retry(tx, bench.box, "refuse"))
    assert refused.value.fields["conflicts"] == [{"task_id": "other", "task": "demo", "path": "/w/x"}]
    for policy in ("queue", "warn"):
        await bench.do(lambda tx, policy=policy: operations.retry(tx, bench.box, policy))
    assert await bench.states("refuse", "queue", "warn") == ["finished", "blocked", "running"]
    assert [each["conflicts"][0]["task_id"] for each in await bench.alerts("write_conflict")] == ["other"]
    await bench.end("other")
    assert await bench.states("queue") == ["running"]  # the warned one came later


async def test_the_id_of_a_refused_task_taken_again_stands_at_the_end_of_the_line(bench: Bench) -> None:
    await bench.connect()
    await bench.add(id="holder", writes_to=["/w"])
    await bench.add(id="early", writes_to=["/w"])
    await bench.add(id="second", writes_to=["/w"], on_conflict="queue")
    await bench.end("holder")
    assert await bench.states("early", "second") == ["finished", "running"]
    await bench.admit({"id": "early", "writes_to": ["/w"], "on_conflict": "queue"})
    assert await bench.states("early", "second") == ["blocked", "running"]


async def test_a_circle_through_a_refused_id_taken_again_is_refused(bench: Bench) -> None:
    await bench.add(id="holder", writes_to=["/w"])
    await bench.add(id="early", writes_to=["/w"])
    await bench.add(id="next", after="early", after_policy="any", queue="parked")
    await bench.do(lambda tx: operations.hold(tx, "next"))
    (outcome,) = await bench.admit({"id": "early", "after": "next", "prompt": "false"})
    assert isinstance(outcome, InvalidTask)
    assert outcome.code == "dependency_cycle"
    assert (await bench.task("early")).run == 1


async def test_a_wait_names_whom_it_is_for_and_a_crowd_is_told_in_part(bench: Bench) -> None:
    for n in range(30):
        await bench.add(id=f"n{n}", writes_to=[f"/w/{n}"])
    (outcome,) = await bench.admit({"id": "wide", "writes_to": ["/w"], "on_conflict": "queue"})
    assert isinstance(outcome, Accepted)
    task = await bench.task("wide")
    assert (task.reason, task.detail) == ("write_conflict", "waits for n29 (demo), which writes /w/29")
    assert await bench.rows("SELECT count(*) FROM conflicts") == [(CONFLICTS_TOLD_MAX,)]


async def test_what_waits_in_a_journal_of_an_older_version_is_noted_when_it_is_looked_at(
    bench: Bench,
) -> None:
    await bench.connect()
    await bench.add(id="holder", writes_to=["/w"])
    await bench.add(id="second", writes_to=["/w"], on_conflict="queue")
    await bench.do(lambda tx: tx.execute("DELETE FROM claim_waits"))
    await bench.do(lambda tx: tx.execute("UPDATE tasks SET wake_at = 0 WHERE id = 'second'"))
    await Waker(bench.box)._turn()
    assert (await bench.task("second")).wake_at is None
    await bench.end("holder")
    assert await bench.states("second") == ["running"]


# What a look costs, counted in steps of SQLite's machine.


async def steps_of(bench: Bench, unit: Callable[[Transaction], Any]) -> int:
    """In units of ten instructions."""

    def counted(tx: Transaction) -> int:
        count = 0

        def step() -> int:
            nonlocal count
            count += 1
            return 0

        tx.connection.set_progress_handler(step, 10)
        try:
            unit(tx)
        finally:
            tx.connection.set_progress_handler(None, 0)
        return count

    return await bench.do(counted)


async def many(bench: Bench, count: int, path: str, policy: str = "refuse") -> None:
    for start in range(0, count, 1000):
        tasks = [{"queue": "parked", "writes_to": [path.format(n)], "on_conflict": policy} for n in range(start, start + min(1000, count))]  # fmt: skip
        await bench.admit(*tasks)


def a_look(tx: Transaction) -> None:
    assert intents.conflicts_of(tx, ["/w/new", "/w/new/x/*.md"]) == []


@pytest.mark.slow
async def test_a_look_among_ten_thousand_claims_costs_what_it_costs_among_few(bench: Bench) -> None:
    await many(bench, 10, "/w/few{}")
    few = await steps_of(bench, a_look)
    await many(bench, 10_000, "/w/d{0}/f{0}")
    assert await steps_of(bench, a_look) <= 2 * few


async def test_an_end_looks_only_at_who_may_be_freed(bench: Bench) -> None:
    """Two wait, then two thousand: the end of the first costs the same, and frees the next in line alone."""
    await bench.connect()

    async def cost(path: str, waiting: int) -> int:
        first = await bench.add(writes_to=[path])
        await many(bench, waiting, path, "queue")
        row = await bench.task(first)

        def unit(tx: Transaction) -> None:
            for each in candidates_after(tx, bench.box, row):
                before = what_blocks(tx, each, request_of(tx, each))
                assert before == (None, None)
                freed.append(each.id)

        freed: list[str] = []
        took = await steps_of(bench, unit)
        assert len(freed) == 1
        return took

    few = await cost("/few", 2)
    assert await cost("/many", 2000) <= 2 * few


async def test_a_retry_that_could_wait_for_what_comes_after_it_names_that_task(bench: Bench) -> None:
    await bench.connect()
    place: dict[str, Any] = {"writes_to": ["/w"], "on_conflict": "queue"}
    await bench.add(id="a", **place)
    await bench.end("a")
    await bench.add(id="b", after="a", queue="parked", **place)
    assert await bench.states("b") == ["queued"]
    with pytest.raises(WriteConflict, match="if it were tried again: b comes after a") as refused:
        await bench.do(lambda tx: operations.retry(tx, bench.box, "a"))
    assert "cancel b" in refused.value.message


async def test_a_retry_may_wait_for_what_comes_after_it_and_runs(bench: Bench) -> None:
    await bench.connect()
    await bench.add(id="a", writes_to=["/w"])
    await bench.end("a")
    await bench.add(id="b", after="a", writes_to=["/w"])
    assert await bench.states("b") == ["running"]
    with pytest.raises(WriteConflict, match="agentqctl retry a --on-conflict queue") as refused:
        await bench.do(lambda tx: operations.retry(tx, bench.box, "a"))
    assert refused.value.fields["conflicts"] == [{"task_id": "b", "task": "demo", "path": "/w"}]
    moved = await bench.do(lambda tx: operations.retry(tx, bench.box, "a", "queue"))
    assert (moved.state, moved.reason) == (State.BLOCKED, "write_conflict")
    await bench.end("b")
    assert await bench.states("a") == ["running"]


@pytest.mark.parametrize("between", ["held", "backoff", "usage_limit"])
async def test_a_task_that_has_begun_never_comes_to_wait_for_one_that_waits_for_it(
    bench: Bench, between: str
) -> None:
    await bench.connect()
    await bench.add(id="a", writes_to=["/w"])
    await bench.end("a")
    await bench.add(id="b", after="a", writes_to=["/w"], on_lost="hold", max_attempts=2, backoff=["1h"])
    await bench.do(lambda tx: operations.retry(tx, bench.box, "a", "queue"))
    if between == "held":
        await bench.end("b", lost="supervisor_gone")
    else:
        limit = Limit("limit reached", bench.clock.now_us() + 3_600_000_000)
        await bench.end("b", 1, limit=limit if between == "usage_limit" else None)
        await bench.do(lambda tx: operations.hold(tx, "b"))
    assert await bench.states("a", "b") == ["blocked", "held"]
    await bench.do(lambda tx: operations.release(tx, bench.box, "b"))
    await bench.do(lambda tx: lift(tx, "shell", "person"))
    assert await bench.states("a", "b") == ["blocked", "running"]
    await bench.end("b")
    assert await bench.states("a") == ["running"]


async def test_a_new_run_waits_for_the_new_run_of_what_it_comes_after_even_if_it_had_begun_before_that(
    bench: Bench,
) -> None:
    await bench.connect()
    await bench.add(id="a")
    await bench.end("a")
    await bench.add(id="b", after="a")
    await bench.do(lambda tx: operations.retry(tx, bench.box, "a"))
    await bench.end("b", 1)
    await bench.do(lambda tx: operations.retry(tx, bench.box, "b"))
    assert await bench.states("a", "b") == ["running", "blocked"]
    await bench.end("a")
    assert await bench.states("b") == ["running"]


async def test_one_that_waits_for_a_place_ends_at_once_when_what_it_comes_after_fails_in_a_new_run(
    bench: Bench,
) -> None:
    await bench.connect()
    await bench.add(id="a")
    await bench.end("a")
    await bench.add(id="holder", writes_to=["/w"])
    await bench.add(id="b", after="a", writes_to=["/w"], on_conflict="queue")
    assert (await bench.task("b")).reason == "write_conflict"
    await bench.do(lambda tx: operations.retry(tx, bench.box, "a"))
    await bench.end("a", 1)
    assert ((await bench.task("b")).result, (await bench.task("b")).reason) == ("refused", "dependency_failed")  # fmt: skip


async def test_a_refused_claim_says_what_its_own_door_can_do(bench: Bench) -> None:
    await bench.connect()
    await bench.add(id="again", writes_to=["/w"])
    await bench.end("again")
    await bench.add(id="other", writes_to=["/w"])
    with pytest.raises(WriteConflict, match="agentqctl retry again --on-conflict queue"):
        await bench.do(lambda tx: operations.retry(tx, bench.box, "again"))
    (outcome,) = await bench.admit({"id": "new", "writes_to": ["/w"]}, door={"kind": "socket"})
    assert isinstance(outcome, WriteConflict)
    assert "--on-conflict queue" in outcome.message


async def test_what_was_said_with_a_retry_counts_for_that_run_alone(bench: Bench) -> None:
    await bench.connect()
    await bench.add(id="a", writes_to=["/w"], on_conflict="queue")
    await bench.end("a")
    await bench.add(id="other", writes_to=["/w"])
    with pytest.raises(WriteConflict):
        await bench.do(lambda tx: operations.retry(tx, bench.box, "a", "refuse"))
    await bench.do(lambda tx: operations.retry(tx, bench.box, "a", "warn"))
    assert await bench.states("a") == ["running"]
    assert len(await bench.alerts("write_conflict")) == 1
    assert (await bench.rows("SELECT data FROM events WHERE event = 'retry_requested'"))[0][0].count('"on_conflict":"warn"') == 1  # fmt: skip
    await bench.end("a")
    await bench.do(lambda tx: operations.retry(tx, bench.box, "a"))
    assert await bench.states("a") == ["blocked"]
