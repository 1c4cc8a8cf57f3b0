"""The laptop's name as a consumer of every box: made once, kept in `$XDG_STATE_HOME/agentqctl/client-id`."""

from __future__ import annotations

import os
from collections.abc import Mapping

from agentqd.client.keeperplace import state_folder
from agentqd.core.errors import AgentqError

NAME_CHARS_MAX = 64
NAME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
HOST_CHARS_MAX = 32


def client_id(env: Mapping[str, str]) -> str:
    """`HOST-RANDOM`. Raises AgentqError where the state folder cannot be written."""
    folder = state_folder(env)
    path = f"{folder}/client-id"
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise AgentqError(f"{path}: {error.strerror}", code="io_error") from error
    given = os.uname().nodename.partition(".")[0][:HOST_CHARS_MAX] or "laptop"
    host = "".join(char if char in NAME_CHARS else "-" for char in given)
    draft = f"{path}.{os.getpid()}"
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            os.write(fd, f"{host}-{os.urandom(6).hex()}\n".encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        try:
            os.link(draft, path)  # whoever was first: everybody reads the same name
        except FileExistsError:
            pass
        finally:
            os.unlink(draft)
        return _read(path)
    except OSError as error:
        raise AgentqError(f"cannot write {path}: {error.strerror or error}", code="io_error") from error


def contact_of(name: str) -> str | None:
    """`CLIENT_ID HOSTNAME`, as the box understands it (docs/api.md); None where one of them cannot be said in it."""
    host = os.uname().nodename
    if "." in name or not host or not NAME_CHARS.issuperset(host):
        return None
    return f"{name} {host}"


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        name = file.read(256).strip()
    if not 0 < len(name) <= NAME_CHARS_MAX or not NAME_CHARS.issuperset(name):
        raise AgentqError(f"{path} does not hold a name; remove it to get another", code="bad_client_id")
    return name
