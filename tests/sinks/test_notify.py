"""The `notify` sink: several services, one of them down; what hangs; secrets; and what people read."""

from __future__ import annotations

import asyncio
import importlib
import logging
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agentqd.core.envelope import seal
from agentqd.core.limits import MIB, SINK_ERROR_CHARS_MAX
from agentqd.sinks import notify
from agentqd.sinks.base import Deferred, Delivered, Outcome, Rejected, Sink
from agentqd.sinks.notifytext import message_of

from .conformance import NOW_US, Condition, delivery, ids, some, with_payload
from .notifyadapter import TOKEN, NotifyAdapter


@pytest.fixture
def people(tmp_path: Path) -> Iterator[NotifyAdapter]:
    (tmp_path / "base").mkdir()
    made = NotifyAdapter(tmp_path / "base")
    yield made
    made.release()


async def one(sink: Sink, number: int = 1) -> Outcome:
    (outcome,) = await sink.deliver([delivery(number)])
    return outcome


async def until_delivered(sink: Sink, number: int = 1) -> None:
    """A try may be too short for a busy machine; the next one is not."""
    async with asyncio.timeout(20):
        while not isinstance(await one(sink, number), Delivered):
            await until(lambda: calls() == 0)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def opened(people: NotifyAdapter) -> Sink:
    sink = people.make()
    await sink.open(0)
    return sink


def calls() -> int:
    """Threads in the library now."""
    return sum(thread.name == "sink-notify" for thread in threading.enumerate())


# A hostile service.


@pytest.mark.parametrize("kind", ["plain", "packed", "chunked", "longer", "redirecting", "refusing"])
async def test_of_an_answer_of_100_mb_only_the_beginning_is_ever_in_memory(people: NotifyAdapter, kind: str) -> None:  # fmt: skip
    people.say(f"vast {kind}", "one")
    sink = await opened(people)
    tracemalloc.start()
    try:
        outcome = await one(sink)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if kind == "refusing":
        assert isinstance(outcome, Deferred)
        assert outcome.reason == "URL 1 of 1 (JSON): HTTP 503"
    else:
        assert isinstance(outcome, Delivered)
        assert people.taken()[0][0] == "one"
    assert ("landed" in dict(people.taken())) is (kind == "redirecting")
    assert peak < 8 * MIB, f"{peak / MIB:.0f} MiB at once"
    await sink.close()


# Several services.


async def test_a_service_that_has_accepted_is_not_asked_again_while_another_is_down(
    people: NotifyAdapter,
) -> None:
    people.write_urls("one", "two", "three")
    people.say("deferring", "two")
    sink = await opened(people)
    for _ in range(3):
        outcome = await one(sink)
        assert isinstance(outcome, Deferred)
        assert outcome.reason == "URL 2 of 3 (JSON): HTTP 503"
        assert not outcome.connection, "others were reached"
    people.say("good", "two")
    assert isinstance(await one(sink), Delivered)
    assert sorted(people.taken()) == [(path, ids(some(1))[0]) for path in ("one", "three", "two")]
    await one(sink)
    assert len(people.taken()) == 6, "it is forgotten once all have it: sent again is sent again"
    await sink.close()


async def test_what_was_accepted_is_known_after_a_restart(people: NotifyAdapter) -> None:
    people.write_urls("one", "two")
    people.say("deferring", "two")
    sink = await opened(people)
    outcome = await one(sink)
    assert isinstance(outcome, Deferred)
    assert outcome.progress is not None
    assert TOKEN.encode() not in outcome.progress
    await sink.close()
    people.say("good", "two")
    again = await opened(people)
    item = msgspec.structs.replace(delivery(1), progress=outcome.progress)
    assert isinstance((await again.deliver([item]))[0], Delivered)
    assert [path for path, _ in people.taken()] == ["one", "two"]
    await again.close()


