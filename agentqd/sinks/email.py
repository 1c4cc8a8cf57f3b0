"""Entries as mail. Delivered means: the SMTP server has taken the message for every recipient (its 250 after the final dot).

What each recipient's answer was is kept with the row: who has the mail does not get it again when others are tried again.
5yz for one: that one is given up, and told once nobody is left to be tried: the row is dead then, its reason names them.
An answer lost after the final dot is "later": the same bytes under the same Message-ID go again.

One connection a mail: nothing is left over from the one before, a server may be changed at any time, and no mail waits
behind the idle connection of another. Mails over LARGE_BYTES go one at a time, so that few are in memory at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, TypeVar

import msgspec

from agentqd.core.errors import ConfigError
from agentqd.core.limits import KIB, MIB
from agentqd.core.sink_rules import SMTP_PORTS, is_loopback
from agentqd.sinks.base import Context, Deferred, Delivered, Delivery, Found, Outcome, Rejected
from agentqd.sinks.letter import compose, rules_of
from agentqd.sinks.message import Mail, Unsendable, build
from agentqd.sinks.reason import bounded
from agentqd.sinks.secretfile import secret
from agentqd.sinks.smtp import WHOLE_S, Answers, Letter, Server, Trouble, converse
from agentqd.system.failpoints import failpoint

T = TypeVar("T")
STEP_S: Final = 60.0  # for each answer of the server
CONCURRENCY: Final = 5
LARGE_BYTES: Final = 1 * MIB
LARGE_WAIT_S: Final = 600.0  # of one large mail for another
_SMALL_BYTES: Final = 64 * KIB  # put together at once; more goes to a thread
_NAMED: Final = 4
_WHY_CHARS: Final = 90


class Progress(msgspec.Struct):
    """What is known of each recipient, by a digest of the address: it stays small, whatever addresses there are."""

    accepted: list[str] = []
    refused: dict[str, str] = {}


class _NotYet(Exception):
    """A large mail has waited long enough for its turn."""


class EmailSink:
    batch_max = 1
    timeout_s = WHOLE_S + LARGE_WAIT_S + 60.0
    notice_kind = "email_setup"

    def __init__(self, context: Context) -> None:
        settings = context.settings
        if not settings.host or not settings.from_:
            raise ConfigError(f"the sink {context.name} is of type email and needs a host and a from")
        try:
            self._rules = rules_of(settings)
        except ValueError as error:
            raise ConfigError(f"the sink {context.name}: {error}") from error
        self.notices: list[str] = []
        self.concurrency = settings.concurrency or CONCURRENCY
        self._host = settings.host
        self._tls: Final = settings.tls or "starttls"
        self._port = settings.port or SMTP_PORTS[self._tls]
        self._username = settings.username
        self._password_file = settings.password_file
        self._step_s = float(settings.timeout or STEP_S)
        self._trust: ssl.SSLContext | None = None
        self._large = asyncio.Semaphore(1)
        self._told: str | None = None

    async def open(self, last_position: int) -> list[Found]:  # noqa: ARG002  (it keeps no positions)
        return []

    async def deliver(self, batch: Sequence[Delivery]) -> Sequence[Outcome]:
        return [await self._deliver(delivery) for delivery in batch]

    async def close(self) -> None:
        """Nothing is kept open between deliveries."""

    async def _deliver(self, delivery: Delivery) -> Outcome:
        try:
            mail = await _aside(delivery, lambda: compose(delivery, self._rules))
            progress = _read(delivery)
            left = tuple(each for each in mail.recipients if not _is_done(each, progress))
            if not left:
                return _outcome(mail, progress, Answers(), self._host)
            async with self._turn(mail):
                content = await _aside(delivery, lambda: build(mail), large=bool(mail.files))
                answers = await self._send(Letter(mail.sender[1], left, content))
        except Unsendable as problem:
            return Rejected(bounded(str(problem)), delivery.progress)
        except _NotYet:
            return Deferred("another large mail is still on its way", progress=delivery.progress)
        except OSError as problem:
            return Deferred(bounded(f"{problem.filename}: {problem.strerror}"))
        failpoint("email_answered")
        return _outcome(mail, progress, answers, self._host)

    async def _send(self, letter: Letter) -> Answers:
        try:
            server = self._server()
            context = await self._context()
        except ConfigError as problem:
            answers = Answers(trouble=Trouble(problem.message, connection=True, about=problem.message))
        else:
            answers = await converse(server, letter, context)
        if answers.logged_in and (answers.trouble is None or answers.trouble.about is None):
            self._told = None
        if answers.trouble is not None:
            self._tell(answers.trouble.about)
        return answers

    def _server(self) -> Server:
        """As it is to be talked to now: the password is read anew for each mail. Raises ConfigError."""
        password = secret(self._password_file) if self._password_file is not None else None
        if password is not None and self._tls == "none" and not is_loopback(self._host):
            raise ConfigError(f"the password is not sent to {self._host} without TLS")
        name = socket.gethostname()
        return Server(
            self._host, self._port, self._tls, self._username, password, self._step_s,
            name if name.isascii() and name.isprintable() and " " not in name and name else "localhost",
        )  # fmt: skip

    async def _context(self) -> ssl.SSLContext | None:
        """The certificates that this machine trusts (SSL_CERT_FILE, too), read once."""
        if self._tls == "none":
            return None
        if self._trust is None:
            self._trust = await asyncio.to_thread(ssl.create_default_context)
        return self._trust

    def _tell(self, about: str | None) -> None:
        """What only a person can mend, once: not with each of a thousand tries."""
        if about is not None and about != self._told:
            self._told = about
            self.notices.append(about)

    @contextlib.asynccontextmanager
    async def _turn(self, mail: Mail) -> AsyncIterator[None]:
        if len(mail.body) + sum(file.size for file in mail.files) <= LARGE_BYTES:
            yield
            return
        try:
            await asyncio.wait_for(self._large.acquire(), LARGE_WAIT_S)
        except TimeoutError:
            raise _NotYet from None
        try:
            yield
        finally:
            self._large.release()


async def _aside(delivery: Delivery, job: Callable[[], T], *, large: bool = False) -> T:
    """In a thread, where it takes long or reads a disk."""
    if large or delivery.blob_path is not None or len(delivery.payload) > _SMALL_BYTES:
        return await asyncio.to_thread(job)
    return job()


def _read(delivery: Delivery) -> Progress:
    """What the last try left. A person's retry (attempts from 0) asks those anew who were refused, never those who have it."""
    if delivery.progress is None:
        return Progress()
    try:
        progress = msgspec.json.decode(delivery.progress, type=Progress)
    except msgspec.DecodeError:  # of another version: the Message-ID is still the same
        return Progress()
    return Progress(progress.accepted, progress.refused if delivery.attempts else {})


