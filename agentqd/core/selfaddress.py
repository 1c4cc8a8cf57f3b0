"""When a JSON object that a worker hands over says itself where it goes, and when it is a mail. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

MAIL_FIELDS: Final = (
    "deliver_to", "to", "cc", "bcc", "reply_to", "subject", "body", "format", "in_reply_to", "references", "attachments",
)  # fmt: skip
_SEPARATORS: Final = re.compile(r"[-_ .]")
_MAIL: Final = frozenset({"to", "cc", "bcc", "subject", "body"})


def is_mail(fields: Collection[str]) -> bool:
    """Is an object with these fields a mail, and not just data?"""
    return bool(_MAIL.intersection(fields)) or {"deliver_to", "attachments"} <= set(fields)


def misspelt(fields: Collection[str]) -> str | None:
    """A field that can only be meant as `deliver_to` (`deliver-to`, `Deliver_To`, `deliverTo`): it would silently go elsewhere."""
    for name in fields:
        if name != "deliver_to" and _SEPARATORS.sub("", name).lower() == "deliverto":
            return name
    return None


def brings_files(fields: Collection[str]) -> bool:
    """Does `attachments` in it name files, and is not just data?"""
    return "attachments" in fields and is_mail(fields)
