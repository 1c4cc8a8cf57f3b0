"""A mail as RFC 5322 bytes: the same bytes for the same mail, at every try. Pure but for the files that it attaches.

Nothing in it is drawn or read from a clock: the date is the entry's, the Message-ID comes from the delivery id, the MIME
boundary from what the mail says.
"""

from __future__ import annotations

import base64
import hashlib
import mimetypes
import re
from datetime import UTC, datetime, timedelta
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import EmailPolicy
from typing import Any, Final

import msgspec

from agentqd.core.limits import MIB
from agentqd.storage.files import open_regular

MAIL_BYTES_MAX: Final = 32 * MIB  # as sent, attachments in base64
SUBJECT_CHARS_MAX: Final = 250
_QUOTED_CHARS_MAX: Final = 256 * 1024  # a longer text goes as base64: quoted-printable takes its time
_PIECE_BYTES: Final = 57 * 1024  # whole lines
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_UNFOLDED: Final = frozenset({"message-id", "in-reply-to", "references"})
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_TYPES: Final = mimetypes.MimeTypes(filenames=())  # the built-in table: the same on every box


class Unsendable(Exception):
    """This entry can be no mail, now or ever; the text says why."""


class File(msgspec.Struct, frozen=True):
    """To be attached: our own copy in `path`, or `content`."""

    name: str
    size: int
    path: str | None = None
    sha256: str | None = None
    content: bytes = b""
    text: bool = False  # it is UTF-8 text, for sure


class Mail(msgspec.Struct, frozen=True):
    """Everything that a mail says. Addresses and Message-IDs are checked ones (core.mailaddress)."""

    delivery_id: str
    type: str
    box: str  # a host name
    at_us: int
    sender: tuple[str, str]  # display name, address
    subject: str
    body: str
    to: tuple[str, ...]
    cc: tuple[str, ...] = ()
    bcc: tuple[str, ...] = ()
    reply_to: tuple[str, ...] = ()
    in_reply_to: str | None = None
    references: tuple[str, ...] = ()
    files: tuple[File, ...] = ()

    @property
    def recipients(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.to, *self.cc, *self.bcc)))

    @property
    def message_id(self) -> str:
        return f"<{self.delivery_id}@{self.box}>"


class _Policy(EmailPolicy):
    """As policy.SMTP, but Message-IDs stand as they are: the standard one would encode a long one, and break the thread."""

    def fold(self, name: str, value: Any) -> str:
        if name.lower() not in _UNFOLDED:
            return str(super().fold(name, value))
        return f"{name}: " + "\r\n ".join(str(value).split(" ")) + "\r\n"

    def fold_binary(self, name: str, value: Any) -> bytes:
        return self.fold(name, value).encode("ascii", "surrogateescape")


_POLICY: Final = _Policy(linesep="\r\n", cte_type="7bit", raise_on_defect=False)


def one_line(text: str, chars_max: int = SUBJECT_CHARS_MAX) -> str:
    """As a header may hold it: printable, one line, bounded."""
    clean = "".join(char if char.isprintable() else " " for char in text[: 4 * chars_max])
    clean = " ".join(clean.split())
    return clean if len(clean) <= chars_max else clean[: chars_max - 1] + "…"


def build(mail: Mail) -> bytes:
    """The message. Raises Unsendable (too large, a file damaged or gone) or OSError (our disk)."""
    size = len(mail.body.encode("utf-8", "replace")) + sum(file.size for file in mail.files)
    if size * 1.37 > MAIL_BYTES_MAX:
        raise Unsendable(
            f"too large: {size} bytes, about {int(size * 1.37)} as a mail; {MAIL_BYTES_MAX} are sent at most"
        )
    message = EmailMessage(policy=_POLICY)
    moment = _EPOCH + timedelta(seconds=mail.at_us // 1_000_000)
    message["Date"] = moment
    message["From"] = Address(display_name=mail.sender[0], addr_spec=mail.sender[1])
    for name, addresses in (("Reply-To", mail.reply_to), ("To", mail.to), ("Cc", mail.cc)):
        if addresses:
            message[name] = [Address(addr_spec=each) for each in addresses]
    if not mail.to and not mail.cc:
        message["To"] = "undisclosed-recipients:;"
    message["Message-ID"] = mail.message_id
    if mail.in_reply_to is not None:
        message["In-Reply-To"] = mail.in_reply_to
    if mail.references:
        message["References"] = " ".join(mail.references)
    message["Subject"] = one_line(mail.subject)
    message["Auto-Submitted"] = "auto-generated"
    message["X-AgentQ-Delivery-ID"] = mail.delivery_id
    message["X-AgentQ-Type"] = one_line(mail.type)
    body = _CONTROL.sub("", mail.body.replace("\r\n", "\n"))
    cte = "base64" if len(body) > _QUOTED_CHARS_MAX else "quoted-printable"
    message.set_content(body if body.endswith("\n") else body + "\n", charset="utf-8", cte=cte)
    if not mail.files:
        return message.as_bytes()
    for number, file in enumerate(mail.files):
        _announce(message, file, _token(mail, number))
    message.set_boundary(_token(mail, -1))
    return _filled(message.as_bytes(), mail)


def _announce(message: EmailMessage, file: File, token: str) -> None:
    """The attachment's headers, and `token` in place of its content."""
    kind, encoding = _TYPES.guess_type(file.name, strict=False)
    maintype, _, subtype = (kind or "").partition("/")
    if not subtype or encoding or maintype in {"message", "multipart"}:
        maintype, subtype = "application", "octet-stream"
    name = one_line(file.name, 200) or "file"
    params = {"charset": "utf-8"} if file.text and maintype == "text" else None
    message.add_attachment(
        b"", maintype=maintype, subtype=subtype, filename=name, params=params, cte="base64"
    )
    part: Any = list(message.iter_attachments())[-1]
    part.set_payload(token)


def _filled(frame: bytes, mail: Mail) -> bytes:
    """With the files in their places. Encoded here, in pieces: the library would hold up the whole daemon over a large one."""
    pieces: list[bytes] = []
    for number, file in enumerate(mail.files):
        before, token, frame = frame.partition(_token(mail, number).encode())
        assert token, "the place of an attachment"
        pieces.append(before)
        content = file.content if file.path is None else _read(file)
        for start in range(0, len(content), _PIECE_BYTES):
            lines = base64.encodebytes(content[start : start + _PIECE_BYTES])
            pieces.append(lines.replace(b"\n", b"\r\n"))
    return b"".join([*pieces, frame])


def _read(file: File) -> bytes:
    """Our copy, if it is still what was handed over."""
    assert file.path is not None
    try:
        descriptor, status = open_regular(file.path)
    except FileNotFoundError:
        raise Unsendable(f"the attachment {one_line(file.name, 100)!r} is gone from blobs/") from None
    with open(descriptor, "rb") as opened:
        content = opened.read(file.size + 1)
    if status.st_size != file.size or hashlib.sha256(content).hexdigest() != file.sha256:
        raise Unsendable(
            f"the stored copy of {one_line(file.name, 100)!r} does not match its sha256 and is not sent"
        )
    return content


def _token(mail: Mail, number: int) -> str:
    """A word that no part can hold: base64 has no `=_`, quoted-printable writes `=3D_`."""
    return f"=_{hashlib.sha256(f'{mail.delivery_id} {number}'.encode()).hexdigest()[:40]}"
