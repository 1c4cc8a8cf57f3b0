"""The order of write claims: who is refused, who waits for whom. Pure; the journal finds what overlaps, these rules decide.

A claim is all paths of one task under one place in a line; a task accepted or run again later stands further back.

Rules (docs/intents.md says why they neither deadlock nor starve anybody):
1. Whoever overlaps a live claim of a stranger, running or waiting, meets its own policy: `refuse`, `queue` or `warn`.
2. A task that it comes `after`, directly or through others, is no stranger: it waits for that one's claim, under any policy.
3. A claim waits only for claims before it in the line.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from agentqd.core.settings import Conflict


class Decision(Enum):
    TAKE = "take"
    WAIT = "wait"
    REFUSE = "refuse"
    WARN = "warn"  # take, and tell


_WITH_STRANGERS: Final = {"refuse": Decision.REFUSE, "queue": Decision.WAIT, "warn": Decision.WARN}


def decide(policy: Conflict, *, strangers: bool) -> Decision:
    """What becomes of a newcomer that overlaps live claims of strangers, or of none."""
    return _WITH_STRANGERS[policy] if strangers else Decision.TAKE


def waits_behind(policy: str, *, related: bool) -> bool:
    """Does a claim wait for one before it that overlaps? (`refuse` was let in, so what is there is related, or gone.)"""
    return related or policy != "warn"
