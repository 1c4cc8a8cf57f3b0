"""Reasons are in the system's words."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from agentqd.sinks.reason import explained

REFUSED = OSError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (REFUSED, "Connection refused"),
        (IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), "/x"), "/x: Is a directory"),
        (OSError(f"Multiple exceptions: {REFUSED}, [Errno 101] Connect call failed"), "Connection refused, Network is unreachable"),
        (Exception(f"Error connecting to h on port 1: {REFUSED}"), "Connection refused"),
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
        (OSError("pip install it"), "pip install it"),
        (ValueError(), "ValueError"),
    ],
)  # fmt: skip
def test_a_reason_has_the_systems_words_and_none_of_pythons(error: Exception, said: str) -> None:
    assert explained(error) == said
