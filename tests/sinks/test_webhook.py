"""The webhook sink against receivers that misbehave on cue, each on a real socket."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from agentqd.core.settings import Sink as SinkSettings
from agentqd.core.units import Duration
from agentqd.sinks import httpline, httppost
from agentqd.sinks.base import Context, Deferred, Delivered, Disabled, Outcome
from agentqd.sinks.httppost import ANSWER_BYTES_MAX
from agentqd.sinks.webhook import WebhookSink

from .conformance import SECRET, delivery, ids, open_descriptors, some
from .httpreceiver import (
    Behaviour,
    Exchange,
    Receiver,
    agrees_unread,
    closes_the_next,
    floods,
    good,
    hangs,
    never_reads,
    raw,
    resets,
    says,
    takes_and_resets,
    trickles,
)
from .webadapter import SECRET_LINE, keep_secret

OTHER_LINE = "whsec_" + "b3RoZXIgb3RoZXIgb3RoZXIgb3RoZXIgb3RoZXI="
TEN_OF_FIFTY = b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n0123456789"


def context(settings: SinkSettings, now_s: Callable[[], float] = time.time) -> Context:
    return Context("hook", settings, "/", None, lambda: int(now_s() * 1_000_000))  # type: ignore[arg-type]


@asynccontextmanager
async def sink_to(
    url: str, now_s: Callable[[], float] = time.time, **options: Any
) -> AsyncIterator[WebhookSink]:
    sink = WebhookSink(context(SinkSettings(type="webhook", url=url, **options), now_s))
    await sink.open(0)
    try:
        yield sink
    finally:
        await sink.close()


@pytest.fixture
async def web() -> AsyncIterator[Receiver]:
    async with Receiver() as receiver:
        yield receiver


async def one(sink: WebhookSink, number: int = 1) -> Outcome:
    (outcome,) = await sink.deliver([delivery(number)])
    return outcome


async def until(condition: Callable[[], Any], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.002)


# What is sent.


async def test_the_envelope_goes_out_as_stored_and_its_verifier_is_content(
    web: Receiver, tmp_path: Path
) -> None:
    async with sink_to(web.url, secret_file=keep_secret(tmp_path / "s"), headers={"X-Team": "a b"}) as sink:
        assert await one(sink) == Delivered()
    (request,) = web.seen
    assert request.line == "POST /hook HTTP/1.1"
    assert request.body == delivery(1).payload
    assert request.headers["host"] == f"127.0.0.1:{web.port}"
    assert request.headers["content-type"] == "application/cloudevents+json"
    assert request.headers["content-length"] == str(len(request.body))
    assert request.headers["webhook-id"] == delivery(1).delivery_id
    assert request.headers["x-team"] == "a b"
    assert request.headers["accept-encoding"] == "identity"
    assert "cookie" not in request.headers
    assert Webhook(SECRET_LINE).verify(request.body, request.headers)["id"] == delivery(1).delivery_id
    with pytest.raises(WebhookVerificationError):
        Webhook(OTHER_LINE).verify(request.body, request.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET_LINE).verify(request.body + b" ", request.headers)


async def test_a_long_envelope_goes_another_way_with_the_same_fields(web: Receiver, tmp_path: Path) -> None:
    """Up to 48 KiB straight over the connection, else by the library's session: the receiver cannot tell."""
    options = {"secret_file": keep_secret(tmp_path / "s"), "headers": {"X-Team": "a b", "User-Agent": "mine"}}
    entries = [delivery(n, padding=n) for n in (10, 47_000, 49_000, 200_000)]
    async with sink_to(web.url, **options) as sink:
        assert await sink.deliver(entries) == [Delivered()] * len(entries)
    fields = [
        {name: value for name, value in request.headers.items() if name not in {"content-length", "webhook-id", "webhook-signature", "webhook-timestamp"}}
        for request in web.seen
    ]  # fmt: skip
    assert fields == [fields[0]] * len(entries)
    assert {request.line for request in web.seen} == {"POST /hook HTTP/1.1"}
    for request, entry in zip(web.seen, entries, strict=True):
        assert request.body == entry.payload
        assert request.headers["content-length"] == str(len(entry.payload))
        Webhook(SECRET_LINE).verify(request.body, request.headers)


