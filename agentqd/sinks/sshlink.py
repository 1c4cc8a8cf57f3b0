"""One kept SSH connection with its SFTP session: made when needed, believed only after a look, closed when idle.

Promises:
1. A host key that the known_hosts files do not name for this host and port is refused, as OpenSSH does with
   `StrictHostKeyChecking yes`: unknown, changed or revoked. Nothing is ever added to a file. Only the name in the
   config is looked up, never the address it resolves to.
2. A private key that others may read is refused. Passwords are never sent, agent and default keys only used where
   the config names no key. `~/.ssh/config` is not read: everything stands in agentqd's config.
3. Every failure comes as `Unreachable`, which says what to do; whatever was open is closed.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import pwd
import stat
import time
from typing import TYPE_CHECKING, Any, Final

from agentqd.core.limits import MIB
from agentqd.core.settings import Sink as SinkSettings
from agentqd.sinks.reason import explained

if TYPE_CHECKING:
    from asyncssh import SFTPClient, SSHClientConnection, SSHKnownHosts

CONNECT_S: Final = 10.0
LOGIN_S: Final = 20.0  # all of it, from the connection to the SFTP session
IDLE_S: Final = 60.0
_BELIEVED_S: Final = 2.0  # a connection used so lately is not looked at first
_LOOK_S: Final = 5.0
_KEEPALIVE_S: Final = 10.0
_KEEPALIVES: Final = 3
_TURNS_TO_CLOSE: Final = 4
_KNOWN_HOSTS_BYTES_MAX: Final = 4 * MIB
_SYSTEM_KNOWN_HOSTS: Final = "/etc/ssh/ssh_known_hosts"


class Unreachable(Exception):
    """No session. `about` is what a person must hear once (an unknown host key), or None."""

    def __init__(self, reason: str, about: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.about = about


class SshLink:
    """Used by one delivery at a time."""

    def __init__(self, settings: SinkSettings) -> None:
        assert settings.host is not None
        self._host = settings.host
        self._port = settings.port or 22
        self._user = settings.user or pwd.getpwuid(os.geteuid()).pw_name
        self._identity_file = settings.identity_file
        self._known_hosts = (
            [settings.known_hosts]
            if settings.known_hosts
            else [os.path.expanduser("~/.ssh/known_hosts"), _SYSTEM_KNOWN_HOSTS]
        )
        self._connection: SSHClientConnection | None = None
        self._sftp: SFTPClient | None = None
        self._used_s = 0.0
        self._idle: asyncio.TimerHandle | None = None

    @property
    def where(self) -> str:
        return f"{self._user}@{self._host}:{self._port}"

    async def session(self) -> SFTPClient:
        """The SFTP session, a living one. Raises Unreachable. Afterwards: `keep` or `drop`."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._sftp is not None and await self._lives(self._sftp):
            return self._sftp
        self.drop()
        try:
            async with asyncio.timeout(LOGIN_S):
                self._sftp = await self._connect()
        except TimeoutError:
            self.drop()
            raise Unreachable(
                f"{self.where} does not answer (no login within {LOGIN_S:g} s); is it asleep?"
            ) from None
        except BaseException:
            self.drop()
            raise
        return self._sftp

    def keep(self) -> None:
        """The session is sound; it stays open until it has been idle for a minute."""
        self._used_s = time.monotonic()
        self._idle = asyncio.get_running_loop().call_later(IDLE_S, self._close_idle)

    def drop(self) -> None:
        """Close whatever is open, at once and without waiting for the peer."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        connection, self._connection, self._sftp = self._connection, None, None
        if connection is not None:
            connection.abort()

    async def close(self) -> None:
        """A clean end, if the peer still answers. May be called twice."""
        connection = self._connection
        if connection is not None:
            connection.close()
            try:
                async with asyncio.timeout(1.0):
                    await connection.wait_closed()
            except TimeoutError:
                pass
        self.drop()
        for _ in range(_TURNS_TO_CLOSE):  # what was dropped just now is closed by the loop's next turns
            await asyncio.sleep(0)

    def _close_idle(self) -> None:
        self._idle = None
        self.drop()

    async def _lives(self, sftp: SFTPClient) -> bool:
        """A peer that has slept or moved leaves a connection that looks open."""
        if self._connection is None or self._connection.is_closed():
            return False
        if time.monotonic() - self._used_s < _BELIEVED_S:
            return True
        ssh = _asyncssh()
        try:
            async with asyncio.timeout(_LOOK_S):
                await sftp.realpath(".")
        except (OSError, TimeoutError, ssh.Error):
            return False
        return True

    async def _connect(self) -> SFTPClient:
        ssh = await asyncio.to_thread(_asyncssh)
        known = await asyncio.to_thread(self._read_known_hosts)
        keys = await asyncio.to_thread(self._read_identity)
        seen = _HostKeys(known)
        try:
            self._connection = await ssh.connect(
                self._host,
                self._port,
                username=self._user,
                config=None,
                known_hosts=seen.match,
                client_factory=lambda: _client(seen),
                client_keys=keys,
                agent_path=() if keys == () else None,
                preferred_auth="publickey",
                gss_host=None,
                connect_timeout=CONNECT_S,
                login_timeout=LOGIN_S,
                keepalive_interval=_KEEPALIVE_S,
                keepalive_count_max=_KEEPALIVES,
            )
            return await self._connection.start_sftp_client()
        except ssh.HostKeyNotVerifiable as problem:
            raise self._bad_host_key(seen, str(problem)) from None
        except ssh.PermissionDenied:
            key = self._identity_file or "the default keys and the agent of the daemon's user"
            raise Unreachable(
                f"{self.where} accepts no key of ours ({key}); put the public key into its authorized_keys"
            ) from None
        except ssh.KeyExchangeFailed as problem:
            if seen.known and "host key" in str(problem).lower():
                raise self._bad_host_key(seen, str(problem)) from None
            raise Unreachable(f"{self.where}: {problem}") from None
        except ssh.ChannelOpenError as problem:
            raise Unreachable(f"{self.where} opens no SFTP session: {problem.reason}") from None
        except (OSError, ssh.Error, ValueError) as problem:
            raise Unreachable(f"{self.where} cannot be reached: {explained(problem)}") from None
        finally:  # a login that was cancelled or refused leaves no socket
            if seen.connection is not None and seen.connection is not self._connection:
                seen.connection.abort()

    def _bad_host_key(self, seen: _HostKeys, said: str) -> Unreachable:
        name = self._host if self._port == 22 else f"[{self._host}]:{self._port}"
        where, offered = self._known_hosts[0], seen.offered or "a key of another type"
        if "revoked" in said.lower():
            reason = f"the host key of {self.where} ({offered}) is revoked in {where}"
        elif seen.known:
            reason = (
                f"the host key of {self.where} has CHANGED to {offered}: somebody may be in between. If that machine"
                f" was set up anew: ssh-keygen -R '{name}' -f {where}, then add its new key there"
            )
        else:
            reason = (
                f"the host key of {self.where} is unknown ({offered}): compare it on that machine"
                f" (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub), then: ssh-keyscan -p {self._port} {self._host} >> {where}"
            )
        return Unreachable(reason, about=reason)

    def _read_known_hosts(self) -> SSHKnownHosts:
        """All files as one; a line that cannot be read costs only itself, a file that is not there nothing."""
        ssh = _asyncssh()
        lines: list[str] = []
        for path in self._known_hosts:
            try:
                with open(path, encoding="utf-8", errors="replace") as file:
                    text = file.read(_KNOWN_HOSTS_BYTES_MAX)
            except FileNotFoundError:
                continue
            except OSError as problem:
                raise Unreachable(f"{path}: the known host keys cannot be read: {problem.strerror}") from None
            for line in text.splitlines():
                try:
                    ssh.import_known_hosts(line)
                except ValueError:
                    continue
                lines.append(line)
        known: SSHKnownHosts = ssh.import_known_hosts("\n".join(lines))
        return known

    def _read_identity(self) -> Any:
        """The configured private key; without one, () lets asyncssh take the user's own. Raises Unreachable."""
        path = self._identity_file
        if path is None:
            return ()
        ssh = _asyncssh()
        try:
            with open(path, "rb", opener=_open_nonblocking) as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise Unreachable(f"{path} is not a regular file; identity_file names a private key")
                if found.st_uid == os.geteuid() and found.st_mode & 0o077:
                    mode = stat.S_IMODE(found.st_mode)
                    raise Unreachable(
                        f"{path} (mode {mode:04o}) can be read by others and is not used: chmod 600 {path}"
                    )
                data = file.read(MIB)
        except OSError as problem:
            raise Unreachable(f"{path}: the private key cannot be read: {problem.strerror}") from None
        try:
            return [ssh.import_private_key(data)]
        except (ssh.KeyEncryptionError, ssh.KeyImportError, ValueError) as problem:
            if isinstance(problem, ssh.KeyEncryptionError) or "passphrase" in str(problem).lower():
                raise Unreachable(f"{path} has a passphrase, which nobody is there to type") from None
            raise Unreachable(f"{path} is no private key") from None


