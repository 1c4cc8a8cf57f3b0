"""A real SMTP server (aiosmtpd) that keeps what it takes, and misbehaves on cue.

    python smtpreceiver.py FOLDER      FOLDER/good.pem, wrong.pem: key and certificate; FOLDER/ports is written: STARTTLS, TLS

`FOLDER/base` names the folder of the test that is on. There `plan` says (JSON, read anew for each connection) what to do:
`at` a phase (greeting EHLO STARTTLS AUTH MAIL RCPT DATA dot QUIT) `do` hang, drop, endless, garbage, or a reply ("421 ...");
`take` (at the dot): first keep the mail; `once`: only the first time for each Message-ID; `rcpt`: reply by address; `starttls`: false;
`cert`: wrong; `auth`: "user:password"; `size`: what it takes; `inject`: a line in plain after the answer to STARTTLS.
`asked` is touched once a mail is there and nothing is said; `received` gets its delivery id; `mails/N.eml` and `.json` hold it.
"""

# ruff: noqa: N802 - aiosmtpd names its hooks so

from __future__ import annotations

import asyncio
import contextlib
import email
import json
import signal
import ssl
import sys
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

ROOT = Path(sys.argv[1])
END = "\r\n"
seen: set[str] = set()


def base() -> Path:
    return Path((ROOT / "base").read_text())


