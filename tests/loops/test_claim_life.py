"""Write claims that lapse, are made again, and stand beside claims from outside; the clock moves only when a test says so."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from agentqd.core import limits
from agentqd.core.errors import IllegalTransition, RefusedForNow, WriteConflict
from agentqd.core.intents import overlap
from agentqd.core.settings import Defaults, Queue, Settings
from agentqd.core.task import read_task
from agentqd.core.units import Duration
from agentqd.loops.claimwatch import AWAY_S, ClaimWatch
from agentqd.loops.lifesigns import has_process, last_sign_us
from agentqd.loops.live import Live
from agentqd.loops.operations import hold, release, retry
from agentqd.loops.outside import Answer, OutsideClaims, Wish, ask
from agentqd.loops.outside import release as let_go
from agentqd.loops.reclaiming import Lapse, release_lapsed
from agentqd.loops.retention import Retention
from agentqd.loops.waking import Waker
from agentqd.storage import outsideclaims
from agentqd.storage import tasks as store
from agentqd.storage.outsideclaims import Holder
from agentqd.supervisor.procfs import boot_id, read_process
from agentqd.supervisor.tree import MARK_ATTEMPT, MARK_STATE, MARK_TASK

from .harness import SOCKET, Bench


class FakeWorkers:
    """What a supervision knows: `live` by task id, and whether a supervisor is connected."""

    def __init__(self) -> None:
        self.live: dict[str, Live] = {}
        self.is_connected = True

    def connected(self) -> bool:
        return self.is_connected


@pytest.fixture
def workers() -> FakeWorkers:
    return FakeWorkers()


@pytest.fixture
def watch(bench: Bench, workers: FakeWorkers) -> ClaimWatch:
    return ClaimWatch(bench.box, workers)


async def first(bench: Bench, **more: Any) -> None:
    """The task `a`, running, with a claim on /p and a TTL of 10 s."""
    await bench.connect()
    await bench.add(id="a", **{"writes_to": ["/p"], "on_conflict": "queue", "intent_ttl": "10s", **more})
    assert await bench.states("a") == ["running"]


async def into_backoff(bench: Bench, **more: Any) -> None:
    await first(bench, **{"max_attempts": 3, "backoff": ["100s"], **more})
    await bench.end("a", 1)
    assert await bench.states("a") == ["retryable"]


async def second(bench: Bench, **more: Any) -> None:
    await bench.add(**{"id": "b", "writes_to": ["/p"], "on_conflict": "queue", **more})


async def make_live(bench: Bench, workers: FakeWorkers, task_id: str, *, has_begun: bool = True) -> Live:
    """Known to the supervisor; `has_begun`: it has begun with the worker, just now."""
    task = await bench.task(task_id)
    if has_begun:
        folder = bench.folders.attempt(task.id, task.attempt)
        os.makedirs(folder)
        with open(f"{folder}/started", "w"):
            bench.clock._now_us = os.stat(f"{folder}/started").st_ctime_ns // 1000
    spec, _ = await bench.journal.read(lambda c: store.spec_of(c, task.seq))
    workers.live[task_id] = Live(task, read_task(spec))
    return workers.live[task_id]


async def claimed(bench: Bench) -> list[str]:
    """The tasks whose claims count."""
    sql = (
        "SELECT t.id FROM intents i JOIN tasks t ON t.seq = i.task_seq WHERE i.expires_at IS NULL ORDER BY 1"
    )
    return [row[0] for row in await bench.rows(sql)]


async def test_a_claim_in_backoff_lapses_exactly_at_its_ttl(bench: Bench, watch: ClaimWatch) -> None:
    await into_backoff(bench)
    await second(bench)
    due = await watch.turn()
    assert due == bench.clock.now_us() + 10_000_000
    bench.clock.advance(9.999)
    await watch.turn()
    assert await bench.states("b") == ["blocked"]
    bench.clock.advance(0.001)
    await watch.turn()
    assert await bench.states("a", "b") == ["retryable", "running"]
    assert await claimed(bench) == ["b"]
    assert "claim_released" in await bench.events("a")


async def test_a_claim_that_waits_for_its_first_start_never_lapses(bench: Bench, watch: ClaimWatch) -> None:
    await bench.add(id="a", writes_to=["/p"], intent_ttl="10s")
    await second(bench, intent_ttl="10s")
    bench.clock.advance(1000)
    await watch.turn()
    assert await claimed(bench) == ["a", "b"]


async def test_the_ttl_of_the_config_counts_as_it_is_now(bench: Bench, watch: ClaimWatch) -> None:
    await into_backoff(bench, intent_ttl=None)
    bench.clock.advance(50)
    await watch.turn()
    assert await claimed(bench) == ["a"]
    bench.box.apply(Settings(defaults=Defaults(intent_ttl=Duration(20))))
    await watch.turn()
    assert await claimed(bench) == []


@pytest.mark.parametrize(
    ("policy", "state"), [("queue", "blocked"), ("refuse", "finished"), ("warn", "running")]
)
async def test_a_task_whose_claim_has_lapsed_claims_again_under_its_policy_before_it_starts(
    bench: Bench, watch: ClaimWatch, policy: str, state: str
) -> None:
    waker = Waker(bench.box)
    await into_backoff(bench, on_conflict=policy)
    bench.clock.advance(10)
    await watch.turn()
    await second(bench)
    assert await bench.states("b") == ["running"]
    bench.clock.advance(90)
    await waker._turn()
    assert await bench.states("a") == [state]
    if policy == "refuse":
        (data,) = await bench.results("a")
        assert (data["status"], data["reason"], "b" in data["detail"]) == ("refused", "write_conflict", True)
    elif policy == "warn":
        assert len(await bench.alerts("write_conflict")) == 1
    else:
        await bench.end("b")
        assert await bench.states("a") == ["running"]
    assert len(await bench.rows("SELECT 1 FROM conflicts WHERE task_id = 'a' AND other_id = 'b'")) == 1


@pytest.mark.parametrize("word", ["at the retry", "at its end"])
async def test_what_a_person_said_with_a_retry_outlasts_a_lapse(
    bench: Bench, watch: ClaimWatch, word: str
) -> None:
    await into_backoff(bench, on_conflict="refuse", max_attempts=2)
    if word == "at the retry":
        bench.clock.advance(100)
        await Waker(bench.box)._turn()
        await bench.end("a", 1)
        await bench.do(lambda tx: retry(tx, bench.box, "a", "queue"))
        await bench.end("a", 1)
    bench.clock.advance(10)
    await watch.turn()
    await second(bench)
    assert await bench.states("a", "b") == ["retryable", "running"]
    said: Any = "queue" if word == "at its end" else None
    await bench.do(lambda tx: retry(tx, bench.box, "a", said))
    assert await bench.states("a") == ["blocked"]
    await bench.end("b")
    assert await bench.states("a") == ["running"]


async def test_one_that_claims_again_waits_for_the_holder_and_goes_before_those_that_wait(
    bench: Bench, watch: ClaimWatch
) -> None:
    waker = Waker(bench.box)
    await into_backoff(bench)
    bench.clock.advance(10)
    await watch.turn()
    await second(bench)
    bench.clock.advance(90)
    await waker._turn()
    await second(bench, id="c")
    assert await bench.states("a", "b", "c") == ["blocked", "running", "blocked"]
    await bench.end("b")
    assert await bench.states("a", "c") == ["running", "blocked"]
    await bench.end("a")
    assert await bench.states("c") == ["running"]


@pytest.mark.parametrize("at_once", [True, False])
async def test_two_that_could_wait_for_each_other_do_not(
    bench: Bench, watch: ClaimWatch, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """`b` was let past `a`, is held between attempts, and is released when `a`, whose place is before its own, waits for it."""
    waker = Waker(bench.box)
    await into_backoff(bench)
    bench.clock.advance(10)
    await watch.turn()
    await second(bench, max_attempts=2, backoff=["200s"])
    await bench.end("b", 1)
    await bench.do(lambda tx: hold(tx, "b"))
    bench.clock.advance(90)
    await waker._turn()
    assert await bench.states("a", "b") == ["blocked", "held"]
    if not at_once:  # the slow look behind it
        monkeypatch.setattr("agentqd.loops.operations.look_again", lambda tx, box, seqs: None)
    await bench.do(lambda tx: release(tx, bench.box, "b"))
    assert await bench.states("a", "b") == ["running" if at_once else "blocked", "blocked"]
    await watch.turn()
    assert await bench.states("a", "b") == ["running", "blocked"]
    await bench.end("a")
    assert await bench.states("b") == ["running"]


async def test_a_held_task_whose_claim_has_lapsed_claims_again_when_it_is_released(
    bench: Bench, watch: ClaimWatch
) -> None:
    await into_backoff(bench)
    await bench.do(lambda tx: hold(tx, "a"))
    bench.clock.advance(10)
    await watch.turn()
    await second(bench)
    moved = await bench.do(lambda tx: release(tx, bench.box, "a"))
    assert (moved.state.value, moved.reason) == ("blocked", "write_conflict")
    await bench.end("b")
    assert await bench.states("a") == ["running"]


async def test_a_task_that_is_ready_lets_others_go_first_only_if_there_are_any(
    bench: Bench, watch: ClaimWatch
) -> None:
    waker = Waker(bench.box)
    await into_backoff(bench)
    bench.scheduler.target = None
    bench.clock.advance(100)
    await waker._turn()
    bench.clock.advance(10)
    await watch.turn()
    assert (await bench.states("a"), await claimed(bench)) == (["queued"], ["a"])
    assert "claim_released" not in await bench.events("a")
    await second(bench)
    await watch.turn()
    assert await bench.states("a", "b") == ["blocked", "queued"]
    await bench.connect()
    await bench.end("b")
    assert await bench.states("a") == ["running"]


async def test_what_has_changed_since_the_look_is_left_alone(bench: Bench) -> None:
    await into_backoff(bench)
    was = await bench.task("a")
    bench.clock.advance(100)
    await Waker(bench.box)._turn()
    assert await bench.states("a") == ["running"]
    assert await bench.do(lambda tx: release_lapsed(tx, bench.box, Lapse(was, 10.0, 0))) is False
    assert await claimed(bench) == ["a"]


async def test_a_live_silent_worker_is_told_once_for_each_silence_and_keeps_its_claim(
    bench: Bench, watch: ClaimWatch, workers: FakeWorkers
) -> None:
    await first(bench)
    await second(bench)
    await make_live(bench, workers, "a")
    for _ in range(3):
        bench.clock.advance(10)
        await watch.turn()
    (told,) = await bench.alerts("claim_expired")
    assert (told["task_id"], told["paths"], told["waiting"]) == ("a", ["/p"], ["b"])
    assert await claimed(bench) == ["a", "b"]


async def test_a_claimed_task_whose_worker_was_never_begun_is_not_told_as_silent(
    bench: Bench, watch: ClaimWatch, workers: FakeWorkers
) -> None:
    await first(bench)
    await make_live(bench, workers, "a", has_begun=False)
    bench.clock.advance(1000)
    await watch.turn()
    assert (await bench.alerts("claim_expired"), await claimed(bench)) == ([], ["a"])


async def test_an_end_that_is_being_judged_is_no_lapse(
    bench: Bench, watch: ClaimWatch, workers: FakeWorkers
) -> None:
    await first(bench)
    (await make_live(bench, workers, "a")).ended = True
    bench.clock.advance(100)
    due = await watch.turn()
    assert due <= bench.clock.now_us() + 1_000_000
    assert (await bench.alerts("claim_expired"), await claimed(bench)) == ([], ["a"])


@pytest.mark.parametrize("lives", ["marked", "session", ""])
async def test_without_a_supervisor_proc_says_whether_a_process_lives(
    bench: Bench, watch: ClaimWatch, workers: FakeWorkers, lives: str
) -> None:
    await first(bench, max_attempts=2)
    await second(bench)
    workers.is_connected = False
    os.makedirs(bench.folders.attempt("a", 1))
    bench.clock.advance(AWAY_S + 10)
    await watch.turn()
    assert await claimed(bench) == ["a", "b"], "an attempt that was never begun may still be begun"
    with open(f"{bench.folders.attempt('a', 1)}/started", "w"):
        pass
    bench.clock._now_us = os.stat(f"{bench.folders.attempt('a', 1)}/started").st_ctime_ns // 1000 + 20_000_000
    mark = {MARK_STATE: bench.box.state_id, MARK_TASK: "a", MARK_ATTEMPT: "1"}
    command = [
        "sh",
        "-c",
        "env -i sleep 300 & [ $0 = session ] || wait",
        lives,
    ]  # the child has lost its marker
    worker = subprocess.Popen(command, env={**os.environ, **mark} if lives else None, start_new_session=True)
    started = read_process(worker.pid)
    assert started is not None
    start = started.start if lives else started.start - 1  # without a process the number is another's by now
    await bench.do(lambda tx: tx.execute("UPDATE attempts SET pid = ?, pid_start = ?", (worker.pid, start)))
    try:
        if lives == "session":
            worker.wait()
        await watch.turn()
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    assert await bench.states("a") == ["running"]
    assert await claimed(bench) == (["a", "b"] if lives else ["b"])
    assert len(await bench.alerts("claim_expired")) == int(bool(lives))
    await bench.until(lambda: not has_process(bench.box.state_id, "a", 1, (worker.pid, start)))


def test_a_sign_of_life_in_the_future_is_one_of_now(tmp_path: Any) -> None:
    (tmp_path / "heartbeat").touch()
    seen = (tmp_path / "heartbeat").stat().st_ctime_ns // 1000
    os.utime(tmp_path / "heartbeat", (0, 0))
    assert last_sign_us(str(tmp_path), 0, seen + 10**9) >= seen, "a set mtime says nothing"
    assert last_sign_us(str(tmp_path), 0, 5) == 5
    assert last_sign_us(str(tmp_path / "none"), 3, 5) == 3


# Claims from outside.


def me() -> Holder:
    process = read_process(os.getpid())
    assert process is not None
    return Holder(os.getuid(), "me", process.pid, process.start, boot_id())


async def outside(
    bench: Bench, claim_id: str, policy: Any = "queue", path: str = "/p", holder: Holder | None = None
) -> Answer:
    wish = Wish(claim_id, "editor", holder or me(), policy, [(path, path)])
    got = await bench.do(lambda tx: ask(tx, bench.box, wish))
    assert isinstance(got, Answer), got
    return got


async def held(bench: Bench) -> dict[str, bool]:
    return {claim.id: claim.held for claim in await bench.journal.read(outsideclaims.all_claims)}


async def test_tasks_and_outside_claims_take_their_turns_by_age(bench: Bench) -> None:
    await bench.connect()
    await bench.add(id="a", writes_to=["/p"])
    assert not (await outside(bench, "claim-1")).claim.held
    await second(bench)
    await outside(bench, "claim-2")
    await second(bench, id="c", writes_to=["/p/below"])
    order = []
    await bench.end("a")
    for _ in range(4):
        for claim_id in [each for each, is_held in (await held(bench)).items() if is_held]:
            order.append(claim_id)
            await bench.do(lambda tx, c=claim_id: let_go(tx, bench.box, c, "ended"))
        for task_id in ("b", "c"):
            if await bench.states(task_id) == ["running"] and task_id not in order:
                order.append(task_id)
                await bench.end(task_id)
    assert order == ["claim-1", "b", "claim-2", "c"]


async def test_an_outside_claim_refuses_a_line_and_a_submit_and_names_itself(bench: Bench) -> None:
    await outside(bench, "claim-1")
    (by_socket,) = await bench.admit({"id": "t", "writes_to": ["/p/x"]}, door=SOCKET)
    assert isinstance(by_socket, WriteConflict)
    assert by_socket.fields["conflicts"] == [{"task_id": "claim-1", "task": "editor", "path": "/p"}]
    await bench.add(id="line", writes_to=["/p/x"])
    (data,) = await bench.results("line")
    assert (data["status"], data["conflicts"][0]["task_id"]) == ("refused", "claim-1")


async def test_a_refused_outside_claim_leaves_nothing_but_the_record(bench: Bench) -> None:
    await bench.add(id="a", writes_to=["/p"])
    wish = Wish("claim-1", "editor", me(), "refuse", [("/p", "/p")])
    got = await bench.do(lambda tx: ask(tx, bench.box, wish))
    assert isinstance(got, WriteConflict)
    assert await held(bench) == {}
    assert await bench.rows("SELECT policy, n FROM conflict_counts") == [("refuse", 1)]


async def test_an_outside_claim_that_warns_is_held_and_told(bench: Bench) -> None:
    await bench.add(id="a", writes_to=["/p"])
    assert (await outside(bench, "claim-1", "warn")).claim.held
    (told,) = await bench.alerts("write_conflict")
    assert (told["claim"], told["conflicts"][0]["task_id"]) == ("claim-1", "a")


async def test_a_second_asking_by_the_same_process_is_the_same_claim(bench: Bench) -> None:
    one = await outside(bench, "claim-1")
    assert (await outside(bench, "claim-1")).claim == one.claim
    with pytest.raises(IllegalTransition):
        await outside(bench, "claim-1", holder=Holder(0, "x", 1, 1, "boot"))


async def test_outside_claims_are_limited_in_all_and_by_user(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentqd.loops.outside.OUTSIDE_CLAIMS_PER_USER_MAX", 1)
    monkeypatch.setattr("agentqd.loops.outside.OUTSIDE_CLAIMS_MAX", 2)
    await outside(bench, "claim-1")
    with pytest.raises(RefusedForNow):
        await outside(bench, "claim-2", path="/q")
    other = Holder(os.getuid() + 1, "other", me().pid, me().pid_start, me().boot_id)
    await outside(bench, "claim-2", path="/q", holder=other)
    with pytest.raises(RefusedForNow):
        await outside(bench, "claim-3", path="/r", holder=Holder(99, "third", 1, 1, "boot"))


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    made = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    yield made
    made.kill()
    made.wait()


async def test_the_claims_of_ended_reused_and_rebooted_processes_are_released(
    bench: Bench, sleeper: subprocess.Popen[bytes]
) -> None:
    started = read_process(sleeper.pid)
    assert started is not None
    lives = Holder(0, "me", sleeper.pid, started.start, boot_id())
    await outside(bench, "claim-lives", path="/a", holder=lives)
    await outside(
        bench, "claim-reused", path="/b", holder=Holder(0, "me", sleeper.pid, started.start - 1, boot_id())
    )
    await outside(
        bench, "claim-rebooted", path="/c", holder=Holder(0, "me", sleeper.pid, started.start, "before")
    )
    await second(bench, writes_to=["/b", "/c"])
    claims = OutsideClaims(bench.box)
    await claims.turn()
    assert await held(bench) == {"claim-lives": True}
    assert await bench.states("b") == ["queued"]
    sleeper.kill()  # not reaped: a zombie holds nothing
    await bench.until(lambda: not claims._pidfds)
    await claims.turn()
    assert await held(bench) == {}


@pytest.mark.parametrize("seed", range(2))
async def test_in_any_history_nobody_shares_a_place_and_everybody_gets_a_turn(
    tmp_path: Path, seed: int
) -> None:
    """Tasks and outside claims come, fail, back off, lapse, claim again, are held and released; none warns."""
    rng = random.Random(seed)
    settings = Settings(max_workers=100, queues={"default": Queue(concurrency=100)})
    async with Bench(tmp_path, settings) as bench:
        history = History(bench, rng)
        await bench.connect()
        for n in range(60):
            await history.come(n)
            for _ in range(rng.randrange(4)):
                await history.step()
        for _ in range(600):
            await history.step(to_the_end=True)
            if not await history.left():
                break
        assert await history.left() == []
        assert (
            await bench.rows("SELECT 1 FROM intents") == await bench.rows("SELECT 1 FROM claim_waits") == []
        )
        assert history.lapsed > 0


class History:
    """One random step after another; after each, nobody who is running or held overlaps another one who is."""

    def __init__(self, bench: Bench, rng: random.Random) -> None:
        self.bench = bench
        self.rng = rng
        self.waker = Waker(bench.box)
        self.watch = ClaimWatch(bench.box, FakeWorkers())
        self.lapsed = 0

    async def come(self, n: int) -> None:
        paths = self.rng.sample(["/p", "/p/a", "/p/b", "/p/a/x", "/p/b/*", "/q"], self.rng.choice([1, 1, 2]))
        if self.rng.random() < 0.4:
            wish = Wish(f"claim-{n}", "editor", me(), "queue", [(path, path) for path in paths])
            await self.bench.do(lambda tx: ask(tx, self.bench.box, wish))
        else:
            after = [f"t{self.rng.randrange(n)}"] if n and self.rng.random() < 0.2 else []
            after = [
                each for each in after if await self.bench.rows("SELECT 1 FROM tasks WHERE id = ?", each)
            ]
            await self.bench.add(
                id=f"t{n}", writes_to=paths, on_conflict="queue", max_attempts=3, backoff=["30s"], intent_ttl="10s",
                **({"after": after, "after_policy": "any"} if after else {}),
            )  # fmt: skip
        await self.check()

    async def step(self, *, to_the_end: bool = False) -> None:
        ways = ["end", "release", "outside", "time"] if to_the_end else ["end", "fail", "fail", "time", "time", "hold", "release", "outside"]  # fmt: skip
        way = self.rng.choice(ways)
        mine = [claim_id for claim_id, is_held in (await held(self.bench)).items() if is_held]
        who = {"hold": "retryable", "release": "held"}.get(way, "running")
        chosen = self.rng.choice([*(mine if way == "outside" else await self.ids(who)), None])
        if way == "time":
            await self.pass_time(self.rng.choice([5, 11, 31]))
        elif chosen is not None and way in {"end", "fail"}:
            await self.bench.end(chosen, int(way == "fail"))
        elif chosen is not None:
            units = {"outside": lambda tx: let_go(tx, self.bench.box, chosen, "ended"), "hold": lambda tx: hold(tx, chosen),
                     "release": lambda tx: release(tx, self.bench.box, chosen)}  # fmt: skip
            await self.bench.do(units[way])
        await self.check()

    async def pass_time(self, seconds: float) -> None:
        """Of a running worker FakeWorkers knows nothing: nothing is done about it."""
        self.bench.clock.advance(seconds)
        await self.watch.turn()
        self.lapsed += len(await self.bench.rows("SELECT 1 FROM intents WHERE expires_at IS NOT NULL"))
        await self.check()
        await self.waker._turn()

    async def ids(self, state: str) -> list[str]:
        return [
            row[0]
            for row in await self.bench.rows("SELECT id FROM tasks WHERE state = ? ORDER BY seq", state)
        ]

    async def left(self) -> list[str]:
        rows = await self.bench.rows("SELECT id || ' ' || state FROM tasks WHERE state != 'finished'")
        return [row[0] for row in rows] + list(await held(self.bench))

    async def check(self) -> None:
        active = await self.bench.rows(
            "SELECT i.task_seq, i.path FROM intents i LEFT JOIN tasks t ON t.seq = i.task_seq"
            " LEFT JOIN outside_claims c ON c.seq = -i.task_seq WHERE t.state = 'running' OR c.held_at IS NOT NULL"
        )
        for (one, path), (other, place) in combinations(active, 2):
            assert one == other or not overlap(path, place), (one, path, other, place)


async def test_conflicts_are_kept_for_a_time_and_in_a_number_and_their_count_for_ever(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentqd.loops.retention.CONFLICTS_KEPT_MAX", 3)
    sql = "INSERT INTO conflicts (at, name, path, other_id, other_path, policy) VALUES (?, 'n', '/p', 'o', '/p', 'refuse')"
    now = bench.clock.now_us()
    await bench.do(lambda tx: tx.executemany(sql, [(now - 10**15,), *([(now,)] * 5)]))
    await bench.do(Retention(bench.box)._remove_conflicts)
    assert await bench.rows("SELECT count(*) FROM conflicts") == [(3,)]
    assert await bench.rows("SELECT policy, n FROM conflict_counts") == [("refuse", 6)]
    assert limits.CONFLICTS_KEPT_MAX > limits.CONFLICTS_TOLD_MAX