async def test_what_another_type_of_sink_remembers_of_a_moved_row_says_nothing_here(people: NotifyAdapter) -> None:  # fmt: skip
    people.write_urls("one", "two")
    people.say("deferring", "two")
    sink = await opened(people)
    for foreign in (
        b'{"accepted":["0123456789abcdef"],"refused":{"fedcba9876543210":"550 no"}}',
        b"\xff\x00 x",
    ):
        outcome = (await sink.deliver([msgspec.structs.replace(delivery(1), progress=foreign)]))[0]
        assert isinstance(outcome, Deferred)
        assert outcome.progress is not None
        assert len(outcome.progress.split()) == 1, "only who has accepted it here"
    assert [path for path, _ in people.taken()] == ["one"]
    await sink.close()


async def test_an_answer_that_comes_too_late_still_counts(people: NotifyAdapter) -> None:
    people.write_urls("one", "two")
    people.say("late", "two")
    people.try_s = 0.8
    sink = await opened(people)
    outcome = await one(sink)
    assert isinstance(outcome, Deferred)
    assert "URL 2 of 2 (JSON): no answer within 0.8 s" in outcome.reason
    people.say("good", "two")
    await until_delivered(sink)
    assert sorted(path for path, _ in people.taken()) == ["one", "two"], "nobody got it twice"
    await sink.close()


async def test_nothing_reached_is_a_connection_failure_and_a_429_is_busy(people: NotifyAdapter) -> None:
    sink = await opened(people)
    people.say("429")
    outcome = await one(sink)
    assert outcome == Deferred("URL 1 of 1 (JSON): HTTP 429", busy=True)
    people.release()
    outcome = await one(sink)
    assert outcome == Deferred("URL 1 of 1 (JSON): no connection", connection=True)
    await sink.close()


async def test_calls_that_hang_are_bounded_hold_up_nobody_and_their_threads_end(
    people: NotifyAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "THREADS_MAX", 3)
    people.say("hanging", "one")
    people.try_s = 0.1
    sink = await opened(people)
    said = [await one(sink, number) for number in range(1, 6)]
    assert all(isinstance(outcome, Deferred) and outcome.connection for outcome in said)
    assert "hang; none is added" in said[3].reason  # type: ignore[union-attr]
    assert calls() == 3
    people.say("good", "one")
    await until(lambda: calls() == 0)
    await until_delivered(sink, 9)
    await sink.close()


async def test_a_machine_without_threads_loses_no_place_for_calls(
    people: NotifyAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "THREADS_MAX", 1)
    sink = await opened(people)
    assert isinstance(await one(sink), Delivered)
    with monkeypatch.context() as patch:
        patch.setattr(notify.threading.Thread, "start", _no_thread)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                await sink._call(("d", "u"), None, None)  # type: ignore[attr-defined]
    assert isinstance(await one(sink, 2), Delivered)
    await sink.close()


def _no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


async def test_a_hung_call_does_not_keep_the_process_from_leaving(people: NotifyAdapter) -> None:
    people.say("hanging")
    program = (
        "import asyncio\nfrom pathlib import Path\nfrom agentqd.core.settings import Sink\nfrom agentqd.core.units import Duration\n"
        "from agentqd.sinks.base import Context, Delivery\nfrom agentqd.sinks.notify import NotifySink\n"
        f"sink = NotifySink(Context('n', Sink(type='notify', urls_file={str(people.urls_file)!r}, timeout=Duration(0.1)), '/', None, None))\n"
        f"item = Delivery('d1', 1, 'agentq.task.entry', 'entry', 'k', 't', {delivery(1).payload!r}, 0, 0)\n"
        "async def main():\n    await sink.open(0)\n    print(await sink.deliver([item]))\n    await sink.close()\n"
        "asyncio.run(main())\n"
    )
    ended = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "no answer within 0.1 s" in ended.stdout
    assert ended.stderr == ""


# The file of URLs.


