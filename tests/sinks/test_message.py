"""From an entry to a mail: who gets it, what it says, what it brings along. No network."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from smtpserver import parsed

from agentqd.core.envelope import seal
from agentqd.core.mailaddress import address, allowed, message_id, pattern
from agentqd.core.settings import Sink as SinkSettings
from agentqd.sinks import letter, message
from agentqd.sinks.base import Delivery
from agentqd.sinks.letter import Rules, compose, rules_of
from agentqd.sinks.message import Unsendable, build
from agentqd.sinks.plaintext import plain

from .conformance import NOW_US, delivery
from .smtpadapter import a_mail

RULES = Rules(("The Bóx", "agent@example.org"), ("me@example.org",), ("*@example.org",))


def sent(item: Delivery, rules: Rules = RULES) -> Any:
    return parsed(build(compose(item, rules)))


def text_of(part: Any) -> str:
    return str(part.get_content()).replace("\r\n", "\n")


def refused(content: Any, rules: Rules = RULES) -> str:
    with pytest.raises(Unsendable) as caught:
        build(compose(a_mail(content), rules))
    return str(caught.value)


# Addresses.


@pytest.mark.parametrize("text", ["a@b", "first.last+tag@Sub.Example.ORG", "o'brien@example.org", "x@xn--bcher-kva.example"])  # fmt: skip
def test_a_plain_address_is_taken_with_its_domain_in_lower_case(text: str) -> None:
    assert address(text) == text.rpartition("@")[0] + "@" + text.rpartition("@")[2].lower()


@pytest.mark.parametrize(
    "text",
    [
        "", "a", "@b", "a@", "a@b@c", "a b@c.d", "a@b c.d", "<a@b.c>", "A <a@b.c>", "a@b.c, d@e.f", "a@b.c;d@e.f", '"a"@b.c', "a@[127.0.0.1]",
        "a@b.c\r\nBcc: x@y.z", "a@b.c\n", "\ra@b.c", "a@b.c\0", "a(c)@b.c", "group: a@b.c;", ".a@b.c", "a.@b.c", "a..b@c.d", "a@b..c", "a@-b.c",
        "a@b.c.", "\u0430@b.c", "a@b\u00fc.c", "a\uff20b.c", "a@b\u3002c", "a@b.c\u200b", "a" * 65 + "@b.c", "a@" + "b." * 130 + "c", "a%\\@b.c",
        "<script>@b.c", "a@b.c>", "=?utf-8?q?a?=@b.c\t", "a@b,c", "a%evil.example@b.c", "evil!a@b.c", "*@b.c",
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"address|ASCII|longer"):
        address(text)


@given(st.text(max_size=60))
def test_whatever_is_taken_for_an_address_stands_in_one_header_as_it_is(text: str) -> None:
    try:
        found = address(text)
    except ValueError:
        return
    assert found.isascii()
    assert found.count("@") == 1
    assert not set(found) & set(' \r\n\t<>",;:()[]\\\0')


def test_patterns_allow_what_they_say_and_nothing_beside_it() -> None:
    def check(text: str, *patterns: str) -> bool:
        return allowed(address(text), [pattern(each) for each in patterns])

    assert check("a@Example.org", "*@example.ORG")
    assert check("a@sub.example.org", "*@*.example.org")
    assert check("a@x.org", "A@x.org", "a@X.org")
    assert check("any@where", "*")
    assert not check("A@x.org", "a@x.org"), "who is who at x.org, x.org alone knows"
    for other in ("a@sub.example.org", "a@evilexample.org", "a@example.org.evil", "a@example.or"):
        assert not check(other, "*@example.org"), other
    assert not check("a@example.org", "*@*.example.org")
    for wrong in ("", "*@", "@x.org", "a*@x.org", "*@*", "*@*x.org", "a@x.*", "*@x.org, b@c.d", "x"):
        with pytest.raises(ValueError, match="neither an address"):
            pattern(wrong)


# Headers.


def test_a_mail_has_its_headers_and_the_same_bytes_every_time(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"%PDF")
    record = {"path": str(tmp_path / "blob"), "name": "réport.pdf", "bytes": 4, "sha256": hashlib.sha256(b"%PDF").hexdigest()}  # fmt: skip
    content = {
        "to": ["a@example.org", "b@example.org"], "cc": "c@example.org", "bcc": ["d@example.org"], "reply_to": "r@example.org",
        "subject": "Grüße", "body": "hällo", "in_reply_to": "<1@x>", "references": ["0@x"], "attachments": ["../work/réport.pdf"],
    }  # fmt: skip
    item = a_mail(content, data={"attachments": [record]})
    mail = compose(item, RULES)
    assert mail.recipients == ("a@example.org", "b@example.org", "c@example.org", "d@example.org")
    first = build(mail)
    time.sleep(0.01)
    assert build(compose(item, RULES)) == first
    found = parsed(first)
    assert found["From"] == "The Bóx <agent@example.org>"
    assert found["To"] == "a@example.org, b@example.org"
    assert found["Cc"] == "c@example.org"
    assert b"d@example.org" not in first, "bcc is in the envelope only"
    assert found["Reply-To"] == "r@example.org"
    assert found["Subject"] == "Grüße"
    assert found["Message-ID"] == "<dm@box>"
    assert (found["In-Reply-To"], found["References"]) == ("<1@x>", "<0@x> <1@x>")
    assert found["Auto-Submitted"] == "auto-generated"
    assert found["Date"].datetime.timestamp() == NOW_US // 1_000_000
    assert text_of(found.get_body()) == "hällo\n"
    (file,) = found.iter_attachments()
    assert (file.get_filename(), file.get_content_type(), file.get_content()) == ("réport.pdf", "application/pdf", b"%PDF")  # fmt: skip


def test_every_line_of_a_mail_fits_and_is_ascii() -> None:
    content = {"to": "a@example.org", "subject": "ü" * 5000, "body": "x" * 5000 + "\n" + "é\r\n.\nFrom \r x", "references": [f"<{'r' * 90}{n}@x>" for n in range(80)]}  # fmt: skip
    raw = build(compose(a_mail(content), RULES))
    assert raw.isascii()
    assert all(len(line) <= 998 and b"\r" not in line and b"\n" not in line for line in raw.split(b"\r\n"))
    found = parsed(raw)
    assert len(found["Subject"]) <= message.SUBJECT_CHARS_MAX
    kept = [word for word in found["References"].replace("\r\n", " ").split() if word]
    assert len(kept) == letter.REFERENCES_MAX
    assert (kept[0], kept[-1]) == (f"<{'r' * 90}0@x>", f"<{'r' * 90}79@x>"), "the first and the newest stay"


@given(
    subject=st.text(max_size=200),
    body=st.text(max_size=500),
    name=st.text(max_size=80),
    parent=st.text(max_size=40),
)
def test_no_text_of_a_worker_makes_a_header_or_a_recipient(
    subject: str, body: str, name: str, parent: str
) -> None:
    content = {"to": "a@example.org", "subject": subject, "body": body, "in_reply_to": parent}
    try:
        mail = compose(a_mail(json.loads(json.dumps(content)), data={"name": name}), RULES)
    except (Unsendable, UnicodeEncodeError):
        return
    found = parsed(build(mail))
    allowed_headers = {"date", "from", "to", "message-id", "in-reply-to", "references", "subject", "auto-submitted", "x-agentq-delivery-id", "x-agentq-type", "content-type", "content-transfer-encoding", "mime-version"}  # fmt: skip
    assert {key.lower() for key in found} <= allowed_headers
    assert mail.recipients == ("a@example.org",)


@pytest.mark.parametrize(
    "text", ["<a@b>", "a.1-x@mail.example.org", "<CA+x=y_z/1@mail.gmail.com>", "<x@[1.2.3.4]>"]
)
def test_a_message_id_is_taken_with_or_without_its_brackets(text: str) -> None:
    assert message_id(text) == (text if text.startswith("<") else f"<{text}>")


@pytest.mark.parametrize("text", ["", "<>", "<a>", "a b@c", "<a@b> <c@d>", "<a@b>\r\nBcc: x@y", "<a@b\n>", "<é@b>", "<a@@b>", "<" + "x" * 300 + "@y>"])  # fmt: skip
def test_what_is_no_message_id_is_not_put_into_a_header(text: str) -> None:
    with pytest.raises(ValueError, match="Message-ID"):
        message_id(text)


# Who gets it.


def test_a_mail_without_to_goes_to_the_sinks_own_and_without_both_nobody_gets_it() -> None:
    assert compose(a_mail({"body": "x"}), RULES).to == ("me@example.org",)
    nobody = Rules(RULES.sender, (), RULES.allow)
    assert refused({"body": "x"}, nobody).startswith("nobody to send it to")
    with pytest.raises(Unsendable, match="nobody"):
        compose(delivery(1, kind="result"), nobody)


@pytest.mark.parametrize("field", ["to", "cc", "bcc", "reply_to"])
def test_an_address_that_is_not_allowed_stops_the_whole_mail(field: str) -> None:
    assert refused({"to": "a@example.org", "body": "x"} | {field: ["b@example.org", "eve@evil.example"]}).startswith("not_allowed: eve@evil.example")  # fmt: skip


def test_without_allow_to_only_the_sinks_own_recipients_are_allowed() -> None:
    settings = SinkSettings(type="email", host="h", from_="x@y", to=["me@Example.org", "you@example.org"])
    rules = rules_of(settings)
    assert compose(a_mail({"to": "you@example.org", "body": "x"}), rules).to == ("you@example.org",)
    assert refused({"to": "other@example.org", "body": "x"}, rules).startswith("not_allowed")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"to": 7, "body": "x"}, "to is neither"),
        ({"to": [], "body": "x"}, "to names nobody"),
        ({"to": None, "cc": [], "bcc": [], "body": "x"}, "cc names nobody"),
        ({"to": ["a@example.org", 7], "body": "x"}, "to is neither"),
        ({"to": "a@example.org\r\nBcc: e@evil.example", "body": "x"}, "no mail address"),
        ({"to": "Ann <a@example.org>", "body": "x"}, "no mail address"),
        ({"to": "a@example.org", "body": 7}, "body is no text"),
        ({"to": "a@example.org"}, "neither a body"),
        ({"to": "a@example.org", "body": "x", "subject": ["x"]}, "subject is no text"),
        ({"to": "a@example.org", "body": "x", "format": "html"}, "format is"),
        ({"to": "a@example.org", "body": "x", "in_reply_to": "no id"}, "in_reply_to or references"),
        ({"to": "a@example.org", "body": "x", "references": [1]}, "references is neither"),
        ({"to": "a@example.org", "body": "x", "In-Reply-To": "<a@b>"}, "did you mean in_reply_to"),
        ({"to": "a@example.org", "body": "x", "refrences": "<a@b>"}, "did you mean references"),
        ({"to": "a@example.org", "body": "x", "attachments": ["x"]}, "not taken when it was handed over"),
        ({"to": [f"u{n}@example.org" for n in range(101)], "body": "x"}, "more than 100"),
    ],
)
def test_a_mail_that_says_what_no_mail_can_say_is_refused_with_a_reason(content: Any, reason: str) -> None:
    assert reason in refused(content)


def test_fields_for_other_receivers_do_not_hurt() -> None:
    assert (
        sent(a_mail({"to": "a@example.org", "body": "x", "ticket": 7, "priority": "high"}))["To"]
        == "a@example.org"
    )


# What it says.


def test_a_result_reads_well() -> None:
    data = {
        "task_id": "t1", "name": "nightly", "status": "failed", "attempt": 2, "run": 1, "exit_code": 3, "signal": None, "reason": "exit_code",
        "detail": None, "submitted_at": "2026-04-07T18:30:00Z", "started_at": "2026-04-07T18:30:01Z", "completed_at": "2026-04-07T18:31:01Z",
        "duration_s": 60.0, "output_dir": "/state/tasks/t1/attempt-2", "stdout_tail": "one\ntwo\x1b[31m\n",
        "artifacts": [{"path": f"f{n}", "bytes": n, "sha256": "x"} for n in range(40)],
    }  # fmt: skip
    payload = seal("dr", "agentq.task.failed", "box", "t1", NOW_US, data)
    found = sent(Delivery("dr", 1, "agentq.task.failed", "result", "result", "t1", payload, NOW_US, 0))
    assert found["Subject"] == "[agentqd] nightly: failed (exit_code)"
    body = text_of(found)
    for part in ("nightly (t1)", "failed", "exit:", "3", "60.0 s", "/state/tasks/t1/attempt-2", "    one\n    two[31m\n", "f29", "and 10 more", "agentqctl show t1"):  # fmt: skip
        assert part in body, part
    assert "\x1b" not in body


def test_an_alert_reads_well_and_so_does_what_is_neither() -> None:
    data = {"alert": "no_work", "message": "task t1 did\nnothing", "at": "2026", "task_id": "t1", "name": "n", "sink": "s"}  # fmt: skip
    payload = seal("da", "agentq.alert.no_work", "box", "t1", NOW_US, data)
    found = sent(Delivery("da", 1, "agentq.alert.no_work", "alert", "k", "t1", payload, NOW_US, 0))
    assert found["Subject"] == "[agentqd] alert: no_work (n)"
    assert "task t1 did nothing" in found.get_content()
    assert "sink:" in found.get_content()
    rejection = seal("dj", "agentq.task.rejected", "box", None, NOW_US, {"reason": "bad_json", "offset": 7})
    other = sent(Delivery("dj", 1, "agentq.task.rejected", "rejection", "k", None, rejection, NOW_US, 0))
    assert "bad_json" in other.get_content()


def test_a_test_of_a_sink_says_so_and_is_no_alert() -> None:
    data = {"alert": "test", "message": "a test of the sink mail", "at": "2026", "task_id": None, "name": None, "sink": "mail", "test": True}  # fmt: skip
    payload = seal("dt", "agentq.test", "box", None, NOW_US, data)
    found = sent(Delivery("dt", 0, "agentq.test", "alert", "k", None, payload, NOW_US, 0))
    assert found["Subject"] == "[agentqd] test of the sink mail"
    assert "a test of the sink mail" in found.get_content()
    assert "alert" not in found.get_content()


def test_text_data_and_bytes_that_are_no_mail_go_to_the_sinks_own_recipients(tmp_path: Path) -> None:
    text = sent(a_mail("# not touched", key="a.txt"))
    assert (text["To"], text["Subject"], text_of(text)) == ("me@example.org", "the task: a.txt", "# not touched\n")  # fmt: skip
    assert "====" in sent(a_mail("# Head", key="a.md")).get_content()
    assert '"x": 1' in sent(a_mail({"x": 1})).get_content()
    (raw,) = sent(a_mail(None, key="a.bin", data={"content_base64": "/wA="})).iter_attachments()
    assert raw.get_content() == b"\xff\x00"
    (tmp_path / "blob").write_bytes(b"z" * 300_000)
    large = {
        "path": str(tmp_path / "blob"),
        "bytes": 300_000,
        "sha256": hashlib.sha256(b"z" * 300_000).hexdigest(),
    }
    item = a_mail(None, key="big.log", data=large, blob_path=str(tmp_path / "blob"))
    (file,) = sent(item).iter_attachments()
    assert file.get_filename() == "big.log"


def test_a_large_json_that_addresses_itself_goes_where_it_says(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text(
        json.dumps({"to": "a@example.org", "body": "x" * 400_000, "format": "text"})
    )
    item = a_mail(None, data={"bytes": 400_100}, blob_path=str(tmp_path / "blob"))
    assert sent(item)["To"] == "a@example.org"
    (tmp_path / "blob").write_text('{"to": "a@example.org", "body": "\\ud800"}')
    with pytest.raises(Unsendable, match="malformed"):
        compose(item, RULES)


def test_a_very_long_text_comes_as_an_attachment() -> None:
    found = sent(a_mail({"to": "a@example.org", "body": "é" * 600_000, "format": "text"}))
    (file,) = found.iter_attachments()
    assert text_of(file) == "é" * 600_000
    assert "1200000 bytes, attached" in text_of(found.get_body())


def test_an_attachment_that_is_not_what_was_handed_over_is_not_sent(tmp_path: Path) -> None:
    record = {
        "path": str(tmp_path / "b"),
        "name": "b",
        "bytes": 3,
        "sha256": hashlib.sha256(b"abc").hexdigest(),
    }
    item = a_mail({"to": "a@example.org", "body": "x", "attachments": ["b"]}, data={"attachments": [record]})
    for content in (b"abd", b"abcd", b"ab"):
        (tmp_path / "b").write_bytes(content)
        with pytest.raises(Unsendable, match="sha256"):
            sent(item)
    (tmp_path / "b").unlink()
    with pytest.raises(Unsendable, match="gone"):
        sent(item)
    os.mkfifo(tmp_path / "b")
    with pytest.raises(OSError, match="FIFO"):
        sent(item)


def test_a_mail_over_the_limit_is_refused_before_its_files_are_read(tmp_path: Path) -> None:
    record = {"path": str(tmp_path / "none"), "name": "b", "bytes": message.MAIL_BYTES_MAX, "sha256": "x"}
    item = a_mail({"to": "a@example.org", "body": "x", "attachments": ["b"]}, data={"attachments": [record]})
    with pytest.raises(Unsendable, match="too large"):
        sent(item)


@pytest.mark.parametrize("payload", [b"{}", b"[]", b"", b'{"data":1}', b'{"a":1,"data":1}', b'{"a":1,"data":{}', b'{"a":1,"data":{"x":"\xff"}}'])  # fmt: skip
def test_a_payload_that_is_no_envelope_is_refused(payload: bytes) -> None:
    with pytest.raises(Unsendable):
        compose(Delivery("d", 1, "t", "result", "k", None, payload, NOW_US, 0), Rules(RULES.sender, (), ()))


# Markdown.


def test_markdown_becomes_what_a_person_would_type() -> None:
    text = "# Head **x**\n## Sub\n### Deep\n\n* one [docs](https://x.y/z)\n+ *two*\n  - three\n1. `**code**`\n\n> quote\n\n---\n<https://a.b> ![pic](http://p/q) \\*no\\*"
    assert plain(text) == (
        "Head *x*\n========\nSub\n---\nDeep\n\n- one docs (https://x.y/z)\n- _two_\n  - three\n1. `**code**`\n\n> quote\n\n"
        + "-" * 40
        + "\nhttps://a.b pic (http://p/q) *no*"
    )


def test_code_blocks_stay_as_they_are() -> None:
    assert plain("```py\n# x **y**\n\n  z\n```\nafter") == "    # x **y**\n\n      z\nafter"
    assert plain("    # indented **code**") == "    # indented **code**"
    assert plain("~~~\nopen to the end") == "    open to the end"


@pytest.mark.parametrize("text", ["snake_case_name and __init__.py", "2 * 3 * 4 = 24", "a**b", "x < y > z", "[1] and (2)", "100 #1", "mail me: a@b.c", "C:\\path\\file", "- item", "$5 * 2"])  # fmt: skip
def test_plain_text_that_is_no_markdown_stays_as_it_is(text: str) -> None:
    assert plain(text) == text


@pytest.mark.parametrize("text", ["*" * 10_000, "[" * 10_000, "`" * 9_999 + "x", "**a" * 3_000, "[a" * 5_000, "![](" * 2_500, "<http:" * 1_600, "_ " * 5_000, "* " * 5_000, "\\" * 9_999, "#" * 9_999, " " * 9_999 + "x"])  # fmt: skip
def test_no_text_takes_long(text: str) -> None:
    began = time.process_time()
    plain(text)
    assert time.process_time() - began < 0.5


@given(st.text(max_size=300))
def test_rendering_never_fails(text: str) -> None:
    assert isinstance(plain(text), str)
