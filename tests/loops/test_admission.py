"""The door: a new task, a duplicate, a refusal; ids, replays and write conflicts."""

from __future__ import annotations

from typing import Any

import pytest

from agentqd.core.errors import IdConflict, InvalidTask, WriteConflict
from agentqd.core.settings import Defaults, Queue, Settings
from agentqd.loops.admission import Accepted, Duplicate, admit
from agentqd.loops.preparing import prepare

from .harness import FILE, SOCKET, Bench

DAY = 86400.0


async def _finished(bench: Bench, **fields: Any) -> str:
    """A task that has run, ended and been delivered."""
    await bench.connect()
    task_id = await bench.add(**fields)
    await bench.end(task_id)
    await bench.deliver_all()
    return task_id


async def test_a_line_with_an_id_is_one_task_and_its_replay_a_duplicate(bench: Bench) -> None:
    first, second = (await bench.admit({"id": "x"}))[0], (await bench.admit({"id": "x"}))[0]
    assert isinstance(first, Accepted)
    assert second == Duplicate("x", (await bench.task("x")).state, None)
    assert await bench.events("x") == ["accepted", "duplicate_submitted"]


async def test_lines_without_id_and_time_are_tasks_of_their_own(bench: Bench) -> None:
    ids = {outcome.task_id for outcome in await bench.admit({}, {}, {}) if isinstance(outcome, Accepted)}
    assert len(ids) == 3


async def test_a_line_with_submitted_at_is_known_by_its_content(bench: Bench) -> None:
    at = {"submitted_at": "2026-04-07T18:30:00Z"}
    first, again, other = await bench.admit(at, at, {**at, "prompt": "false"})
    assert isinstance(again, Duplicate)
    assert isinstance(first, Accepted)
    assert again.task_id == first.task_id
    assert isinstance(other, Accepted)


async def test_twice_in_one_batch_is_a_task_and_a_duplicate_or_a_conflict(bench: Bench) -> None:
    first, same, other = await bench.admit({"id": "x"}, {"id": "x"}, {"id": "x", "prompt": "no"})
    assert isinstance(first, Accepted)
    assert isinstance(same, Duplicate)
    assert isinstance(other, IdConflict)
    assert other.code == "id_conflict"
    assert await bench.rows("SELECT count(*) FROM tasks") == [(1,)]


async def test_the_same_id_with_other_content_is_an_id_conflict_and_changes_nothing(bench: Bench) -> None:
    await bench.add(id="x", timeout="45m")
    (other,) = await bench.admit({"id": "x", "timeout": "44m"})
    (same,) = await bench.admit({"id": "x", "run_timeout": 2700, "submitted_at": "2026-04-07T18:30:00Z"})
    assert isinstance(other, IdConflict)
    assert isinstance(same, Duplicate)


async def test_a_replay_inside_dedup_ttl_is_a_duplicate_and_after_it_a_new_task(bench: Bench) -> None:
    await _finished(bench, id="x", dedup_ttl="1h")
    bench.clock.advance(3599)
    (inside,) = await bench.admit({"id": "x", "dedup_ttl": "1h"})
    assert isinstance(inside, Duplicate)
    assert inside.result == "success"
    bench.clock.advance(1)
    (after,) = await bench.admit({"id": "x", "dedup_ttl": "1h"})
    assert isinstance(after, Accepted)
    assert after.task_id == "x-2"
    (again,) = await bench.admit({"id": "x", "dedup_ttl": "1h"})
    assert isinstance(again, Duplicate)
    assert again.task_id == "x-2"


async def test_the_third_life_of_an_id_is_minus_three(bench: Bench) -> None:
    await bench.connect()
    seen = []
    for _ in range(3):
        (outcome,) = await bench.admit({"id": "x", "dedup_ttl": "1h"})
        assert isinstance(outcome, Accepted)
        seen.append(outcome.task_id)
        await bench.end(outcome.task_id)
        await bench.deliver_all()
        bench.clock.advance(3600)
    assert seen == ["x", "x-2", "x-3"]


async def test_the_suffix_of_a_full_length_id_replaces_its_end(bench: Bench) -> None:
    full = "x" * 64
    await _finished(bench, id=full, dedup_ttl=1)
    bench.clock.advance(1)
    (after,) = await bench.admit({"id": full, "dedup_ttl": 1})
    assert isinstance(after, Accepted)
    assert after.task_id == "x" * 62 + "-2"


@pytest.mark.parametrize("same_batch", [False, True])
async def test_a_replay_never_takes_an_id_that_is_somebody_elses(bench: Bench, same_batch: bool) -> None:
    await _finished(bench, id="x", dedup_ttl=1)
    bench.clock.advance(1)
    stranger, replay = {"id": "x-2", "prompt": "other"}, {"id": "x", "dedup_ttl": 1}
    if same_batch:
        (_, after) = await bench.admit(stranger, replay)
    else:
        await bench.admit(stranger)
        (after,) = await bench.admit(replay)
    assert isinstance(after, Accepted)
    assert after.task_id == "x-3"


