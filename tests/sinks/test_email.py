"""The email sink against a real SMTP server that misbehaves on cue."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from contextlib import closing
from typing import Any

import msgspec
import pytest

from agentqd.core.config_rules import check_settings
from agentqd.core.errors import ConfigError
from agentqd.core.limits import PROGRESS_BYTES_MAX, SINK_ERROR_CHARS_MAX
from agentqd.core.settings import Settings
from agentqd.core.settings import Sink as SinkSettings
from agentqd.core.units import Duration
from agentqd.sinks.base import Deferred, Delivered, Delivery, Outcome, Rejected

from .conformance import delivery
from .smtpadapter import PASSWORD, USER, EmailAdapter, a_mail

pytestmark = pytest.mark.slow


ABC = ["a@example.org", "b@example.org", "c@example.org"]
PHASES = ["greeting", "EHLO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA", "dot"]


@pytest.fixture(autouse=True)
def _allow(post: EmailAdapter) -> None:
    post.more = {"allow_to": ["*@example.org"]}


def three(**fields: Any) -> Delivery:
    return a_mail({"to": ABC, "subject": "s", "body": "text"}, **fields)


async def send(post: EmailAdapter, item: Delivery) -> Outcome:
    sink = post.make()
    (outcome,) = await sink.deliver([item])
    await sink.close()
    return outcome


def again(item: Delivery, outcome: Outcome, attempts: int = 1) -> Delivery:
    assert isinstance(outcome, Deferred | Rejected)
    return msgspec.structs.replace(item, attempts=attempts, progress=outcome.progress)


# Each recipient.


async def test_after_451_for_one_of_three_only_that_one_is_tried_again(post: EmailAdapter) -> None:
    post.plan(rcpt={"c@example.org": "451 4.7.1 greylisted"})
    first = await send(post, three())
    assert isinstance(first, Deferred)
    assert not first.connection
    assert "c@example.org (451 4.7.1 greylisted)" in first.reason
    assert "2 of 3 have it" in first.reason
    second = await send(post, again(three(), first))
    assert isinstance(second, Deferred)
    post.plan()
    assert isinstance(await send(post, again(three(), second, 2)), Delivered)
    assert [facts["to"] for facts in post.server.facts()] == [ABC[:2], ABC[2:]]
    one, other = post.server.raw()
    assert one == other, "the same mail, its Message-ID and bytes"


async def test_after_550_for_one_the_others_have_it_and_that_one_is_told(post: EmailAdapter) -> None:
    post.plan(rcpt={"b@example.org": "550 5.1.1 nobody here"})
    outcome = await send(post, three())
    assert isinstance(outcome, Rejected)
    assert outcome.reason == "refused for 1 of 3: b@example.org (550 5.1.1 nobody here); 2 have it"
    post.plan()
    assert isinstance(await send(post, again(three(), outcome, 0)), Delivered), "a person has it sent again"
    assert [facts["to"] for facts in post.server.facts()] == [["a@example.org", "c@example.org"], ["b@example.org"]]  # fmt: skip


async def test_one_refused_and_one_put_off_the_refused_one_is_not_asked_again(post: EmailAdapter) -> None:
    post.plan(rcpt={"b@example.org": "550 no", "c@example.org": "452 full"})
    first = await send(post, three())
    assert isinstance(first, Deferred)
    post.plan(rcpt={"b@example.org": "250 now it would"})
    second = await send(post, again(three(), first))
    assert isinstance(second, Rejected)
    assert second.reason.startswith("refused for 1 of 3: b@example.org")
    assert [facts["to"] for facts in post.server.facts()] == [["a@example.org"], ["c@example.org"]]


async def test_what_is_kept_between_tries_is_bounded(post: EmailAdapter) -> None:
    everybody = [f"{'u' * 50}{n}@{'long.' * 30}example.org" for n in range(100)]
    post.more["allow_to"] = ["*"]
    post.plan(
        rcpt=dict.fromkeys(everybody[:99], "550 " + "very long words " * 20) | {everybody[99]: "451 no"}
    )
    outcome = await send(post, a_mail({"to": everybody, "body": "x"}))
    assert isinstance(outcome, Deferred)
    assert outcome.progress is not None
    assert len(outcome.progress) <= PROGRESS_BYTES_MAX
    assert len(outcome.reason) <= SINK_ERROR_CHARS_MAX


async def test_a_memory_of_another_version_is_no_harm(post: EmailAdapter) -> None:
    assert isinstance(await send(post, three(progress=b"\xffnot json", attempts=3)), Delivered)


@pytest.mark.parametrize(
    ("at", "reply", "outcome"),
    [
        ("MAIL", "451 4.3.0 later", Deferred),
        ("MAIL", "550 5.7.1 not from you", Rejected),
        ("RCPT", "450 4.2.0 greylisted", Deferred),
        ("RCPT", "552 too many recipients", Deferred),
        ("RCPT", "552 5.2.2 mailbox full", Rejected),
        ("RCPT", "553 5.1.3 bad", Rejected),
        ("DATA", "451 4.3.0 later", Deferred),
        ("DATA", "554 5.5.1 no", Rejected),
        ("dot", "452 4.3.1 disk full", Deferred),
        ("dot", "554 5.7.1 spam", Rejected),
        ("dot", "299 what", Deferred),
        *[(phase, "421 4.3.2 going down", Deferred) for phase in PHASES if phase != "AUTH"],
        ("greeting", "554 no service", Deferred),
        ("EHLO", "502 what?", Deferred),
        ("STARTTLS", "454 4.7.0 no TLS today", Deferred),
        ("AUTH", "454 4.7.0 later", Deferred),
    ],
)
async def test_a_4yz_is_later_and_a_5yz_on_the_mail_is_for_good(
    post: EmailAdapter, at: str, reply: str, outcome: type[Outcome]
) -> None:
    post.plan(at=at, do=reply)
    said = await send(post, three())
    assert type(said) is outcome, said
    assert isinstance(said, Deferred | Rejected)
    assert reply.split(maxsplit=1)[0] in said.reason
    if reply.startswith("421"):
        assert isinstance(said, Deferred)
        assert (said.connection, said.busy) == (False, True), "it was reached, and says later"


# Each phase.


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("do", ["hang", "drop", "endless", "garbage"])
async def test_a_server_that_misbehaves_at_any_point_is_left_in_time(
    post: EmailAdapter, phase: str, do: str
) -> None:
    post.more["timeout"] = Duration(0.4)
    post.plan(at=phase, do=do)
    began = time.monotonic()
    said = await send(post, three())
    assert isinstance(said, Deferred), said
    assert said.reason.isprintable()
    assert time.monotonic() - began < 15
    if do == "hang":
        assert (said.connection, said.busy) == (True, True)
    elif do == "drop":
        assert said.connection == (PHASES.index(phase) < PHASES.index("MAIL"))
    assert post.received() == []
    post.plan()
    post.more["timeout"] = Duration(20)
    assert isinstance(await send(post, again(three(), said)), Delivered)


async def test_a_hanging_farewell_changes_nothing(
    post: EmailAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentqd.sinks.smtp._QUIT_S", 0.1)
    for do in ("hang", "drop", "garbage", "500 stay"):
        post.plan(at="QUIT", do=do)
        assert isinstance(await send(post, three()), Delivered), do


async def test_nobody_there_is_a_connection_failure(post: EmailAdapter) -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        post.more["port"] = free.getsockname()[1]
        said = await send(post, three())
    assert isinstance(said, Deferred)
    assert said.connection


async def test_a_lost_answer_comes_again_under_the_same_message_id(post: EmailAdapter) -> None:
    post.plan(at="dot", do="drop", take=True, once=True)
    said = await send(post, three())
    assert isinstance(said, Deferred)
    assert "may have arrived" in said.reason
    assert isinstance(await send(post, again(three(), said)), Delivered)
    assert [mail["Message-ID"] for mail in post.server.mails()] == ["<dm@box>"] * 2
    assert len(set(post.server.raw())) == 1


# TLS and login.


async def test_the_mail_goes_over_tls_with_the_login(post: EmailAdapter) -> None:
    assert isinstance(await send(post, three()), Delivered)
    post.more |= {"tls": "tls", "port": post.server.tls_port}
    assert isinstance(await send(post, three()), Delivered)
    assert [(facts["tls"], facts["user"], facts["from"]) for facts in post.server.facts()] == [(True, USER, "agent@example.org")] * 2  # fmt: skip


async def test_without_starttls_nothing_is_sent_and_it_is_told_once(post: EmailAdapter) -> None:
    post.plan(starttls=False, plain=True)
    sink = post.make()
    for _ in range(3):
        (said,) = await sink.deliver([three()])
        assert isinstance(said, Deferred)
        assert said.connection
        assert "STARTTLS" in said.reason
    assert len(sink.notices) == 1  # type: ignore[attr-defined]
    assert post.received() == []


async def test_a_wrong_certificate_is_not_trusted_and_told(post: EmailAdapter) -> None:
    post.plan(cert="wrong")
    sink = post.make()
    (said,) = await sink.deliver([three()])
    assert isinstance(said, Deferred)
    assert "certificate" in said.reason.lower()
    assert len(sink.notices) == 1  # type: ignore[attr-defined]
    post.plan()
    post.more["host"] = "ip6-localhost.invalid"
    assert isinstance(await send(post, three()), Deferred)
    assert post.received() == []


async def test_a_certificate_of_another_name_is_not_trusted(post: EmailAdapter) -> None:
    post.more["host"] = "127.0.0.2"
    said = await send(post, three())
    assert isinstance(said, Deferred)
    assert post.received() == []


async def test_a_refused_login_is_told_once_and_again_after_it_had_worked(post: EmailAdapter) -> None:
    sink = post.make()
    for plan, notices in ({"auth": "x:y"}, 1), ({"auth": "x:y"}, 1), ({}, 1), ({"auth": "x:y"}, 2):
        post.plan(**plan)
        (said,) = await sink.deliver([three()])
        assert isinstance(said, Deferred if plan else Delivered)
        if isinstance(said, Deferred):
            assert said.connection, (
                "others would fail likewise: the breaker keeps the account from being locked"
            )
            assert PASSWORD not in said.reason
        assert len(sink.notices) == notices  # type: ignore[attr-defined]
    assert PASSWORD not in str(sink.notices)  # type: ignore[attr-defined]


async def test_a_server_that_wants_a_login_which_is_not_configured_is_told(post: EmailAdapter) -> None:
    post.more |= {"username": None, "password_file": None}
    sink = post.make()
    (said,) = await sink.deliver([three()])
    assert isinstance(said, Deferred)
    assert "530" in said.reason
    assert len(sink.notices) == 1  # type: ignore[attr-defined]


async def test_the_password_is_read_anew_and_a_bad_file_is_told(post: EmailAdapter) -> None:
    (post.base / "password").write_text("old\n")
    sink = post.make()
    (said,) = await sink.deliver([three()])
    assert isinstance(said, Deferred)
    (post.base / "password").write_text("")
    (said,) = await sink.deliver([three()])
    assert isinstance(said, Deferred)
    assert "is empty" in said.reason
    assert len(sink.notices) == 2  # type: ignore[attr-defined]
    (post.base / "password").write_text(PASSWORD)
    (said,) = await sink.deliver([three()])
    assert isinstance(said, Delivered)


async def test_words_in_plain_after_starttls_are_not_heard(post: EmailAdapter) -> None:
    """CVE-2011-0411: what a man in the middle says before TLS must not count after it."""
    post.plan(inject=True)
    said = await send(post, three())
    assert isinstance(said, Delivered | Deferred)
    assert all(facts["tls"] for facts in post.server.facts())
    if isinstance(said, Delivered):
        assert post.server.facts()[0]["user"] == USER


async def test_without_tls_a_password_goes_to_this_machine_only(post: EmailAdapter) -> None:
    post.plan(plain=True)
    post.more |= {"tls": "none"}
    assert isinstance(await send(post, three()), Delivered)
    post.more["host"] = "mail.example.org"
    assert [problem.key for problem in check_settings(Settings(sinks={"m": post.settings()}))] == [("sinks", "m", "tls")]  # fmt: skip
    said = await send(post, three())
    assert isinstance(said, Deferred)
    assert "without TLS" in said.reason


# Sizes, and what can never be sent.


async def test_a_mail_larger_than_the_server_takes_is_dead_with_both_sizes(post: EmailAdapter) -> None:
    post.plan(size=2000)
    said = await send(post, a_mail({"to": ABC, "body": "x" * 3000}))
    assert isinstance(said, Rejected)
    assert "the server takes 2000" in said.reason
    assert isinstance(await send(post, a_mail({"to": ABC, "body": "x"})), Delivered)


async def test_large_mails_arrive_whole_one_at_a_time(post: EmailAdapter) -> None:
    sink = post.make()
    body = "".join(f".{n} line\n" for n in range(300_000))
    items = [a_mail({"to": ABC, "body": body, "format": "text"}, name=f"m{n}") for n in range(3)]
    outcomes = await asyncio.gather(*[sink.deliver([item]) for item in items])
    assert all(isinstance(outcome, Delivered) for (outcome,) in outcomes)
    for mail in post.server.mails():
        (file,) = mail.iter_attachments()
        assert file.get_content().replace("\r\n", "\n") == body


async def test_lines_that_begin_with_a_dot_arrive_as_they_are(post: EmailAdapter) -> None:
    body = ".\n..\n.x\nFrom y\n\n.\n" + "long " * 30 + "\n."
    assert isinstance(await send(post, a_mail({"to": ABC, "body": body, "format": "text"})), Delivered)
    (mail,) = post.server.mails()
    assert mail.get_content().replace("\r\n", "\n") == body + "\n"


async def test_a_large_mail_does_not_wait_for_ever_behind_another(
    post: EmailAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentqd.sinks.email.LARGE_WAIT_S", 0.1)
    post.plan(at="dot", do="hang")
    sink = post.make()
    large = a_mail({"to": ABC, "body": "x" * 2_000_000})
    first = asyncio.ensure_future(sink.deliver([large]))
    async with asyncio.timeout(20):
        while not (post.base / "asked").exists():
            await asyncio.sleep(0.01)
    (said,) = await sink.deliver([large])
    assert isinstance(said, Deferred)
    assert not said.connection
    post.plan()
    (small,) = await sink.deliver([three()])
    assert isinstance(small, Delivered), "a small one goes past it"
    first.cancel()
    await asyncio.wait([first])
    (again,) = await sink.deliver([large])
    assert isinstance(again, Delivered)


async def test_what_is_not_allowed_is_never_tried(post: EmailAdapter) -> None:
    said = await send(post, a_mail({"to": ["a@example.org", "eve@evil.example"], "body": "x"}))
    assert isinstance(said, Rejected)
    assert said.reason.startswith("not_allowed: eve@evil.example")
    assert post.received() == []


async def test_a_disk_that_fails_is_later(post: EmailAdapter) -> None:
    record = {"path": "/proc/self/mem/x", "name": "b", "bytes": 3, "sha256": "x"}
    said = await send(
        post, a_mail({"to": ABC, "body": "x", "attachments": ["b"]}, data={"attachments": [record]})
    )
    assert isinstance(said, Deferred)


# The config.


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"from_": None}, ()),
        ({"host": None}, ()),
        ({"host": "a b"}, ("host",)),
        ({"port": 0}, ("port",)),
        ({"from_": "no address"}, ("from",)),
        ({"from_": "A\nB <a@b.c>"}, ("from",)),
        ({"to": "A <a@b.c>"}, ("to",)),
        ({"to": ["a@b.c", "x"]}, ("to",)),
        ({"allow_to": ["*@*"]}, ("allow_to",)),
        ({"password_file": None}, ("username",)),
        ({"username": None}, ("password_file",)),
        ({"username": ""}, ("username",)),
        ({"password_file": "relative"}, ("password_file",)),
        ({"path": "/x"}, ("path",)),
        ({"concurrency": 0}, ("concurrency",)),
    ],
)
def test_a_broken_rule_names_its_option(
    post: EmailAdapter, fields: dict[str, Any], key: tuple[str, ...]
) -> None:
    post.more = fields
    settings = Settings(sinks={"m": post.settings()})
    assert [problem.key for problem in check_settings(settings)] == [("sinks", "m", *key)]


def test_a_whole_example_breaks_no_rule_and_a_wrong_one_makes_no_sink(post: EmailAdapter) -> None:
    post.more = {"allow_to": ["*@example.org", "*@*.example.org", "*", "x@y"], "to": ["a@b.c"], "tls": "tls"}
    assert check_settings(Settings(sinks={"m": post.settings()})) == []
    for wrong in (SinkSettings(type="email", host="h"), SinkSettings(type="email", host="h", from_="x")):
        post.settings = lambda wrong=wrong: wrong  # type: ignore[method-assign, misc]
        with pytest.raises(ConfigError):
            post.make()


async def test_the_library_is_loaded_with_the_first_mail(post: EmailAdapter) -> None:
    code = "import sys; from agentqd.sinks import email; assert 'aiosmtplib' not in sys.modules"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 0
    assert isinstance(await send(post, delivery(1, kind="result")), Delivered)
