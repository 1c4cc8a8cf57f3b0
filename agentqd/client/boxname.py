"""What a box may be called: its name becomes a file name. (No `re`: every verb with `--box` loads this.)"""

from __future__ import annotations

ALL_BOXES = "all"
NAME_CHARS_MAX = 32
FIRST = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
LATER = FIRST | frozenset("-_")


def check_box_name(name: str) -> str:
    """The name. Raises ValueError with what is wrong."""
    if name == ALL_BOXES:
        raise ValueError("`all` means every box and cannot be a name")
    if not 0 < len(name) <= NAME_CHARS_MAX or name[0] not in FIRST or not LATER.issuperset(name):
        raise ValueError(
            f"{name[:64]!r} cannot name a box: letters, digits, - and _, at most {NAME_CHARS_MAX}, a letter or digit first"
        )
    return name
