"""One booted box for all tests here: each leaves it running, with both units up."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from systemd import nspawn


@pytest.fixture(scope="session")
def machine() -> Iterator[nspawn.Box]:
    """A real systemd with agentqd installed as docs/install.md says, both units running."""
    if reason := nspawn.missing():
        pytest.skip(reason)
    with nspawn.Box(f"agentqd-test-{os.getpid()}") as box:
        box.install("As a system service")
        yield box