@pytest.mark.parametrize("value", ["a\r\nX: y", "a\nX: y", "a\rX: y", "a\0"])
def test_a_field_is_never_more_than_one_line(value: str) -> None:
    with pytest.raises(ValueError, match="line end"):
        httpline.lines({"X-Team": value, "Y": "z"})


async def test_without_a_secret_file_it_goes_unsigned(web: Receiver) -> None:
    async with sink_to(web.url) as sink:
        assert await one(sink) == Delivered()
    assert "webhook-signature" not in web.seen[0].headers
    assert web.seen[0].id == delivery(1).delivery_id


async def test_two_keys_sign_both_and_either_receiver_verifies(web: Receiver, tmp_path: Path) -> None:
    files = [keep_secret(tmp_path / "new", OTHER_LINE), keep_secret(tmp_path / "old")]
    for given in (files, keep_secret(tmp_path / "both", "# new", OTHER_LINE, "", SECRET_LINE)):
        async with sink_to(web.url, secret_file=given) as sink:
            await one(sink)
        request = web.seen[-1]
        assert len(request.headers["webhook-signature"].split(" ")) == 2
        for line in (SECRET_LINE, OTHER_LINE):
            Webhook(line).verify(request.body, request.headers)


async def test_an_exchanged_secret_counts_from_the_next_try(web: Receiver, tmp_path: Path) -> None:
    file = keep_secret(tmp_path / "s")
    web.plan = [says(500)]
    async with sink_to(web.url, secret_file=file) as sink:
        assert isinstance(await one(sink), Deferred)
        keep_secret(tmp_path / "s", OTHER_LINE)
        assert await one(sink) == Delivered()
    first, second = web.seen
    Webhook(SECRET_LINE).verify(first.body, first.headers)
    Webhook(OTHER_LINE).verify(second.body, second.headers)
    assert first.id == second.id
    assert first.body == second.body


async def test_each_try_has_its_own_timestamp_and_the_same_id(web: Receiver, tmp_path: Path) -> None:
    now = time.time()
    web.plan = [says(500), says(429)]
    async with sink_to(web.url, lambda: now, secret_file=keep_secret(tmp_path / "s")) as sink:
        for _ in range(3):
            await one(sink)
            now += 100
    assert [int(request.headers["webhook-timestamp"]) for request in web.seen] == [
        int(now) - 300 + n * 100 for n in range(3)
    ]
    assert len({request.id for request in web.seen}) == 1
    assert len({request.headers["webhook-signature"] for request in web.seen}) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"), (b"", "is empty"), (b"plain\n", "does not begin with whsec_"), (b"whsec_***\n", "not base64"), (b"whsec_\n", "empty after whsec_"),
        (SECRET_LINE.encode() + b"\nwhsk_privatekey\n", "secret 2 does not begin"), (b"\xff\xfe", "not UTF-8"), ((OTHER_LINE + "\n").encode() * 9, "at most 8"),
    ],
)  # fmt: skip
async def test_what_cannot_be_signed_is_never_sent_and_told_once(
    web: Receiver, tmp_path: Path, content: bytes | None, said: str
) -> None:
    file = tmp_path / "s"
    if content is not None:
        file.write_bytes(content)
        file.chmod(0o600)
    async with sink_to(web.url, secret_file=str(file)) as sink:
        for _ in range(3):
            outcome = await one(sink)
            assert isinstance(outcome, Deferred)
            assert not outcome.connection
            assert said in outcome.reason
            for secret in ("plain", "***", "privatekey", OTHER_LINE[6:]):
                assert secret not in outcome.reason + "".join(sink.notices)
        assert web.connections == 0
        assert len(sink.notices) == 1
        assert str(file) in sink.notices[0]
        keep_secret(file)
        assert await one(sink) == Delivered()
        file.unlink()
        await one(sink)
        assert len(sink.notices) == 2, "a new trouble is told anew"


# What counts as delivered.


