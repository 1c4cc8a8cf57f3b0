"""One SSH connection to a box, or a `Trouble` that says what stands in the way and what to do about it.

~/.ssh/config, the agent's keys and known_hosts are asyncssh's business. A host key that is not known is never taken:
no option, no question.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any, NamedTuple

import asyncssh

from agentqd.client.boxes import BoxEntry
from agentqd.client.keeper.passphrase import ask_for_keys
from agentqd.client.keeper.trouble import (
    HOST_KEY_CHANGED,
    HOST_KEY_UNKNOWN,
    NOT_PERMITTED,
    UNREACHABLE,
    Trouble,
)

CONNECT_TIMEOUT_S = 15
LOGIN_TIMEOUT_S = 30
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_COUNT_MAX = 3  # a black hole is noticed after about 20 s

SSH_PORT = 22
BAD_CONFIG = (asyncssh.ConfigParseError, asyncssh.KeyImportError, OSError, ValueError)


class Target(NamedTuple):
    """Where the connection goes once ~/.ssh/config has spoken."""

    host: str
    port: int
    user: str
    through: str | None  # a jump host or a proxy command


class _Client(asyncssh.SSHClient):
    """Remembers the host key that was refused, for the message."""

    refused: asyncssh.SSHKey | None = None

    def validate_host_public_key(
        self,
        host: str,  # noqa: ARG002 - asyncssh's signature
        addr: str,  # noqa: ARG002
        port: int,  # noqa: ARG002
        key: asyncssh.SSHKey,
    ) -> bool:
        self.refused = key
        return False


def _arguments(entry: BoxEntry) -> dict[str, Any]:
    """What the entry itself says; the rest is asked of ~/.ssh/config, which `config=()` makes asyncssh read."""
    found: dict[str, Any] = {"host": entry.address.host, "config": ()}
    if entry.address.port is not None:
        found["port"] = entry.address.port
    if entry.address.user is not None:
        found["username"] = entry.address.user
    return found


async def read_options(entry: BoxEntry) -> asyncssh.SSHClientConnectionOptions:
    """The entry together with ~/.ssh/config. Raises Trouble where that file or a key it names cannot be used."""
    options: asyncssh.SSHClientConnectionOptions
    try:
        options = await asyncssh.SSHClientConnectionOptions.construct(
            **_arguments(entry), ignore_encrypted=True
        )
    except BAD_CONFIG as error:
        raise _config_trouble(entry, error) from error
    return options


def target_of(options: asyncssh.SSHClientConnectionOptions) -> Target:
    through = options.tunnel if isinstance(options.tunnel, str) else None
    if options.proxy_command:
        through = "a ProxyCommand"
    return Target(options.host, options.port, options.username, through or None)


async def connect(entry: BoxEntry, tty: int | None = None) -> asyncssh.SSHClientConnection:
    """A connection that is logged in. Encrypted keys are asked for on `tty` if nothing else opens the box."""
    try:
        return await _connect(entry, ignore_encrypted=True)
    except Trouble as trouble:
        if trouble.code != NOT_PERMITTED or tty is None:
            raise
        keys = await asyncio.to_thread(ask_for_keys, tty, await read_options(entry))
        if not keys:
            raise
    return await _connect(entry, client_keys=keys)


async def _connect(entry: BoxEntry, **more: Any) -> asyncssh.SSHClientConnection:
    client = _Client()
    try:
        return await asyncssh.connect(
            **_arguments(entry),
            client_factory=lambda: client,
            connect_timeout=CONNECT_TIMEOUT_S,
            login_timeout=LOGIN_TIMEOUT_S,
            keepalive_interval=KEEPALIVE_INTERVAL_S,
            keepalive_count_max=KEEPALIVE_COUNT_MAX,
            **more,
        )
    except BAD_CONFIG as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError):
            raise await _trouble(entry, client, error) from error
        raise _config_trouble(entry, error) from error
    except asyncssh.Error as error:
        raise await _trouble(entry, client, error) from error


async def _trouble(entry: BoxEntry, client: _Client, error: Exception) -> Trouble:
    """The failure of a connection, explained."""
    options = await read_options(entry)
    target = target_of(options)
    named = _named(entry, target)
    if isinstance(error, asyncssh.PermissionDenied):
        return Trouble(
            NOT_PERMITTED,
            f"{named}: no key was accepted for {target.user}; send yours there: "
            f"ssh-copy-id -p {target.port} {target.user}@{target.host} (encrypted keys: ssh-add first)",
        )
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        return _host_key_trouble(options, target, named, client.refused, str(error))
    if isinstance(error, asyncssh.KeyExchangeFailed | asyncssh.ConnectionLost | ConnectionResetError):
        # We ask for the kind of key that known_hosts has; a server that has none of that kind just hangs up.
        shown = await _shown_key(entry)
        if shown is not None and _is_known(options, target) and not _is_known(options, target, shown):
            return _host_key_trouble(options, target, named, shown, "")
    return Trouble(UNREACHABLE, f"{named}: {why(error)}")


async def _shown_key(entry: BoxEntry) -> asyncssh.SSHKey | None:
    """The host key that the server shows to whoever takes any."""
    where = _arguments(entry)
    where.pop("username", None)  # nobody logs in
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            return await asyncssh.get_server_host_key(**where)
    except (asyncssh.Error, OSError, TimeoutError):
        return None


def _config_trouble(entry: BoxEntry, error: Exception) -> Trouble:
    return Trouble(
        NOT_PERMITTED, f"box {entry.name}: ~/.ssh/config or a key it names cannot be used: {error}"
    )


def why(error: BaseException) -> str:
    """The failure in a few words."""
    if isinstance(error, socket.gaierror):
        return f"its name cannot be resolved ({error.strerror or error})"
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused: no sshd listens there"
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return f"no answer in {CONNECT_TIMEOUT_S} s"
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
    return str(error) or type(error).__name__


def _named(entry: BoxEntry, target: Target) -> str:
    through = f" through {target.through}" if target.through else ""
    return f"box {entry.name} ({target.user}@{target.host}:{target.port}{through})"


def _host_key_trouble(
    options: asyncssh.SSHClientConnectionOptions,
    target: Target,
    named: str,
    key: asyncssh.SSHKey | None,
    said: str,
) -> Trouble:
    if key is None:
        return Trouble(HOST_KEY_UNKNOWN, f"{named}: REFUSED: its host key cannot be trusted: {said}")
    fingerprint = key.get_fingerprint()
    shown = f"({_key_kind(key)} {fingerprint})"
    compare = "compare the fingerprint with the box's own (ssh-keygen -lf /etc/ssh/ssh_host_*_key.pub there)"
    if _is_known(options, target):
        where = target.host if target.port == SSH_PORT else f"[{target.host}]:{target.port}"
        return Trouble(
            HOST_KEY_CHANGED,
            f"{named}: REFUSED: its host key {shown} is another than the one in known_hosts. Somebody may stand in between, "
            f"or the box was set up anew: {compare}; if it is right: ssh-keygen -R '{options.host_key_alias or where}', "
            "then connect once with ssh",
            fingerprint=fingerprint,
        )
    port = "" if target.port == SSH_PORT else f" -p {target.port}"
    return Trouble(
        HOST_KEY_UNKNOWN,
        f"{named}: REFUSED: its host key {shown} is not in known_hosts: {compare}; if it is right, take it: "
        f"ssh{port} {target.user}@{target.host} true",
        fingerprint=fingerprint,
    )


def _is_known(
    options: asyncssh.SSHClientConnectionOptions, target: Target, key: asyncssh.SSHKey | None = None
) -> bool:
    """Whether known_hosts has any key for this host, or this one: a connection cut in mid-login is no other key."""
    known = options.known_hosts
    if known is None:
        return False
    if not known:
        path = os.path.expanduser("~/.ssh/known_hosts")
        if not os.path.isfile(path):
            return False
        known = path
    port = None if target.port == SSH_PORT else target.port
    try:
        found = asyncssh.match_known_hosts(known, options.host_key_alias or target.host, "", port)
    except (OSError, ValueError):
        return False
    if key is not None:
        return key.get_fingerprint() in {each.get_fingerprint() for each in found[0]}
    return bool(found[0] or found[1] or found[2])


def _key_kind(key: asyncssh.SSHKey) -> str:
    return key.get_algorithm().removeprefix("ssh-")
