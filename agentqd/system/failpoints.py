"""Named places at which a test ends or stops this process: AGENTQD_FAILPOINT="name:kill" or "name:pause", several with commas.

For the edges of docs/crash-states.md that no system call marks. Read once, at import; without it `failpoint` does nothing.
`pause` is SIGSTOP: whoever waits for it goes on with SIGCONT, or kills.
"""

from __future__ import annotations

import os
import signal
from typing import Final

_SIGNALS: Final = {"kill": signal.SIGKILL, "pause": signal.SIGSTOP}


def _read(text: str) -> dict[str, signal.Signals]:
    """Raises ValueError on anything that is not such a list: a failpoint that does nothing would prove nothing."""
    chosen = {}
    for item in filter(None, text.split(",")):
        name, _, action = item.partition(":")
        if action not in _SIGNALS:
            raise ValueError(f"AGENTQD_FAILPOINT: {item!r} is not NAME:kill or NAME:pause")
        chosen[name] = _SIGNALS[action]
    return chosen


_CHOSEN: Final = _read(os.environ.get("AGENTQD_FAILPOINT", ""))


def failpoint(name: str) -> None:
    """The test's signal, if it has named this place."""
    if _CHOSEN and name in _CHOSEN:
        os.kill(os.getpid(), _CHOSEN[name])
