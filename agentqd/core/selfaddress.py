"""When a JSON object that a worker hands over says itself where it goes, and when it is a mail. Pure."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

MAIL_FIELDS: Final = (
    "deliver_to", "to", "cc", "bcc", "reply_to", "subject", "body", "format", "in_reply_to", "references", "attachments",
)  # fmt: skip
_MAIL: Final = frozenset({"to", "cc", "bcc", "subject", "body"})


def is_mail(fields: Collection[str]) -> bool:
    """Is an object with these fields a mail, and not just data?"""
    return bool(_MAIL.intersection(fields)) or {"deliver_to", "attachments"} <= set(fields)


def brings_files(fields: Collection[str]) -> bool:
    """Does `attachments` in it name files, and is not just data?"""
    return "attachments" in fields and is_mail(fields)
