"""From an outbox entry to a mail: who gets it, what it says, what it brings along. No network; reads our own copies of files.

What of a worker's JSON is a mail says core.selfaddress. Every address in it must be allowed, reply_to too: a mail with one
that is not is not sent at all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from agentqd.core import mailaddress
from agentqd.core.envelope import TEST_TYPE, data_of
from agentqd.core.limits import JSON_CHECK_BYTES_MAX, MIB
from agentqd.core.selfaddress import MAIL_FIELDS, is_mail
from agentqd.core.settings import Sink as SinkSettings
from agentqd.core.units import parse_time_us
from agentqd.sinks.base import Delivery
from agentqd.sinks.mailtext import of_alert, of_other, of_result, of_test
from agentqd.sinks.message import File, Mail, Unsendable, one_line
from agentqd.sinks.plaintext import plain
from agentqd.storage.files import open_regular

RECIPIENTS_MAX: Final = 100  # RFC 5321, 4.5.3.1.8: what every server must take at once
REFERENCES_MAX: Final = 50
BODY_BYTES_MAX: Final = 1 * MIB  # a longer one goes as an attachment
_BOX: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,200}[A-Za-z0-9])?")
_NO_BOX: Final = "agentqd.invalid"


class Rules(msgspec.Struct, frozen=True):
    """What the config says of senders and recipients, checked."""

    sender: tuple[str, str]
    to: tuple[str, ...]
    allow: tuple[str, ...]


class _Envelope(msgspec.Struct):
    type: str = ""
    source: str = ""
    time: str = ""


def rules_of(settings: SinkSettings) -> Rules:
    """Raises ValueError. Without allow_to only the addresses of `to` are allowed."""
    to = tuple(mailaddress.address(each) for each in _words(settings.to))
    patterns = (
        to if settings.allow_to is None else tuple(mailaddress.pattern(each) for each in settings.allow_to)
    )
    return Rules(mailaddress.named_address(settings.from_ or ""), to, (*patterns, *to))


def compose(delivery: Delivery, rules: Rules) -> Mail:
    """The mail of this entry. Raises Unsendable, or OSError (our own copies cannot be read)."""
    try:
        envelope = msgspec.json.decode(delivery.payload, type=_Envelope)
        data = msgspec.json.decode(data_of(delivery.payload))
    except (msgspec.MsgspecError, ValueError, UnicodeDecodeError, RecursionError):
        raise Unsendable("the payload is no envelope") from None
    if not isinstance(data, dict):
        raise Unsendable("the payload's data is no object")
    mail = Mail(
        delivery_id=delivery.delivery_id,
        type=delivery.type,
        box=_host(envelope.source),
        at_us=_time(envelope.time, delivery.created_at),
        sender=rules.sender,
        subject="",
        body="",
        to=rules.to,
    )
    box = envelope.source.rpartition("/")[2]
    if delivery.kind == "result":
        return _with(mail, *of_result(data))
    if delivery.kind == "alert":
        return _with(mail, *(of_test if envelope.type == TEST_TYPE else of_alert)(data, box))
    if delivery.kind in {"entry", "broken"}:
        return _entry(mail, data, delivery.blob_path, rules)
    return _with(mail, *of_other(delivery.type, data, box))


def _with(mail: Mail, subject: str, body: str) -> Mail:
    if not mail.to:
        raise Unsendable("nobody to send it to: the sink has no `to`")
    return msgspec.structs.replace(mail, subject=subject, body=body)


# What a worker handed over.


def _entry(mail: Mail, data: dict[str, Any], blob: str | None, rules: Rules) -> Mail:
    key, content = str(data.get("key", "")), data.get("content")
    size = data.get("bytes")
    if blob is not None and key.endswith(".json") and isinstance(size, int) and size <= JSON_CHECK_BYTES_MAX:
        content = _large_json(blob)
    files = _files(data)
    if isinstance(content, dict) and is_mail(content):
        return _addressed(mail, content, files, data, rules)
    subject = f"{data.get('name', '')}: {key}"
    if blob is not None:
        whole = File(key, size if isinstance(size, int) else 0, path=blob, sha256=str(data.get("sha256")))
        return _with(_plus(mail, whole), subject, f"{key}: {whole.size} bytes, attached.")
    if isinstance(content, str):
        text = plain(content) if key.endswith((".md", ".markdown")) else content
        return _bounded(_with(mail, subject, text), key)
    if "content_base64" in data:
        raw = _decoded(data["content_base64"])
        return _with(
            _plus(mail, File(key, len(raw), content=raw)), subject, f"{key}: {len(raw)} bytes, attached."
        )
    text = msgspec.json.format(msgspec.json.encode(content), indent=2).decode()
    return _bounded(_with(mail, subject, text), key)


def _addressed(
    mail: Mail, fields: dict[str, Any], files: tuple[File, ...], data: dict[str, Any], rules: Rules
) -> Mail:
    for name in fields:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), MAIL_FIELDS, n=1, cutoff=0.85)
        if name not in MAIL_FIELDS and near:
            raise Unsendable(
                f"malformed: {one_line(name, 60)!r} is no field of a mail; did you mean {near[0]}?"
            )
    to, cc, bcc = (_addresses(fields, name) for name in ("to", "cc", "bcc"))
    reply_to = _addresses(fields, "reply_to")
    if not (to or cc or bcc):
        empty = next((name for name in ("to", "cc", "bcc") if fields.get(name) is not None), None)
        if empty is not None:
            raise Unsendable(f"malformed: {empty} names nobody; leave it out for the sink's own `to`")
        to = rules.to
        if not to:
            raise Unsendable("nobody to send it to: neither the entry nor the sink has a `to`")
    _check_allowed((*to, *cc, *bcc, *reply_to), rules)
    if len({*to, *cc, *bcc}) > RECIPIENTS_MAX:
        raise Unsendable(f"malformed: more than {RECIPIENTS_MAX} recipients")
    named = fields.get("attachments") or []
    if not isinstance(named, list) or len(files) != len(named):
        raise Unsendable(
            "malformed: its attachments were not taken when it was handed over; hand it over again"
        )
    in_reply_to, references = _thread(fields)
    mail = msgspec.structs.replace(
        mail, to=to, cc=cc, bcc=bcc, reply_to=reply_to, in_reply_to=in_reply_to, references=references, files=files,
        subject=_text(fields, "subject") or f"{data.get('name', '')}: {data.get('key', '')}", body=_body(fields, files),
    )  # fmt: skip
    return _bounded(mail, "message.txt")


def _body(fields: dict[str, Any], files: Sequence[File]) -> str:
    body = _text(fields, "body")
    if body is None and not files:
        raise Unsendable("malformed: it has neither a body nor attachments")
    match fields.get("format"):
        case None | "markdown":
            return plain(body or "")
        case "text":
            return body or ""
    raise Unsendable('malformed: format is "markdown" (the default) or "text"')


def _text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise Unsendable(f"malformed: {name} is no text")
    return value


def _addresses(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    value = fields.get(name)
    if value is None:
        return ()
    words = [value] if isinstance(value, str) else value
    if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise Unsendable(f"malformed: {name} is neither an address nor a list of addresses")
    try:
        return tuple(dict.fromkeys(mailaddress.address(word) for word in words))
    except ValueError as error:
        raise Unsendable(f"malformed: {name}: {error}") from None


def _check_allowed(addresses: Sequence[str], rules: Rules) -> None:
    wrong = [each for each in dict.fromkeys(addresses) if not mailaddress.allowed(each, rules.allow)]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise Unsendable(
            f"not_allowed: {', '.join(wrong[:5])}{more}; see allow_to of the sink (nothing was sent)"
        )


def _thread(fields: dict[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    parent = _text(fields, "in_reply_to")
    value = fields.get("references")
    words = value.split() if isinstance(value, str) else value or []
    if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise Unsendable("malformed: references is neither a text nor a list of Message-IDs")
    try:
        in_reply_to = mailaddress.message_id(parent) if parent is not None else None
        references = [mailaddress.message_id(word) for word in words]
    except ValueError as error:
        raise Unsendable(f"malformed: in_reply_to or references: {error}") from None
    if in_reply_to is not None and (not references or references[-1] != in_reply_to):
        references.append(in_reply_to)
    if len(references) > REFERENCES_MAX:  # RFC 5322, 3.6.4: the first and the newest are what a reader needs
        references = [references[0], *references[-(REFERENCES_MAX - 1) :]]
    return in_reply_to, tuple(references)


# Content and files.


def _files(data: dict[str, Any]) -> tuple[File, ...]:
    """Our copies, as they were recorded when the entry was taken."""
    found = data.get("attachments") or []
    return tuple(
        File(each["name"], each["bytes"], path=each["path"], sha256=each["sha256"]) for each in found
    )


def _bounded(mail: Mail, name: str) -> Mail:
    """A text that nobody wants to read in a mail goes as an attachment."""
    raw = mail.body.encode("utf-8", "replace")
    if len(raw) <= BODY_BYTES_MAX:
        return mail
    return msgspec.structs.replace(
        _plus(mail, File(name, len(raw), content=raw, text=True)), body=f"{name}: {len(raw)} bytes, attached."
    )


def _plus(mail: Mail, file: File) -> Mail:
    return msgspec.structs.replace(mail, files=(file, *mail.files))


def _large_json(blob: str) -> Any:
    try:
        descriptor, _ = open_regular(blob)
    except FileNotFoundError:
        raise Unsendable("its content is gone from blobs/") from None
    with open(descriptor, "rb") as file:
        try:
            return msgspec.json.decode(file.read())
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Unsendable(f"malformed: {error}") from None  # it may say where it wants to go


def _decoded(text: object) -> bytes:
    import base64
    import binascii

    try:
        return base64.b64decode(str(text), validate=True)
    except binascii.Error:
        raise Unsendable("its content_base64 is damaged") from None


def _host(source: str) -> str:
    """The box's name as the right side of a Message-ID."""
    name = source.rpartition("/")[2]
    return name if _BOX.fullmatch(name) and ".." not in name else _NO_BOX


def _time(text: str, otherwise_us: int) -> int:
    try:
        return parse_time_us(text)
    except ValueError:
        return otherwise_us


def _words(value: list[str] | str | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