async def test_the_file_is_read_anew_for_each_try(people: NotifyAdapter) -> None:
    sink = await opened(people)
    people.urls_file.rename(people.urls_file.with_name("aside"))
    outcome = await one(sink)
    assert isinstance(outcome, Deferred)
    assert str(people.urls_file) in outcome.reason
    people.write_urls("other")
    assert isinstance(await one(sink), Delivered)
    assert [path for path, _ in people.taken()] == ["other"]
    people.urls_file.write_text("# nothing\n")
    outcome = await one(sink)
    assert isinstance(outcome, Deferred)
    assert "is empty" in outcome.reason
    await sink.close()


@pytest.mark.parametrize("line", [f"nonsense://{TOKEN}", TOKEN, f"slack://{TOKEN}", "tgram://"])
async def test_a_url_that_apprise_does_not_understand_is_named_by_its_number_and_nothing_is_sent(
    people: NotifyAdapter, line: str
) -> None:
    sink = await opened(people)
    with people.urls_file.open("a") as file:
        file.write(f"{line}\n")
    outcome = await one(sink)
    assert isinstance(outcome, Deferred)
    assert "URL 2 of 2" in outcome.reason
    assert TOKEN not in outcome.reason
    assert people.taken() == []
    await sink.close()


async def test_no_more_urls_than_the_limit(people: NotifyAdapter) -> None:
    sink = await opened(people)
    people.write_urls(*(f"p{n}" for n in range(notify.URLS_MAX + 1)))
    outcome = await one(sink)
    assert isinstance(outcome, Deferred)
    assert "33 URLs" in outcome.reason
    await sink.close()


async def test_ntfy_takes_it_too(people: NotifyAdapter) -> None:
    people.write_urls("topic", scheme="ntfy")
    sink = await opened(people)
    assert isinstance(await one(sink), Delivered)
    (message,) = people.messages()
    assert message["topic"] == "topic"
    assert message["message"].endswith(ids(some(1))[0])
    await sink.close()


# Secrets.


