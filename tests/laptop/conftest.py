"""What the tests of the laptop's side share: a real sshd (realsshd.py) and an ordinary user to log in as."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from realsshd import ordinary_user, sshd, user_sshd

from tests.laptop.onelaptop import OneLaptop, one_laptop

__all__ = ["ordinary_user", "sshd", "user_sshd"]


@pytest.fixture
def one() -> Iterator[OneLaptop]:
    """A laptop, an sshd for the current user, and a running box."""
    with one_laptop() as found:
        yield found
