"""Starts and stops smtpreceiver.py, a real SMTP server, for tests."""

from __future__ import annotations

import contextlib
import datetime as dt
import email
import email.policy
import ipaddress
import json
import subprocess
import sys
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from realbox import wait_for

PROGRAM = Path(__file__).with_name("smtpreceiver.py")


class SmtpServer:
    """`base` is where it keeps mails and looks for its plan."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca_file = folder / "good.crt"
        self.port = self.tls_port = 0
        self.base = folder

    def use(self, base: Path) -> None:
        self.base = base
        (self.folder / "base").write_text(str(base))

    def plan(self, **plan: Any) -> None:
        (self.base / "plan.new").write_text(json.dumps(plan))
        (self.base / "plan.new").rename(self.base / "plan")

    def received(self) -> list[str]:
        """The delivery ids, in order."""
        path = self.base / "received"
        return path.read_text().split() if path.exists() else []

    def mails(self) -> list[EmailMessage]:
        return [parsed(path.read_bytes()) for path in self._paths()]

    def raw(self) -> list[bytes]:
        return [path.read_bytes() for path in self._paths()]

    def facts(self) -> list[dict[str, Any]]:
        """from, to (as in the envelope), tls, user."""
        return [json.loads(path.with_suffix(".json").read_text()) for path in self._paths()]

    def _paths(self) -> list[Path]:
        return sorted((self.base / "mails").glob("*.eml"), key=lambda path: int(path.stem))


def parsed(content: bytes) -> EmailMessage:
    message = email.message_from_bytes(content, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    return message


@contextlib.contextmanager
def smtp_server(folder: Path) -> Iterator[SmtpServer]:
    for name in ("good", "wrong"):
        _certificate(folder, name, "localhost" if name == "good" else "somebody.else")
    server = SmtpServer(folder)
    server.use(folder)
    process = subprocess.Popen([sys.executable, str(PROGRAM), str(folder)], stdin=subprocess.DEVNULL)
    try:
        wait_for("the SMTP server", (folder / "ports").exists)
        server.port, server.tls_port = json.loads((folder / "ports").read_text())
        yield server
    finally:
        process.kill()
        process.wait(10)


def _certificate(folder: Path, name: str, host: str) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = dt.datetime.now(dt.UTC)
    names: list[x509.GeneralName] = [x509.DNSName(host)]
    if name == "good":
        names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    certificate = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=10)).add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
    )  # fmt: skip
    public = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / f"{name}.pem").write_bytes(private + public)
    (folder / f"{name}.crt").write_bytes(public)