@pytest.mark.parametrize(
    "behaviour",
    [
        says(200), says(201, body=b"made"), says(202), says(226), says(299), raw(b"HTTP/1.1 204 None\r\n\r\n"), good,
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "reset"), raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "reset"),
        raw(b"HTTP/1.1 204 \r\n\r\n", "reset"), raw(b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n"), raw(b"HTTP/1.0 200 OK\r\n\r\nall of it", "close"),
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nok\r\n0\r\nX: y\r\n\r\n", "reset"), raw(b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok", "close"),
        raw(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nbad"),
    ],
)  # fmt: skip
async def test_a_whole_2xx_is_delivered_whatever_the_connection_does_after_it(
    web: Receiver, behaviour: Behaviour
) -> None:
    web.does = behaviour
    async with sink_to(web.url) as sink:
        assert await one(sink) == Delivered()
        assert await one(sink, 2) == Delivered()


@pytest.mark.parametrize(
    ("behaviour", "said", "connection"),
    [
        (resets, "cut (Connection reset by peer) before an answer", True), (takes_and_resets, "before an answer", True), (raw(b"", "close"), "closed before an answer", True),
        (raw(b"HTTP/1.1 200 OK\r\n", "reset"), "before an answer was there", True), (raw(b"HTTP/1.1 200 OK\r\n", "close"), "before an answer was there", True),
        (raw(TEN_OF_FIFTY, "reset"), "HTTP 200, but its answer was cut off", False), (raw(TEN_OF_FIFTY, "close"), "HTTP 200, but its answer was cut off", False),
        (raw(b"HTTP/1.1 200 OK\r\n\r\nuntil the end", "reset"), "HTTP 200, but", False),
        (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", "close"), "HTTP 200, but", False),
        (raw(b"SSH-2.0-OpenSSH_9.2\r\n"), "no HTTP", False), (raw(b"HTTP/1.1 2000 OK\r\n\r\n"), "no HTTP", False),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok"), "no HTTP", False), (raw(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"), "no HTTP", False),
        (raw(b"HTTP/1.1 200 OK\r\n folded\r\n\r\n"), "no HTTP", False), (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "no HTTP", False),
        (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nok\r\n"), "no HTTP", False),
        (floods(b"HTTP/1.1 200 OK\r\n", b"X-Long: " + b"y" * 1000 + b"\r\n"), "no HTTP", False),
        (raw(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000 + b"\r\n"), "no HTTP", False),
    ],
)  # fmt: skip
async def test_what_is_no_whole_answer_is_later_and_says_what_came(
    web: Receiver, behaviour: Behaviour, said: str, connection: bool
) -> None:
    web.plan = [behaviour]
    async with sink_to(web.url) as sink:
        outcome = await one(sink)
        assert isinstance(outcome, Deferred)
        assert said in outcome.reason
        assert (outcome.connection, outcome.busy) == (connection, False)
        assert await one(sink) == Delivered(), "the same id, on a sound connection"
    assert len({request.id for request in web.seen}) == 1


@pytest.mark.parametrize(
    "status", [400, 401, 403, 404, 408, 413, 418, 422, 499, 500, 502, 504, 599, 999, 101]
)
async def test_any_other_status_is_later_and_named(web: Receiver, status: int) -> None:
    web.plan = [says(status, body=b"you said: " + SECRET.encode())]
    async with sink_to(web.url) as sink:
        outcome = await one(sink)
        assert isinstance(outcome, Deferred)
        assert outcome.reason.startswith(f"HTTP {status}")
        assert (outcome.connection, outcome.busy) == (False, False)
        assert SECRET not in outcome.reason
        assert await one(sink) == Delivered()


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
async def test_a_redirect_is_not_followed_not_even_to_itself(web: Receiver, status: int) -> None:
    web.plan = [says(status, f"Location: {web.url}?token=xyzzy")]
    async with sink_to(web.url) as sink:
        outcome = await one(sink)
    assert isinstance(outcome, Deferred)
    assert f"HTTP {status}" in outcome.reason
    assert "not followed" in outcome.reason
    assert "xyzzy" not in outcome.reason
    assert [request.line for request in web.seen] == ["POST /hook HTTP/1.1"]