async def test_a_replay_is_never_new_while_the_first_is_active_undelivered_or_unpulled(bench: Bench) -> None:
    await bench.connect()
    await bench.add(id="x", dedup_ttl=1)
    bench.clock.advance(DAY)
    assert isinstance((await bench.admit({"id": "x", "dedup_ttl": 1}))[0], Duplicate)
    await bench.end("x")
    bench.clock.advance(DAY)
    assert isinstance((await bench.admit({"id": "x", "dedup_ttl": 1}))[0], Duplicate)
    await bench.deliver_all()
    await bench.do(lambda tx: tx.execute("INSERT INTO consumers VALUES ('default', 0, 0)"))
    assert isinstance((await bench.admit({"id": "x", "dedup_ttl": 1}))[0], Duplicate)
    await bench.do(lambda tx: tx.execute("UPDATE consumers SET acknowledged = 1"))
    assert isinstance((await bench.admit({"id": "x", "dedup_ttl": 1}))[0], Accepted)


async def test_a_dependency_must_exist_and_a_refused_line_leaves_its_id_free(bench: Bench) -> None:
    (outcome,) = await bench.admit({"id": "b", "after": "a"})
    assert isinstance(outcome, InvalidTask)
    assert outcome.code == "unknown_dependency"
    first, second = await bench.admit({"id": "a"}, {"id": "b", "after": "a"})
    assert isinstance(first, Accepted)
    assert isinstance(second, Accepted)
    assert await bench.states("a", "b") == ["queued", "blocked"]


@pytest.mark.parametrize("policy", ["refuse", "queue", "warn"])
async def test_what_a_write_conflict_makes_by_file(bench: Bench, policy: str) -> None:
    await bench.add(id="a", writes_to=["/w/a"])
    (outcome,) = await bench.admit({"id": "b", "writes_to": ["/w"], "on_conflict": policy})
    assert isinstance(outcome, Accepted)
    task = await bench.task("b")
    wanted = {
        "refuse": ("finished", "refused", "write_conflict"),
        "queue": ("blocked", None, "write_conflict"),
        "warn": ("queued", None, None),
    }
    assert (task.state.value, task.result, task.reason) == wanted[policy]
    results = await bench.results("b")
    assert [data["conflicts"] for data in results] == ([[{"task_id": "a", "task": "demo", "path": "/w/a"}]] if policy == "refuse" else [])  # fmt: skip
    assert len(await bench.alerts("write_conflict")) == (0 if policy == "queue" else 1)
    assert await bench.rows("SELECT name, policy, other_id FROM conflicts") == [("demo", policy, "a")]


async def test_what_a_write_conflict_makes_by_socket(bench: Bench) -> None:
    await bench.add(id="a", writes_to=["/w/a"])
    (outcome,) = await bench.admit({"id": "b", "writes_to": ["/w/*"]}, door=SOCKET)
    assert isinstance(outcome, WriteConflict)
    assert outcome.fields["conflicts"] == [{"task_id": "a", "task": "demo", "path": "/w/a"}]
    assert await bench.rows("SELECT count(*) FROM tasks WHERE id = 'b'") == [(0,)]


async def test_a_refused_id_is_free_again_once_the_conflict_is_gone(bench: Bench) -> None:
    await bench.connect()
    await bench.add(id="a", writes_to=["/w/a"])
    await bench.admit({"id": "b", "writes_to": ["/w"]})
    await bench.end("a")
    (outcome,) = await bench.admit({"id": "b", "writes_to": ["/w"], "prompt": "otherwise"})
    assert isinstance(outcome, Accepted)
    task = await bench.task("b")
    assert (task.state.value, task.run, task.result) == ("running", 2, None)
    assert await bench.rows("SELECT path FROM intents") == [("/w",)]


async def test_a_refused_id_sent_again_into_the_same_conflict_is_refused_again(bench: Bench) -> None:
    await bench.connect()
    await bench.add(id="a", writes_to=["/w/a"])
    for run in (1, 2):
        (outcome,) = await bench.admit({"id": "b", "writes_to": ["/w"]})
        assert isinstance(outcome, Accepted)
        task = await bench.task("b")
        assert (task.state.value, task.result, task.run) == ("finished", "refused", run)
    (by_socket,) = await bench.admit({"id": "b", "writes_to": ["/w"]}, door=SOCKET)
    assert isinstance(by_socket, WriteConflict)
    assert len(await bench.results("b")) == 2


