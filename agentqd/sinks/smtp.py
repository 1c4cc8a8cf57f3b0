"""One mail, one SMTP conversation: connect, TLS, login, envelope, data. What the server said of each recipient comes out.

Invariants:
1. Without TLS nothing is sent but EHLO and STARTTLS, unless the config says `tls: none`; a server that does not offer
   STARTTLS gets nothing. Certificates are verified against the host name of the config.
2. A recipient is `accepted` only if the server took the whole message for it: 250 to RCPT and 250 after the final dot.
3. Every wait has an end, and no answer is longer than aiosmtplib's 32 KiB.
4. The connection is gone when `converse` returns or is cancelled: no mail sees another's.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from agentqd.sinks.reason import bounded, explained

if TYPE_CHECKING:
    from aiosmtplib import SMTP
    from aiosmtplib.errors import SMTPResponseException
    from aiosmtplib.response import SMTPResponse

WHOLE_S: Final = 1800.0  # of one conversation
_QUIT_S: Final = 2.0
_TURNS_TO_CLOSE: Final = 3  # of the event loop: TLS, then the socket
_SLOWEST_BYTES_S: Final = (
    32 * 1024
)  # of a message on its way; besides it the server may think as long as RFC 5321 says
_FINAL_DOT: Final = 2.0  # times the step: 4.5.3.2.6 asks for ten minutes, by the default
_BUSY: Final = 421
_GO_ON: Final = 354
_TAKEN: Final = 250
_PIECE_BYTES: Final = 256 * 1024
_BUFFER_LOOK_S: Final = 0.005
_SETUP_CODES: Final = frozenset({530, 534, 535, 538})  # log in first, and the like: not about this mail
_ANSWER_CHARS: Final = 160


class Server(msgspec.Struct, frozen=True):
    host: str
    port: int
    tls: Literal["starttls", "tls", "none"]
    username: str | None
    password: str | None
    step_s: float  # for each answer
    name: str  # ours, in EHLO


class Letter(msgspec.Struct, frozen=True):
    sender: str
    recipients: tuple[str, ...]
    content: bytes


class Trouble(Exception):
    """The conversation ended before its end. `about`: what a person should do, where only one can."""

    def __init__(
        self, reason: str, *, connection: bool = False, busy: bool = False, about: str | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.connection = connection
        self.busy = busy
        self.about = about


class Answers(msgspec.Struct):
    """What became of each recipient; one that is in none of these has had no answer."""

    accepted: list[str] = []
    later: dict[str, str] = {}
    refused: dict[str, str] = {}
    trouble: Trouble | None = None
    logged_in: bool = False


async def converse(server: Server, letter: Letter, context: ssl.SSLContext | None) -> Answers:
    """Raises nothing of the network's: that is `trouble`."""
    import aiosmtplib

    answers = Answers()
    smtp = aiosmtplib.SMTP(
        hostname=server.host, port=server.port, timeout=server.step_s, use_tls=server.tls == "tls", start_tls=False,
        tls_context=context, local_hostname=server.name,
    )  # fmt: skip
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(WHOLE_S):
            await _log_in(smtp, server, context)
            answers.logged_in = True
            transport = smtp.transport  # `quit` forgets it, and would let a TLS farewell take its time
            await _hand_over(smtp, server, letter, answers)
            with contextlib.suppress(aiosmtplib.SMTPException, OSError, TimeoutError):
                await smtp.quit(timeout=_QUIT_S)
    except Trouble as trouble:
        answers.trouble = trouble
    except TimeoutError:
        answers.trouble = Trouble(f"not done within {WHOLE_S:g} s", connection=True, busy=True)
    finally:
        await _drop(smtp, transport or smtp.transport)
    return answers


async def _drop(smtp: SMTP, transport: asyncio.BaseTransport | None) -> None:
    """Closed, and its descriptor free, whatever the other side does or does not say."""
    smtp.close()
    if isinstance(transport, asyncio.WriteTransport):
        transport.abort()
    for _ in range(_TURNS_TO_CLOSE):
        await asyncio.sleep(0)


