"""The mission's mail case, whole: replies that an agent hands over reach their people, each once, in its thread, whatever becomes of the agent."""

import json
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path

import pytest
from conftest import MakeBox
from realbox import RealBox, wait_for
from smtpserver import SmtpServer, smtp_server

pytestmark = pytest.mark.real
USER, PASSWORD = "agent@example.org", "a long secret"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmtpServer]:
    with smtp_server(tmp_path_factory.mktemp("smtp")) as made:
        yield made


@pytest.fixture
def mailbox(server: SmtpServer, tmp_path: Path) -> SmtpServer:
    """The server, empty."""
    (tmp_path / "mailbox").mkdir()
    server.use(tmp_path / "mailbox")
    server.plan(auth=f"{USER}:{PASSWORD}")
    return server


def mail_box(make_box: MakeBox, server: SmtpServer, tmp_path: Path) -> RealBox:
    (tmp_path / "password").write_text(PASSWORD)
    (tmp_path / "password").chmod(0o600)
    config = f"""
sinks:
  mail: {{type: email, host: localhost, port: {server.port}, username: {USER}, password_file: {tmp_path}/password, from: "The Agent <{USER}>",
         to: owner@example.org, allow_to: ["*@example.org"], backoff: [100ms]}}
"""
    box = make_box(config, start=False)
    box.env["SSL_CERT_FILE"] = str(server.ca_file)
    return box.start()


def reply(number: int, to: str | None = None) -> str:
    """A shell line that hands one over, as an agent would write it."""
    mail = {
        "deliver_to": ["mail"], "to": to or f"person{number}@example.org", "subject": f"Re: question {number}", "body": f"# Answer\n\nIt is **{number}**.",
        "in_reply_to": f"<question-{number}@example.org>", "references": [f"<first-{number}@example.org>"],
    }  # fmt: skip
    return f"printf %s '{json.dumps(mail)}' > $AGENTQ_OUTBOX/reply-{number}.json"


def by_subject(server: SmtpServer) -> dict[str, EmailMessage]:
    return {mail["Subject"]: mail for mail in server.mails()}


@pytest.mark.row(52, 56, 50)
def test_four_replies_of_an_agent_that_is_killed_after_the_second_arrive_once_each_in_their_threads(
    make_box: MakeBox, mailbox: SmtpServer, tmp_path: Path
) -> None:
    box = mail_box(make_box, mailbox, tmp_path)
    prompt = "\n".join(
        [reply(1), reply(2), "[ $AGENTQ_ATTEMPT = 1 ] && sleep 300", reply(3), reply(4), "echo done"]
    )
    box.append(
        {"task": "mails", "id": "mails", "prompt": prompt, "run_timeout": "1s", "kill_grace": "100ms", "max_attempts": 2, "backoff": ["10ms"]}
    )  # fmt: skip
    assert box.result("mails")["status"] == "success"
    assert [attempt["result"] for attempt in box.show("mails")["attempts"]] == ["timeout", "success"]
    wait_for("four mails", lambda: len(mailbox.mails()) == 4)
    rows = [row for row in box.show("mails")["outbox"] if row["sink"] == "mail"]
    wait_for("their marks", lambda: {row["state"] for row in box.show("mails")["outbox"]} == {"delivered"})
    assert len(rows) == 4
    found = by_subject(mailbox)
    assert sorted(found) == [f"Re: question {number}" for number in range(1, 5)]
    for number in range(1, 5):
        mail = found[f"Re: question {number}"]
        assert mail["To"] == f"person{number}@example.org"
        assert mail["From"] == f"The Agent <{USER}>"
        assert mail["In-Reply-To"] == f"<question-{number}@example.org>"
        assert mail["References"] == f"<first-{number}@example.org> <question-{number}@example.org>"
        assert mail.get_content().replace("\r\n", "\n") == f"Answer\n======\n\nIt is *{number}*.\n"
    assert {facts["tls"] for facts in mailbox.facts()} == {True}
    assert len({mail["Message-ID"] for mail in mailbox.mails()}) == 4


