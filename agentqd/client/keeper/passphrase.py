"""Encrypted keys: asked for on the terminal, when the agent and the other keys do not open the box."""

from __future__ import annotations

import contextlib
import os
import termios
from typing import Any

import asyncssh

DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa", "id_ed25519_sk", "id_ecdsa_sk")
TRIES_MAX = 3
LINE_BYTES_MAX = 4096


def ask_for_keys(tty: int, options: asyncssh.SSHClientConnectionOptions) -> list[asyncssh.SSHKey]:
    """The encrypted keys of ~/.ssh/config, or of the usual names, that a person has opened. Blocks."""
    opened = []
    for path in _encrypted(_candidates(options)):
        key = _opened(tty, path)
        if key is not None:
            opened.append(key)
    return opened


def _candidates(options: asyncssh.SSHClientConnectionOptions) -> list[str]:
    named: Any = options.config.get("IdentityFile", ()) if options.config is not None else ()
    paths = [str(path) for path in named] or [f"~/.ssh/{name}" for name in DEFAULT_KEYS]
    return [os.path.expanduser(path) for path in paths]


def _encrypted(paths: list[str]) -> list[str]:
    found = []
    for path in paths:
        try:
            asyncssh.read_private_key(path)
        except asyncssh.KeyEncryptionError:
            found.append(path)
        except asyncssh.KeyImportError as error:
            if "passphrase" in str(error).lower():
                found.append(path)
        except OSError:
            continue
    return found


def _opened(tty: int, path: str) -> asyncssh.SSHKey | None:
    for _ in range(TRIES_MAX):
        text = _ask(tty, f"Passphrase for {path}: ")
        if not text:
            return None
        with contextlib.suppress(asyncssh.KeyEncryptionError, asyncssh.KeyImportError):
            return asyncssh.read_private_key(path, text)
    return None


def _ask(tty: int, prompt: str) -> str:
    """A line, not shown. The terminal is as it was, whatever happens."""
    before = termios.tcgetattr(tty)
    quiet = termios.tcgetattr(tty)
    quiet[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(tty, termios.TCSAFLUSH, quiet)
        os.write(tty, prompt.encode("utf-8", "replace"))
        line = os.read(tty, LINE_BYTES_MAX)
        os.write(tty, b"\n")
    finally:
        termios.tcsetattr(tty, termios.TCSAFLUSH, before)
    return line.decode("utf-8", "surrogateescape").rstrip("\r\n")