def _outcome(mail: Mail, before: Progress, answers: Answers, host: str) -> Outcome:
    """What the row becomes, by what is now known of all its recipients."""
    everybody = mail.recipients
    accepted = {*before.accepted, *map(_digest, answers.accepted)}
    refused = before.refused | {
        _digest(each): bounded(why)[:_WHY_CHARS] for each, why in answers.refused.items()
    }
    lost = {
        each: refused[_digest(each)]
        for each in everybody
        if _digest(each) in refused and _digest(each) not in accepted
    }
    has = sum(_digest(each) in accepted for each in everybody)
    kept = msgspec.json.encode(Progress(sorted(accepted), refused)) if accepted or refused else None
    open_ = [each for each in everybody if _digest(each) not in accepted and each not in lost]
    if open_:
        return _later(open_, lost, has, len(everybody), answers, kept)
    if lost:
        reason = f"refused for {len(lost)} of {len(everybody)}: {_named(lost)}" + (
            f"; {has} have it" if has else ""
        )
        return Rejected(bounded(reason), kept)
    return Delivered(detail=bounded(host))


def _later(
    open_: list[str], lost: dict[str, str], has: int, total: int, answers: Answers, kept: bytes | None
) -> Deferred:
    trouble = answers.trouble
    why = answers.later or dict.fromkeys(open_, "no answer")
    reason = trouble.reason if trouble is not None else f"later for {len(open_)} of {total}: {_named(why)}"
    if lost:
        reason += f"; refused for {len(lost)}: {_named(lost)}"
    if has:
        reason += f"; {has} of {total} have it"
    if trouble is None:
        return Deferred(bounded(reason), progress=kept)
    return Deferred(bounded(reason), connection=trouble.connection, busy=trouble.busy, progress=kept)


def _named(why: dict[str, str]) -> str:
    shown = "; ".join(f"{address} ({said})" for address, said in list(why.items())[:_NAMED])
    return f"{shown}; and {len(why) - _NAMED} more" if len(why) > _NAMED else shown


def _is_done(address: str, progress: Progress) -> bool:
    return _digest(address) in progress.accepted or _digest(address) in progress.refused


def _digest(address: str) -> str:
    return hashlib.sha256(address.encode()).hexdigest()[:16]