async def test_410_disables_the_sink(web: Receiver) -> None:
    web.does = says(410)
    async with sink_to(web.url) as sink:
        outcome = await one(sink)
    assert isinstance(outcome, Disabled)
    assert "HTTP 410 Gone" in outcome.reason


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        (None, None), ("120", 120), ("-5", 0), ("99999999999999999999", 86400), ("soon", None), ("Wed, 21 Oct 2065 07:28:00 GMT", 86400),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0), ("\xff\xfe", None), ("9" * 8000, 86400),
    ],
)  # fmt: skip
async def test_a_receiver_that_is_busy_gets_the_time_it_asks_for(
    web: Receiver, status: int, asked: str | None, seconds: float | None
) -> None:
    web.does = says(status, *([] if asked is None else [f"Retry-After: {asked}"]))
    async with sink_to(web.url) as sink:
        outcome = await one(sink)
    assert isinstance(outcome, Deferred)
    assert (outcome.retry_after_s, outcome.busy, outcome.connection) == (seconds, True, False)


async def test_retry_after_may_be_a_date(web: Receiver) -> None:
    now = 1_700_000_000
    web.does = says(429, "Retry-After: Tue, 14 Nov 2023 22:15:20 GMT")
    async with sink_to(web.url, lambda: now) as sink:
        outcome = await one(sink)
    assert isinstance(outcome, Deferred)
    assert outcome.retry_after_s == 120


# Time and size.


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (hangs, "no answer within"), (never_reads, "no answer within"), (trickles(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", 0.04), "HTTP 200, and no end"),
        (trickles(b"HTTP/1.1 200 OK\r\nX: "), "no answer within"), (floods(b"", b"HTTP/1.1 102 Processing\r\n\r\n" * 100), "no answer within"), (trickles(b"HTTP/1.1 200 OK\r\n\r\n"), "HTTP 200, and no end"), (raw(b"HT", "hang"), "no answer within"),
        (raw(TEN_OF_FIFTY, "hang"), "HTTP 200, and no end"),
    ],
)  # fmt: skip
async def test_what_takes_longer_than_the_timeout_is_later_and_busy(
    web: Receiver, behaviour: Behaviour, said: str
) -> None:
    web.does = behaviour
    before = len(open_descriptors())
    async with sink_to(web.url, timeout=Duration(0.25)) as sink:
        began = time.monotonic()
        outcome = await one(sink)
        assert 0.2 < time.monotonic() - began < 15
        assert isinstance(outcome, Deferred)
        assert said in outcome.reason
        assert "0.25 s" in outcome.reason
        assert (outcome.connection, outcome.busy) == (True, True)
    web.drop_all()
    await until(lambda: len(open_descriptors()) <= before)


@pytest.mark.parametrize("behaviour", [hangs, never_reads, trickles(b"HTTP/1.1 200 OK\r\nX: ")])
async def test_a_long_envelope_keeps_the_time_too(web: Receiver, behaviour: Behaviour) -> None:
    """It is not written at one go, so that its time is kept in another way."""
    web.does = behaviour
    entry = delivery(1, padding=250_000)
    async with sink_to(web.url, timeout=Duration(0.25)) as sink:
        began = time.monotonic()
        (outcome,) = await sink.deliver([entry])
        assert 0.2 < time.monotonic() - began < 2
        assert isinstance(outcome, Deferred)
        assert "no answer within 0.25 s" in outcome.reason
        assert (outcome.connection, outcome.busy) == (True, True)
        web.does = good
        (outcome,) = await sink.deliver([entry])
        assert outcome == Delivered()
    assert web.seen[-1].body == entry.payload