async def _log_in(smtp: SMTP, server: Server, context: ssl.SSLContext | None) -> None:
    """Up to the point where a mail can be sent. Raises Trouble."""
    import aiosmtplib

    where = f"{server.host}:{server.port}"
    try:
        await smtp.connect()
        await smtp.ehlo()
        if server.tls == "starttls":
            if not smtp.supports_extension("starttls"):
                about = (
                    f"{where} offers no STARTTLS: nothing was sent; set tls and port as the server needs them"
                )
                raise Trouble(
                    f"{where} offers no STARTTLS; it is not talked to in plain", connection=True, about=about
                )
            await smtp.starttls(tls_context=context, server_hostname=server.host)
            await smtp.ehlo()
        if server.username is not None and server.password is not None:
            await _authenticate(smtp, server.username, server.password, where)
    except aiosmtplib.SMTPTimeoutError as problem:
        raise Trouble(bounded(f"{where}: no answer: {problem}"), connection=True, busy=True) from problem
    except aiosmtplib.SMTPResponseException as problem:  # also a greeting that is none
        busy = problem.code == _BUSY
        raise Trouble(f"{where}: {_said(problem)}", connection=not busy, busy=busy) from problem
    except (aiosmtplib.SMTPException, OSError) as problem:
        cause = problem.__cause__ if isinstance(problem.__cause__, ssl.SSLError) else problem
        about = None
        if isinstance(cause, ssl.SSLError):
            about = f"TLS with {where} failed, nothing was sent: {cause}"
        raise Trouble(
            bounded(f"{where}: {explained(cause)}"), connection=True, about=about and bounded(about)
        ) from problem


async def _authenticate(smtp: SMTP, username: str, password: str, where: str) -> None:
    import aiosmtplib

    try:
        await smtp.login(username, password)
    except aiosmtplib.SMTPTimeoutError:
        raise
    except aiosmtplib.SMTPServerDisconnected:
        raise
    except aiosmtplib.SMTPResponseException as problem:
        if problem.code // 100 != 5:
            raise
        about = f"{where} refuses the login of {username}: {_said(problem)}; mend username or password_file"
        raise Trouble(
            bounded(f"{where}: login refused: {_said(problem)}"), connection=True, about=bounded(about)
        ) from problem
    except aiosmtplib.SMTPException as problem:
        about = f"{where} takes no login here: {problem}"
        raise Trouble(bounded(about), connection=True, about=bounded(about)) from problem


async def _hand_over(smtp: SMTP, server: Server, letter: Letter, answers: Answers) -> None:
    """Envelope and message. What is known of a recipient is in `answers` when this raises Trouble."""
    import aiosmtplib

    try:
        if not await _begin(smtp, server, letter, answers):
            return
        taken = [each for each in letter.recipients if await _recipient(smtp, each, answers)]
        if taken:
            await _send(smtp, server, letter.content, taken, answers)
    except aiosmtplib.SMTPTimeoutError as problem:
        raise Trouble(f"{server.host}: no answer within its time", connection=True, busy=True) from problem
    except aiosmtplib.SMTPResponseException as problem:
        raise Trouble(f"{server.host}: {_said(problem)}", busy=problem.code == _BUSY) from problem
    except (aiosmtplib.SMTPException, OSError) as problem:
        raise Trouble(bounded(f"{server.host}: cut: {problem}")) from problem


async def _begin(smtp: SMTP, server: Server, letter: Letter, answers: Answers) -> bool:
    """MAIL FROM. False: nobody gets it, and `answers` says so."""
    import aiosmtplib

    size, options = len(letter.content), []
    if smtp.supports_extension("size"):
        most = smtp.esmtp_extensions.get("size", "").strip()
        if most.isdecimal() and 0 < int(most[:18]) < size:
            _all(
                answers.refused,
                letter.recipients,
                f"too large: the mail has {size} bytes, the server takes {most[:18]}",
            )
            return False
        options.append(f"SIZE={size}")
    try:
        await smtp.mail(letter.sender, options=options)
    except aiosmtplib.SMTPSenderRefused as problem:
        if problem.code in _SETUP_CODES:
            about = f"{server.host} does not let us send: {_said(problem)}; does it need username and password_file?"
            raise Trouble(bounded(about), connection=True, about=bounded(about)) from problem
        if not _is_answer(problem):
            raise
        _all(answers.refused if problem.code >= 500 else answers.later, letter.recipients, _said(problem))
        return False
    return True