def tls(name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(ROOT / name)
    return context


class Handler:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan

    async def act(self, server: Receiver, phase: str) -> str | None:
        """The reply of this phase, if the plan has one; None: go on."""
        if self.plan.get("at") != phase:
            return None
        do = self.plan["do"]
        writer = server._writer
        if do == "hang":
            if phase == "dot":
                (base() / "asked").touch()
            await asyncio.sleep(3600)
        if do == "drop":
            server.transport.abort()  # type: ignore[union-attr]
            await asyncio.sleep(3600)
        if do == "endless":
            while server.transport is not None and not server.transport.is_closing():
                writer.write(b"250-" + b"x" * 500 + b"\r\n")
                await writer.drain()
                await asyncio.sleep(0)
            await asyncio.sleep(3600)  # until this connection's task is cancelled
        if do == "long":
            return "\r\n".join(["451-" + "really not now " * 20] * 80 + ["451 no"])
        if do == "garbage":
            return "\x00\xff\x1b[31mhello there"
        return str(do)

    async def handle_EHLO(
        self, server: Receiver, session: Session, envelope: Envelope, hostname: str, responses: list[str]
    ) -> list[str]:
        session.host_name = hostname
        reply = await self.act(server, "EHLO")
        return responses if reply is None else [reply]

    async def handle_MAIL(
        self, server: Receiver, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        reply = await self.act(server, "MAIL")
        if reply is None or reply.startswith("250"):
            envelope.mail_from = address
        return reply or "250 OK"

    async def handle_RCPT(
        self, server: Receiver, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        reply = self.plan.get("rcpt", {}).get(address) or await self.act(server, "RCPT")
        if reply is None or reply.startswith("250"):
            envelope.rcpt_tos.append(address)
        return reply or "250 OK"

    async def handle_DATA(self, server: Receiver, session: Session, envelope: Envelope) -> str:
        content = envelope.original_content or b""
        key = f"{base()} {email.message_from_bytes(content)['Message-ID']}"
        again = self.plan.get("once") and key in seen
        seen.add(key)
        if again:
            self.plan = {}
        if self.plan.get("at") != "dot" or self.plan.get("take"):
            keep(content, server, envelope)
        return await self.act(server, "dot") or "250 2.0.0 queued"

    async def handle_QUIT(self, server: Receiver, session: Session, envelope: Envelope) -> str:
        return await self.act(server, "QUIT") or "221 bye"


def keep(content: bytes, server: Receiver, envelope: Envelope) -> None:
    user, transport = server.session.auth_data, server.transport  # type: ignore[union-attr]
    folder = base() / "mails"
    folder.mkdir(exist_ok=True)
    number = len(list(folder.glob("*.eml")))
    facts = {
        "from": envelope.mail_from,
        "to": envelope.rcpt_tos,
        "tls": transport.get_extra_info("ssl_object") is not None,  # type: ignore[union-attr]
        "user": user and user.decode(),
    }
    (folder / f"{number}.json").write_text(json.dumps(facts))
    (folder / f".{number}").write_bytes(content)
    (folder / f".{number}").rename(folder / f"{number}.eml")
    with (base() / "received").open("a") as file:
        file.write(f"{email.message_from_bytes(content)['X-AgentQ-Delivery-ID']}\n")


class Receiver(SMTP):
    def __init__(self, plan: dict[str, Any], *, wrapped: bool) -> None:
        self.plan = plan
        self.handler = Handler(plan)
        certificate = "wrong.pem" if plan.get("cert") == "wrong" else "good.pem"
        offered = plan.get("starttls", True) and not wrapped
        super().__init__(
            self.handler, tls_context=tls(certificate) if offered else None, require_starttls=offered and not plan.get("plain", False),
            data_size_limit=plan.get("size", 64 * 1024 * 1024), authenticator=self.check, auth_required="auth" in plan,
            auth_require_tls=not (plan.get("plain", False) or wrapped), hostname="receiver.test", loop=asyncio.get_running_loop(),
        )  # fmt: skip

    def check(
        self, server: SMTP, session: Session, envelope: Envelope, mechanism: str, data: object
    ) -> AuthResult:
        assert isinstance(data, LoginPassword)
        if f"{data.login.decode()}:{data.password.decode()}" == self.plan.get("auth"):
            return AuthResult(success=True, auth_data=data.login)
        return AuthResult(success=False, handled=False)

    async def _handle_client(self) -> None:
        reply = await self.handler.act(self, "greeting")
        if reply is not None:
            await self.push(reply.encode("latin-1"))
            self.transport.close()  # type: ignore[union-attr]
            return
        await super()._handle_client()

    async def push(self, status: Any) -> None:
        if isinstance(status, str):
            status = status.encode("latin-1")
        await super().push(status)

    async def smtp_STARTTLS(self, arg: str) -> None:
        reply = await self.handler.act(self, "STARTTLS")
        if reply is not None:
            await self.push(reply)
            return
        if self.plan.get("inject"):
            self._writer.write(b"220 go on\r\n250-injected\r\n250 AUTH PLAIN\r\n")
            self.push = lambda status: asyncio.sleep(0)  # type: ignore[method-assign, assignment]
        await super().smtp_STARTTLS(arg)
        if self.plan.get("inject"):
            del self.push  # type: ignore[method-assign]

    async def smtp_AUTH(self, arg: str) -> None:
        reply = await self.handler.act(self, "AUTH")
        await (super().smtp_AUTH(arg) if reply is None else self.push(reply))

    async def smtp_DATA(self, arg: str) -> None:
        reply = await self.handler.act(self, "DATA")
        await (super().smtp_DATA(arg) if reply is None else self.push(reply))


def plan() -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError):
        return dict(json.loads((base() / "plan").read_text()))
    return {}


async def main() -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.set_exception_handler(lambda *_: None)  # connections that we cut
    starttls = await loop.create_server(lambda: Receiver(plan(), wrapped=False), "127.0.0.1", 0)
    wrapped = await loop.create_server(
        lambda: Receiver(plan(), wrapped=True), "127.0.0.1", 0, ssl=tls("good.pem")
    )
    ports = [server.sockets[0].getsockname()[1] for server in (starttls, wrapped)]
    (ROOT / ".ports").write_text(json.dumps(ports))
    (ROOT / ".ports").rename(ROOT / "ports")
    await stop.wait()


if __name__ == "__main__":
    asyncio.run(main())