def test_the_library_says_nothing_while_it_is_loaded() -> None:
    """In a process of its own: it is loaded once."""
    script = """
import logging
logging.basicConfig(level=1)
from agentqd.sinks import notify
notify._load()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


async def test_no_token_is_ever_logged_printed_or_given_as_a_reason(
    people: NotifyAdapter, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every logger of the process at its loudest."""
    heard: list[str] = []

    class Everything(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(f"{record.name} {record.getMessage()} {record.exc_info}")

    everything = Everything()
    logging.getLogger().addHandler(everything)
    monkeypatch.setattr(logging.getLogger(), "level", 1)
    try:
        people.write_urls(f"hook/{TOKEN}", "two")
        with people.urls_file.open("a") as file:
            file.write(f"ntfy://:{TOKEN}@127.0.0.1:{people.port}/topic\njson://127.0.0.1:1/{TOKEN}\n")
        people.try_s = 5.0
        sink = await opened(people)
        monkeypatch.setattr("apprise.plugins.base.NotifyBase.request_rate_per_sec", 0)
        said: list[object] = []
        for condition in (Condition.DEFERRING, Condition.CRASHING, Condition.AMBIGUOUS, Condition.HUGE_ANSWER, Condition.GOOD):  # fmt: skip
            people.become(condition)
            said.append(await one(sink))

        def raises(*_: object, **__: object) -> bool:
            raise ValueError(f"https://x/{TOKEN}")

        service = next(iter(sink._services.values()))  # type: ignore[attr-defined]
        monkeypatch.setattr(service, "notify", raises)
        said.append(await one(sink, 2))
        people.urls_file.write_text(f"nonsense://{TOKEN}\n")
        said.append(await one(sink, 3))
        await sink.close()
    finally:
        logging.getLogger().removeHandler(everything)
    assert len(said) == 7
    assert all(isinstance(each, Deferred) and len(each.reason) <= SINK_ERROR_CHARS_MAX for each in said)
    assert "URL 1 of 4 (JSON): ValueError" in str(said[5])
    assert not [each for each in heard if each.startswith(("apprise", "urllib3", "requests"))]
    printed = "".join(capfd.readouterr())
    for text in (repr(said), "\n".join(heard), printed):
        assert TOKEN not in text
        assert "token-in-an-answer" not in text


# The library.


async def test_without_apprise_the_sink_says_what_to_install_and_works_once_it_is_there(
    people: NotifyAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def missing(name: str, package: str | None = None) -> object:
        if name == "apprise":
            raise ImportError(name)
        return real(name, package)

    sink = people.make()
    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", missing)
        with pytest.raises(OSError, match=r"pip install 'agentqd\[notify\]'"):
            await sink.open(0)
    await sink.open(0)
    assert isinstance(await one(sink), Delivered)
    await sink.close()


def test_apprise_is_loaded_when_a_sink_is_opened_and_not_before() -> None:
    program = "import sys, agentqd.sinks.registry, agentqd.sinks.notify; sys.exit('apprise' in sys.modules or 'requests' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# What people read.


def text(data: dict[str, Any], type_: str = "agentq.task.entry") -> Any:
    return message_of(seal("d1", type_, "box", "t1", NOW_US, data), "d1", type_)


def test_a_result_says_what_it_was_how_it_ended_and_its_last_lines() -> None:
    data = {
        "task_id": "t1", "name": "nightly", "status": "failed", "reason": "exit_code", "exit_code": 3, "signal": None, "attempt": 2,
        "duration_s": 61.234, "output_dir": "/var/x", "stdout_tail": "\n".join(f"line {n}" for n in range(50)),
    }  # fmt: skip
    said = text(data, "agentq.task.failed")
    assert said.title == "nightly: failed"
    assert said.mood == "failure"
    head, _, tail = said.body().partition("\n\n")
    assert head.splitlines() == ["task t1: failed (exit_code 3)", "attempt 2, 1m01s", "in /var/x"]
    assert tail.splitlines()[:1] == ["line 38"]
    assert said.body().endswith("\n\nbox d1")


def test_an_entry_is_its_own_subject_and_body_or_its_content_or_its_place() -> None:
    data = {"name": "n", "key": "k", "content": {"subject": "hello", "body": "you", "deliver_to": ["x"]}}
    assert (text(data).title, text(data).body()) == ("hello", "you\n\nbox d1")
    data = {"name": "n", "key": "reply.txt", "content": "the reply"}
    assert (text(data).title, text(data).body()) == ("n: reply.txt", "the reply\n\nbox d1")
    large = {"name": "n", "key": "big", "bytes": 9, "path": "/state/blobs/x"}
    assert text(large).body() == "9 bytes, at /state/blobs/x\n\nbox d1"
    alert = text({"alert": "no_work", "message": "task t1 did nothing"}, "agentq.alert.no_work")
    assert (alert.title, alert.lines, alert.mood) == ("alert: no_work", "task t1 did nothing", "warning")
    test = text({"alert": "test", "message": "a test", "sink": "people", "test": True}, "agentq.test")
    assert (test.title, test.lines, test.mood) == ("test of the sink people", "a test", "info")


@pytest.mark.parametrize("room", [80, 140, 500, 10**6])
def test_everything_is_bounded_printable_and_ends_with_the_id(room: int) -> None:
    hostile = "\x1b]0;owned\x07\u202eevil\r\n<script>" * 5000
    said = text({"name": hostile, "key": hostile, "content": hostile})
    assert len(said.title) <= 120
    assert said.title.isprintable()
    body = said.body(room)
    assert len(body) <= max(80, min(room, 3000))
    assert all(line.isprintable() for line in body.split("\n"))
    assert body.endswith("box d1")


@pytest.mark.parametrize("payload", [b"", b"\xff", b"[1]", b'{"data": 3}', b"{}", b"[" * 100_000])
async def test_what_is_no_envelope_is_rejected(people: NotifyAdapter, payload: bytes) -> None:
    sink = await opened(people)
    (outcome,) = await sink.deliver([with_payload(payload)])
    assert isinstance(outcome, Rejected)
    assert people.taken() == []
    await sink.close()
