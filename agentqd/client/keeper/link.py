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


class Target(NamedTuple):
    """Where the connection goes once ~/.ssh/config has spoken."""

    host: str
    port: int
    user: str
    through: str | None  # a jump host or a proxy command


class _Client(asyncssh.SSHClient):
    """Remembers the host key that was refused, for the message."""

    refused: asyncssh.SSHKey | None = None
    addr: str = ""

    def validate_host_public_key(
        self,
        host: str,  # noqa: ARG002 - asyncssh's signature
        addr: str,
        port: int,  # noqa: ARG002
        key: asyncssh.SSHKey,
    ) -> bool:
        self.refused, self.addr = key, addr
        return False


async def read_options(entry: BoxEntry, **more: Any) -> asyncssh.SSHClientConnectionOptions:
    """The entry together with ~/.ssh/config. Raises Trouble where that file or a key it names cannot be used."""
    where: dict[str, Any] = {"host": entry.address.host}
    if entry.address.port is not None:
        where["port"] = entry.address.port
    if entry.address.user is not None:
        where["username"] = entry.address.user
    try:
        options: asyncssh.SSHClientConnectionOptions
        options = await asyncssh.SSHClientConnectionOptions.construct(
            **where,
            connect_timeout=CONNECT_TIMEOUT_S,
            login_timeout=LOGIN_TIMEOUT_S,
            keepalive_interval=KEEPALIVE_INTERVAL_S,
            keepalive_count_max=KEEPALIVE_COUNT_MAX,
            **{"ignore_encrypted": True, **more},
        )
    except (asyncssh.ConfigParseError, asyncssh.KeyImportError, OSError, ValueError) as error:
        raise Trouble(
            NOT_PERMITTED, f"{entry.name}: ~/.ssh/config or a key it names cannot be used: {error}"
        ) from error
    return options


def target_of(options: asyncssh.SSHClientConnectionOptions) -> Target:
    through = options.tunnel if isinstance(options.tunnel, str) else None
    if options.proxy_command:
        through = "a ProxyCommand"
    return Target(options.host, options.port, options.username, through or None)


async def connect(entry: BoxEntry, tty: int | None = None) -> asyncssh.SSHClientConnection:
    """A connection that is logged in. Encrypted keys are asked for on `tty` if nothing else opens the box."""
    options = await read_options(entry)
    target = target_of(options)
    try:
        return await _connect(entry, options, target)
    except Trouble as trouble:
        if trouble.code != NOT_PERMITTED or tty is None:
            raise
        keys = await asyncio.to_thread(ask_for_keys, tty, options)
        if not keys:
            raise
    options = await read_options(entry, client_keys=keys)
    return await _connect(entry, options, target)


async def _connect(
    entry: BoxEntry, options: asyncssh.SSHClientConnectionOptions, target: Target
) -> asyncssh.SSHClientConnection:
    client = _Client()
    try:
        return await asyncssh.connect(
            target.host, target.port, tunnel=options.tunnel, client_factory=lambda: client, options=options
        )
    except asyncssh.HostKeyNotVerifiable as error:
        raise _host_key_trouble(entry, options, target, client, error) from error
    except asyncssh.KeyExchangeFailed as error:
        if "host key" in str(error):
            raise _host_key_trouble(entry, options, target, client, error) from error
        raise Trouble(UNREACHABLE, f"{_named(entry, target)}: {error}") from error
    except asyncssh.PermissionDenied as error:
        raise Trouble(
            NOT_PERMITTED,
            f"{_named(entry, target)}: no key was accepted for {target.user}; send yours there: "
            f"ssh-copy-id -p {target.port} {target.user}@{target.host} (encrypted keys: ssh-add first)",
        ) from error
    except (asyncssh.Error, OSError) as error:
        raise Trouble(UNREACHABLE, f"{_named(entry, target)}: {why(error)}") from error


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
    entry: BoxEntry,
    options: asyncssh.SSHClientConnectionOptions,
    target: Target,
    client: _Client,
    error: Exception,
) -> Trouble:
    named = _named(entry, target)
    where = target.host if target.port == 22 else f"[{target.host}]:{target.port}"
    alias = options.host_key_alias or where
    shown = f" ({_key_kind(client.refused)} {client.refused.get_fingerprint()})" if client.refused else ""
    fields: dict[str, Any] = {"fingerprint": client.refused.get_fingerprint()} if client.refused else {}
    if _is_known(options, target, client):
        return Trouble(
            HOST_KEY_CHANGED,
            f"{named}: REFUSED: its host key{shown} is another than the one in known_hosts. Somebody may stand in between, "
            f"or the box was set up anew: compare the fingerprint with the box's own (ssh-keygen -lf /etc/ssh/ssh_host_*_key.pub "
            f"there); if it is right: ssh-keygen -R '{alias}', then connect once with ssh",
            **fields,
        )
    if client.refused is None and "not trusted" not in str(error):
        return Trouble(HOST_KEY_UNKNOWN, f"{named}: REFUSED: its host key cannot be trusted: {error}")
    port = "" if target.port == 22 else f" -p {target.port}"
    return Trouble(
        HOST_KEY_UNKNOWN,
        f"{named}: REFUSED: its host key{shown} is not in known_hosts. Compare the fingerprint with the box's own "
        f"(ssh-keygen -lf /etc/ssh/ssh_host_*_key.pub there); if it is right, take it: ssh{port} {target.user}@{target.host} true",
        **fields,
    )


def _is_known(options: asyncssh.SSHClientConnectionOptions, target: Target, client: _Client) -> bool:
    """Whether known_hosts has any key for this host."""
    known = options.known_hosts
    if known is None:
        return False
    if not known:
        path = os.path.expanduser("~/.ssh/known_hosts")
        if not os.path.isfile(path):
            return False
        known = path
    try:
        port = None if target.port == 22 else target.port
        found = asyncssh.match_known_hosts(known, options.host_key_alias or target.host, client.addr, port)
    except (OSError, ValueError):
        return False
    return bool(found[0] or found[1] or found[2])


def _key_kind(key: asyncssh.SSHKey) -> str:
    return key.get_algorithm().removeprefix("ssh-")