async def test_a_no_that_trickles_is_heard_at_once(web: Receiver) -> None:
    web.does = trickles(b"HTTP/1.1 500 No\r\nContent-Length: 99999\r\n\r\n")
    async with sink_to(web.url, timeout=Duration(20)) as sink:
        began = time.monotonic()
        outcome = await one(sink)
        assert isinstance(outcome, Deferred)
        assert "HTTP 500" in outcome.reason
        assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    ("status", "head"),
    [(status, head) for status in (b"200 OK", b"500 No") for head in (b"Content-Length: 100000000", b"X: y", b"Transfer-Encoding: chunked")],
)  # fmt: skip
async def test_of_an_endless_answer_64_kib_are_taken(web: Receiver, status: bytes, head: bytes) -> None:
    sent = 0

    async def flood(x: Exchange) -> None:
        nonlocal sent
        piece = b"ffff\r\n" + b"x" * 0xFFFF + b"\r\n"
        x.take()
        await x.say(b"HTTP/1.1 " + status + b"\r\n" + head + b"\r\n\r\n")
        while True:
            await x.say(piece)
            sent += len(piece)

    web.does = flood
    async with sink_to(web.url) as sink:
        outcome = await one(sink)
        assert isinstance(outcome, Delivered if status == b"200 OK" else Deferred)
        await until(lambda: not web._writers, 5)
    assert sent < 100 * ANSWER_BYTES_MAX, "what the sockets hold, and no more"


async def test_a_413_with_the_body_unread_is_heard(web: Receiver, tmp_path: Path) -> None:
    from .httpreceiver import refuses_unread
    from .test_webhook_large import large

    web.does = refuses_unread
    async with sink_to(web.url) as sink:
        (outcome,) = await sink.deliver([large(tmp_path, os.urandom(20_000_000))])
    assert isinstance(outcome, Deferred)
    assert "HTTP 413" in outcome.reason


async def test_a_yes_to_half_a_body_is_no_yes(web: Receiver, tmp_path: Path) -> None:
    from .test_webhook_large import large

    web.does = agrees_unread
    async with sink_to(web.url) as sink:
        (outcome,) = await sink.deliver([large(tmp_path, os.urandom(20_000_000))])
    assert isinstance(outcome, Deferred)


# Connections.


async def test_connections_are_kept_and_as_many_as_needed(web: Receiver) -> None:
    async with sink_to(web.url) as sink:
        for number in range(1, 6):
            assert await one(sink, number) == Delivered()
        assert web.connections == 1
        await asyncio.gather(*(one(sink, number) for number in range(6, 16)))
        assert 1 < web.connections <= 10
        await asyncio.gather(*(one(sink, number) for number in range(16, 26)))
        assert web.connections <= 10
    await until(lambda: not web._writers)


@pytest.mark.parametrize("padding", [0, 60_000])
async def test_a_whole_no_keeps_the_connection(web: Receiver, padding: int) -> None:
    web.does = says(503)
    async with sink_to(web.url) as sink:
        for number in range(1, 6):
            (outcome,) = await sink.deliver([delivery(number, padding=padding)])
            assert isinstance(outcome, Deferred)
    assert web.connections == 1


@pytest.mark.parametrize("close", ["Connection: close", "Connection: foo, Close"])
async def test_a_receiver_that_closes_gets_a_new_connection(web: Receiver, close: str) -> None:
    web.does = says(200, close)
    async with sink_to(web.url) as sink:
        for number in range(1, 4):
            assert await one(sink, number) == Delivered()
    assert web.connections == 3


async def test_a_kept_connection_that_was_closed_under_us_is_no_failure(web: Receiver) -> None:
    async with sink_to(web.url) as sink:
        web.does = closes_the_next()
        assert await one(sink) == Delivered()
        web.does = good
        assert await one(sink, 2) == Delivered(), "sent again at once, on a new connection"
    assert web.connections == 2
    assert web.taken == ids(some(2))


async def test_a_new_connection_that_is_closed_without_a_word_is_a_failure_and_not_tried_on(
    web: Receiver,
) -> None:
    async with sink_to(web.url) as sink:
        web.does = resets
        assert isinstance(await one(sink), Deferred)
        assert web.connections == 1
        web.does = good
        await asyncio.gather(*(one(sink, number) for number in range(1, 9)))
        kept = web.connections
        web.does = resets
        assert isinstance(await one(sink), Deferred)
        assert web.connections <= kept + 1
        tries = [request for request in web.seen[9:] if request.id == delivery(1).delivery_id]
        assert 2 <= len(tries) <= 3, "kept ones that are closed are no failure, but not for ever"