@pytest.mark.row(55)
def test_a_reply_to_somebody_who_is_not_allowed_is_set_aside_told_and_the_others_go(
    make_box: MakeBox, mailbox: SmtpServer, tmp_path: Path
) -> None:
    box = mail_box(make_box, mailbox, tmp_path)
    prompt = "\n".join([reply(1), reply(2, "eve@evil.example"), reply(3, "a@example.org\r\nBcc: eve@evil.example"), reply(4), "echo done"])  # fmt: skip
    box.append({"task": "mails", "id": "mails", "prompt": prompt})
    assert box.result("mails")["status"] == "success"
    wait_for(
        "two mails and two alerts", lambda: len(mailbox.mails()) == 2 and len(box.alerts("dead_letter")) == 2
    )
    assert sorted(by_subject(mailbox)) == ["Re: question 1", "Re: question 4"]
    dead = {row["key"]: row["last_error"] for row in box.show("mails")["outbox"] if row["state"] == "dead"}
    assert dead["reply-2.json"].startswith("not_allowed: eve@evil.example")
    assert dead["reply-3.json"].startswith("malformed: to")
    assert not any("evil" in to for facts in mailbox.facts() for to in facts["to"])


@pytest.mark.row(52)
def test_an_attachment_is_sent_as_it_was_handed_over_though_the_agent_has_deleted_it(
    make_box: MakeBox, mailbox: SmtpServer, tmp_path: Path
) -> None:
    mailbox.plan(auth=f"{USER}:{PASSWORD}", at="MAIL", do="451 not yet")
    box = mail_box(make_box, mailbox, tmp_path)
    mail = {"deliver_to": "mail", "to": "a@example.org", "subject": "report", "body": "see there", "attachments": ["../work/report.txt"]}  # fmt: skip
    prompt = f"echo first > report.txt; printf %s '{json.dumps(mail)}' > $AGENTQ_OUTBOX/m.json; while ! [ -e {tmp_path}/go ]; do sleep 0.02; done; rm report.txt; echo x"
    box.append({"task": "report", "id": "report", "prompt": prompt})
    wait_for("a try", lambda: [r for r in box.show("report").get("outbox", ()) if r["state"] == "retryable"])
    (tmp_path / "go").touch()
    box.result("report")
    box.kill()
    mailbox.plan(auth=f"{USER}:{PASSWORD}")
    box.start()
    wait_for("the mail", mailbox.mails)
    (found,) = mailbox.mails()
    (file,) = found.iter_attachments()
    assert (file.get_filename(), file.get_payload(decode=True)) == ("report.txt", b"first\n")


@pytest.mark.row(57)
def test_one_of_three_recipients_is_put_off_and_the_others_do_not_get_the_mail_twice(
    make_box: MakeBox, mailbox: SmtpServer, tmp_path: Path
) -> None:
    mailbox.plan(auth=f"{USER}:{PASSWORD}", rcpt={"c@example.org": "451 4.7.1 greylisted"})
    box = mail_box(make_box, mailbox, tmp_path)
    mail = {"deliver_to": "mail", "to": ["a@example.org", "b@example.org", "c@example.org"], "body": "x"}
    box.append(
        {
            "task": "three",
            "id": "three",
            "prompt": f"printf %s '{json.dumps(mail)}' > $AGENTQ_OUTBOX/m.json; echo x",
        }
    )
    wait_for("a try", lambda: [r for r in box.show("three").get("outbox", ()) if r["state"] == "retryable"])
    box.kill()
    mailbox.plan(auth=f"{USER}:{PASSWORD}")
    box.start()
    wait_for("both", lambda: len(mailbox.facts()) == 2)
    assert [facts["to"] for facts in mailbox.facts()] == [
        ["a@example.org", "b@example.org"],
        ["c@example.org"],
    ]


@pytest.mark.row(57)
def test_results_and_alerts_come_as_readable_mail(
    make_box: MakeBox, mailbox: SmtpServer, tmp_path: Path
) -> None:
    box = mail_box(make_box, mailbox, tmp_path)
    box.append({"task": "nightly", "id": "n1", "prompt": "echo all is lost; exit 3", "deliver_to": ["mail"]})
    wait_for("the mail", mailbox.mails)
    (mail,) = mailbox.mails()
    assert mail["Subject"] == "[agentqd] nightly: failed (exit_code)"
    assert mail["To"] == "owner@example.org"
    assert "    all is lost" in mail.get_content()