async def test_a_refused_id_sent_again_waits_for_what_it_comes_after(bench: Bench) -> None:
    await bench.connect()
    await bench.add(id="a")
    await bench.add(id="b", after="a")
    await bench.end("a", exit_code=1)
    assert (await bench.task("b")).result == "refused"
    await bench.add(id="c")
    await bench.add(id="b", after=["c"])
    task = await bench.task("b")
    assert (task.state.value, task.reason) == ("blocked", "dependency")
    await bench.end("c")
    assert (await bench.task("b")).state.value == "running"


async def test_a_refused_id_may_go_to_another_queue(bench: Bench) -> None:
    bench.box.apply(Settings(queues={"other": Queue()}))
    await bench.add(id="a", writes_to=["/w/a"])
    await bench.admit({"id": "b", "writes_to": ["/w"]})
    await bench.add(id="b", queue="other")
    assert (await bench.task("b")).queue == "other"


async def test_an_expired_task_is_a_task_and_no_rejection(bench: Bench) -> None:
    (outcome,) = await bench.admit({"id": "x", "expires_at": "2020-01-01T00:00:00Z"})
    assert isinstance(outcome, Accepted)
    assert (await bench.task("x")).wake_at == bench.clock.now_us()


async def test_a_start_time_ahead_is_scheduled(bench: Bench) -> None:
    await bench.add(id="x", not_before="2030-01-01T00:00:00Z")
    assert await bench.states("x") == ["scheduled"]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"queue": "nope"}, "unknown_queue"),
        ({"runner": "nope"}, "unknown_runner"),
        ({"deliver_to": ["nope"]}, "unknown_sink"),
        ({"runner": "shell", "command": ["x"]}, "command_not_allowed"),
        ({"writes_to": ["relative"]}, "invalid_field"),
        ({"prompt_ref": "x"}, "invalid_field"),
        ({"workdir": "rel"}, "invalid_field"),
        ({"workdir": "~no-such-user/x", "writes_to": ["a"]}, "invalid_field"),
    ],
)
async def test_what_does_not_fit_the_box_is_invalid(bench: Bench, fields: dict[str, Any], code: str) -> None:
    with pytest.raises(InvalidTask) as caught:
        await bench.admit(fields)
    assert caught.value.code == code


async def test_a_clock_from_the_config_wakes_a_plain_task(bench: Bench) -> None:
    bench.box.apply(Settings(defaults=Defaults(queue_timeout=60)))  # type: ignore[arg-type]
    await bench.add(id="x")
    assert (await bench.task("x")).wake_at == bench.clock.now_us() + 60_000_000


async def test_invalid_candidates_pass_through_in_their_place(bench: Bench) -> None:
    wrong = InvalidTask("no")
    good = [prepare(b'{"task":"a","prompt":"p","id":"%d"}' % n, FILE, b"", bench.box) for n in range(2)]
    outcomes = await bench.do(lambda tx: admit(tx, bench.box, [good[0], wrong, good[1]]))
    assert [type(outcome) for outcome in outcomes] == [Accepted, InvalidTask, Accepted]
    assert outcomes[1] is wrong
    assert [outcome.seq for outcome in outcomes if isinstance(outcome, Accepted)] == [1, 2]


async def _refused(bench: Bench) -> None:
    await bench.add(id="other", writes_to=["/w/a"])
    await bench.admit({"id": "b", "writes_to": ["/w"]})
    assert (await bench.task("b")).result == "refused"


async def test_a_refused_id_sent_again_for_later_is_scheduled(bench: Bench) -> None:
    await _refused(bench)
    (outcome,) = await bench.admit({"id": "b", "not_before": "2030-01-01T00:00:00Z"})
    assert isinstance(outcome, Accepted)
    assert outcome.state.value == (await bench.task("b")).state.value == "scheduled"


async def test_a_refused_id_sent_again_twice_in_one_batch_is_one_task(bench: Bench) -> None:
    await _refused(bench)
    first, second = await bench.admit({"id": "b"}, {"id": "b"})
    assert isinstance(first, Accepted)
    assert isinstance(second, Duplicate)


async def test_a_line_twice_in_one_batch_that_conflicts_is_refused_twice(bench: Bench) -> None:
    outcomes = await bench.admit({"id": "a", "writes_to": ["/w"]}, *[{"id": "b", "writes_to": ["/w"]}] * 2)
    assert [outcome.state.value for outcome in outcomes if isinstance(outcome, Accepted)] == ["queued", "finished", "finished"]  # fmt: skip
    assert len(await bench.results("b")) == 2


async def test_a_refused_id_sent_again_and_expired_meanwhile_ends_as_expired(bench: Bench) -> None:
    await _refused(bench)
    await bench.admit({"id": "b", "expires_at": "2020-01-01T00:00:00Z"})
    bench.clock.advance(1)
    from agentqd.loops.waking import Waker

    await Waker(bench.box)._turn()
    assert (await bench.task("b")).result == "expired"