class _HostKeys:
    """What is known of one host, and what it has offered in this connection."""

    def __init__(self, known_hosts: SSHKnownHosts) -> None:
        self._known_hosts = known_hosts
        self.known = False
        self.offered: str | None = None
        self.connection: SSHClientConnection | None = None

    def match(self, host: str, addr: str, port: int | None) -> Any:  # noqa: ARG002 - asyncssh's signature
        found = self._known_hosts.match(host, "", port)  # by the name only: an address proves nothing
        self.known = bool(found[0] or found[1])
        return found


def _client(seen: _HostKeys) -> Any:
    ssh = _asyncssh()

    class Client(ssh.SSHClient):  # type: ignore[name-defined,misc]
        """Remembers the connection, to close it whatever happens, and the key that was refused, for the message."""

        def connection_made(self, conn: SSHClientConnection) -> None:
            seen.connection = conn

        def validate_host_public_key(self, host: str, addr: str, port: int, key: Any) -> bool:  # noqa: ARG002
            seen.offered = f"{key.get_algorithm()} {key.get_fingerprint()}"
            return False

    return Client()


def _asyncssh() -> Any:
    """Loaded on first use: it takes a fifth of a second."""
    module = importlib.import_module("asyncssh")
    module.set_log_level("CRITICAL")  # it tells hosts and users; what matters comes as an exception
    return module


def _open_nonblocking(path: str, flags: int) -> int:
    """A FIFO in the key's place must not hang the thread."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