async def _recipient(smtp: SMTP, address: str, answers: Answers) -> bool:
    import aiosmtplib

    try:
        await smtp.rcpt(address)
    except aiosmtplib.SMTPRecipientRefused as problem:
        if not _is_answer(problem):
            raise
        too_many = problem.code == 552 and not problem.message.startswith("5.")  # RFC 5321, 4.5.3.1.10
        (answers.refused if problem.code >= 500 and not too_many else answers.later)[address] = _said(problem)
        return False
    return True


async def _send(smtp: SMTP, server: Server, content: bytes, taken: Sequence[str], answers: Answers) -> None:
    import aiosmtplib

    patience = server.step_s * _FINAL_DOT + len(content) / _SLOWEST_BYTES_S
    begun = await smtp.execute_command(b"DATA")
    if begun.code != _GO_ON:
        _not_taken(begun, taken, answers)
        return
    try:
        ended = await _message(smtp, content, patience)
    except aiosmtplib.SMTPTimeoutError:
        raise
    except (aiosmtplib.SMTPServerDisconnected, OSError) as problem:
        raise Trouble("cut before the server had answered for the message; it may have arrived") from problem
    if ended.code == _TAKEN:
        answers.accepted += taken
    else:
        _not_taken(ended, taken, answers)


def _not_taken(response: SMTPResponse, taken: Sequence[str], answers: Answers) -> None:
    import aiosmtplib

    problem = aiosmtplib.SMTPDataError(response.code, response.message)
    if not _is_answer(problem):
        raise problem
    _all(answers.refused if problem.code >= 500 else answers.later, taken, _said(problem))


async def _message(smtp: SMTP, content: bytes, patience: float) -> SMTPResponse:
    """The message with its final dot, in pieces: as one, it would hold up the whole daemon. The answer may come early."""
    import aiosmtplib

    protocol, transport = smtp.protocol, smtp.transport
    if protocol is None or not isinstance(transport, asyncio.WriteTransport):
        raise aiosmtplib.SMTPServerDisconnected("Connection lost")
    answer = asyncio.ensure_future(protocol.read_response(timeout=patience))
    try:
        stuffed = content.replace(b"\r\n.", b"\r\n..")
        if stuffed.startswith(b"."):
            stuffed = b"." + stuffed
        for start in range(0, len(stuffed), _PIECE_BYTES):
            while transport.get_write_buffer_size() > _PIECE_BYTES and not answer.done():  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(_BUFFER_LOOK_S)
            if answer.done():
                break
            protocol.write(stuffed[start : start + _PIECE_BYTES])
            await asyncio.sleep(0)
        if not answer.done():
            protocol.write(b".\r\n" if stuffed.endswith(b"\r\n") else b"\r\n.\r\n")
        return await answer
    finally:
        answer.cancel()
        await asyncio.wait([answer])
        _ = answer.cancelled() or answer.exception()  # it has been looked at


def _is_answer(problem: SMTPResponseException) -> bool:
    """Is this a word on this mail (4yz, 5yz), and not on the whole server, or nonsense?"""
    return 400 <= problem.code <= 599 and problem.code != _BUSY


def _all(where: dict[str, str], recipients: Sequence[str], said: str) -> None:
    where.update(dict.fromkeys(recipients, said))


def _said(problem: SMTPResponseException) -> str:
    text = bounded(problem.message)[:_ANSWER_CHARS]
    return f"{problem.code} {text}".strip() if problem.code > 0 else text or "an answer that is none"