async def test_what_comes_unasked_over_a_kept_connection_is_never_an_answer(web: Receiver) -> None:
    web.plan = [
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    ]
    async with sink_to(web.url) as sink:
        assert await one(sink) == Delivered()
        web.does = says(500)
        outcome = await one(sink, 2)
        assert isinstance(outcome, Deferred)
        assert web.connections == 2

        async def late(x: Exchange) -> None:
            await good(x)
            await asyncio.sleep(0.02)
            await good(x)

        web.does = late
        assert await one(sink, 3) == Delivered()
        await until(lambda: len(web.taken) >= 3)
        await asyncio.sleep(0.05)
        web.does = says(500)
        assert isinstance(await one(sink, 4), Deferred)


async def test_idle_connections_are_given_up(web: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpline, "KEEP_S", 0.1)
    async with sink_to(web.url) as sink:
        await asyncio.gather(*(one(sink, number) for number in range(1, 6)))
        assert web.connections >= 1
        await until(lambda: not web._writers, 3)
        assert await one(sink) == Delivered()


async def test_a_half_closed_connection_is_not_used_again(web: Receiver) -> None:
    async def half(x: Exchange) -> None:
        await good(x)
        x.writer.write_eof()
        await x.until_gone()

    web.plan = [half]
    async with sink_to(web.url) as sink:
        assert await one(sink) == Delivered()
        assert await one(sink, 2) == Delivered()
        await until(lambda: web.connections == 2)


async def test_a_port_where_nobody_listens_is_a_connection_failure(web: Receiver) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        async with sink_to(f"http://127.0.0.1:{port}/x?token=xyzzy") as sink:
            outcome = await one(sink)
    assert isinstance(outcome, Deferred)
    assert (outcome.connection, outcome.busy) == (True, False)
    assert outcome.reason == f"127.0.0.1:{port}: Connection refused"


async def test_a_name_that_nobody_knows_is_a_connection_failure() -> None:
    async with sink_to("http://no-such-host.invalid/x") as sink:
        outcome = await one(sink)
    assert isinstance(outcome, Deferred)
    assert outcome.connection
    assert outcome.reason.startswith("no-such-host.invalid:80: its name is not known: ")


async def test_a_name_server_that_hangs_holds_one_thread_however_many_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import threading

    asked, answer = [], threading.Event()
    real = socket.getaddrinfo

    def slow(host: str, *rest: Any, flags: int = 0, **more: Any) -> Any:
        if host == "slow.invalid":
            asked.append(host)
            answer.wait(20)
            raise socket.gaierror(-3, "Temporary failure")
        return real(host, *rest, flags=flags, **more)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(httppost, "CONNECT_S", 0.1)
    async with sink_to("http://slow.invalid/x") as sink:
        outcomes = await asyncio.gather(*(one(sink, number) for number in range(5)))
        assert {outcome.reason for outcome in outcomes} == {"slow.invalid:80: no connection within 0.1 s"}  # type: ignore[union-attr]
        assert all(outcome.connection for outcome in outcomes)  # type: ignore[union-attr]
        assert asked == ["slow.invalid"]
        answer.set()


async def test_an_address_that_refuses_is_followed_by_the_next(
    web: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def both(host: str, *rest: Any, flags: int = 0, **more: Any) -> Any:
        if host == "two.invalid":
            return [*real("::1", *rest, **more), *real("127.0.0.1", *rest, **more)]
        return real(host, *rest, flags=flags, **more)

    monkeypatch.setattr(socket, "getaddrinfo", both)
    async with sink_to(f"http://two.invalid:{web.port}/hook") as sink:
        assert await one(sink) == Delivered()
    assert web.seen[0].headers["host"] == f"two.invalid:{web.port}"


async def test_proxies_of_the_environment_are_not_used(
    web: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with sink_to(web.url) as sink:
        assert await one(sink) == Delivered()


def test_a_url_that_cannot_be_used_is_a_config_error_that_does_not_show_it() -> None:
    from agentqd.core.errors import ConfigError

    with pytest.raises(ConfigError, match="hook is of type webhook and its url has a user") as caught:
        WebhookSink(context(SinkSettings(type="webhook", url="https://me:xyzzy@host/x")))
    assert "xyzzy" not in str(caught.value)


def test_the_payloads_data_is_what_the_verifier_sees() -> None:
    assert json.loads(delivery(1).payload)["data"]["content"] == SECRET
