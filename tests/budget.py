"""How much a test tries: all of it, or, in the quick loop of `make check` (AGENTQD_QUICK=1), a part of it."""

from __future__ import annotations

import os
from typing import Final

from hypothesis import HealthCheck, settings

QUICK: Final = os.environ.get("AGENTQD_QUICK", "") == "1"
_PART: Final = 8


def tries(full: int) -> int:
    """`full`, or an eighth of it in the quick loop."""
    return max(1, full // _PART) if QUICK else full


def load_profile() -> None:
    """A busy machine is no reason to fail: what takes too long has a test of its own."""
    settings.register_profile(
        "agentqd",
        deadline=None,
        max_examples=tries(100),
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("agentqd")
