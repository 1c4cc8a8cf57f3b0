"""What the tests of the laptop's side share: a real sshd (realsshd.py) and an ordinary user to log in as."""

from __future__ import annotations

from realsshd import ordinary_user, sshd, user_sshd

__all__ = ["ordinary_user", "sshd", "user_sshd"]
